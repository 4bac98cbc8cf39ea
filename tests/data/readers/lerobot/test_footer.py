"""Sizes from a parquet file's footer, as pyarrow tells them, and of footers on which pyarrow ends the process."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot_sets import LENGTHS, columns, make_v2, read_all, refused

from vlaft.data.readers.lerobot.footer import column_sizes
from vlaft.errors import DataError


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("dictionary", [True, False])
def test_they_are_those_that_pyarrow_tells(tmp_path: Path, dictionary: bool, statistics: bool) -> None:
    table = pa.table(columns(0, 50) | {"text": ["a", "b"] * 25, "flag": [True, None] * 25, "names": [["x", "y"]] * 50})
    file = tmp_path / "file.parquet"
    pq.write_table(table, file, row_group_size=20, use_dictionary=dictionary, write_statistics=statistics)
    metadata = pq.read_metadata(file)
    found = column_sizes(file)
    assert len(found) == metadata.num_row_groups == 3
    for number, group in enumerate(found):
        known = metadata.row_group(number)
        assert len(group) == known.num_columns
        for index, column in enumerate(group):
            told = known.column(index)
            assert column.path == told.path_in_schema and column.physical == told.physical_type
            assert (column.values, column.stored) == (told.num_values, told.total_compressed_size)
            assert column.unpacked == told.total_uncompressed_size
            assert column.dictionary == any("DICTIONARY" in encoding for encoding in told.encodings)


def test_every_byte_of_a_footer_may_be_damaged(tmp_path: Path) -> None:
    """One of these made pyarrow end the process when it was asked for a column's metadata."""
    make_v2(tmp_path, videos=False)
    file = tmp_path / "data/chunk-000/episode_000000.parquet"
    whole = file.read_bytes()
    begin = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    refusals = 0
    for at in range(begin, len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 7]) + whole[at + 1 :])
        try:
            episodes = read_all(tmp_path)[1]
            assert len(episodes) == len(LENGTHS)
        except DataError:
            refusals += 1
    assert refusals > 100


@pytest.mark.parametrize("footer", [b"", b"\x15", b"\x19\xfc\xff\xff\xff\x0f", b"\x1c" * 500, b"\x49\x1c" * 40])
def test_no_footer(tmp_path: Path, footer: bytes) -> None:
    make_v2(tmp_path, videos=False)
    file = tmp_path / "data/chunk-000/episode_000000.parquet"
    file.write_bytes(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(DataError, match="footer is damaged"):
        column_sizes(file)
    refused(tmp_path, "parquet file is damaged")
