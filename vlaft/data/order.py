"""The order in which examples come: an endless sequence that seed, epoch and position alone decide.

An epoch is a permutation of its examples. Up to `_LISTED` of them it is drawn as a list. Above, it is computed: a
Feistel network maps each position to an example and every example is met once, with a few numbers in memory whatever
the size, where lists of 10^8 examples would take 2.4 GB in every process. Runs of earlier versions have listed orders
of any size, and go on with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_LISTED = 2**20  # examples of an epoch: 24 MB of lists
_ROUNDS = 8
_TOGETHER = 4096  # positions that are computed at once: alone, a batch would take a millisecond
_FIXED = 2**63  # above all epochs: keys of the orders that are walked on from epoch to epoch


@dataclass(frozen=True)
class Runs:
    """Numbers of examples, as stretches that ascend by one.

    Attributes:
        starts: int64 `[S]`, the first of each stretch.
        counts: int64 `[S + 1]`, how many there are before each stretch, and last of all.
    """

    starts: NDArray[np.int64]
    counts: NDArray[np.int64]

    def __len__(self) -> int:
        return int(self.counts[-1])

    def at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the numbers at some places, from 0 on."""
        stretches = np.searchsorted(self.counts, places, side="right") - 1
        return self.starts[stretches] + places - self.counts[stretches]

    def below(self, limit: int) -> Runs:
        """Return those numbers that are below a limit."""
        lengths = np.clip(limit - self.starts, 0, np.diff(self.counts))
        return Runs.of(self.starts, lengths)

    @classmethod
    def of(cls, starts: Sequence[int] | NDArray[np.int64], lengths: Sequence[int] | NDArray[np.int64]) -> Runs:
        """Take stretches that begin so and are so long."""
        kept = np.asarray(lengths, dtype=np.int64) > 0
        counts = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.asarray(lengths, dtype=np.int64)[kept])])
        return cls(np.asarray(starts, dtype=np.int64)[kept], counts)


class Order:
    """Examples of several weights, shuffled anew in every epoch.

    A group of weight w gives w times its examples to every epoch: 2.0 means each one twice, 0.5 a different half of
    them in turn.

    Attributes:
        length: examples in one epoch.
        listed: whether an epoch is drawn as a list; may be set, for a run that began so.
    """

    def __init__(self, groups: Sequence[tuple[float, Runs]], seed: int) -> None:
        self._groups = groups
        self._seed = seed % 2**64
        self._counts = [round(weight * len(examples)) for weight, examples in groups]
        self.length = max(1, sum(self._counts))
        self.listed = self.length <= _LISTED
        self._lists: dict[int, NDArray[np.int64]] = {}
        self._blocks: dict[int, NDArray[np.int64]] = {}

    def examples(self, start: int, count: int) -> NDArray[np.int64]:
        """Return the examples at so many positions of the endless order, int64 `[count]`."""
        if self.listed:
            return self._at(np.arange(start, start + count))
        numbers = range(start // _TOGETHER, (start + count - 1) // _TOGETHER + 1)
        self._blocks = {
            number: self._blocks[number]
            if number in self._blocks
            else self._at(np.arange(number * _TOGETHER, (number + 1) * _TOGETHER))
            for number in numbers
        }
        first = start - numbers.start * _TOGETHER
        return np.concatenate([self._blocks[number] for number in numbers])[first : first + count]

    def _at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        epochs, offsets = np.divmod(positions, self.length)
        found = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs).tolist():
            own = epochs == epoch
            found[own] = self._list(epoch)[offsets[own]] if self.listed else self._computed(epoch, offsets[own])
        return found

    def _list(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._lists:
            for old in [known for known in self._lists if known < epoch - 1]:
                del self._lists[old]
            parts = []
            for number, (count, (_, examples)) in enumerate(zip(self._counts, self._groups, strict=True)):
                every = examples.at(np.arange(len(examples)))
                copies, rest = divmod(count, len(every))
                parts += [every] * copies
                if rest:
                    # a fixed order of the source, walked on from epoch to epoch: every row gets its turn
                    fixed = self._generator(_FIXED + number)
                    parts.append(fixed.permutation(every)[(epoch * rest + np.arange(rest)) % len(every)])
            self._lists[epoch] = self._generator(epoch).permutation(np.concatenate(parts))
        return self._lists[epoch]

    def _computed(self, epoch: int, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        places = scattered(offsets, self.length, self._keys(epoch))
        found = np.empty(len(places), np.int64)
        first = 0
        for number, (count, (_, examples)) in enumerate(zip(self._counts, self._groups, strict=True)):
            own = (places >= first) & (places < first + count)
            at = places[own] - first
            first += count
            rest = count % len(examples)
            whole = at < count - rest
            at[whole] %= len(examples)
            walked = (epoch * rest + at[~whole] - (count - rest)) % len(examples)
            at[~whole] = scattered(walked, len(examples), self._keys(_FIXED + number))
            found[own] = examples.at(at)
        return found

    def _generator(self, stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self._seed, stream]))

    def _keys(self, stream: int) -> NDArray[np.uint64]:
        key = np.array([self._seed, stream], np.uint64)
        return np.random.Generator(np.random.Philox(key=key)).integers(2**64, size=_ROUNDS, dtype=np.uint64)


def scattered(places: NDArray[np.int64], length: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return where a permutation of `length` numbers, which the keys choose, puts some of them.

    A balanced Feistel network permutes the numbers of 2k bits, of which there are fewer than four times `length`; what
    falls outside is mapped again until it falls inside, so that the rest is a permutation too.
    """
    half = np.uint64(max(1, ((length - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    found = places.astype(np.uint64)
    outside = np.arange(len(found))
    while len(outside):
        left, right = found[outside] >> half, found[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        found[outside] = (left << half) | right
        outside = outside[found[outside] >= length]
    return found.astype(np.int64)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix 64 bits as splitmix64 ends: every bit of the input changes each of the output half of the time."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
