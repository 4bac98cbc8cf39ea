from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lerobot_sets import (
    CAMERA,
    LENGTHS,
    columns,
    edit_info,
    edit_rows,
    make_v2,
    make_v3,
    read_all,
    refused,
    video,
    warned,
    write_json,
    write_lines,
)

from vlaft.data.codec import encode_image
from vlaft.data.readers.lerobot.files import fill_template, inside
from vlaft.data.readers.lerobot.source import LeRobotReader
from vlaft.errors import DataError


@pytest.mark.parametrize("make", [make_v2, make_v3])
def test_the_sound_sets_are_sound(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    source, episodes = read_all(make(tmp_path / "set"))
    assert source.warnings == []
    assert [episode.length for episode in episodes] == list(LENGTHS)
    assert [episode.instruction for episode in episodes] == ["task 0", "task 1"]
    np.testing.assert_allclose([episode.action[-1] for episode in episodes], [[0.0, 0.5], [1.0, 0.4]], atol=1e-6)
    levels = [float(next(episode.cameras["top"].read([2])).mean()) for episode in episodes]
    np.testing.assert_allclose(levels, [36, 136], atol=3)


# --- the real broken sets


def test_lfs_pointers(samples: Path) -> None:
    refused(samples / "broken/lerobot_lfs_pointers", "15 of 15 data and video files.*run git lfs pull")


def test_malformed_info(samples: Path) -> None:
    refused(samples / "broken/lerobot_malformed_info", r"info\.json: this is not LeRobot's info\.json")


# --- folders


def test_folders_that_are_no_dataset(tmp_path: Path) -> None:
    refused(tmp_path, r"no meta/info\.json")
    refused(tmp_path / "absent", r"no meta/info\.json")
    root = make_v2(tmp_path / "a")
    (root / "data").rename(root / "elsewhere")
    refused(root, "the folder 'data' is missing")
    (root / "data").mkdir()
    refused(root, "holds no episode_")
    with pytest.raises(DataError, match="no option 'speed'"):
        LeRobotReader(root, {"speed": 1})


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"text"', "{}", '{"features": {}}', "[" * 100_000, "\xff\xfe"])
def test_info_that_is_none(tmp_path: Path, text: str) -> None:
    root = make_v2(tmp_path / "a")
    (root / "meta/info.json").write_bytes(text.encode("latin-1"))
    refused(root, r"info\.json")


def test_empty_meta_files(tmp_path: Path) -> None:
    root = make_v2(tmp_path / "a")
    for name in ("episodes.jsonl", "tasks.jsonl"):
        (root / "meta" / name).write_text("")
    episodes = warned(root, "not in episodes.jsonl")
    assert [episode.instruction for episode in episodes] == ["", ""]
    root = make_v3(tmp_path / "b")
    (root / "meta/episodes/chunk-000/file-000.parquet").unlink()
    refused(root, "no episode is listed here")
    (root / "meta/episodes/chunk-000/file-000.parquet").write_bytes(b"")
    refused(root, "parquet file is damaged")


def test_lfs_pointers_for_one_camera_only(tmp_path: Path) -> None:
    root = make_v2(tmp_path / "a")
    for number in range(2):
        pointer = root / f"videos/chunk-000/observation.images.wrist/episode_{number:06d}.mp4"
        pointer.parent.mkdir(exist_ok=True)
        pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    edit_info(root, lambda value: value["features"].update({"observation.images.wrist": {"dtype": "video"}}))
    episodes = warned(root, r"'observation\.images\.wrist' has no video for any episode \(git-LFS")
    assert list(episodes[0].cameras) == ["top"]


# --- metadata that lie


def test_templates_that_do_not_fit(tmp_path: Path) -> None:
    root = make_v2(tmp_path / "a")
    (root / "videos").rename(root / "video")
    edit_info(root, lambda value: value.update(data_path="rows/{episode_number}.parquet"))
    warned(root, r"'rows/\{episode_number\}\.parquet' of info\.json does not fit")


@pytest.mark.parametrize(
    "template", ["../{episode_index}.parquet", "/etc/passwd", "data/../../x", "C:\\x", "data\\..\\..\\x"]
)
def test_templates_that_leave_the_folder(tmp_path: Path, template: str) -> None:
    root = make_v2(tmp_path / "a")
    edit_info(root, lambda value: value.update(data_path=template))
    refused(root, "points outside of the dataset's folder")


def test_templates_reach_into_nothing() -> None:
    fields = {"episode_index": 3}
    assert fill_template("a/{episode_index:04d}", fields) == "a/0003"
    for odd in ("{episode_index.__class__}", "{episode_index:999999999d}", "{0}", "{", 7, None, "{episode_index!r}"):
        assert fill_template(odd, fields) is None
    assert inside("a/./b/../c", "x") == "a/c"


def test_wrong_version_counts_and_splits(tmp_path: Path) -> None:
    root = make_v2(tmp_path / "a")
    edit_info(root, lambda value: value.update(codebase_version="v3.0", total_episodes=10**30))
    warned(root, "read as v2.0")
    warned(root, "info.json says 1000000000.* episodes where 2 exist")
    edit_info(root, lambda value: value.update(splits={"train": "0:1", "val": "1:99999999"}))
    assert [episode.split for episode in read_all(root)[1]] == ["train", "val"]
    edit_info(root, lambda value: value.update(splits={"train": "0:1", "val": "most of it"}))
    warned(root, "split 'val' is no range")
    edit_info(root, lambda value: value.pop("codebase_version"))
    warned(root, "codebase_version 'None'")


@pytest.mark.parametrize("fps", [None, 0, -5, "fast", 1e308, True, 10**400])
def test_unusable_rate(tmp_path: Path, fps: object) -> None:
    root = make_v2(tmp_path / "a")
    edit_info(root, lambda value: value.update(fps=fps))
    assert {episode.fps for episode in warned(root, "no usable fps")} == {None}


def test_a_rate_that_the_timestamps_deny(tmp_path: Path) -> None:
    root = make_v2(tmp_path / "a")
    edit_info(root, lambda value: value.update(fps=30))
    warned(root, r"timestamps are 0\.1 s apart while info\.json says 30 fps")


def test_a_rate_that_is_8_percent_off_is_told_but_no_pause_or_uneven_clock(tmp_path: Path) -> None:
    root = make_v2(tmp_path / "a")
    edit_rows(root, 0, timestamp=np.arange(6, dtype=np.float32) / 10.8)
    warned(root, r"episode_000000: the timestamps are 0\.0926 s apart.*10 fps.*give fps=10\.8")
    for times in ([0, 0.1, 0.2, 2.3, 2.4, 2.5], [0, 0.08, 0.2, 0.28, 0.4, 0.5], [0, 0.103, 0.206, 0.309, 0.412, 0.515]):
        edit_rows(root, 0, timestamp=np.asarray(times, np.float32))
        assert not any("s apart" in text for text in read_all(root)[0].warnings)


def test_listed_episodes_and_lengths_that_disagree(tmp_path: Path) -> None:
    root = make_v2(tmp_path / "a")
    rows: list[Any] = [
        {"episode_index": 0, "tasks": [], "length": 10**15},
        {"episode_index": 7},
        5,
        {"episode_index": "x"},
    ]
    write_lines(root / "meta/episodes.jsonl", rows)
    warned(root, "the metadata say 1000000000000000 steps, the file has 6")
    warned(root, r"1 episodes of episodes\.jsonl have no parquet file \(the first is 7\)")


def test_cameras_that_are_incomplete(tmp_path: Path) -> None:
    root = make_v2(tmp_path / "a")
    side = root / "videos/chunk-000/observation.images.side/episode_000000.mp4"
    video(side, [50] * 6)
    edit_info(root, lambda value: value["features"].update({"observation.images.side": {"dtype": "video"}}))
    assert list(warned(root, "for only 1 of 2 episodes")[0].cameras) == ["top"]
    video(side.with_name("episode_000001.mp4"), [50] * 5)
    edit_info(root, lambda value: value["features"].pop("observation.images.side"))
    assert set(warned(root, "is not in info.json but has a video")[0].cameras) == {"top", "side"}


def test_the_only_camera_is_incomplete(tmp_path: Path) -> None:
    root = make_v2(tmp_path / "a")
    (root / f"videos/chunk-000/{CAMERA}/episode_000000.mp4").unlink()
    episodes = warned(root, "only 1 of 2 episodes have a video")
    assert [(episode.index, episode.name) for episode in episodes] == [(0, "episode_000001")]


@pytest.mark.parametrize("place", ["info", "video_info", None])
def test_depth_videos_are_left_out(tmp_path: Path, place: str | None) -> None:
    root = make_v2(tmp_path / "a")
    mark: dict[str, Any] = {place: {"video.is_depth_map": True}} if place else {"is_depth_map": True}
    edit_info(root, lambda value: value["features"].update({CAMERA: {"dtype": "video", **mark}}))
    assert warned(root, "is a depth video")[0].cameras == {}


def test_drifted_start_times(tmp_path: Path) -> None:
    root = make_v3(tmp_path / "a", starts=(0.0, 0.72))
    episodes = warned(root, "start times drifted")
    np.testing.assert_allclose(next(episodes[1].cameras["top"].read([0])).mean(), 120, atol=3)


# --- rows


def test_v3_row_groups_and_lookups_by_value(tmp_path: Path) -> None:
    root = make_v3(tmp_path / "a", row_group=4)  # episodes begin in the middle of row groups
    source, episodes = read_all(root)
    assert source.warnings == []
    assert [episode.arrays["index"].tolist() for episode in episodes] == [list(range(6)), list(range(6, 11))]


def test_truncated_and_damaged_parquet(tmp_path: Path) -> None:
    root = make_v2(tmp_path / "a")
    path = root / "data/chunk-000/episode_000001.parquet"
    data = path.read_bytes()
    for damaged in (b"", data[:100], data[:-9], data[:-4] + b"XXXX", b"version 1\n" * 9):
        path.write_bytes(damaged)
        refused(root, r"episode_000001\.parquet: episode_000001: the parquet file is damaged")
    rng = np.random.default_rng(0)
    for _ in range(60):
        array = np.frombuffer(data, np.uint8).copy()
        array[rng.integers(0, len(array), 5)] ^= (1 << rng.integers(0, 8, 5)).astype(np.uint8)
        path.write_bytes(array.tobytes())
        try:
            read_all(root)
        except DataError as error:
            assert "\n" not in str(error)


def test_rows_that_disagree(tmp_path: Path) -> None:
    root = make_v2(tmp_path / "a")
    edit_rows(root, 1, action=pa.array([[1.0, 2.0], [1.0, 2.0], [3.0], [1.0, 2.0], [1.0, 2.0]]))
    refused(root, r"column 'action', step 2: the row has 1 numbers where the others have 2")
    edit_rows(root, 1, action=pa.array([[1.0, 2.0], None, [3.0, 1.0], [1.0, 2.0], [1.0, 2.0]]))
    refused(root, r"column 'action', step 1: the value is missing")
    edit_rows(root, 1, action=pa.array([[1.0, 2.0], [None, 1.0], [3.0, 1.0], [1.0, 2.0], [1.0, 2.0]]))
    refused(root, r"episode_000001', step 1: the action is not finite")
    edit_rows(root, 1, action=pa.array(["left", "right"] * 2 + ["left"]))
    refused(root, "has no array 'action'")
    edit_rows(root, 1, episode_index=pa.array([0] * 5))
    warned(root, "episode_000001: the column episode_index says 0; the file's name was believed")
    edit_rows(root, 1, episode_index=pa.array([4, 4, 5, 5, 5]))
    refused(root, "belong to 2 other episodes")
    edit_rows(root, 1, frame_index=pa.array([0, 1, 2, 4, 3]), timestamp=pa.array([0, 0.1, 0.2, 0.4, 0.3]))
    refused(root, "rows are out of order")
    edit_rows(root, 1, frame_index=pa.array([0, 1, 0, 1, 0]))
    warned(root, "frame_index does not rise")
    edit_rows(root, 1, timestamp=pa.array([0, 0.1, np.nan, 0.3, 0.4]))
    warned(root, "timestamp does not rise")
    edit_rows(root, 1, action=pa.array([], pa.list_(pa.float32())))
    refused(root, "holds no row of this episode")


def test_more_rows_than_frames(tmp_path: Path) -> None:
    root = make_v2(tmp_path / "a")
    many = columns(1, 9)
    edit_rows(root, 1, **many)
    refused(root, r"camera 'observation\.images\.top': the video has 5 frames for 9 rows")


def test_columns_that_are_absent(tmp_path: Path) -> None:
    root = make_v2(tmp_path / "a")
    for number in range(2):
        edit_rows(root, number, frame_index=None, timestamp=None, index=None)
    _, episodes = read_all(root)
    assert [episode.length for episode in episodes] == list(LENGTHS)
    for number in range(2):
        edit_rows(root, number, task_index=None)
    assert [episode.instruction for episode in read_all(root)[1]] == ["task 0", "task 1"]  # of episodes.jsonl
    (root / "meta/episodes.jsonl").unlink()
    assert [episode.instruction for episode in warned(root, "give it as instruction=")] == ["", ""]


def test_action_chunks_are_refused(tmp_path: Path) -> None:
    root = make_v2(tmp_path / "a")
    for number, length in enumerate(LENGTHS):
        edit_rows(root, number, action=pa.array([[[1.0, 2.0]] * 4] * length, pa.list_(pa.list_(pa.float32(), 2))))
    refused(root, "'action' holds a list of vectors per row")
    assert any("action chunks" in text for text in LeRobotReader(root).warnings)


def test_labels_are_no_instruction(tmp_path: Path) -> None:
    root = make_v2(tmp_path / "a")
    tasks = [{"task_index": 0, "task": "valid"}, {"task_index": 5, "task": "open the drawer"}]
    write_lines(root / "meta/tasks.jsonl", tasks)
    for number, length in enumerate(LENGTHS):
        described = {"annotation.human.task_description": pa.array([5] * length)}
        edit_rows(root, number, task_index=pa.array([0] * length), **described)
    assert [episode.instruction for episode in read_all(root)[1]] == ["open the drawer"] * 2


def test_the_most_frequent_instruction(tmp_path: Path) -> None:
    root = make_v2(tmp_path / "a")
    edit_rows(root, 0, task_index=pa.array([0, 1, 1, 1, 0, 99]))
    assert warned(root, "episode_000000: the rows name 2 instructions")[0].instruction == "task 1"


def test_texts_that_are_none(tmp_path: Path) -> None:
    root = make_v3(tmp_path / "a")
    path = root / "meta/tasks.parquet"
    path.write_bytes(path.read_bytes().replace(b"task 0", b"\xff\xfe\xff 0"))
    refused(root, r"tasks\.parquet: metadata: the parquet file is damaged")


# --- pictures


def image_set(tmp_path: Path, cell: Callable[[int, int], object], kind: pa.DataType) -> Path:
    root = make_v2(tmp_path / "a", videos=False)
    edit_info(root, lambda value: value["features"].update({CAMERA: {"dtype": "image"}}))
    for number, length in enumerate(LENGTHS):
        edit_rows(root, number, **{CAMERA: pa.array([cell(number, step) for step in range(length)], kind)})
    return root


def png(number: int, step: int) -> bytes:
    return encode_image(np.full((8, 8, 3), 100 * number + step, np.uint8), "png")


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def test_picture_columns(tmp_path: Path) -> None:
    root = image_set(tmp_path, lambda number, step: {"bytes": png(number, step), "path": None}, STRUCT)
    _, episodes = read_all(root)
    assert [int(image[0, 0, 0]) for image in episodes[1].cameras["top"].read([0, 2, 4])] == [100, 102, 104]


def test_plain_bytes_are_pictures_where_the_metadata_say_so(tmp_path: Path) -> None:
    root = image_set(tmp_path, png, pa.binary())
    assert [int(image[0, 0, 0]) for image in read_all(root)[1][0].cameras["top"].read([3])] == [3]
    edit_info(root, lambda value: value["features"].update({CAMERA: {"dtype": "binary"}}))
    assert read_all(root)[1][0].cameras == {}


def test_damaged_pictures_name_their_step(tmp_path: Path) -> None:
    root = image_set(tmp_path, lambda _, step: {"bytes": b"" if step == 2 else png(0, step), "path": "x"}, STRUCT)
    refused(
        root, r"episode_000000\.parquet: episode_000000, camera 'observation\.images\.top', step 2: the image is empty"
    )


def test_named_pictures_stay_in_the_folder(tmp_path: Path) -> None:
    root = image_set(tmp_path, lambda *_: {"bytes": None, "path": "../../secret.png"}, STRUCT)
    refused(root, "points outside of the dataset's folder")


@pytest.mark.parametrize("name", ["episode_{:06d}/frame_{:06d}.png", "episode-{:06d}/frame-{:06d}.png"])
def test_loose_pictures(tmp_path: Path, name: str) -> None:
    root = make_v2(tmp_path / "a", videos=False)
    edit_info(root, lambda value: value["features"].update({CAMERA: {"dtype": "image"}}))
    for number, length in enumerate(LENGTHS):
        for step in range(length):
            path = root / "images" / CAMERA / name.format(number, step)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(number, step))
    assert [int(image[0, 0, 0]) for image in read_all(root)[1][1].cameras["top"].read([1, 4])] == [101, 104]
    path.unlink()
    refused(root, "camera 'observation.images.top' has 4 frames for 5 steps")


