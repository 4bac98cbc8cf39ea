"""The RLDS reader against what TensorFlow decodes, and against damaged folders."""

from __future__ import annotations

import json
import pickle
import shutil
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from expected_facts import assert_actions, load_expected, quarters
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rlds_sets import make_episode, writer

from vlaft.data.layout import apply_layout
from vlaft.data.readers.opening import open_reader
from vlaft.data.readers.reader import EpisodeRef, Reader
from vlaft.data.readers.rlds.fields import Ragged, decode_field, is_stored, parse_features
from vlaft.data.readers.rlds.source import RldsReader
from vlaft.errors import ConfigError, DataError


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A version folder: two episodes of 4 and 3 steps in `train`, in two shards."""
    return writer.write_rlds(
        tmp_path, "tiny", {"train": [make_episode(4, 0), make_episode(3, 1)]}, shards=2, image_format="png"
    )


def read_all(path: Path) -> list[Any]:
    """Everything that a user of the reader could touch."""
    source = RldsReader(path)
    result = []
    for ref in source.episodes():
        episode = source.read(ref)
        result.append({name: episode.arrays[name] for name in episode.arrays})
        for frames in episode.cameras.values():
            list(frames.read(range(len(frames))))
    return result


def decode_all(source: RldsReader, ref: EpisodeRef) -> dict[str, Any]:
    """Decode every stored field of one episode, by its key in the record."""
    example, where = source._example(ref)
    return {field.path: decode_field(field, example, where) for field in source.fields if is_stored(field, example)}


def edit_json(path: Path, change: Any) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# --- real datasets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "facts", "action"),
    [
        ("bridge_dataset", "rlds_bridge_dataset", ("action",)),
        (
            "encodings/1.0.0",
            "rlds_encodings",
            ("action/world_vector", "action/rotation_delta", "action/gripper_closedness_action"),
        ),
    ],
)
def test_agrees_with_expected_facts(samples: Path, folder: str, facts: str, action: tuple[str, ...]) -> None:
    expected = load_expected(samples, facts)
    source = open_reader(samples / "rlds" / folder)
    assert source.format == "rlds"
    assert source.name == folder.partition("/")[0]
    assert source.warnings == []
    assert next(iter(source.layout.cameras)) == expected["splits"]["train"]["main_camera"]
    refs = source.episodes()
    assert [ref.index for ref in refs] == list(range(sum(split["episodes"] for split in expected["splits"].values())))
    for split, facts_of in expected["splits"].items():
        episodes = [source.read(ref) for ref in refs if ref.split == split]
        assert [episode.name for episode in episodes] == [f"{split}[{i}]" for i in range(facts_of["episodes"])]
        assert [episode.length for episode in episodes] == facts_of["steps_per_episode"]
        assert [episode.instruction for episode in episodes] == facts_of["instruction_per_episode"]
        actions = [np.concatenate([episode.arrays[name] for name in action], axis=1) for episode in episodes]
        assert_actions(actions, facts_of["action"], ends=0)
        camera = episodes[0].cameras[source.layout.cameras[facts_of["frames"]["camera"]]]
        frames = list(camera.read([0, len(camera) - 1]))
        for frame, name in zip(frames, ("first_of_first_episode", "last_of_first_episode"), strict=True):
            for part, value in quarters(frame).items():
                # decoded as TensorFlow does, so not within 3 levels but exactly, to the four decimals given
                np.testing.assert_allclose(value, facts_of["frames"][name][part], atol=1e-4)


def test_default_layout_of_bridge(samples: Path) -> None:
    source = open_reader(samples / "rlds/bridge_dataset/1.0.0")
    assert source.layout.action == ("action",)
    assert source.layout.state == ("observation/state",)
    assert next(iter(source.layout.cameras.items())) == ("image_0", "observation/image_0")
    assert list(source.layout.cameras) == ["image_0", "image_1", "image_3"]
    episode = apply_layout(source.read(source.episodes()[0]), source.layout)
    assert episode.action is not None and episode.action.shape == (10, 7)
    assert episode.state is not None and episode.state.shape == (10, 7)


def test_dict_action_has_no_default(samples: Path) -> None:
    source = open_reader(samples / "rlds/encodings")
    assert source.layout.action == ()
    arrays = source.read(source.episodes()[0]).arrays
    assert {"action/world_vector", "observation/state", "observation/by_f64", "reward", "phase"} <= set(arrays)
    assert "action" not in arrays
    assert list(source.layout.cameras.values()) == ["observation/image", "observation/wrist_png"]


def test_every_encoding_field_by_field(samples: Path) -> None:
    texts = json.loads((samples / "expected/rlds_encodings_values.json").read_text())["text"]
    source = RldsReader(samples / "rlds/encodings")
    got: dict[str, Any] = {}
    for ref in source.episodes():
        position = int(ref.name.partition("[")[2].rstrip("]"))
        for path, value in decode_all(source, ref).items():
            got[f"{ref.split}/{position:02d}/{path}"] = value
    compared = set()
    with np.load(samples / "expected/rlds_encodings_values.npz", allow_pickle=False) as arrays:
        for key in arrays.files:
            path, _, part = key.partition("#")
            compared.add(path)
            value = got[path]
            if part == "accurate_dct":
                assert not np.array_equal(value, arrays[key])  # the expected images do tell the two decoders apart
                continue
            if part and isinstance(value, Ragged):
                value = value.values if part == "values" else value.row_lengths[0]
            elif part:
                value = np.concatenate(value) if part == "values" else np.array([len(row) for row in value])
            elif isinstance(value, Ragged):
                assert set(value.row_lengths[0].tolist()) == {arrays[key].shape[1]}
                value = np.asarray(value.values).reshape(arrays[key].shape)
            assert value.dtype == arrays[key].dtype, key
            assert value.shape == arrays[key].shape, key
            np.testing.assert_array_equal(value, arrays[key], err_msg=key)
    for key, expected in texts.items():
        compared.add(key)
        value = got[key]
        if isinstance(value, Ragged):
            ends = np.cumsum(value.row_lengths[0])
            value = [
                list(value.values[end - count : end]) for end, count in zip(ends, value.row_lengths[0], strict=True)
            ]
        assert value == expected, key
    assert compared == set(got)


# --- what we write ourselves ---------------------------------------------------------------------------------------


def test_round_trip_and_pickle(small: Path) -> None:
    source: Reader = RldsReader(small.parent)
    assert source.path == small
    first, second = (pickle.loads(pickle.dumps(source.read(ref))) for ref in source.episodes())
    written = make_episode(4, 0)
    np.testing.assert_array_equal(first.arrays["action"], written["action"])
    np.testing.assert_array_equal(list(first.cameras["observation/image"].read(range(4))), written["observation/image"])
    assert (first.length, second.length) == (4, 3)
    assert source.episodes()[1].location[1] == "tiny-train.tfrecord-00001-of-00002"
    assert list(source.layout.cameras) == ["image", "wrist_image"]


def test_frames_and_arrays_are_decoded_only_when_asked_for(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("decoded too early")

    monkeypatch.setattr("vlaft.data.readers.rlds.source.decode_image", refuse)
    source = RldsReader(small)
    episode = source.read(source.episodes()[0])
    monkeypatch.setattr("vlaft.data.readers.rlds.source.decode_field", refuse)
    assert "action" in episode.arrays
    with pytest.raises(AssertionError):
        episode.arrays["action"]


def test_newest_version_and_configurations(small: Path, tmp_path: Path) -> None:
    for version in ("0.9.0", "1.10.0"):
        shutil.copytree(small, small.parent / version)
    source = open_reader(small.parent)
    assert source.path.name == "1.10.0"
    assert any("1.10.0" in warning for warning in source.warnings)
    assert open_reader(tmp_path).path.name == "1.10.0"
    shutil.copytree(small, tmp_path / "other" / "1.0.0")
    with pytest.raises(DataError, match="other, tiny"):
        open_reader(tmp_path)


@pytest.mark.parametrize(
    ("path", "values", "text"),
    [
        ("observation/natural_language_instruction", ["move"] * 2, "move"),
        ("natural_language_instruction", ["", "move"], "move"),
        ("language_instruction_2", ["", "move"], "move"),
        ("language", np.array([list(b"mo\xc3\xb6ve\0\0\0")] * 2, np.int32), "moöve"),
        ("observation/instruction", np.array([list(b"move\0\0")] * 2, np.int32), "move"),
        ("remark", ["move"] * 2, ""),
    ],
)
def test_where_instructions_lie(tmp_path: Path, path: str, values: Any, text: str) -> None:
    episode = {"action": np.zeros((2, 7), np.float32), "language_instruction": ["", " "], path: values}
    source = RldsReader(writer.write_rlds(tmp_path, "tiny", {"train": [episode]}))
    assert source.read(source.episodes()[0]).instruction == text


def test_first_instruction_wins(tmp_path: Path) -> None:
    episode = {
        "action": np.zeros((1, 7), np.float32),
        "language_instruction_3": ["third"],
        "language_instruction_2": ["second"],
        "language_instruction": ["first"],
    }
    source = RldsReader(writer.write_rlds(tmp_path, "tiny", {"train": [episode]}))
    assert source.read(source.episodes()[0]).instruction == "first"


# --- damaged folders -----------------------------------------------------------------------------------------------


def test_truncation_anywhere_is_told(samples: Path, tmp_path: Path) -> None:
    """Cut the last shard at every 1,000th byte: boundaries between records too, where only the counts can tell."""
    folder = tmp_path / "1.0.0"
    shutil.copytree(samples / "rlds/encodings/1.0.0", folder)
    shard = folder / "encodings-train.tfrecord-00000-of-00002"
    shard.chmod(0o644)
    folder.chmod(0o755)
    data = shard.read_bytes()
    boundary = RldsReader(folder).episodes()[1].location[3]
    for size in [0, 1, boundary, len(data) - 1, *range(1000, len(data), 1000)]:
        shard.write_bytes(data[:size])
        with pytest.raises(DataError, match=shard.name):
            RldsReader(folder).episodes()


def test_flipped_bit_names_shard_and_record(small: Path) -> None:
    shard = small / "tiny-train.tfrecord-00001-of-00002"
    data = bytearray(shard.read_bytes())
    for position in (3, 9, 20, len(data) // 2, len(data) - 1):
        data[position] ^= 0x10
        shard.write_bytes(data)
        with pytest.raises(DataError, match=rf"{shard.name}.*record 0"):
            read_all(small)
        data[position] ^= 0x10


def test_missing_shard_is_named(small: Path) -> None:
    (small / "tiny-train.tfrecord-00001-of-00002").unlink()
    with pytest.raises(DataError, match=r"tiny-train.tfrecord-00001-of-00002"):
        open_reader(small)
    (small / "dataset_info.json").unlink()
    with pytest.raises(DataError, match="lacks shard 1 of 2"):
        open_reader(small)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\0", "\udcff"])
def test_bad_json(small: Path, name: str, text: str) -> None:
    (small / name).write_bytes(text.encode("utf-8", errors="surrogateescape"))
    with pytest.raises(DataError, match=name):
        read_all(small)


def test_lfs_pointers(small: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"
    for name in ("tiny-train.tfrecord-00000-of-00002", "dataset_info.json", "features.json"):
        before = (small / name).read_bytes()
        (small / name).write_text(pointer)
        with pytest.raises(DataError, match=rf"{name}.*git lfs pull"):
            open_reader(small)
        (small / name).write_bytes(before)


@pytest.mark.parametrize(
    "template", ["../{SPLIT}", "/etc/passwd", "{SPLIT}/../../x", "{DATASET.__class__}", "{UNKNOWN}", "a\0b", "..\\x"]
)
def test_template_stays_inside(small: Path, template: str) -> None:
    edit_json(small / "dataset_info.json", lambda info: info["splits"][0].update(filepathTemplate=template))
    with pytest.raises(DataError, match="filepathTemplate"):
        open_reader(small)


def test_dataset_name_cannot_lead_out(small: Path) -> None:
    edit_json(small / "dataset_info.json", lambda info: info.update(name="../../evil"))
    with pytest.raises(DataError, match="leads out"):
        open_reader(small)


def test_other_file_formats_are_refused(small: Path) -> None:
    edit_json(small / "dataset_info.json", lambda info: info.update(fileFormat="array_record"))
    with pytest.raises(DataError, match="array_record"):
        open_reader(small)


def test_falls_back_to_file_names(small: Path) -> None:
    edit_json(small / "dataset_info.json", lambda info: info["splits"][0].pop("shardLengths"))
    source = RldsReader(small)
    assert len(source.episodes()) == 2
    assert "shardLengths" in source.warnings[0]
    (small / "dataset_info.json").unlink()
    source = RldsReader(small)
    assert (source.name, len(source.episodes())) == ("tiny", 2)
    assert "dataset_info.json" in source.warnings[0]


def test_fallback_when_files_are_named_otherwise(small: Path) -> None:
    edit_json(small / "dataset_info.json", lambda info: info["splits"][0].pop("filepathTemplate"))
    assert RldsReader(small).warnings == []
    for shard in small.glob("*.tfrecord-*"):
        shard.rename(small / shard.name.replace("tiny", "renamed"))
    source = RldsReader(small)
    assert len(source.episodes()) == 2
    assert "filepathTemplate" in source.warnings[0]


def test_more_records_than_announced_is_a_warning(small: Path) -> None:
    edit_json(small / "dataset_info.json", lambda info: info["splits"][0].update(shardLengths=["1", "0"]))
    source = RldsReader(small)
    assert len(source.episodes()) == 2
    assert "00001-of-00002" in source.warnings[0]


@pytest.mark.parametrize("lengths", [["x"], "2", [None], ["-1"], [{}], ["9" * 5000]])
def test_bad_shard_lengths(small: Path, lengths: Any) -> None:
    edit_json(small / "dataset_info.json", lambda info: info["splits"][0].update(shardLengths=lengths))
    with pytest.raises(DataError, match=r"shardLengths|lacks"):
        open_reader(small)


def _steps(features: dict[str, Any]) -> dict[str, Any]:
    return features["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]


@pytest.mark.parametrize("dimensions", [["8"], ["14"], ["3"], ["1000000000"], []])
def test_shape_that_lies(small: Path, dimensions: list[str]) -> None:
    edit_json(
        small / "features.json",
        lambda tree: _steps(tree)["action"]["tensor"]["shape"].update(dimensions=dimensions),
    )
    source = RldsReader(small)
    with pytest.raises(DataError, match=r"train\[0\].*'steps/action'"):
        source.read(source.episodes()[0])


@pytest.mark.parametrize("dimensions", [["99999999999"], ["-7"], ["x"], "7", [1.5e300], ["65536"] * 3, ["1"] * 99])
def test_impossible_shapes(small: Path, dimensions: Any) -> None:
    edit_json(
        small / "features.json",
        lambda tree: _steps(tree)["action"]["tensor"]["shape"].update(dimensions=dimensions),
    )
    with pytest.raises(DataError, match=r"features.json.*steps/action"):
        open_reader(small)


def test_declared_type_that_lies(small: Path) -> None:
    edit_json(small / "features.json", lambda tree: _steps(tree)["action"]["tensor"].update(dtype="int32"))
    source = RldsReader(small)
    with pytest.raises(DataError, match=r"int32"):
        source.read(source.episodes()[0]).arrays["action"]


def test_unknown_kind_is_left_out_with_a_warning(small: Path) -> None:
    edit_json(
        small / "features.json",
        lambda tree: _steps(tree).update(sound={"pythonClassName": "a.Audio", "audio": {}}),
    )
    source = RldsReader(small)
    assert "steps/sound" in source.warnings[0] and "a.Audio" in source.warnings[0]
    assert len(source.episodes()) == 2


def test_reader_options_are_refused(small: Path) -> None:
    with pytest.raises(ConfigError, match="swap_rb"):
        open_reader(small, {"swap_rb": "no"})


def test_no_steps(small: Path) -> None:
    edit_json(
        small / "features.json",
        lambda tree: tree["featuresDict"]["features"].update(steps={"text": {}, "pythonClassName": "x"}),
    )
    with pytest.raises(DataError, match="no 'steps'"):
        open_reader(small)


def test_damaged_image_names_the_step(tmp_path: Path) -> None:
    folder = writer.write_rlds(tmp_path, "tiny", {"train": [make_episode()]}, image_format="png")
    example = writer.example_message()()
    example.ParseFromString(writer.serialize_episode(make_episode(), "png"))
    example.features.feature["steps/observation/image"].bytes_list.value[2] = b"\x89PNG no more"
    record = writer.frame_record(example.SerializeToString())
    (folder / "tiny-train.tfrecord-00000-of-00001").write_bytes(record)
    source = RldsReader(folder)
    episode = source.read(source.episodes()[0])
    frames = episode.cameras["observation/image"].read(range(4))
    next(frames), next(frames)
    with pytest.raises(DataError, match=r"tiny-train.*train\[0\].*observation/image.*step 2"):
        next(frames)


def rewritten(folder: Path, change: Any) -> RldsReader:
    """One episode whose record is changed."""
    example = writer.example_message()()
    example.ParseFromString(writer.serialize_episode(make_episode(), "png"))
    change(example.features.feature)
    record = writer.frame_record(example.SerializeToString())
    (folder / "tiny-train.tfrecord-00000-of-00001").write_bytes(record)
    return RldsReader(folder)


def test_empty_frames_are_black_and_told(tmp_path: Path) -> None:
    """OpenVLA's pipeline shows a frame of zero bytes as zeros."""
    folder = writer.write_rlds(tmp_path, "tiny", {"train": [make_episode()]}, image_format="png")

    def empty(features: Any) -> None:
        features["steps/observation/image"].bytes_list.value[2] = b""

    source = rewritten(folder, empty)
    for _ in range(2):  # reading again tells nothing new
        frames = list(source.read(source.episodes()[0]).cameras["observation/image"].read(range(4)))
    assert [bool(frame.any()) for frame in frames] == [True, True, False, True]
    assert frames[2].shape == frames[1].shape and frames[2].dtype == np.uint8
    assert source.warnings == [
        "episode 'train[0]': 1 of 4 frames of camera 'observation/image' are empty; they count as black, as OpenVLA's"
        " pipeline shows them"
    ]


