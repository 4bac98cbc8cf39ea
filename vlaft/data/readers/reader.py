"""What a reader is, one per format, and what every one asks of a file before it believes it.

A file is known by its first bytes, never by its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vlaft.data.episode import Episode
from vlaft.data.layout import Layout
from vlaft.errors import DataError

_LFS = b"version https://git-lfs.github.com/spec/v1"
_HDF5 = b"\x89HDF\r\n\x1a\n"


@dataclass(frozen=True)
class EpisodeRef:
    """Where one episode lies; small and picklable, so that worker processes can read it themselves.

    Attributes:
        index: position in the source, from 0, over all splits.
        name: as in `Episode.name`.
        split: the source's own split, or None.
        location: what the reader needs to find it (file, offset, key ...).
    """

    index: int
    name: str
    split: str | None
    location: tuple[str | int, ...]


class Reader(Protocol):
    """Turns one source on disk into episodes, lazily: opening it reads metadata only."""

    path: Path
    name: str  # the dataset's name: default statistics key
    format: str  # "rlds", "robomimic", "libero", "aloha", "hdf5", "lerobot-v2.1" ...
    layout: Layout  # the reader's own default
    warnings: list[str]  # metadata that was not believed, each one sentence

    def episodes(self) -> Sequence[EpisodeRef]:
        """List the episodes, in the source's order (numeric where names are numbered)."""

    def read(self, ref: EpisodeRef) -> Episode:
        """Read one episode; frames stay undecoded.

        Raises:
            DataError: the episode is damaged; the sentence names file and episode.
        """


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
