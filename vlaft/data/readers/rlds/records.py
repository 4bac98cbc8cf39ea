"""TFRecord shards: framing, checksums, and an index of where each record starts.

Framing, repeated to the end of the file (tensorflow/core/lib/io/record_writer.h):

    uint64  length of the payload, little endian
    uint32  masked CRC32C of those eight bytes
    bytes   payload
    uint32  masked CRC32C of the payload

There is no footer: a file that was cut between two records looks whole, so the caller has to know how many
records to expect. No length is believed before its checksum holds and the file is long enough for it.
"""

from __future__ import annotations

import struct
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from vlaft.errors import DataError

_HEADER = struct.Struct("<QI")
_CHECKSUM = struct.Struct("<I")
_OVERHEAD = _HEADER.size + _CHECKSUM.size
_AGAIN = "download or copy the file again"
Stored = NDArray[np.float32] | NDArray[np.int64] | list[bytes]
_PACKAGE = "vlaft.tf_example"


def masked_crc32c(data: bytes) -> int:
    """Return the CRC32C of `data`, rotated and offset as TFRecord stores it.

    >>> hex(masked_crc32c(b"123456789"))
    '0xc78ab0e5'
    """
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def starts_with_record(head: bytes) -> bool:
    """Whether `head` (12 bytes or more) is a record's header with a checksum that holds."""
    if len(head) < _HEADER.size:
        return False
    _, checksum = _HEADER.unpack_from(head)
    return masked_crc32c(head[:8]) == checksum


def index_records(shard: Path) -> list[int]:
    """Return the offset of every record, reading only the 12-byte headers.

    Raises:
        DataError: the shard cannot be read, a length is damaged, or the last record is cut off.
    """
    offsets: list[int] = []
    offset = 0
    try:
        with shard.open("rb", buffering=0) as file:
            size = file.seek(0, 2)
            while offset < size:
                length = _read_length(file, shard, len(offsets), offset, size)
                offsets.append(offset)
                offset += length + _OVERHEAD
    except OSError as error:
        raise DataError(f"shard '{shard}' cannot be read: {error.strerror}") from error
    return offsets


def read_record(shard: Path, number: int, offset: int) -> bytes:
    """Return the payload of the record that starts at `offset`.

    Args:
        shard: the file.
        number: position of the record in the shard, for messages.
        offset: as `index_records` gave it.

    Raises:
        DataError: the shard cannot be read, the record is cut off, or a checksum does not hold.
    """
    try:
        with shard.open("rb", buffering=0) as file:
            size = file.seek(0, 2)
            length = _read_length(file, shard, number, offset, size)
            body = _read_exactly(file, length + _CHECKSUM.size)
    except OSError as error:
        raise DataError(f"shard '{shard}' cannot be read: {error.strerror}") from error
    if len(body) != length + _CHECKSUM.size:
        raise DataError(f"shard '{shard}': record {number} is cut off; {_AGAIN}")
    payload = body[:length]
    if masked_crc32c(payload) != _CHECKSUM.unpack_from(body, length)[0]:
        raise DataError(f"shard '{shard}': record {number} is damaged (its checksum does not hold); {_AGAIN}")
    return payload


def _read_length(file: BinaryIO, shard: Path, number: int, offset: int, size: int) -> int:
    file.seek(offset)
    header = _read_exactly(file, _HEADER.size)
    if len(header) < _HEADER.size:
        raise DataError(f"shard '{shard}': record {number} is cut off at byte {size}; {_AGAIN}")
    if not starts_with_record(header):
        raise DataError(f"shard '{shard}': the length of record {number} is damaged (byte {offset}); {_AGAIN}")
    length: int = _HEADER.unpack(header)[0]
    if length > size - offset - _OVERHEAD:
        raise DataError(
            f"shard '{shard}': record {number} is cut off: it needs {length} bytes from byte {offset}"
            f" and the file ends at {size}; {_AGAIN}"
        )
    return length


def _read_exactly(file: BinaryIO, count: int) -> bytes:
    """Read `count` bytes of an unbuffered file, or what there is: one system call may give less."""
    parts = []
    while count > 0 and (part := file.read(count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def parse_example(payload: bytes, where: str) -> dict[str, Stored]:
    """Return the features of one serialized Example.

    Args:
        payload: one record.
        where: names the record in messages.

    Returns:
        Key to float32 `[N]`, int64 `[N]` or a list of N byte strings; a feature without a kind is an empty list.

    Raises:
        DataError: the bytes are no Example.
    """
    example = example_message()()
    try:
        example.ParseFromString(payload)
    except DecodeError as error:
        raise DataError(f"{where} is no tf.train.Example") from error
    return {key: _values(feature) for key, feature in example.features.feature.items()}


def _values(feature: Any) -> Stored:
    kind = feature.WhichOneof("kind")
    if kind == "float_list":
        values = feature.float_list.value
        return np.fromiter(values, np.float32, len(values))
    if kind == "int64_list":
        values = feature.int64_list.value
        return np.fromiter(values, np.int64, len(values))
    return list(feature.bytes_list.value)


@cache
def example_message() -> Any:
    """Return the message class `Example`, for whoever writes records too."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name=f"{_PACKAGE}.proto", package=_PACKAGE, syntax="proto3")

    def add(message: Any, name: str, number: int, kind: Any, *, repeated: bool = False, of: str = "") -> Any:
        label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
        added = message.field.add(name=name, number=number, type=kind, label=label)
        if of:
            added.type_name = f".{_PACKAGE}.{of}"
        return added

    lists = {"BytesList": field.TYPE_BYTES, "FloatList": field.TYPE_FLOAT, "Int64List": field.TYPE_INT64}
    for name, kind in lists.items():
        add(file.message_type.add(name=name), "value", 1, kind, repeated=True)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, (name, of) in enumerate(zip(("bytes_list", "float_list", "int64_list"), lists, strict=True), start=1):
        add(feature, name, number, field.TYPE_MESSAGE, of=of).oneof_index = 0
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    add(entry, "key", 1, field.TYPE_STRING)
    add(entry, "value", 2, field.TYPE_MESSAGE, of="Feature")
    add(features, "feature", 1, field.TYPE_MESSAGE, repeated=True, of="Features.FeatureEntry")
    add(file.message_type.add(name="Example"), "features", 1, field.TYPE_MESSAGE, of="Features")
    # A pool of our own: TensorFlow, if it is loaded too, registers its own message in the default pool.
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Example"))
