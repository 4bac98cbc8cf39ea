"""What is small on disk and large in memory is refused before it is in memory."""

from __future__ import annotations

import tracemalloc
import zlib
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlaft.data.codec import SMALL
from vlaft.data.readers.hdf5.access import read_array
from vlaft.data.readers.lerobot.rows import read_bounded
from vlaft.data.readers.rlds.fields import decode_field, parse_features
from vlaft.errors import DataError


def test_a_zlib_field_unfolds_to_what_its_shape_promises() -> None:
    node = {"tensor": {"dtype": "float32", "encoding": "zlib", "shape": {"dimensions": ["4"]}}}
    fields, _ = parse_features({"featuresDict": {"features": {"steps": {"sequence": {"feature": node}}}}}, "here")
    values = np.arange(4, dtype=np.float32)
    decoded = decode_field(fields[0], {"steps": [zlib.compress(values.tobytes())] * 3}, "here")
    assert isinstance(decoded, np.ndarray) and np.array_equal(decoded, [values] * 3)
    bomb = zlib.compress(bytes(2**28))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="unpack to more than they can hold"):
            decode_field(fields[0], {"steps": [bomb]}, "here")
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_many_large_promises_are_refused_together() -> None:
    node = {"tensor": {"dtype": "uint8", "encoding": "zlib", "shape": {"dimensions": [str(2**24)]}}}
    fields, _ = parse_features({"featuresDict": {"features": {"steps": {"sequence": {"feature": node}}}}}, "here")
    packed = zlib.compress(bytes(2**24))
    with pytest.raises(DataError, match="unpack to more than they can hold"):
        decode_field(fields[0], {"steps": [packed] * 40}, "here")


@pytest.mark.parametrize("chunks", [(2**14, 8), (2**21, 8)])
def test_a_packed_array_of_nothing(tmp_path: Path, chunks: tuple[int, int]) -> None:
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        data = file.create_dataset("a", (2**21, 8), np.float64, chunks=chunks, compression="gzip")
        data[:] = 0
        small = file.create_dataset("b", (1000, 8), np.float64, chunks=(1000, 8), compression="gzip")
        small[:] = 0
        assert np.array_equal(read_array(small, "x"), np.zeros((1000, 8)))
        with pytest.raises(DataError, match="'/a' claim to unpack to 134217728, too many to be right"):
            read_array(data, "x")


def read(path: Path, table: pa.Table, **options: object) -> pa.Table:
    pq.write_table(table, path, **options)
    with pq.ParquetFile(path) as file:
        return read_bounded(file, path, range(file.num_row_groups), table.column_names)


def test_a_constant_parquet_column(tmp_path: Path) -> None:
    rows = SMALL // 8 + 1
    constant = pa.chunked_array([pa.array(np.zeros(rows // 9 + 1, np.int64))] * 9)
    with pytest.raises(DataError, match=r"bytes of a unfold to \d+ or more, too many to be right"):
        read(tmp_path / "x.parquet", pa.table({"a": constant}))


def test_a_long_text_again_and_again(tmp_path: Path) -> None:
    texts = pa.table({"t": pa.array(["x" * 2**19] * 1000)})
    before = pa.total_allocated_bytes()
    with pytest.raises(DataError, match="bytes of t unfold to"):
        read(tmp_path / "x.parquet", texts)
    assert pa.total_allocated_bytes() - before < 2 * SMALL


@pytest.mark.parametrize("rows", [0, 5, 3000])
def test_usual_columns_come_as_they_are(tmp_path: Path, rows: int) -> None:
    generator = np.random.default_rng(0)
    table = pa.table(
        {
            "a.b": pa.array(generator.normal(size=(rows, 7)).tolist(), pa.list_(pa.float64())),
            "t": pa.array([f"{number} {'push ' * 4000}" for number in range(rows)], pa.string()),
        }
    )
    assert read(tmp_path / "x.parquet", table, row_group_size=700).equals(table)
