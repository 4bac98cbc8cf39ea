"""Checkpoints on disk: what is read, and every way in which one is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
import torch
from golden_models import MINI, base_tensors, copy_checkpoint, write_single_file
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from vlaft.errors import CheckpointError
from vlaft.model.load import BASES, load_config, load_model
from vlaft.model.vision import vit_config
from vlaft.weights.layout import (
    INDEX_FILE,
    LICENCES,
    SINGLE_FILE,
    check_tensor_checksums,
    fingerprint,
    read_header,
    resolve_checkpoint,
    tensor_checksums,
    tensor_table,
)

FUSED = MINI / "fused"
SHARD = "model-00003-of-00007.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_checkpoint(FUSED, tmp_path / "checkpoint")


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def refused(folder: Path) -> str:
    """Return the sentence with which a folder is refused."""
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_load_keeps_the_stored_type_and_is_in_eval_mode(folder: Path) -> None:
    model = load_model(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    assert {p.dtype for p in load_model(folder, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    stored = base_tensors(folder)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())


def test_rotary_frequencies_stay_in_float32_under_bfloat16(folder: Path) -> None:
    # rounding them costs 1e-4 of the loss; transformers keeps them, and so does vlaft
    exact = load_model(folder).language_model.model.rotary_emb.inv_freq
    assert torch.equal(load_model(folder, dtype=torch.bfloat16).language_model.model.rotary_emb.inv_freq, exact)


def test_a_single_file_without_index(tmp_path: Path) -> None:
    tensors = base_tensors(FUSED)
    folder = write_single_file(FUSED, tmp_path / "single", tensors)
    state = load_model(folder).state_dict()
    assert set(state) == set(tensors)
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


def test_pickled_weights_are_refused(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    assert "safetensors only" in refused(folder)
    (folder / "pytorch_model.bin").rename(folder / "model.pt")
    assert "safetensors only" in refused(folder)
    (folder / "model.pt").unlink()
    assert INDEX_FILE in refused(folder)


def test_pickled_weights_beside_safetensors_are_not_opened(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"not a pickle")
    load_model(folder)


def test_lfs_pointer(folder: Path) -> None:
    (folder / SHARD).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 123456\n"
    )
    sentence = refused(folder)
    assert SHARD in sentence
    assert "git lfs pull" in sentence


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, 0.25, 0.5, 0.99, -1])
def test_truncated_shard(folder: Path, keep: float) -> None:
    data = (folder / SHARD).read_bytes()
    size = int(keep * len(data)) if isinstance(keep, float) else keep if keep >= 0 else len(data) + keep
    (folder / SHARD).write_bytes(data[:size])
    sentence = refused(folder)
    assert SHARD in sentence
    assert "truncated" in sentence


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200), declared=st.one_of(st.none(), st.integers(0, 2**64 - 1)))
def test_any_bytes_are_a_header_or_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, declared: int | None
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(data if declared is None else struct.pack("<Q", declared) + data)
    try:
        table = read_header(path)
    except CheckpointError as error:
        assert str(path) in str(error)
    else:
        assert all(0 <= entry.begin <= entry.end <= path.stat().st_size for entry in table.values())


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},  # bytes do not fit the shape
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 400]},
        {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [-8, -4]},
        {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0]},
        {"dtype": "F32", "shape": [1]},
        {"shape": [1], "data_offsets": [0, 4]},
        [],
        None,
    ],
)
def test_damaged_entry_of_a_header(tmp_path: Path, entry: object) -> None:
    header = json.dumps({"x": entry}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_header(path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""])
def test_index_that_names_a_file_outside(folder: Path, name: str) -> None:
    outside = folder.parent / "x.safetensors"
    outside.write_bytes((folder / SHARD).read_bytes())

    def change(index: dict[str, Any]) -> None:
        for tensor, file in index["weight_map"].items():
            if file == SHARD:
                index["weight_map"][tensor] = name

    edit_json(folder / INDEX_FILE, change)
    sentence = refused(folder)
    assert INDEX_FILE in sentence or "missing" in sentence
    assert "outside" in sentence or "missing" in sentence


def test_holes_and_overlaps_between_tensors(tmp_path: Path) -> None:
    folder = write_single_file(FUSED, tmp_path / "damaged", base_tensors(FUSED))
    data = (folder / SINGLE_FILE).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header["projector.fc2.bias"] = header["projector.fc3.bias"]
    text = json.dumps(header).encode()
    (folder / SINGLE_FILE).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    assert str(folder) in refused(folder)


def test_missing_shard(folder: Path) -> None:
    (folder / SHARD).unlink()
    sentence = refused(folder)
    assert SHARD in sentence
    assert "missing" in sentence


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100_000])
def test_damaged_index(folder: Path, content: str) -> None:
    (folder / INDEX_FILE).write_text(content)
    assert INDEX_FILE in refused(folder)


def test_index_that_disagrees_with_its_shards(folder: Path) -> None:
    edit_json(folder / INDEX_FILE, lambda index: index["weight_map"].pop("projector.fc1.bias"))
    assert "projector.fc1.bias" in refused(folder)


def test_missing_extra_and_misshapen_tensors(tmp_path: Path) -> None:
    tensors = base_tensors(FUSED)
    del tensors["projector.fc1.bias"]
    sentence = refused(write_single_file(FUSED, tmp_path / "missing", tensors))
    assert "1 tensors are missing, first 'projector.fc1.bias'" in sentence

    tensors = base_tensors(FUSED) | {"projector.fc9.bias": torch.zeros(1)}
    sentence = refused(write_single_file(FUSED, tmp_path / "extra", tensors))
    assert "not the model's, first 'projector.fc9.bias'" in sentence

    tensors = base_tensors(FUSED)
    tensors["projector.fc1.bias"] = torch.zeros(3)
    sentence = refused(write_single_file(FUSED, tmp_path / "shape", tensors))
    assert "'projector.fc1.bias': (3,)" in sentence


def test_vocabulary_that_does_not_fit_the_weights(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config["text_config"].update(vocab_size=640))
    sentence = refused(folder)
    assert "embed_tokens" in sentence or "lm_head" in sentence
    assert "(576, 32)" in sentence
    assert "(640, 32)" in sentence


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llava"}, ["llava", "openvla"]),
        ({"model_type": None}, ["None"]),
        ({"vision_backbone_id": "clip-vit-l"}, ["clip-vit-l"]),
        ({"timm_model_ids": ["resnet50", "resnet50"]}, ["resnet50"]),
        ({"vision_overrides": [{"width": 3}, {}]}, ["width"]),
        ({"text_config": {"model_type": "phi", "vocab_size": 576}}, ["phi"]),
        ({"image_sizes": "large"}, []),
        ({"vision_overrides": [{}]}, []),
        ({"image_sizes": [56]}, ["image_sizes"]),
        ({"image_sizes": [56, "56"]}, []),
        ({"vision_overrides": [3, {}]}, []),
        ({"vision_overrides": [{"embed_dim": 0}, {}]}, []),
        ({"vision_overrides": [{"patch_size": 0}, {}]}, []),
        ({"text_config": [1]}, []),
        ({"text_config": {"model_type": "llama", "hidden_size": -1}}, []),
    ],
)
def test_configuration_of_something_else(folder: Path, change: dict[str, Any], words: list[str]) -> None:
    edit_json(folder / "config.json", lambda config: config.update(change))
    sentence = refused(folder)
    assert all(word in sentence for word in ["config.json", *words])


@pytest.mark.parametrize("content", ["", "[]", "nonsense", "\ud800".encode("utf-16", "surrogatepass"), "[" * 100_000])
def test_damaged_configuration(folder: Path, content: str | bytes) -> None:
    path = folder / "config.json"
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)
    assert "config.json" in refused(folder)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name, words in (("empty", "config.json"), ("file", "is a file"), ("absent", "no such folder")):
        with pytest.raises(CheckpointError, match=words):
            resolve_checkpoint(str(tmp_path / name))
    assert resolve_checkpoint(str(FUSED)) == FUSED


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("openvla-7b", "openvla-7b: no such folder; did you mean 'openvla/openvla-7b'?"),
        ("OpenVLA-v01-7b", "OpenVLA-v01-7b: no such folder; did you mean 'openvla/openvla-v01-7b'?"),
        ("openvla", "openvla: no such folder; did you mean 'openvla/openvla-7b'?"),
        ("my-robot", "my-robot: no such folder"),
        ("./openvla-7b", "./openvla-7b: no such folder"),
        ("/data/openvla-7b", "/data/openvla-7b: no such folder"),
        ("runs/base/openvla-7b", "runs/base/openvla-7b: no such folder"),
    ],
)
def test_a_plain_name_is_answered_with_the_nearest_known_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        resolve_checkpoint(name)
    assert str(caught.value) == words


def test_offline_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(*args: object, **kwargs: object) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(CheckpointError, match="cannot be reached") as caught:
        resolve_checkpoint("someone/some-model")
    assert "\n" not in str(caught.value)


def test_the_known_bases_are_those_that_are_described() -> None:
    assert set(LICENCES) == set(BASES)


def test_configuration_of_the_mini_models() -> None:
    config = load_config(FUSED)
    assert config.action_vocab_size == 512
    assert config.text_config.rms_norm_eps == 1e-6  # the class default; Llama-2's own is 1e-5
    assert config.use_fused_vision_backbone is True
    assert load_config(MINI / "single").use_fused_vision_backbone is False


def test_fingerprint_does_not_depend_on_sharding(tmp_path: Path) -> None:
    tensors = base_tensors(FUSED)
    single = write_single_file(FUSED, tmp_path / "single", tensors)
    reverse = write_single_file(FUSED, tmp_path / "reverse", dict(reversed(list(tensors.items()))))
    assert (single / SINGLE_FILE).stat().st_size > 500_000
    assert fingerprint(single) == fingerprint(FUSED) == fingerprint(reverse)
    assert len(tensor_table(single)) == len(tensors)


@pytest.mark.parametrize("index", [0, -1])
@pytest.mark.parametrize("name", ["projector.fc1.weight", "language_model.lm_head.weight", "projector.fc1.bias"])
def test_fingerprint_changes_with_a_tensor(tmp_path: Path, name: str, index: int) -> None:
    tensors = base_tensors(FUSED)
    tensors[name].view(-1)[index] += 1
    assert fingerprint(write_single_file(FUSED, tmp_path / "changed", tensors)) != fingerprint(FUSED)


def test_fingerprint_changes_with_type_name_and_shape(tmp_path: Path) -> None:
    tensors = base_tensors(FUSED)
    name = "projector.fc1.bias"
    variants = [
        tensors | {name: tensors[name].view(torch.int32)},
        tensors | {name: tensors[name].view(2, -1)},
        {key.replace(name, "projector.fc1.offset"): tensor for key, tensor in tensors.items()},
    ]
    prints = [
        fingerprint(write_single_file(FUSED, tmp_path / str(number), variant))
        for number, variant in enumerate(variants)
    ]
    assert len({*prints, fingerprint(FUSED)}) == 4


def test_checksums_are_of_every_tensor_and_do_not_depend_on_sharding(tmp_path: Path) -> None:
    tensors = base_tensors(FUSED)
    single = write_single_file(FUSED, tmp_path / "single", tensors)
    recorded = tensor_checksums(FUSED)
    assert len(recorded) == 8 * len(tensors) and tensor_checksums(single) == recorded
    names = sorted(tensors)
    for number in (0, len(names) // 2, len(names) - 1):
        data = tensors[names[number]].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert recorded[8 * number : 8 * number + 8] == f"{google_crc32c.value(data):08x}"
    check_tensor_checksums(single, recorded)


def test_a_flip_inside_a_tensor_is_named_where_the_fingerprint_does_not_see_it(folder: Path) -> None:
    recorded, before = tensor_checksums(folder), fingerprint(folder)
    name, entry = max(tensor_table(folder).items(), key=lambda item: item[1].end - item[1].begin)
    path = folder / entry.file
    content = bytearray(path.read_bytes())
    content[(entry.begin + entry.end) // 2] ^= 1
    path.write_bytes(content)
    assert fingerprint(folder) == before
    with pytest.raises(CheckpointError, match=f"{entry.file}: the tensor '{name}' is not as it was in training"):
        check_tensor_checksums(folder, recorded)


def test_another_base_is_told_from_a_damaged_one(folder: Path, tmp_path: Path) -> None:
    recorded = tensor_checksums(folder)
    other = {name: tensor + 1 for name, tensor in base_tensors(folder).items()}
    with pytest.raises(CheckpointError, match="tensors are not those of training, so this is another base"):
        check_tensor_checksums(write_single_file(FUSED, tmp_path / "other", other), recorded)
    with pytest.raises(CheckpointError, match="checksums are recorded for its"):
        check_tensor_checksums(folder, recorded[8:])


def test_eight_bit_floats_are_a_sentence(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 2).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    for read in (tensor_table, fingerprint):
        with pytest.raises(CheckpointError, match=r"'a' is in FP8 \(F8_E4M3\).*bfloat16"):
            read(tmp_path)


@pytest.mark.parametrize("shape", [[2**60, 0], [2**40, 2**40, 0]])
def test_a_shape_that_no_tensor_has(tmp_path: Path, shape: list[int]) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match="header is damaged at 'x'"):
        tensor_table(tmp_path)


def test_weights_and_tokenizers_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read \(Permission denied\)"):
        tensor_table(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"text_config": {"num_hidden_layers": 2**31}}, "num_hidden_layers must be from 1 to 1000"),
        ({"text_config": {"hidden_size": "4096"}}, "hidden_size must be a whole number, not '4096'"),
        ({"image_sizes": [0]}, "image_sizes must be from 1"),
        ({"n_action_bins": True}, "n_action_bins must be a whole number, not True"),
    ],
)
def test_a_config_of_impossible_sizes(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "openvla"} | change))
    with pytest.raises(CheckpointError, match=says):
        load_config(tmp_path)


@pytest.mark.parametrize("change", [{"depth": 2**31}, {"embed_dim": 0}, {"mlp_ratio": "4"}, {"num_heads": 5}])
def test_impossible_sizes_of_a_vit(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: vision_overrides: "):
        vit_config("vit_so400m_patch14_siglip_224", change)
