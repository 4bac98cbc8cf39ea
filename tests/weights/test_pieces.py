"""Tensors whose rows lie in several files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from vlaft.errors import CheckpointError
from vlaft.weights.pieces import StoredTensors, piece_name, pieces_in, rows_metadata
from vlaft.weights.stream import TYPE_NAMES, ShardWriter

TENSORS = {
    "matrix": torch.arange(35.0).view(7, 5),
    "short": torch.arange(2, dtype=torch.bfloat16),
    "image": torch.randint(0, 255, (5, 3, 2, 2), dtype=torch.uint8),
    "number": torch.tensor(3.5),
    "nothing": torch.empty(0, 4),
}


def write_pieces(folder: Path, stem: str, count: int, tensors: dict[str, Tensor] = TENSORS) -> None:
    """Write what so many processes would: rows in equal parts, the last ones fewer or none; numbers by the first."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        own = {}
        for name, tensor in tensors.items():
            size = -(-len(tensor) // count) if tensor.ndim else 1
            part = tensor[number * size : (number + 1) * size] if tensor.ndim else tensor
            if (tensor.ndim and (len(part) or number == 0)) or (not tensor.ndim and number == 0):
                own[name] = (number * size, part)
        layout = {name: (TYPE_NAMES[part.dtype], tuple(part.shape)) for name, (_, part) in own.items()}
        metadata = rows_metadata({name: (first, part.ndim) for name, (first, part) in own.items()})
        with ShardWriter(folder / piece_name(stem, number + 1, count), layout, metadata) as writer:
            for name, (_, part) in own.items():
                writer.write(name, part)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_a_whole_is_read_from_any_number_of_parts(tmp_path: Path, count: int) -> None:
    write_pieces(tmp_path, "trained", count)
    stored = StoredTensors(tmp_path, "trained")
    assert set(stored) == set(TENSORS) and len(stored.files) == count
    for name, tensor in TENSORS.items():
        assert stored[name].equal(tensor) and stored[name].dtype == tensor.dtype
    for start in range(8):
        for stop in range(start, 8):
            assert stored.rows("matrix", range(start, stop)).equal(TENSORS["matrix"][start:stop])


def test_a_single_file_is_a_set_of_one(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "trained.safetensors")
    stored = StoredTensors(tmp_path, "trained")
    assert stored.files == [tmp_path / "trained.safetensors"]
    assert stored.rows("image", range(1, 3)).equal(TENSORS["image"][1:3]) and float(stored["number"]) == 3.5
    assert not StoredTensors(tmp_path, "optimizer") and pieces_in(tmp_path, "optimizer") == []


def test_distributed_checkpoints_reader_reads_a_set(tmp_path: Path) -> None:
    """The layout is torch.distributed.checkpoint's own, so that its tools can be used on a checkpoint."""
    tensors = {name: TENSORS[name] for name in ("matrix", "short", "image")}
    write_pieces(tmp_path, "trained", 3, tensors)
    read = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    load(read, storage_reader=HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    for name, tensor in tensors.items():
        assert read[name].equal(tensor), name


def test_sets_that_are_not_whole(tmp_path: Path) -> None:
    write_pieces(tmp_path / "one", "trained", 3)
    shutil.copytree(tmp_path / "one", tmp_path / "lost")
    (tmp_path / "lost" / piece_name("trained", 2, 3)).unlink()
    with pytest.raises(CheckpointError, match="number 2 is missing"):
        StoredTensors(tmp_path / "lost", "trained")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    write_pieces(tmp_path / "two", "trained", 2)
    with pytest.raises(CheckpointError, match="files of two sets"):
        StoredTensors(tmp_path / "two", "trained")
    (tmp_path / "one" / "trained.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"both trained\.safetensors and files of a set"):
        StoredTensors(tmp_path / "one", "trained")
    (tmp_path / "one" / "trained.safetensors").unlink()
    shutil.copytree(tmp_path / "one", tmp_path / "twice")
    shutil.copyfile(tmp_path / "one" / piece_name("trained", 1, 3), tmp_path / "twice" / piece_name("trained", 2, 3))
    with pytest.raises(CheckpointError, match="do not make a whole"):
        StoredTensors(tmp_path / "twice", "trained")


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"a": 1}', '{"a": {"saved_offsets": [0, 3]}}', '{"a": {"saved_offsets": [-1, 0]}}']
)
def test_damaged_offsets(tmp_path: Path, text: str) -> None:
    save_file({"a": torch.zeros(2, 2)}, tmp_path / "trained.safetensors", metadata={"DCP_SHARDING_INFO": text})
    with pytest.raises(CheckpointError, match="what it says of its rows is damaged"):
        StoredTensors(tmp_path, "trained")
