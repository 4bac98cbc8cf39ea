"""The Example parser against the wire format, written by hand here."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlaft.data.readers.rlds.records import example_message, parse_example
from vlaft.errors import DataError


def varint(value: int) -> bytes:
    value &= 2**64 - 1
    result = bytearray()
    while value > 127:
        result.append(value & 127 | 128)
        value >>= 7
    result.append(value)
    return bytes(result)


def message(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def example(**features: bytes) -> bytes:
    entries = (message(1, message(1, key.encode()) + message(2, feature)) for key, feature in features.items())
    return message(1, b"".join(entries))


def test_three_kinds_packed() -> None:
    payload = example(
        b=message(1, message(1, b"one") + message(1, b"")),
        f=message(2, message(1, struct.pack("<3f", 1.5, -2.0, float("inf")))),
        i=message(3, message(1, varint(-5) + varint(2**40))),
    )
    parsed = parse_example(payload, "record 0")
    assert parsed["b"] == [b"one", b""]
    assert isinstance(parsed["f"], np.ndarray) and parsed["f"].dtype == np.float32
    assert parsed["f"].tolist() == [1.5, -2.0, float("inf")]
    assert isinstance(parsed["i"], np.ndarray) and parsed["i"].dtype == np.int64
    assert parsed["i"].tolist() == [-5, 2**40]


def test_unpacked_and_split_lists_are_joined() -> None:
    unpacked = varint(1 << 3 | 5) + struct.pack("<f", 1.0)
    packed = message(1, struct.pack("<2f", 2.0, 3.0))
    payload = example(f=message(2, unpacked + packed) + message(2, packed), i=message(3, varint(1 << 3) + varint(7)))
    parsed = parse_example(payload, "record 0")
    assert list(parsed["f"]) == [1.0, 2.0, 3.0, 2.0, 3.0]
    assert list(parsed["i"]) == [7]


def test_feature_without_a_kind_is_empty() -> None:
    assert parse_example(example(x=b""), "record 0") == {"x": []}
    assert parse_example(b"", "record 0") == {}


def test_damage_names_the_record() -> None:
    with pytest.raises(DataError, match="record 3 of shard x"):
        parse_example(example(x=message(1, message(1, b"text")))[:-2], "record 3 of shard x")


def test_length_behind_the_end_allocates_nothing() -> None:
    with pytest.raises(DataError):
        parse_example(varint(1 << 3 | 2) + varint(2**31 - 1) + b"abc", "record 0")


@settings(max_examples=100, deadline=None)
@given(
    floats=st.lists(st.floats(width=32, allow_nan=False)),
    integers=st.lists(st.integers(-(2**63), 2**63 - 1)),
    texts=st.lists(st.binary(max_size=20)),
)
def test_round_trip(floats: list[float], integers: list[int], texts: list[bytes]) -> None:
    written = example_message()()
    written.features.feature["f"].float_list.value.extend(floats)
    written.features.feature["i"].int64_list.value.extend(integers)
    written.features.feature["b"].bytes_list.value.extend(texts)
    parsed = parse_example(written.SerializeToString(), "record 0")
    assert list(parsed["f"]) == floats
    assert list(parsed["i"]) == integers
    assert parsed["b"] == texts


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200))
def test_random_bytes(data: bytes) -> None:
    try:
        parsed = parse_example(data, "record 0")
    except DataError:
        return
    assert sum(len(values) for values in parsed.values()) <= len(data)


@settings(max_examples=100, deadline=None)
@given(position=st.integers(0, 10**4), patch=st.binary(min_size=1, max_size=6))
def test_mutated_bytes(position: int, patch: bytes) -> None:
    data = bytearray(
        example(a=message(1, message(1, b"one")), f=message(2, message(1, struct.pack("<4f", 1, 2, 3, 4))))
    )
    data[position % len(data) : position % len(data) + len(patch)] = patch
    try:
        parsed = parse_example(bytes(data), "record 0")
    except DataError:
        return
    assert sum(len(values) for values in parsed.values()) <= len(data)
