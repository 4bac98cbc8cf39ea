"""Safetensors files written tensor by tensor are those that the library reads, byte for byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vlaft.errors import CheckpointError
from vlaft.weights import stream as tensor_stream
from vlaft.weights.layout import TensorEntry, expecting, read_header, tensor_checksums, tensor_table
from vlaft.weights.stream import DTYPES, Scratch, ShardWriter, read_rows, read_tensor


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape).to(dtype)
    return torch.randint(0, 2, shape).to(dtype)


@settings(max_examples=60, deadline=None)
@given(kinds=st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=4)), max_size=6))
def test_round_trip_with_the_library(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[tuple[str, list[int]]]
) -> None:
    tmp = tmp_path_factory.getbasetemp()
    tensors = {f"t{i}": random_tensor(DTYPES[kind], tuple(shape)) for i, (kind, shape) in enumerate(kinds)}
    layout = {f"t{i}": (kind, tuple(shape)) for i, (kind, shape) in enumerate(kinds)}
    with ShardWriter(tmp / "ours.safetensors", layout) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    read = load_file(tmp / "ours.safetensors")
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)

    save_file(tensors, tmp / "library.safetensors")
    table = read_header(tmp / "library.safetensors")
    for name, tensor in tensors.items():
        ours = read_tensor(tmp, table[name])
        assert ours.dtype == tensor.dtype
        assert torch.equal(ours, tensor)
    # copied block by block, the file is the same again
    with ShardWriter(tmp / "copy.safetensors", layout) as writer:
        for name in layout:
            writer.write_rows(name, (block for _, block in read_rows(tmp, table[name], Scratch())))
    assert (tmp / "copy.safetensors").read_bytes() == (tmp / "ours.safetensors").read_bytes()


def test_a_view_that_is_not_contiguous(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).view(2, 3).T
    with ShardWriter(tmp_path / "x.safetensors", {"x": ("F32", (3, 2))}) as writer:
        writer.write("x", tensor)
    assert torch.equal(load_file(tmp_path / "x.safetensors")["x"], tensor)


def test_what_was_not_announced_is_refused(tmp_path: Path) -> None:
    layout = {"a": ("F32", (2,)), "b": ("F32", (2,))}
    with pytest.raises(ValueError, match="out of order"), ShardWriter(tmp_path / "x", layout) as writer:
        writer.write("b", torch.zeros(2))
    with pytest.raises(ValueError, match="announced as"), ShardWriter(tmp_path / "x", layout) as writer:
        writer.write("a", torch.zeros(2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="announced as"), ShardWriter(tmp_path / "x", layout) as writer:
        writer.write("a", torch.zeros(3))
    with pytest.raises(ValueError, match="1 announced"), ShardWriter(tmp_path / "x", layout) as writer:
        writer.write("a", torch.zeros(2))


def test_reading_beyond_the_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\0" * 10)
    entry = TensorEntry("x", "F32", (4,), 0, 16)
    with pytest.raises(CheckpointError, match="truncated"):
        read_tensor(tmp_path, entry)
    with pytest.raises(CheckpointError, match="truncated"):
        list(read_rows(tmp_path, entry, Scratch()))
    with pytest.raises(CheckpointError, match="F8_E4M3"):
        read_tensor(tmp_path, TensorEntry("x", "F8_E4M3", (4,), 0, 4))


def test_blocks_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {
        "a": torch.arange(70.0).view(10, 7),
        "b": torch.arange(3.0),
        "c": torch.tensor(5),
        "d": torch.zeros(0, 4),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    table = read_header(tmp_path / "x.safetensors")
    monkeypatch.setattr(tensor_stream, "_CHUNK", 3 * 7 * 4)
    scratch = Scratch()
    blocks = [(first, block.clone()) for first, block in read_rows(tmp_path, table["a"], scratch)]
    assert [(first, len(block)) for first, block in blocks] == [(0, 3), (3, 3), (6, 3), (9, 1)]
    assert torch.equal(torch.cat([block for _, block in blocks]), tensors["a"])
    for name in ("b", "c", "d"):
        joined = [block.clone() for _, block in read_rows(tmp_path, table[name], scratch)]
        assert torch.equal(
            torch.cat(joined) if joined else torch.zeros(0, 4), tensors[name].view(-1, *tensors[name].shape[1:])
        )
    # a block stays as it is while the next is read
    rows = read_rows(tmp_path, table["a"], scratch)
    kept = next(rows)[1]
    before = kept.clone()
    next(rows)
    assert torch.equal(kept, before)


def test_a_failing_disk_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: ShardWriter, data: memoryview) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardWriter, "_write_all", full)
    with pytest.raises(OSError, match="No space"), ShardWriter(tmp_path / "x", {"a": ("F32", (2,))}) as writer:
        writer.write("a", torch.zeros(2))


@pytest.mark.parametrize("shape", [(), (3,), (700, 5), (0, 4)])
def test_a_tensor_is_held_against_its_checksum_as_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr(tensor_stream, "_CHUNK", 4096)  # several blocks
    save_file({"x": torch.randn(shape), "y": torch.ones(2)}, tmp_path / "model.safetensors")
    recorded = tensor_checksums(tmp_path)
    entry = expecting(tensor_table(tmp_path), tmp_path, recorded)["x"]
    assert len(read_tensor(tmp_path, entry).shape) == len(shape)
    assert sum(block.numel() for _, block in read_rows(tmp_path, entry, Scratch())) == torch.Size(shape).numel()
    wrong = replace(entry, crc32c="ffffffff")
    with pytest.raises(CheckpointError, match="the tensor 'x' is not as it was in training"):
        read_tensor(tmp_path, wrong)
    with pytest.raises(CheckpointError, match="the tensor 'x' is not as it was in training"):
        list(read_rows(tmp_path, wrong, Scratch()))


def test_very_many_empty_rows_are_copied_at_once(tmp_path: Path) -> None:
    entry = TensorEntry("x.safetensors", "F32", (2**40, 0), 8, 8)
    (tmp_path / entry.file).write_bytes(bytes(8))
    [(first, block)] = read_rows(tmp_path, entry, Scratch())
    assert (first, block.shape) == (0, (2**40, 0))
    with ShardWriter(tmp_path / "copy.safetensors", {"x": ("F32", (2**40, 0))}) as writer:
        writer.write_rows("x", (block for _, block in read_rows(tmp_path, entry, Scratch())))
    assert read_header(tmp_path / "copy.safetensors")["x"].shape == (2**40, 0)
