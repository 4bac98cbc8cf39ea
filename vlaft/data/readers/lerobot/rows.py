"""Rows of one episode out of a parquet file: numbers and texts at once, pictures when they are asked for.

Columns of other types (binary, pickles, structs) are never loaded. A v3.0 file holds many episodes, often in one
row group, so the last row group is kept: reading episode after episode decodes each group once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vlaft.data.codec import decode_image
from vlaft.data.readers.lerobot.bounded import read_bounded
from vlaft.data.readers.lerobot.files import inside
from vlaft.errors import DataError
from vlaft.observation.images import Image

_MAX_IMAGE_FILE = 2**28


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
        with _open_parquet(path, where) as file:
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
            table = read_bounded(file, range(file.num_row_groups), ["episode_index"], str(path))
            column = table.column("episode_index")
            self._held_numbers = (path, np.asarray(column.to_numpy()))
        return self._held_numbers[1]

    def _group(self, file: pq.ParquetFile, path: Path, group: int, names: list[str]) -> pa.Table:
        if self._held is None or self._held[0] != (path, group):
            # pyarrow takes "action" to mean "action.joints" too, hence the second selection
            self._held = None
            table = read_bounded(file, [group], names, str(path)).select(names)
            table.validate(full=True)
            self._held = ((path, group), table)
        return self._held[1]


@dataclass(frozen=True)
class ImageColumnFrames:
    """Encoded pictures in a parquet column (struct of bytes and path, or plain bytes).

    Attributes:
        path: the parquet file.
        column: the column's name.
        positions: rows of the episode in the file, `[T]` increasing.
        root: the dataset's folder, for pictures that the column only names.
        where: names episode and camera in messages.
    """

    path: Path
    column: str
    positions: NDArray[np.int64]
    root: Path
    where: str

    def __len__(self) -> int:
        return len(self.positions)

    def read(self, indices: Sequence[int]) -> Iterator[Image]:
        """Yield the frames of `indices` (increasing); batches of rows keep memory small."""
        wanted = [(int(index), int(self.positions[index])) for index in indices]
        done, offset = 0, 0
        with _open_parquet(self.path, self.where) as file:
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if done < len(wanted) and wanted[done][1] < offset + rows:
                    start = offset
                    for batch in file.iter_batches(
                        batch_size=64, row_groups=[group], columns=[self.column], use_threads=False
                    ):
                        column = batch.column(batch.schema.get_field_index(self.column))
                        while done < len(wanted) and start <= wanted[done][1] < start + len(batch):
                            index, position = wanted[done]
                            where = f"{self.path}: {self.where}, step {index}"
                            yield decode_image(self._bytes(column[position - start].as_py(), where), where)
                            done += 1
                        start += len(batch)
                        if done == len(wanted):
                            return
                offset += rows

    def _bytes(self, value: object, where: str) -> bytes:
        data = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(data, bytes):
            return data
        named = value.get("path") if isinstance(value, dict) else None
        if not isinstance(named, str) or not named:
            raise DataError(f"{where}: the row has no picture")
        return read_picture(self.root / inside(named, f"{where}: the picture's path '{named[:200]}'"), where)


@dataclass(frozen=True)
class PictureFiles:
    """Loose pictures, one file per frame, in order."""

    paths: tuple[Path, ...]
    where: str

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: Sequence[int]) -> Iterator[Image]:
        """Yield the frames of `indices`."""
        for index in indices:
            where = f"{self.paths[index]}: {self.where}, step {index}"
            yield decode_image(read_picture(self.paths[index], where), where)


def read_picture(path: Path, where: str) -> bytes:
    """Return the bytes of a picture file; a DataError when it is missing or absurdly large."""
    try:
        if path.stat().st_size > _MAX_IMAGE_FILE:
            raise DataError(f"{where}: the picture file is larger than is read ({_MAX_IMAGE_FILE} bytes)")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{where}: the picture file cannot be read ({error.strerror})") from error


def read_records(path: Path, prefixes: tuple[str, ...] = ("",)) -> list[dict[str, Any]]:
    """Return a metadata file's rows: numbers, texts and lists of columns that begin with `prefixes`."""
    with _open_parquet(path, "metadata") as file:
        names = [
            name
            for name in file.schema_arrow.names
            if _loadable(file.schema_arrow.field(name).type, texts=True) and name.startswith(prefixes)
        ]
        table = read_bounded(file, range(file.num_row_groups), names, str(path)).select(names)
        table.validate(full=True)
        return list(table.to_pylist())


def read_schema(path: Path) -> pa.Schema:
    """Return the schema in a parquet file's footer."""
    with _open_parquet(path, "schema") as file:
        return file.schema_arrow


@contextmanager
def _open_parquet(path: Path, where: str) -> Iterator[pq.ParquetFile]:
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
