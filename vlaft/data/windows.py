"""Windows of K actions, cut from converted rows when these are read: one conversion serves every K.

An example is what a policy reads at one frame, and the K actions from there on. A window never leaves its episode: the
last K - 1 frames are no examples (as in OpenVLA-OFT), unless `policy.tail` is `repeat`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlaft.data.store import ConvertedDataset
from vlaft.errors import DataError
from vlaft.recipe.settings import PolicyConfig

_PLACE = ("dataset", "episode_index", "frame_index")


@dataclass(frozen=True)
class Windows:
    """The examples of one split of a dataset, in the order in which their frames are stored.

    Attributes:
        chunk: K.
        order: int64 `[R]`, the split's rows, episode by episode and frame by frame.
        first: int64 `[E]`, for each example the place in `order` where its window begins.
        last: int64 `[E]`, and the last place in `order` of its episode.
        lengths: int64, steps of each episode; empty where K is 1 and nobody looked.
    """

    chunk: int
    order: NDArray[np.int64]
    first: NDArray[np.int64]
    last: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, example: int) -> NDArray[np.int64]:
        """Return the K rows of an example; its last row is repeated where the episode ends before."""
        return self.order[np.minimum(self.first[example] + np.arange(self.chunk), self.last[example])]

    @property
    def rows(self) -> NDArray[np.int64]:
        """For each example the row that shows its frame, `[E]`."""
        return self.order[self.first]

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
            every = np.arange(dataset.rows(split), dtype=np.int64)
            return cls(1, every, every, every, every[:0])
        table = dataset.table(split, _PLACE)
        if any(column.null_count for column in table.columns):
            raise DataError(
                f"{dataset.path}: rows of split '{split}' lack their episode or frame; convert the source again"
            )
        name = table["dataset"].combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
        episode, frame = (table[column].to_numpy() for column in _PLACE[1:])
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
    order = np.lexsort((frame, episode, dataset)).astype(np.int64)
    before, after = order[:-1], order[1:]
    follows = (dataset[before] == dataset[after]) & (episode[before] == episode[after])
    follows &= frame[before] + 1 == frame[after]
    ends = np.append(np.flatnonzero(~follows), len(order) - 1)[: len(order)]  # the last place of each episode
    lengths = np.diff(ends, prepend=-1)
    last = np.repeat(ends, lengths)
    first = np.arange(len(order)) if repeat else np.flatnonzero(np.arange(len(order)) + chunk - 1 <= last)
    first = first[np.argsort(order[first], kind="stable")]
    return Windows(chunk, order, first, last[first], lengths)
