"""Rows of one episode out of a parquet file: its numbers as arrays by name, GR00T's named slices of them, its texts.

Columns of other types (binary, pickles, structs) are never loaded. A v3.0 file holds many episodes, often in one
row group, so the last row group is kept: reading episode after episode decodes each group once.

Nothing is unfolded beyond what the metadata make plausible: a column that holds one value a billion times takes a few
bytes on disk. How many numbers there are stands in the file's metadata; how long its texts become does not, so that
these are read in small batches where they might be long.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vlaft.data.codec import largest_unfolded
from vlaft.data.readers.lerobot.footer import column_sizes
from vlaft.errors import DataError

Slices = Mapping[str, tuple[str, int, int]]  # name: (column, start, end)

_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}  # bytes of a number
_BATCH = 64  # rows; with texts of a megabyte each they take as much as anything may


@dataclass(frozen=True)
class Rows:
    """One episode's rows: a table of its number and text columns, and the rows' positions in the file `[T]`."""

    table: pa.Table
    positions: NDArray[np.int64]


class RowReader:
    """Reads episodes from parquet files, holding on to one row group."""

    def __init__(self) -> None:
        self._held: tuple[tuple[Path, int], pa.Table] | None = None
        self._held_numbers: tuple[Path, NDArray[np.generic]] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"_held": None, "_held_numbers": None}  # a worker process fills its own

    def read(self, path: Path, number: int, *, whole_file: bool, where: str, warnings: list[str]) -> Rows:
        """Return the rows of episode `number`.

        Args:
            path: the parquet file.
            number: LeRobot's episode_index.
            whole_file: the file is one episode (v2.x): its name is believed over a column that disagrees.
            where: names the episode in messages.
            warnings: gets a sentence when the column disagrees.

        Raises:
            DataError: the file is damaged or does not hold the episode.
        """
        tables, positions, offset = [], [], 0
        with open_parquet(path, where) as file:
            names = [name for name in file.schema_arrow.names if _loadable(file.schema_arrow.field(name).type)]
            by_row = "episode_index" in names
            if not by_row and not whole_file:
                raise DataError(f"{path}: {where}: the file has no column episode_index; it is not LeRobot's")
            mask = None if whole_file else self._numbers(file, path) == number
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if mask is None:
                    table = self._group(file, path, group, names)
                    chosen = np.arange(len(table))
                else:
                    chosen = np.flatnonzero(mask[offset : offset + count])
                    table = self._group(file, path, group, names) if len(chosen) else None
                if len(chosen) and int(chosen[-1]) < len(table):
                    tables.append(table.take(pa.array(chosen)))
                    positions.append(chosen + offset)
                offset += count
        if not tables:
            raise DataError(f"{path}: {where}: the file holds no row of this episode; fetch the file again")
        table = pa.concat_tables(tables).combine_chunks()
        held = Rows(table, np.concatenate(positions).astype(np.int64))
        return _doubt_number(held, path, number, where, warnings) if whole_file and by_row else held

    def _numbers(self, file: pq.ParquetFile, path: Path) -> NDArray[np.generic]:
        """Return the column episode_index of a file `[rows]`, held for the next episode.

        Row-group statistics would do with less reading, but pyarrow aborts the process on damaged ones.
        """
        if self._held_numbers is None or self._held_numbers[0] != path:
            table = read_bounded(file, path, range(file.num_row_groups), ["episode_index"])
            column = table.column("episode_index")
            self._held_numbers = (path, np.asarray(column.to_numpy()))
        return self._held_numbers[1]

    def _group(self, file: pq.ParquetFile, path: Path, group: int, names: list[str]) -> pa.Table:
        if self._held is None or self._held[0] != (path, group):
            # pyarrow takes "action" to mean "action.joints" too, hence the second selection
            self._held = None
            table = read_bounded(file, path, [group], names).select(names)
            table.validate(full=True)
            self._held = ((path, group), table)
        return self._held[1]


def read_records(path: Path, prefixes: tuple[str, ...] = ("",)) -> list[dict[str, Any]]:
    """Return a metadata file's rows: numbers, texts and lists of columns that begin with `prefixes`."""
    with open_parquet(path, "metadata") as file:
        names = [
            name
            for name in file.schema_arrow.names
            if _loadable(file.schema_arrow.field(name).type, texts=True) and name.startswith(prefixes)
        ]
        table = read_bounded(file, path, range(file.num_row_groups), names).select(names)
        table.validate(full=True)
        return list(table.to_pylist())


