"""A split of a converted dataset as arrays, a number per row: all but its frames, and where each frame lies.

Parquet is made for reading a column from end to end. Training asks for single rows in random order, and a row group's
description alone takes a kilobyte per row in memory. So a dataset is read once into plain arrays, some 200 bytes per
row. Those of a large one are kept in the user's cache, under the dataset's fingerprint, and mapped: all processes of a
machine share them, and the system takes their pages back when it needs the memory. A frame is then one read of its
bytes, which lie in the shard as they are.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vlaft.checksums import cache_folder, identity, seal_holds, sealed
from vlaft.data.store import ConvertedDataset
from vlaft.errors import DataError, InUse, VlaftError
from vlaft.files import output_folder, read_json, write_json

_VERSION = 1  # of what is kept; part of its name
_KEPT = 64 * 2**20  # bytes of shards; what is smaller is read again in less than a second
_GROUPS = 64  # row groups read at once: some 10 MB of frames
_WAIT = 0.2  # s between two looks at whether another process has finished
_ABSENT, _ENCODED = -1, -2  # places of frames: there is none; it is encoded, and only Parquet can give it
_LISTS = {"action": np.float32, "normalized_action": np.float32, "action_token_ids": np.int32, "state": np.float32}
_NUMBERS = ("episode_index", "frame_index")
_INDEX_FILE = "index.json"
_LOCK = threading.Lock()


@dataclass(frozen=True)
class SplitColumns:
    """One split.

    Attributes:
        arrays: `episode_index`, `frame_index` and `dataset` int32 `[R]` (-1 where the row does not say), `prompt` int32
            `[R]`, the number of the row's prompt; `action`, `normalized_action` float32 `[R, A]` and `action_token_ids`
            int32 `[R, A]`; `state` float32 `[R, S]`, zeros where there is none; for each camera's column `place.NAME`
            int64 and `size.NAME` int32 `[R]`; `prompt_values`, `prompt_starts`: prompts, one after another.
        names: of the datasets.
        widths: of each column of lists, all lengths that its rows have.
        missing: of each column, how many rows have nothing.
    """

    dataset: ConvertedDataset
    split: str
    arrays: Mapping[str, NDArray[Any]]
    names: tuple[str, ...]
    widths: Mapping[str, tuple[int, ...]]
    missing: Mapping[str, int]

    @classmethod
    def of(cls, dataset: ConvertedDataset, split: str) -> SplitColumns:
        """Return the columns of a split; they are read the first time, and where they are large kept for the next.

        Raises:
            DataError: a shard cannot be read.
        """
        with _LOCK:
            if split not in dataset.columns:
                dataset.columns[split] = _kept(dataset, split) or _read(dataset, split, None)
            return dataset.columns[split]

    def prompt(self, row: int) -> NDArray[np.int32]:
        """Return the prompt's ids of a row, `[T]`."""
        starts, number = self.arrays["prompt_starts"], int(self.arrays["prompt"][row])
        return self.arrays["prompt_values"][int(starts[number]) : int(starts[number + 1])]

    def lists(self, column: str) -> NDArray[Any]:
        """Return a column of lists, `[R, D]`.

        Raises:
            DataError: they differ in length, or some are missing.
        """
        where = f"{self.dataset.path}, split '{self.split}': column '{column}'"
        if self.missing[column]:
            rows = self.dataset.rows(self.split)
            raise DataError(f"{where} is empty in {self.missing[column]:,} of {rows:,} rows; convert the source again")
        if len(widths := self.widths[column]) > 1:
            raise DataError(f"{where} has from {widths[0]} to {widths[-1]} numbers in a row; convert the source again")
        return self.arrays[column]

    def frame(self, row: int, column: str) -> bytes | None:
        """Return an encoded frame, or None where the row has none.

        Raises:
            DataError: the shard cannot be read.
        """
        place, size = int(self.arrays[f"place.{column}"][row]), int(self.arrays[f"size.{column}"][row])
        if place == _ABSENT:
            return None
        if place == _ENCODED:
            return self.dataset.image(self.split, row, column)
        path, checked = self.dataset.frame_file(self.split, row)
        return _bytes_at(path, place, size, checked)

    def runs(self, rows: Iterator[NDArray[np.int64]]) -> Iterator[tuple[int, int]]:
        """Yield the number of the dataset and how many rows in succession belong to it."""
        number, count = 0, 0
        for block in rows:
            owners = self.arrays["dataset"][block]
            edges = np.flatnonzero(np.diff(owners)) + 1
            for start, end in zip([0, *edges], [*edges, len(owners)], strict=True):
                if count and int(owners[start]) != number:
                    yield number, count
                    count = 0
                number, count = int(owners[start]), count + int(end - start)
        if count:
            yield number, count


