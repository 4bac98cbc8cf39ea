"""TFRecord framing: what is whole is read, what is not is told."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlaft.data.readers.rlds.records import index_records, masked_crc32c, read_record, starts_with_record
from vlaft.errors import DataError


def frame(payload: bytes) -> bytes:
    length = struct.pack("<Q", len(payload))
    return length + struct.pack("<I", masked_crc32c(length)) + payload + struct.pack("<I", masked_crc32c(payload))


def read_all(shard: Path) -> list[bytes]:
    return [read_record(shard, number, offset) for number, offset in enumerate(index_records(shard))]


def test_real_shards(samples: Path) -> None:
    shard = samples / "rlds/bridge_dataset/1.0.0/bridge_dataset-train.tfrecord-00000-of-00001"
    records = read_all(shard)
    assert len(records) == 25
    assert sum(map(len, records)) == 2029933  # numBytes of dataset_info.json
    assert starts_with_record(shard.read_bytes()[:12])


def test_empty_file_has_no_records(tmp_path: Path) -> None:
    (tmp_path / "shard").touch()
    assert index_records(tmp_path / "shard") == []


def test_every_cut_is_told(tmp_path: Path) -> None:
    shard = tmp_path / "shard"
    first, second = frame(b"one"), frame(b"number two")
    for size in range(1, len(first + second)):
        shard.write_bytes((first + second)[:size])
        if size == len(first):
            assert read_all(shard) == [b"one"]
            continue
        number = int(size > len(first))
        with pytest.raises(DataError, match=rf"shard.*record {number} is cut off"):
            read_all(shard)


def test_every_flipped_bit_is_told(tmp_path: Path) -> None:
    shard = tmp_path / "shard"
    data = frame(b"one") + frame(b"number two")
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << (bit % 8)
        shard.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"record {int(bit // 8 >= len(frame(b'one')))} is damaged|the length of"):
            read_all(shard)


@pytest.mark.parametrize("length", [2**40, 2**63, 2**64 - 1, 2**64 - 17])
def test_absurd_length_with_a_good_checksum(tmp_path: Path, length: int) -> None:
    shard = tmp_path / "shard"
    packed = struct.pack("<Q", length)
    shard.write_bytes(packed + struct.pack("<I", masked_crc32c(packed)) + bytes(100))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="record 0 is cut off"):
            read_all(shard)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone"):
        index_records(tmp_path / "gone")
    with pytest.raises(DataError, match="cannot be read"):
        read_record(tmp_path, 0, 0)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(payloads=st.lists(st.binary(max_size=200), max_size=5))
def test_round_trip(tmp_path: Path, payloads: list[bytes]) -> None:
    shard = tmp_path / "shard"
    shard.write_bytes(b"".join(map(frame, payloads)))
    assert read_all(shard) == payloads


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(min_size=1, max_size=300))
def test_random_bytes(tmp_path: Path, data: bytes) -> None:
    shard = tmp_path / "shard"
    shard.write_bytes(data)
    with pytest.raises(DataError, match="shard"):
        read_all(shard)