def test_a_feature_that_a_record_lacks_is_told(tmp_path: Path) -> None:
    folder = writer.write_rlds(tmp_path, "tiny", {"train": [make_episode()]}, image_format="png")
    source = rewritten(folder, lambda features: features.pop("steps/observation/wrist_image"))
    episode = source.read(source.episodes()[0])
    assert list(episode.cameras) == ["observation/image"]
    assert len(source.warnings) == 1
    assert "describes 'steps/observation/wrist_image', but episode 'train[0]' holds none" in source.warnings[0]


def test_compressed_tensor_cannot_blow_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlaft.data.readers.rlds.fields._MAX_FIELD_BYTES", 1 << 22)
    node = {"tensor": {"dtype": "uint8", "encoding": "zlib", "shape": {"dimensions": ["-1"]}}}
    fields, _ = parse_features({"featuresDict": {"features": {"steps": {"sequence": {"feature": node}}}}}, "here")
    half, bomb = zlib.compress(bytes(1 << 21)), zlib.compress(bytes(1 << 28))
    decoded = decode_field(fields[0], {"steps": [half, half]}, "here")
    assert isinstance(decoded, list) and [len(row) for row in decoded] == [1 << 21, 1 << 21]
    tracemalloc.start()
    try:
        for strings in ([bomb], [half, half, half]):
            with pytest.raises(DataError, match="unpack to more"):
                decode_field(fields[0], {"steps": strings}, "here")
        assert tracemalloc.get_traced_memory()[1] < 1 << 25
    finally:
        tracemalloc.stop()
    with pytest.raises(DataError, match="cut off"):
        decode_field(fields[0], {"steps": [half[:-9]]}, "here")