def _kept(dataset: ConvertedDataset, split: str) -> SplitColumns | None:
    """Return the columns from the cache, where they are put first if need be; None where they do not belong there."""
    if dataset.stored_bytes(split) < _KEPT:
        return None
    key = hashlib.sha256(f"{_VERSION} {dataset.fingerprint} {split}".encode()).hexdigest()[:32]
    folder = cache_folder("columns") / key
    while True:
        if (found := _mapped(folder, dataset, split)) is not None:
            return found
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with output_folder(folder, overwrite=True) as partial:
                _read(dataset, split, partial)
            return _mapped(folder, dataset, split)
        except InUse:
            time.sleep(_WAIT)
        except DataError:
            raise
        except (OSError, VlaftError):  # no cache to write to
            return None


def _mapped(folder: Path, dataset: ConvertedDataset, split: str) -> SplitColumns | None:
    try:
        index = read_json(folder / _INDEX_FILE)
        if not seal_holds(index):
            return None
        arrays = {}
        for name, size in index["bytes"].items():
            path = folder / f"{name}.npy"
            if path.stat().st_size != size:
                return None
            arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
        widths = {name: tuple(values) for name, values in index["widths"].items()}
        return SplitColumns(dataset, split, arrays, tuple(index["names"]), widths, index["missing"])
    except (DataError, OSError, KeyError, ValueError):
        return None


