"""The number columns of one episode as numpy arrays by name, and GR00T's named slices of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vlaft.data.readers.lerobot.files import inside
from vlaft.data.readers.lerobot.meta import Metadata, is_depth
from vlaft.data.readers.lerobot.rows import is_list, is_number
from vlaft.errors import DataError

Slices = Mapping[str, tuple[str, int, int]]  # name: (column, start, end)


@dataclass(frozen=True)
class ColumnArrays(Mapping[str, NDArray[np.generic]]):
    """Columns `[T]` or `[T, N]` in their stored dtype, converted when they are read.

    Attributes:
        table: the episode's rows.
        slices: further names for parts of columns, from `meta/modality.json`.
        chunks: columns that hold several vectors per row; reading one is refused.
        where: names file and episode in messages.
    """

    table: pa.Table
    slices: Slices
    chunks: frozenset[str]
    where: str
    _names: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        columns = [part.name for part in self.table.schema if _is_array(part.type)]
        extra = [name for name, (column, _, _) in self.slices.items() if column in columns and name not in columns]
        object.__setattr__(self, "_names", (*columns, *extra, *sorted(self.chunks)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> NDArray[np.generic]:
        """Return one array.

        Raises:
            DataError: rows are missing or of different lengths, or the column holds chunks of vectors.
        """
        if name not in self._names:
            raise KeyError(name)
        if name in self.chunks:
            raise DataError(
                f"{self.where}: column '{name}' holds a list of vectors per row (action chunks), and one vector per"
                " step is needed: name another column or write the dataset without chunks"
            )
        if name not in self.table.schema.names:
            column, start, end = self.slices[name]
            return _to_numpy(self.table.column(column), f"{self.where}: column '{column}'")[:, start:end]
        return _to_numpy(self.table.column(name), f"{self.where}: column '{name}'")


def chunk_columns(schema: pa.Schema) -> frozenset[str]:
    """Return the columns whose rows are lists of lists of numbers."""
    names = set()
    for part in schema:
        kind, depth = part.type, 0
        while is_list(kind):
            kind, depth = kind.value_type, depth + 1
        if depth > 1 and is_number(kind):
            names.add(part.name)
    return frozenset(names)


def modality_slices(modality: Mapping[str, Any], columns: Mapping[str, int | None], warnings: list[str]) -> Slices:
    """Return the slices of GR00T's modality.json: `action.<part>` and `state.<part>`, where no such column exists.

    Args:
        modality: the file's content.
        columns: the columns and their widths, None where unknown.
        warnings: gets a sentence for a slice that fits no column.
    """
    slices = {}
    for kind, vector in (("action", "action"), ("state", "observation.state")):
        parts = modality.get(kind)
        for part, bounds in (parts if isinstance(parts, dict) else {}).items():
            name = f"{kind}.{part}"
            if name in columns:
                continue
            bounds = bounds if isinstance(bounds, dict) else {}
            start, end, column = bounds.get("start"), bounds.get("end"), bounds.get("original_key", vector)
            width = columns.get(column) if isinstance(column, str) else None
            if (
                isinstance(column, str)
                and column in columns
                and type(start) is int
                and type(end) is int
                and 0 <= start < end <= (width or 2**31)
            ):
                slices[name] = (column, start, end)
            else:
                warnings.append(f"modality.json: '{name[:60]}' fits no column; left out")
    return slices


def _is_array(kind: pa.DataType) -> bool:
    return is_number(kind) or (is_list(kind) and is_number(kind.value_type))


def _to_numpy(column: pa.ChunkedArray, where: str) -> NDArray[np.generic]:
    if column.null_count:
        step = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise DataError(
            f"{where}, step {step}: the value is missing ({column.null_count} such steps); repair the episode"
        )
    if is_number(column.type):
        return np.asarray(column.to_numpy())
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0) if array.num_chunks else pa.array([], column.type)
    flat = np.asarray(array.flatten().to_numpy(zero_copy_only=False))
    lengths = (
        np.full(len(array), column.type.list_size)
        if pa.types.is_fixed_size_list(column.type)
        else np.asarray(array.value_lengths().to_numpy(zero_copy_only=False))
    )
    if len(lengths) == 0:
        return flat.reshape(0, 0)
    odd = np.flatnonzero(lengths != lengths[0])
    if len(odd):
        raise DataError(
            f"{where}, step {odd[0]}: the row has {lengths[odd[0]]} numbers where the others have {lengths[0]};"
            " repair or drop the episode"
        )
    return flat.reshape(len(array), int(lengths[0]))


_FRAME = re.compile(r"^frame[_-](\d{1,9})\.(?:png|jpe?g)$", re.IGNORECASE)


def find_pictures(meta: Metadata, schema: pa.Schema, warnings: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the cameras that are columns, and those that are loose files.

    A struct of `bytes` and `path` is a picture whatever the metadata say; plain bytes are one only where the
    metadata say `image`, since other binary columns hold pickles.
    """
    columns, loose = [], []
    said = {key for key, feature in meta.features.items() if feature.get("dtype") == "image"}
    for part in schema:
        names = {child.name for child in part.type} if pa.types.is_struct(part.type) else set()
        binary = pa.types.is_binary(part.type) or pa.types.is_large_binary(part.type)
        if {"bytes", "path"} <= names or (binary and part.name in said):
            columns.append(part.name)
    for key in sorted(said - set(columns)):
        count = sum(_folder(meta.root, key, episode.number) is not None for episode in meta.episodes)
        if count == len(meta.episodes):
            loose.append(key)
        else:
            warnings.append(f"camera '{key}' has pictures for only {count} of {len(meta.episodes)} episodes; left out")
    for key in [key for key in (*columns, *loose) if is_depth(meta.features.get(key, {}))]:
        warnings.append(f"camera '{key}' holds depth maps; left out")
        columns, loose = [name for name in columns if name != key], [name for name in loose if name != key]
    return tuple(columns), tuple(loose)


def list_pictures(root: Path, key: str, number: int) -> tuple[Path, ...]:
    """Return the loose pictures of one episode by frame number.

    Raises:
        DataError: there are none.
    """
    folder = _folder(root, key, number)
    files = [(int(match[1]), path) for path in folder.iterdir() if (match := _FRAME.match(path.name))] if folder else []
    if not files:
        raise DataError(f"{root}: camera '{key}' has no pictures of episode {number}; was the download complete?")
    return tuple(path for _, path in sorted(files))


def _folder(root: Path, key: str, number: int) -> Path | None:
    for name in (f"episode_{number:06d}", f"episode-{number:06d}"):
        folder = root / inside(f"images/{key}/{name}", f"meta/info.json: the camera '{key[:80]}'")
        if "\0" not in key and len(key) < 200 and folder.is_dir():
            return folder
    return None
