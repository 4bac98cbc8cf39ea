"""Safetensors files written tensor by tensor are those that the library reads, byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vlaft.errors import CheckpointError
from vlaft.model.checkpoint import TensorEntry, read_header
from vlaft.model.tensor_stream import DTYPES, ShardWriter, read_chunks, read_tensor


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
    # copied as bytes, the file is the same again
    with ShardWriter(tmp / "copy.safetensors", layout) as writer:
        for name in layout:
            writer.copy(name, read_chunks(tmp, table[name]))
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
        list(read_chunks(tmp_path, entry))
    with pytest.raises(CheckpointError, match="F8_E4M3"):
        read_tensor(tmp_path, TensorEntry("x", "F8_E4M3", (4,), 0, 4))