def _read(dataset: ConvertedDataset, split: str, folder: Path | None) -> SplitColumns:
    """Read a split into arrays: in memory, or in files of `folder`.

    Raises:
        DataError: a shard cannot be read.
    """
    into = _Arrays(dataset.rows(split), folder)
    names: dict[str, int] = {}
    prompts: dict[bytes, int] = {}
    missing = dict.fromkeys([*_LISTS, *_NUMBERS, "dataset"], 0)
    widths: dict[str, set[int]] = {name: set() for name in _LISTS}
    first = 0
    for path, metadata, groups, rows in dataset.blocks(split, _GROUPS):
        here = slice(first, first + len(rows))
        first += len(rows)
        for name in _NUMBERS:
            missing[name] += rows[name].null_count
            into.fill(name, here, rows[name].combine_chunks().fill_null(-1).to_numpy(), np.int32)
        missing["dataset"] += rows["dataset"].null_count
        into.fill("dataset", here, _numbers(rows["dataset"], names), np.int32)
        into.fill("prompt", here, _prompt_numbers(rows["prompt_token_ids"], prompts), np.int32)
        for name, kind in _LISTS.items():
            matrix, lengths = _matrix(rows[name], kind)
            missing[name] += int((lengths == 0).sum())
            widths[name].update(lengths[lengths > 0].tolist())
            if matrix is not None and len(widths[name]) == 1:  # of several widths nobody may read them
                into.fill(name, here, matrix, kind)
        for name in dataset.cameras:
            places, sizes = _places(path, metadata, groups, rows[name], name)
            into.fill(f"place.{name}", here, places, np.int64)
            into.fill(f"size.{name}", here, sizes, np.int32)
    for name, kind in _LISTS.items():
        into.fill(name, slice(0, 0), np.zeros((0, min(widths[name], default=0)), kind), kind)
    for name in (*_NUMBERS, "dataset", "prompt"):
        into.fill(name, slice(0, 0), np.zeros(0, np.int32), np.int32)
    into.put("prompt_values", np.frombuffer(b"".join(prompts), np.int32))
    into.put("prompt_starts", np.cumsum([0, *(len(text) // 4 for text in prompts)], dtype=np.int64))
    sorted_widths = {name: tuple(sorted(found)) for name, found in widths.items()}
    if folder is not None:
        into.close({"names": list(names), "widths": sorted_widths, "missing": missing})
    return SplitColumns(dataset, split, into.arrays, tuple(names), sorted_widths, missing)


def _numbers(column: pa.ChunkedArray, names: dict[str, int]) -> NDArray[np.int32]:
    """Return the number of each row's text, -1 where there is none; new ones are added to `names`."""
    encoded = column.combine_chunks().dictionary_encode()
    numbers = np.array([*(names.setdefault(name, len(names)) for name in encoded.dictionary.to_pylist()), -1], np.int32)
    return numbers[encoded.indices.fill_null(len(numbers) - 1).to_numpy(zero_copy_only=False)]


def _prompt_numbers(column: pa.ChunkedArray, prompts: dict[bytes, int]) -> NDArray[np.int32]:
    """Return the number of each row's prompt; new ones are added to `prompts`."""
    lists = column.combine_chunks()
    offsets = lists.offsets.to_numpy()
    values = lists.values.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int32)
    texts = (values[start:end].tobytes() for start, end in pairwise(offsets))
    return np.array([prompts.setdefault(text, len(prompts)) for text in texts], np.int32)


def _matrix(column: pa.ChunkedArray, kind: Any) -> tuple[NDArray[Any] | None, NDArray[np.int64]]:
    """Return a column of lists as `[R, D]`, zeros where a row has none, and the length of each row.

    It is None where they are of several lengths, or all empty.
    """
    lists = column.combine_chunks()
    lengths = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    there = lengths > 0
    if len(set(lengths[there].tolist())) != 1:
        return None, lengths
    width = int(lengths.max())
    matrix = np.zeros((len(lengths), width), kind)
    values = lists.values.fill_null(0).to_numpy(zero_copy_only=False)
    matrix[there] = values[lists.offsets.to_numpy()[:-1][there, None] + np.arange(width)]
    return matrix, lengths


def _places(
    path: Path, metadata: pq.FileMetaData, groups: Sequence[int], column: pa.ChunkedArray, name: str
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Return where in a shard the bytes of each frame lie, and how many they are.

    They are looked for in the row group's own bytes and taken only where they are found as they are; frames of a
    shard that something else has written, compressed, are left to Parquet.
    """
    whole = column.combine_chunks()
    frames = whole.flatten()[whole.type.get_field_index("bytes")]
    places = np.full(len(frames), _ABSENT, np.int64)
    sizes = np.zeros(len(frames), np.int32)
    row = 0
    for group in groups:
        described = metadata.row_group(group)
        chunks = [described.column(number) for number in range(described.num_columns)]
        chunk = next(chunk for chunk in chunks if chunk.path_in_schema == f"{name}.bytes")
        start = min(chunk.dictionary_page_offset or chunk.data_page_offset, chunk.data_page_offset)
        raw = _bytes_at(path, start, chunk.total_compressed_size)
        at = 0
        for index in range(row, row + described.num_rows):
            value = frames[index].as_py()
            if value is None:
                continue
            found = at + 4  # after the one before, behind four bytes that say how long it is
            if raw[found : found + len(value)] != value:
                found = raw.find(value)
            places[index] = start + found if found >= 0 else _ENCODED
            sizes[index] = len(value)
            at = found + len(value) if found >= 0 else at
        row += described.num_rows
    return places, sizes


def _bytes_at(path: Path, start: int, size: int, checked: list[int] | None = None) -> bytes:
    """Return bytes of a file, which has to be the one that was checked: places in one are nonsense in its successor."""
    try:
        with path.open("rb", buffering=0) as file:
            if checked is not None and identity(os.fstat(file.fileno())) != checked:
                raise DataError(f"{path} was replaced while it was read; start again")
            return os.pread(file.fileno(), size, start)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); convert the source again") from error


class _Arrays:
    """Arrays of so many rows, made as they are met: in memory, or in files of a folder."""

    def __init__(self, rows: int, folder: Path | None) -> None:
        self.rows, self.folder = rows, folder
        self.arrays: dict[str, NDArray[Any]] = {}

    def fill(self, name: str, here: slice, values: NDArray[Any], kind: Any) -> None:
        """Set some rows."""
        if name not in self.arrays:
            shape = (self.rows, *values.shape[1:])
            if self.folder is None or not np.prod(shape):  # nothing cannot be mapped
                self.arrays[name] = np.zeros(shape, kind)
            else:
                path = self.folder / f"{name}.npy"
                self.arrays[name] = np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=shape)
                if hasattr(os, "posix_fallocate"):  # not on macOS
                    with path.open("r+b") as file:  # a full disk has to say so here: in a mapped page it is a signal
                        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        self.arrays[name][here] = values

    def put(self, name: str, values: NDArray[Any]) -> None:
        """Set a whole array."""
        self.arrays[name] = values

    def close(self, described: Mapping[str, Any]) -> None:
        """Write what is not in files yet, and what describes them."""
        assert self.folder is not None
        for name, values in self.arrays.items():
            if isinstance(values, np.memmap):
                values.flush()
            else:
                np.save(self.folder / f"{name}.npy", values, allow_pickle=False)
        sizes = {name: (self.folder / f"{name}.npy").stat().st_size for name in self.arrays}
        write_json(self.folder / _INDEX_FILE, sealed({**described, "bytes": sizes}))
