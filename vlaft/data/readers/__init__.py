"""Readers: one module per format, each turning a source on disk into episodes, lazily.

`open_source` looks at what lies on disk, never at the file's extension, and picks the reader.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vlaft.data.episode import Episode
from vlaft.data.layout import Layout


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


class Source(Protocol):
    """An opened source of episodes. Opening reads metadata only."""

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


def open_source(path: Path, options: dict[str, object] | None = None) -> Source:
    """Open whatever lies at `path`.

    Args:
        path: a file or a folder.
        options: what only one reader understands, from a preset or from the command line.

    Raises:
        DataError: nothing there, or nothing that a reader knows.
    """
    raise NotImplementedError