def read_schema(path: Path) -> pa.Schema:
    """Return the schema in a parquet file's footer."""
    with open_parquet(path, "schema") as file:
        return file.schema_arrow


@contextmanager
def open_parquet(path: Path, where: str) -> Iterator[pq.ParquetFile]:
    """Open a parquet file, and turn what pyarrow raises meanwhile into a `DataError` that names file and `where`."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            if len(set(names)) != len(names):
                raise DataError(f"{path}: {where}: two columns have the same name")
            yield file
    except FileNotFoundError as error:
        raise DataError(f"{path}: {where}: the file does not exist; was the download complete?") from error
    except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise DataError(f"{path}: {where}: the parquet file is damaged ({reason}); fetch it again") from error


def is_number(kind: pa.DataType) -> bool:
    """Whether values of this type become numbers in numpy."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def is_list(kind: pa.DataType) -> bool:
    """Whether this is a list type, of fixed or free length."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def is_text(kind: pa.DataType) -> bool:
    """Whether this is a string type."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _loadable(kind: pa.DataType, texts: bool = False) -> bool:
    if is_list(kind):
        return is_number(kind.value_type) or (texts and is_text(kind.value_type))
    return is_number(kind) or is_text(kind)


def _doubt_number(rows: Rows, path: Path, number: int, where: str, warnings: list[str]) -> Rows:
    """In a file of one episode, drop rows of other episodes; believe the file's name when all rows disagree."""
    column = rows.table.column("episode_index").to_numpy()
    chosen = np.flatnonzero(column == number)
    if len(chosen) == len(column):
        return rows
    if len(chosen) == 0 and len(np.unique(column)) == 1:
        warnings.append(f"{where}: the column episode_index says {column[0]}; the file's name was believed")
        return rows
    if len(chosen) == 0:
        raise DataError(f"{path}: {where}: the rows belong to {len(np.unique(column))} other episodes; repair the file")
    warnings.append(f"{where}: {len(column) - len(chosen)} rows belong to other episodes; left out")
    return Rows(rows.table.take(pa.array(chosen)), rows.positions[chosen])


def read_bounded(file: pq.ParquetFile, path: Path, groups: Sequence[int], names: Sequence[str]) -> pa.Table:
    """Return columns of some row groups.

    Args:
        file: the open file.
        path: where it lies.
        groups: numbers of its row groups.
        names: of its columns.

    Raises:
        DataError: they unfold to far more than what is stored of them, or the file's footer is damaged.
    """
    stored, numbers, texts = _sizes(path, groups, names)
    limit = largest_unfolded(stored)
    if numbers > limit:
        raise DataError(f"{path}: {_too_much(names, stored, numbers)}")
    if numbers + texts <= limit:
        return file.read_row_groups(list(groups), columns=list(names), use_threads=False)
    batches: list[pa.RecordBatch] = []
    size = 0
    for batch in file.iter_batches(_BATCH, row_groups=list(groups), columns=list(names), use_threads=False):
        size += batch.nbytes
        if size > limit:
            raise DataError(f"{path}: {_too_much(names, stored, size)}")
        batches.append(batch)
    return pa.Table.from_batches(batches) if batches else file.read_row_groups([], columns=list(names))


def _too_much(names: Sequence[str], stored: int, size: int) -> str:
    listed = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    return f"the {stored} bytes of {listed} unfold to {size} or more, too many to be right; fetch or write it anew"


def _sizes(path: Path, groups: Sequence[int], names: Sequence[str]) -> tuple[int, int, int]:
    """Return bytes on disk, bytes of the numbers, and the most bytes that the texts can have in memory."""
    stored = numbers = texts = 0
    prefixes = tuple(f"{name}." for name in names)
    described = column_sizes(path)
    for group in groups:
        for column in described[group]:
            if column.path not in names and not column.path.startswith(prefixes):
                continue
            stored += column.stored
            width = _WIDTHS.get(column.physical)
            if width is not None:
                numbers += column.values * width
            elif column.dictionary:
                texts += column.values * column.unpacked
            else:
                texts += column.values + column.unpacked
    return stored, numbers, texts


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
