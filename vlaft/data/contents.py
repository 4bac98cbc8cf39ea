"""What lies in a source, whether its layout is known or not: names, shapes and types, as a tree."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vlaft.data.episode import Episode
from vlaft.errors import DataError


@dataclass(frozen=True)
class Entry:
    """One group, array, camera, file or attribute.

    Attributes:
        path: where it lies, parts divided by `/`; empty for the whole file.
        shape: of an array; None for whatever is none.
        kind: an array's type, `"group"`, `"attribute"` or `"file"`.
        note: what else there is to say: an attribute's value, how many more are named alike.
    """

    path: str
    shape: tuple[int, ...] | None
    kind: str
    note: str = ""


@dataclass(frozen=True)
class Contents:
    """What lies in one file or episode (`of`), in its own order."""

    of: str
    entries: tuple[Entry, ...]


def of_episode(episode: Episode) -> Contents:
    """Return the arrays and cameras of an episode; frames of which none can be decoded have no size."""
    entries = [_array(episode, name) for name in episode.arrays]
    for name, frames in episode.cameras.items():
        shape: tuple[int, ...] = (episode.length,)
        note = "camera"
        try:
            shape = (len(frames), *next(iter(frames.read([0]))).shape)
        except DataError:  # why is told of the episode, not of the tree
            note = "camera, damaged"
        entries.append(Entry(name, shape, "uint8", note))
    return Contents(f"episode {episode.name}", tuple(entries))


def _array(episode: Episode, name: str) -> Entry:
    try:
        values = np.asarray(episode.arrays[name])
    except DataError as error:
        return Entry(name, None, "damaged", str(error))
    return Entry(name, values.shape, "text" if values.dtype.kind in "OSU" else str(values.dtype))


def alike(names: Iterable[str]) -> Iterator[list[str]]:
    """Gather names that differ only in their numbers, in the order of the first of each.

    >>> list(alike(["traj_0", "meta", "traj_1"]))
    [['traj_0', 'traj_1'], ['meta']]
    """
    gathered: dict[str, list[str]] = {}
    for name in names:
        gathered.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    yield from gathered.values()


def named_alike(names: Sequence[str]) -> str:
    """Say that the first of `names` stands for all."""
    return f"one of {len(names):,} named alike, to {names[-1].rpartition('/')[2]}" if len(names) > 1 else ""
