"""Columns of a Parquet file, read without unfolding more than its metadata make plausible.

A column that holds one value a billion times takes a few bytes on disk. How many numbers there are stands in the
file's metadata; how long its texts become does not, so that these are read in small batches where they might be long.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from vlaft.data.codec import largest_unfolded
from vlaft.errors import DataError

_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}  # bytes of a number
_BATCH = 64  # rows; with texts of a megabyte each they take as much as anything may


def read_bounded(file: pq.ParquetFile, groups: Sequence[int], names: Sequence[str], where: str) -> pa.Table:
    """Return columns of some row groups.

    Args:
        file: the open file.
        groups: numbers of its row groups.
        names: of its columns.
        where: names the file in the message.

    Raises:
        DataError: they unfold to far more than what is stored of them.
    """
    stored, numbers, texts = _sizes(file.metadata, groups, names)
    limit = largest_unfolded(stored)
    if numbers > limit:
        raise DataError(f"{where}: {_told(names, stored, numbers)}")
    if numbers + texts <= limit:
        return file.read_row_groups(list(groups), columns=list(names), use_threads=False)
    batches: list[pa.RecordBatch] = []
    size = 0
    for batch in file.iter_batches(_BATCH, row_groups=list(groups), columns=list(names), use_threads=False):
        size += batch.nbytes
        if size > limit:
            raise DataError(f"{where}: {_told(names, stored, size)}")
        batches.append(batch)
    return pa.Table.from_batches(batches) if batches else file.read_row_groups([], columns=list(names))


def _told(names: Sequence[str], stored: int, size: int) -> str:
    listed = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    return f"the {stored} bytes of {listed} unfold to {size} or more, too many to be right; fetch or write it anew"


def _sizes(metadata: pq.FileMetaData, groups: Sequence[int], names: Sequence[str]) -> tuple[int, int, int]:
    """Return bytes on disk, bytes of the numbers, and the most bytes that the texts can have in memory."""
    stored = numbers = texts = 0
    prefixes = tuple(f"{name}." for name in names)
    for group in groups:
        row_group = metadata.row_group(group)
        for index in range(row_group.num_columns):
            column = row_group.column(index)
            if column.path_in_schema not in names and not column.path_in_schema.startswith(prefixes):
                continue
            stored += column.total_compressed_size
            width = _WIDTHS.get(column.physical_type)
            if width is not None:
                numbers += column.num_values * width
            elif any("DICTIONARY" in encoding for encoding in column.encodings):
                texts += column.num_values * column.total_uncompressed_size
            else:
                texts += column.num_values + column.total_uncompressed_size
    return stored, numbers, texts
