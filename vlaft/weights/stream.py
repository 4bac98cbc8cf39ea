"""Safetensors files read and written one tensor at a time, so that memory is bounded by the largest tensor.

The safetensors library writes a file from a dict of all its tensors and maps files as a whole when reading; both
are fine for adapters and too much for the shards of a 15 GB checkpoint on a small machine.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from types import TracebackType

import google_crc32c
import torch
from torch import Tensor

from vlaft.errors import CheckpointError
from vlaft.weights.layout import TensorEntry, changed_tensor

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
TYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK = 4 * 2**20
_OF_NOTHING = "00000000"  # CRC-32C of no bytes


def read_tensor(folder: Path, entry: TensorEntry) -> Tensor:
    """Read one tensor into memory of its own.

    Raises:
        CheckpointError: the file ends early, the type is not known, or the checksum is not the expected one.
    """
    if entry.dtype not in DTYPES:
        raise CheckpointError(f"{folder / entry.file}: tensors of type {entry.dtype} are not supported")
    buffer = bytearray(entry.end - entry.begin)
    with (folder / entry.file).open("rb") as file:
        file.seek(entry.begin)
        if file.readinto(buffer) != len(buffer):
            raise CheckpointError(f"{folder / entry.file}: truncated")
    if entry.crc32c is not None and f"{google_crc32c.value(bytes(buffer)):08x}" != entry.crc32c:
        raise changed_tensor(folder, entry)
    if not buffer:
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    return torch.frombuffer(buffer, dtype=DTYPES[entry.dtype]).view(entry.shape)


class Scratch:
    """Memory that is lent out again and again: fresh memory for each block would cost more than the arithmetic.

    Each purpose has two buffers in turn, so that one can still be written to disk while the other is filled.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, list[Tensor]] = {}

    def take(self, purpose: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Return memory of a type and shape, with what was in it; valid until the second next call of this purpose."""
        size = torch.Size(shape).numel() * dtype.itemsize
        pair = self._buffers.setdefault(purpose, [torch.empty(0, dtype=torch.uint8)] * 2)
        pair.reverse()
        if pair[0].nbytes < size:
            pair[0] = torch.empty(max(size, _CHUNK), dtype=torch.uint8)
        return pair[0][:size].view(dtype).view(shape)


def read_rows(
    folder: Path, entry: TensorEntry, scratch: Scratch, only: range | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Read one tensor in blocks of rows of a few megabytes.

    Args:
        folder: of the checkpoint.
        entry: where the tensor lies.
        scratch: lends the memory.
        only: the rows to read; None: all. Of some rows no checksum can be taken.

    Yields:
        The number of the first row and `[rows, ...]`, a number as one row. The second next has its memory.

    Raises:
        CheckpointError: the file ends early, the type is not known, or, after the last block, the checksum is not the
            expected one.
    """
    if entry.dtype not in DTYPES:
        raise CheckpointError(f"{folder / entry.file}: tensors of type {entry.dtype} are not supported")
    if entry.begin == entry.end:  # of no bytes, and perhaps of very many empty rows
        if entry.crc32c not in (None, _OF_NOTHING):
            raise changed_tensor(folder, entry)
        yield 0, torch.empty(entry.shape or (0,), dtype=DTYPES[entry.dtype])
        return
    checksum = 0
    shape = entry.shape or (1,)
    row = (entry.end - entry.begin) // max(shape[0], 1)
    rows = max(1, _CHUNK // max(row, 1))
    start, stop = (0, shape[0]) if only is None else (only.start, only.stop)
    summed = entry.crc32c is not None and (start, stop) == (0, shape[0])
    with (folder / entry.file).open("rb", buffering=0) as file:
        file.seek(entry.begin + start * row)
        for first in range(start, stop, rows):
            block = scratch.take("read", DTYPES[entry.dtype], (min(rows, stop - first), *shape[1:]))
            data = left = memoryview(block.view(-1).view(torch.uint8).numpy().data)
            while left:
                got = file.readinto(left)
                if not got:
                    raise CheckpointError(f"{folder / entry.file}: truncated")
                left = left[got:]
            if summed:
                checksum = google_crc32c.extend(checksum, bytes(data))
            yield first, block
    if summed and f"{checksum:08x}" != entry.crc32c:
        raise changed_tensor(folder, entry)


class ShardWriter:
    """Write a safetensors file whose names, types and shapes are known beforehand, tensor by tensor, in order.

    One block is written by a thread of its own while the next is made: memory that was given to be written must stay as
    it is until the block after it has been given.
    """

    def __init__(
        self,
        path: Path,
        layout: Mapping[str, tuple[str, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Open `path` and write the header.

        Args:
            path: the file to write.
            layout: tensor name to (safetensors' name of the type, shape), in the order of writing.
            metadata: texts for the header.
        """
        header: dict[str, object] = {"__metadata__": {"format": "pt"} | dict(metadata or {})}
        offset = 0
        for name, (dtype, shape) in layout.items():
            size = torch.Size(shape).numel() * DTYPES[dtype].itemsize
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
        self._layout = dict(layout)
        self._pending = list(layout)
        self._file: FileIO = path.open("wb", buffering=0)
        self._thread = ThreadPoolExecutor(1)
        self._pending_write: Future[None] | None = None
        self._put(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor."""
        self.write_rows(name, iter([tensor]) if tensor.ndim else iter([tensor[None]]))

    def write_rows(self, name: str, blocks: Iterator[Tensor]) -> None:
        """Write the next tensor from blocks of its rows."""
        dtype, shape = self._next(name)
        rows = 0
        for block in blocks:
            rows += len(block)
            if TYPE_NAMES.get(block.dtype) != dtype or tuple(block.shape[1:]) != shape[1:]:
                raise ValueError(f"'{name}' is {block.dtype} {tuple(block.shape)}, announced as {dtype} {shape}")
            data = block.detach().cpu().contiguous().view(-1).view(torch.uint8)
            self._put(data.numpy().data)
        if rows != (shape[0] if shape else 1):
            raise ValueError(f"'{name}' has {rows} rows, announced as {dtype} {shape}")

    def _put(self, data: bytes | memoryview) -> None:
        self._wait()
        self._pending_write = self._thread.submit(self._write_all, data)

    def _wait(self) -> None:
        if self._pending_write is not None:
            self._pending_write.result()

    def _write_all(self, data: bytes | memoryview) -> None:
        left = memoryview(data)
        while left:
            left = left[self._file.write(left) :]

    def _next(self, name: str) -> tuple[str, tuple[int, ...]]:
        if not self._pending or self._pending[0] != name:
            raise ValueError(f"'{name}' is out of order")
        self._pending.pop(0)
        return self._layout[name]

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if self._pending:
                    raise ValueError(f"{len(self._pending)} announced tensors were not written")
                self._wait()
                os.fsync(self._file.fileno())
        finally:
            self._thread.shutdown()
            self._file.close()