# --- fuzzing -------------------------------------------------------------------------------------------------------

KINDS = st.sampled_from(["featuresDict", "sequence", "tensor", "image", "text", "classLabel", "features", "feature"])
WORDS = st.sampled_from(["shape", "dimensions", "dtype", "encoding", "length", "steps", "action", "observation"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.sampled_from(["-1", "7", "zlib", "float32"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KINDS | WORDS | st.text(max_size=3), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None)
@given(tree=JSON)
def test_fuzz_features_tree(tree: Any) -> None:
    try:
        fields, _ = parse_features(tree, "features.json")
    except DataError:
        return
    assert fields


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzz_mutated_features(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Replace one node of a good features.json: either all is read, or a DataError comes out."""
    folder = _fuzz_folder(tmp_path_factory)
    tree = json.loads((folder / "good.json").read_text())
    node, parent, key = tree, None, None
    while isinstance(node, dict | list) and node and (parent is None or data.draw(st.integers(0, 5))):
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        parent, key = node, data.draw(st.sampled_from(keys))
        node = parent[key]
    parent[key] = data.draw(JSON)
    (folder / "features.json").write_text(json.dumps(tree))
    try:
        read_all(folder)
        source = RldsReader(folder)
        decode_all(source, source.episodes()[0])
    except DataError as error:
        assert str(error)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10**6), patch=st.binary(min_size=1, max_size=12))
def test_fuzz_payload_behind_a_good_checksum(
    tmp_path_factory: pytest.TempPathFactory, position: int, patch: bytes
) -> None:
    """Damage inside the record that its checksum hides: the parser and the decoders are all that is left."""
    folder = _fuzz_folder(tmp_path_factory)
    (folder / "features.json").write_text((folder / "good.json").read_text())
    payload = bytearray(writer.serialize_episode(make_episode(2), "png"))
    payload[position % len(payload) : position % len(payload) + len(patch)] = patch
    shard = folder / "fuzz-train.tfrecord-00000-of-00001"
    before = shard.read_bytes()
    try:
        shard.write_bytes(writer.frame_record(bytes(payload)))
        read_all(folder)
        source = RldsReader(folder)
        decode_all(source, source.episodes()[0])
    except DataError as error:
        assert str(error)
    finally:
        shard.write_bytes(before)


_FUZZ: list[Path] = []


def _fuzz_folder(factory: pytest.TempPathFactory) -> Path:
    if not _FUZZ:
        folder = writer.write_rlds(factory.mktemp("fuzz"), "fuzz", {"train": [make_episode(2)]}, image_format="png")
        shutil.copy(folder / "features.json", folder / "good.json")
        _FUZZ.append(folder)
    return _FUZZ[0]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(["steps/observation/views", "steps/observation/heat", "steps/words", "steps/zl"]),
    stored=st.lists(st.binary(max_size=8), max_size=4) | st.lists(st.integers(-(2**62), 2**62), max_size=4),
    lengths=st.lists(st.integers(-(2**62), 2**62) | st.integers(0, 3), max_size=4),
)
def test_fuzz_encoded_fields(path: str, stored: list[Any], lengths: list[int]) -> None:
    image = {"image": {"dtype": "uint8", "shape": {"dimensions": ["-1", "-1", "3"]}}}
    heat = {"tensor": {"dtype": "float32", "encoding": "zlib", "shape": {"dimensions": ["-1", "-1"]}}}
    plain = {"tensor": {"dtype": "float32", "encoding": "bytes", "shape": {"dimensions": ["1", "1"]}}}
    features = {
        "observation": {
            "featuresDict": {"features": {"views": {"sequence": {"feature": image}}, "heat": heat}},
        },
        "words": {"sequence": {"feature": {"text": {}}}},
        "zl": plain,
    }
    tree = {
        "featuresDict": {"features": {"steps": {"sequence": {"feature": {"featuresDict": {"features": features}}}}}}
    }
    field = next(field for field in parse_features(tree, "features.json")[0] if field.path == path)
    values: Any = stored if stored and isinstance(stored[0], bytes) else np.array(stored, np.int64)
    rows = np.array(lengths, np.int64)
    example = {
        path: values,
        f"{path}/ragged_flat_values": values,
        f"{path}/ragged_row_lengths_0": rows,
        f"{path}/shape": rows,
        f"{path}/value": values,
    }
    for drop in ([], [path], [path, f"{path}/ragged_flat_values"]):
        try:
            decode_field(field, {key: value for key, value in example.items() if key not in drop}, "here")
        except DataError as error:
            assert str(error).startswith("here")