# --- anything at all

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def mutate(value: Any, data: st.DataObject) -> Any:
    """Replace, drop or rename something at a random place of a JSON value."""
    if isinstance(value, dict) and value and data.draw(st.integers(0, 3)):
        key = data.draw(st.sampled_from(sorted(value)))
        action = data.draw(st.sampled_from(["deeper", "deeper", "drop", "rename"]))
        changed = dict(value)
        if action == "deeper":
            changed[key] = mutate(value[key], data)
        else:
            moved = changed.pop(key)
            if action == "rename":
                changed[data.draw(st.text(max_size=20))] = moved
        return changed
    if isinstance(value, list) and value and data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(value) - 1))
        return [*value[:place], mutate(value[place], data), *value[place + 1 :]]
    return data.draw(JUNK)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_v2(tmp_path_factory.mktemp("fuzz") / "v2")
    parts = {"joints": {"start": 0, "end": 2}, "odd": {"start": 1, "end": 2, "original_key": "observation.state"}}
    described = {"human.task": {"original_key": "task_index"}}
    write_json(root / "meta/modality.json", {"action": parts, "state": {}, "annotation": described})
    return root


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_mutated_metadata_give_sentences_only(fuzzed: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["info.json", "info.json", "episodes.jsonl", "tasks.jsonl", "modality.json"]))
    path = fuzzed / "meta" / name
    original = path.read_text()
    if name.endswith(".jsonl"):
        rows = mutate([json.loads(line) for line in original.splitlines()], data)
        text = "".join(json.dumps(row) + "\n" for row in (rows if isinstance(rows, list) else [rows]))
    else:
        text = json.dumps(mutate(copy.deepcopy(json.loads(original)), data))
    try:
        path.write_text(text)
        read_all(fuzzed)
    except DataError as error:
        assert str(error)
    finally:
        path.write_text(original)
    assert len(read_all(fuzzed)[1]) == 2
