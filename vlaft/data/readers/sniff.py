"""What a file is, by its first bytes, never by its name."""

from __future__ import annotations

from pathlib import Path

from vlaft.errors import DataError

_LFS = b"version https://git-lfs.github.com/spec/v1"
_HDF5 = b"\x89HDF\r\n\x1a\n"
_KNOWN = {
    b"PAR1": "a single parquet file",
    b"PK\x03\x04": "a zip archive (unpack it first)",
    b"\x1f\x8b": "a gzip archive (unpack it first)",
    b"\x93NUMPY": "a numpy array",
}


def first_bytes(path: Path, count: int = 64) -> bytes:
    """Return the first `count` bytes of a regular file.

    Raises:
        DataError: the path is no regular file (a pipe would block), or cannot be read.
    """
    if not path.is_file():
        raise DataError(f"'{path}' is no regular file")
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}") from error


def is_lfs_pointer(path: Path) -> bool:
    """Whether git stored only a pointer here, because git-lfs did not fetch the file itself."""
    return first_bytes(path).startswith(_LFS)


def refuse_lfs_pointer(path: Path) -> None:
    """Raise a DataError that says what to do when `path` is a git-LFS pointer."""
    if is_lfs_pointer(path):
        raise DataError(f"'{path}' is only a git-LFS pointer, its data were never downloaded: run git lfs pull")


def is_hdf5(path: Path) -> bool:
    """Whether the file opens with the HDF5 signature."""
    return first_bytes(path).startswith(_HDF5)


def describe_file(path: Path) -> str:
    """Say in a few words what an unknown file seems to be."""
    from vlaft.data.readers.rlds.records import starts_with_record

    head = first_bytes(path)
    if not head:
        return "an empty file"
    if starts_with_record(head):
        return "a single TFRecord shard (give the folder that holds dataset_info.json)"
    return next((words for magic, words in _KNOWN.items() if head.startswith(magic)), "a file of an unknown kind")
