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
from pathlib import Path
from typing import BinaryIO

import google_crc32c

from vlaft.errors import DataError

_HEADER = struct.Struct("<QI")
_CHECKSUM = struct.Struct("<I")
_OVERHEAD = _HEADER.size + _CHECKSUM.size
_AGAIN = "download or copy the file again"


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
