"""Windows of K actions, cut from converted rows when these are read: one conversion serves every K.

An example is what a policy reads at one frame, and the K actions from there on. A window never leaves its episode: the
last K - 1 frames are no examples (as in OpenVLA-OFT), unless `policy.tail` is `repeat`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlaft.data.columns import SplitColumns
from vlaft.data.store import ConvertedDataset
from vlaft.errors import DataError
from vlaft.recipe.settings import PolicyConfig

_PLACE = ("dataset", "episode_index", "frame_index")
_BLOCK = 2**18  # rows or examples looked at together


@dataclass(frozen=True)
class Windows:
    """The examples of one split of a dataset, in the order in which their frames are stored.

    A conversion stores an episode's frames one after another, and then a few numbers per episode say it all.

    Attributes:
        chunk: K.
        edges: int64 `[E + 1]`, where each episode begins, and last their end: rows, or places in `order`.
        counts: int64 `[E + 1]`, how many examples there are before each episode, and last of all.
        order: int64 `[R]`, the split's rows, episode by episode and frame by frame; None where they are stored so.
        numbers: int64, for each example its number counted in `order`; None where `order` is.
    """

    chunk: int
    edges: NDArray[np.int64]
    counts: NDArray[np.int64]
    order: NDArray[np.int64] | None = None
    numbers: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return int(self.counts[-1])

    def __getitem__(self, example: int) -> NDArray[np.int64]:
        """Return the K rows of an example; its last row is repeated where the episode ends before."""
        number = example if self.numbers is None else int(self.numbers[example])
        episode = int(np.searchsorted(self.counts, number, side="right")) - 1
        first = int(self.edges[episode]) + number - int(self.counts[episode])
        places = np.minimum(first + np.arange(self.chunk), self.edges[episode + 1] - 1)
        return places if self.order is None else self.order[places]

    def shown(self, examples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the row that shows the frame of each of some examples."""
        numbers = examples if self.numbers is None else self.numbers[examples]
        episodes = np.searchsorted(self.counts, numbers, side="right") - 1
        places = self.edges[episodes] + numbers - self.counts[episodes]
        return places if self.order is None else self.order[places]

    def blocks(self) -> Iterator[NDArray[np.int64]]:
        """Yield the rows that show the frames of all examples, some at a time."""
        for start in range(0, len(self), _BLOCK):
            yield self.shown(np.arange(start, min(start + _BLOCK, len(self)), dtype=np.int64))

    @property
    def rows(self) -> NDArray[np.int64]:
        """For each example the row that shows its frame, `[E]`."""
        return self.shown(np.arange(len(self), dtype=np.int64))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Steps of each episode; where K is 1 nobody looks, and the split is one."""
        return np.diff(self.edges)

    @property
    def short(self) -> int:
        """How many episodes have fewer than K steps."""
        return int((self.lengths < self.chunk).sum())

    @classmethod
    def of(cls, dataset: ConvertedDataset, split: str, policy: PolicyConfig) -> Windows:
        """Cut the windows of a split.

        Raises:
            DataError: a shard cannot be read, or a row does not say where it belongs.
        """
        if policy.chunk == 1:
            every = np.unique(np.array([0, dataset.rows(split)], dtype=np.int64))
            return cls(1, every, every)
        columns = SplitColumns.of(dataset, split)
        if any(columns.missing[name] for name in _PLACE):
            raise DataError(
                f"{dataset.path}: rows of split '{split}' lack their episode or frame; convert the source again"
            )
        name, episode, frame = (columns.arrays[column] for column in _PLACE)
        return cut(name, episode, frame, policy.chunk, repeat=policy.tail == "repeat")


def cut(
    dataset: NDArray[np.integer], episode: NDArray[np.integer], frame: NDArray[np.integer], chunk: int, *, repeat: bool
) -> Windows:
    """Cut windows of `chunk` rows.

    Args:
        dataset: number of each row's dataset, `[R]`.
        episode: number of its episode there.
        frame: its step in the episode; where one is missing, an episode ends and another begins.
        chunk: K.
        repeat: whether a frame with fewer than K actions to come is an example.
    """
    edges = _edges(dataset, episode, frame)
    order = None
    if not _stored_in_order(dataset, episode, frame, edges):
        order = np.lexsort((frame, episode, dataset)).astype(np.int64)
        edges = _edges(dataset[order], episode[order], frame[order])
    lengths = np.diff(edges)
    examples = lengths if repeat else np.maximum(lengths - chunk + 1, 0)
    counts = np.concatenate([np.zeros(1, np.int64), np.cumsum(examples, dtype=np.int64)])
    windows = Windows(chunk, edges, counts, order)
    if order is not None:
        numbers = np.argsort(windows.rows, kind="stable")
        windows = Windows(chunk, edges, counts, order, numbers)
    return windows


def _edges(dataset: NDArray[Any], episode: NDArray[Any], frame: NDArray[Any]) -> NDArray[np.int64]:
    """Return where stretches of rows begin that are one episode's, each a step after the one before; last, the end."""
    found = [np.zeros(min(1, len(frame)), np.int64)]
    for start in range(0, len(frame) - 1, _BLOCK):
        now, then = slice(start, min(start + _BLOCK, len(frame) - 1)), slice(start + 1, start + _BLOCK + 1)
        follows = (dataset[now] == dataset[then]) & (episode[now] == episode[then]) & (frame[now] + 1 == frame[then])
        found.append(np.flatnonzero(~follows).astype(np.int64) + start + 1)
    return np.concatenate([*found, [len(frame)]]).astype(np.int64)


def _stored_in_order(
    dataset: NDArray[Any], episode: NDArray[Any], frame: NDArray[Any], edges: NDArray[np.int64]
) -> bool:
    """Say whether no two of the stretches between edges would be one, or lie within each other, were rows sorted."""
    first, last = edges[:-1], edges[1:] - 1
    names, numbers = dataset[first], episode[first]
    sorted_by = np.lexsort((frame[first], numbers, names))
    before, after = sorted_by[:-1], sorted_by[1:]
    same = (names[before] == names[after]) & (numbers[before] == numbers[after])
    return not (same & (frame[last][before] + 1 >= frame[first][after])).any()
