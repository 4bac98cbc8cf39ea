"""What a parquet file's footer says of its columns, read without pyarrow.

pyarrow ends the process where a footer's statistics contradict its schema, as soon as one asks for a column's metadata
(seen in 26.0.1: `RowGroupMetaData.column` lets a C++ exception through); its readers raise. So sizes, which have to be
known before anything is unfolded, are taken from the footer itself: Thrift's compact protocol, of which only what is
needed is kept (parquet-format, `parquet.thrift`: FileMetaData, RowGroup, ColumnChunk, ColumnMetaData).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from vlaft.errors import DataError

_MAGIC = b"PAR1"
_DEEPEST = 32  # levels; a footer has eight
_PHYSICAL = ("BOOLEAN", "INT32", "INT64", "INT96", "FLOAT", "DOUBLE", "BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY")
_DICTIONARIES = (2, 8)  # PLAIN_DICTIONARY, RLE_DICTIONARY


@dataclass(frozen=True)
class ColumnSizes:
    """One column of one row group.

    Attributes:
        path: names of the fields down to it, joined by dots.
        physical: name of the type that is stored.
        dictionary: whether any page refers to a dictionary.
        values: how many there are.
        stored: bytes on disk.
        unpacked: bytes when decompressed, still encoded.
    """

    path: str
    physical: str
    dictionary: bool
    values: int
    stored: int
    unpacked: int


def column_sizes(file: Path) -> Sequence[Sequence[ColumnSizes]]:
    """Return the columns of each row group.

    Raises:
        DataError: the footer is damaged.
        OSError: the file cannot be read.
    """
    status = file.stat()
    return _read_once(file, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=8)
def _read_once(file: Path, size: int, modified_ns: int) -> list[list[ColumnSizes]]:
    with file.open("rb") as opened:
        size = opened.seek(0, 2)
        opened.seek(max(size - 8, 0))
        length, magic = struct.unpack("<I4s", opened.read(8)) if size >= 12 else (0, b"")
        if magic != _MAGIC or length > size - 12:
            raise _damaged(file)
        opened.seek(size - 8 - length)
        footer = opened.read(length)
    try:
        groups = _Compact(footer).struct()[4]
        return [[_column(entry[3]) for entry in group[1]] for group in groups]
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
        raise _damaged(file) from None


def _column(entry: Mapping[int, Any]) -> ColumnSizes:
    kind, encodings, path, values, unpacked, stored = (entry[key] for key in (1, 2, 3, 5, 6, 7))
    numbers = (kind, values, unpacked, stored)
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError
    return ColumnSizes(
        path=".".join(part.decode() for part in path),
        physical=_PHYSICAL[kind],
        dictionary=any(encoding in _DICTIONARIES for encoding in encodings),
        values=values,
        stored=stored,
        unpacked=unpacked,
    )


def _damaged(file: Path) -> DataError:
    return DataError(f"{file}: the parquet file's footer is damaged; fetch it again")


class _Compact:
    """Thrift's compact protocol: numbers of fields to their values."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def struct(self, level: int = 0) -> dict[int, Any]:
        if level > _DEEPEST:
            raise ValueError
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._signed()
            fields[number] = self._value(head & 15, level)
        return fields

    def _value(self, kind: int, level: int) -> Any:
        if kind in (1, 2):
            return int(kind == 1)
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._signed()
        if kind == 7:
            return self._bytes(8)
        if kind == 8:
            return self._bytes(self._unsigned())
        if kind in (9, 10):
            return self._list(level)
        if kind == 12:
            return self.struct(level + 1)
        raise ValueError  # a map, which no footer has

    def _list(self, level: int) -> list[Any]:
        head = self._byte()
        count = head >> 4 if head >> 4 < 15 else self._unsigned()
        kind = head & 15
        if count > len(self._data) - self._at:  # every element takes a byte or more
            raise ValueError
        if kind in (1, 2):
            return [int(self._byte() == 1) for _ in range(count)]
        return [self._value(kind, level + 1) for _ in range(count)]

    def _byte(self) -> int:
        value = self._data[self._at]
        self._at += 1
        return value

    def _bytes(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            raise ValueError
        self._at += count
        return self._data[self._at - count : self._at]

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError

    def _signed(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
