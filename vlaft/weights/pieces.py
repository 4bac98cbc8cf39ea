"""Tensors whose rows lie in several files: what each process of a run has written of its own.

A set `trained-00001-of-00004.safetensors` ... holds, in each file, some rows of each tensor, and in the header's
metadata which ones, under the key and in the form that torch.distributed.checkpoint has for safetensors: its
`HuggingFaceStorageReader` reads such a folder. Its writer is not used: it makes a process's file in memory before it
writes it, and other writers of that package keep what they know in a pickle. A single file `trained.safetensors` is a
set of one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vlaft.errors import CheckpointError
from vlaft.weights.layout import TensorEntry, read_header, read_header_metadata
from vlaft.weights.stream import DTYPES, Scratch, read_rows

_SHARDING = "DCP_SHARDING_INFO"  # torch.distributed.checkpoint's keys
_OFFSETS = "saved_offsets"
_VERSION = {"DCP_VERSION": "1.0"}
_PIECE = re.compile(r"-(\d{5,})-of-(\d{5,})$")


def piece_name(stem: str, number: int, count: int) -> str:
    """Return the name of a set's file.

    >>> piece_name("trained", 1, 4)
    'trained-00001-of-00004.safetensors'
    """
    return f"{stem}-{number:05d}-of-{count:05d}.safetensors"


def pieces_in(folder: Path, stem: str) -> list[Path]:
    """Return the files of a set, or the single file, in order; empty where there is neither.

    Raises:
        CheckpointError: some of a set's files are missing, there are two sets, or a set and a single file.
    """
    single = folder / f"{stem}.safetensors"
    found = sorted(path for path in folder.glob(f"{stem}-*.safetensors") if _PIECE.search(path.stem))
    if single.is_file():
        if found:
            raise CheckpointError(f"{folder}: both {single.name} and files of a set of '{stem}' lie here")
        return [single]
    if not found:
        return []
    matches = [_PIECE.search(path.stem) for path in found]
    counts = {int(match[2]) for match in matches if match}
    numbers = [int(match[1]) for match in matches if match]
    if len(counts) > 1:
        raise CheckpointError(f"{folder}: files of two sets of '{stem}' lie here")
    if missing := sorted(set(range(1, counts.pop() + 1)) - set(numbers)):
        raise CheckpointError(f"{folder}: of the files '{stem}-*', number {missing[0]} is missing")
    return found


@dataclass(frozen=True)
class Spread:
    """A tensor over several files.

    Attributes:
        shape: of the whole.
        dtype: safetensors' name of the type.
        pieces: first row and place of each part, in order, without gaps.
    """

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[tuple[int, TensorEntry], ...]


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a set, each read when it is asked for: whole, or some rows of it."""

    def __init__(self, folder: Path, stem: str) -> None:
        """Read the headers.

        Raises:
            CheckpointError: a file is missing or damaged, or the parts of a tensor do not make a whole.
        """
        self.folder = folder
        self.files = pieces_in(folder, stem)
        parts: dict[str, list[tuple[int, TensorEntry]]] = {}
        for path in self.files:
            offsets = _offsets(path)
            for name, entry in read_header(path).items():
                parts.setdefault(name, []).append((offsets.get(name, 0), entry))
        self.spreads = {name: _joined(name, sorted(found, key=_first), folder) for name, found in parts.items()}
        self._scratch = Scratch()

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor whole, into memory of its own."""
        return self.rows(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.spreads)

    def __len__(self) -> int:
        return len(self.spreads)

    def rows(self, name: str, only: range | None = None) -> Tensor:
        """Read some rows of a tensor, or all, into memory of their own.

        Raises:
            CheckpointError: a file ends early, or the type is not known.
        """
        spread = self.spreads[name]
        if spread.dtype not in DTYPES:
            raise CheckpointError(f"{self.folder}: '{name}' is of type {spread.dtype}, which is not supported")
        if not spread.shape:
            only = range(1)
        elif only is None:
            only = range(spread.shape[0])
        made = torch.empty(len(only), *spread.shape[1:], dtype=DTYPES[spread.dtype])
        for first, entry in spread.pieces:
            count = entry.shape[0] if entry.shape else 1
            start, stop = max(only.start, first), min(only.stop, first + count)
            if start >= stop:
                continue
            for row, block in read_rows(self.folder, entry, self._scratch, range(start - first, stop - first)):
                at = first + row - only.start
                made[at : at + len(block)].copy_(block)
        return made if spread.shape else made[0]


def _first(part: tuple[int, TensorEntry]) -> int:
    return part[0]


def _joined(name: str, parts: list[tuple[int, TensorEntry]], folder: Path) -> Spread:
    entry = parts[0][1]
    if len(parts) == 1 and parts[0][0] == 0:
        return Spread(entry.shape, entry.dtype, tuple(parts))
    rows = 0
    for first, part in parts:
        if first != rows or not part.shape or part.shape[1:] != entry.shape[1:] or part.dtype != entry.dtype:
            raise CheckpointError(f"{folder}: the parts of '{name}' do not make a whole: row {rows} is not there once")
        rows += part.shape[0]
    return Spread((rows, *entry.shape[1:]), entry.dtype, tuple(parts))


def _offsets(path: Path) -> dict[str, int]:
    """Return the first row of each tensor of a file, where it says so."""
    text = read_header_metadata(path).get(_SHARDING)
    if text is None:
        return {}
    try:
        content = json.loads(text)
        found = {name: [int(offset) for offset in entry[_OFFSETS]] for name, entry in content.items()}
        if any(min(offsets, default=0) < 0 or any(offsets[1:]) for offsets in found.values()):
            raise ValueError("parts that are no rows")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: what it says of its rows is damaged ({error})") from None
    return {name: offsets[0] if offsets else 0 for name, offsets in found.items()}


def rows_metadata(first_rows: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """Return the header's metadata of a file that holds some rows of each tensor.

    Args:
        first_rows: by name: the first row, and how many dimensions the tensor has.
    """
    content = {
        name: {_OFFSETS: [first, *[0] * (dimensions - 1)] if dimensions else []}
        for name, (first, dimensions) in first_rows.items()
    }
    return _VERSION | {_SHARDING: json.dumps(content, separators=(",", ":"))}
