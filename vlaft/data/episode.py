"""One demonstration, as every reader gives it and every later step takes it.

* A reader fills `arrays` and `cameras` with what lies in the source, under the source's own names, unchanged.
* A `Layout` (see `vlaft.data.layout`) says which of them are the action, the state and the cameras to keep.
* Standardizing steps (see `vlaft.data.standardize.steps`) then return changed copies; nothing is changed in place.

Frames are decoded only when they are read, and always in order: a video is decoded once from its start.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from vlaft.observation.images import Image


@runtime_checkable
class Frames(Protocol):
    """The frames of one camera over one episode, decoded on demand."""

    def __len__(self) -> int:
        """Number of frames T."""

    def read(self, indices: Sequence[int]) -> Iterator[Image]:
        """Yield the frames of `indices` (in increasing order), each uint8 `[height, width, 3]` RGB.

        Raises:
            DataError: a frame is damaged; the sentence names the file, episode and step.
        """


@dataclass(frozen=True)
class SelectedFrames:
    """The frames of `source` at `indices`, in increasing order."""

    source: Frames
    indices: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, indices: Sequence[int]) -> Iterator[Image]:
        """Yield the frames of the source that `indices` stand for."""
        return self.source.read([int(self.indices[index]) for index in indices])


@dataclass(frozen=True)
class MappedFrames:
    """The frames of `source`, each passed through `function` (uint8 `[H, W, 3]` to uint8 `[H', W', 3]`)."""

    source: Frames
    function: Callable[[Image], Image]

    def __len__(self) -> int:
        return len(self.source)

    def read(self, indices: Sequence[int]) -> Iterator[Image]:
        """Yield the frames of `indices`, each passed through `function`."""
        return (self.function(image) for image in self.source.read(indices))


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One demonstration of T steps.

    Attributes:
        index: position in the source, from 0, over all of its splits.
        name: where it came from, for messages and for the `source` column: `"demo_3"`, `"train[12]"`.
        length: T.
        instruction: what the demonstration does, as the source says it, most of the time where its steps differ;
            empty when the source does not say.
        instructions: that of each step, T texts, where they differ; empty when `instruction` holds for all.
        arrays: per-step arrays of the source, each `[T, ...]`, by the source's own names.
        cameras: frames by the source's own camera names.
        split: the source's own split, or None when it has none.
        fps: control rate in Hz, or None when the source does not say.
        action: `[T, A]` float32, once a layout was applied.
        action_names: one name per action dimension, kept in step with `action`; empty when unknown.
        state: `[T, S]` float32, once a layout that names a state was applied.
    """

    index: int
    name: str
    length: int
    instruction: str = ""
    instructions: tuple[str, ...] = ()
    arrays: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)
    cameras: Mapping[str, Frames] = field(default_factory=dict)
    split: str | None = None
    fps: float | None = None
    action: NDArray[np.float32] | None = None
    action_names: tuple[str, ...] = ()
    state: NDArray[np.float32] | None = None

    @property
    def step_instructions(self) -> tuple[str, ...]:
        """The instruction of each step, T texts."""
        return self.instructions or (self.instruction,) * self.length

    def select(self, indices: NDArray[np.int64]) -> Episode:
        """Return the episode with only the steps `indices` (`[T']`, increasing)."""
        return replace(
            self,
            length=len(indices),
            instructions=tuple(self.instructions[index] for index in indices) if self.instructions else (),
            arrays=_SelectedArrays(self.arrays, indices),
            cameras={name: SelectedFrames(frames, indices) for name, frames in self.cameras.items()},
            action=None if self.action is None else self.action[indices],
            state=None if self.state is None else self.state[indices],
        )


@dataclass(frozen=True)
class _SelectedArrays(Mapping[str, NDArray[np.generic]]):
    """`arrays[name][indices]`, read on access, so that a lazy mapping stays lazy."""

    arrays: Mapping[str, NDArray[np.generic]]
    indices: NDArray[np.int64]

    def __getitem__(self, name: str) -> NDArray[np.generic]:
        return self.arrays[name][self.indices]

    def __contains__(self, name: object) -> bool:
        return name in self.arrays  # Mapping's own would read the array

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)


def gather(texts: Sequence[str], where: str, warnings: list[str]) -> tuple[str, tuple[str, ...]]:
    """Return an `Episode`'s `instruction` and `instructions`: the most frequent text; each one's own where they differ.

    The earliest counts as the most frequent of equals. A step without a text gets the only one that there is, else the
    most frequent, with a warning.

    Args:
        texts: of the T steps, blank where one has none.
        where: names the episode in the warning.
        warnings: gets it, once.
    """
    counts = Counter(text for text in texts if text.strip())
    if not counts:
        return "", ()
    most = counts.most_common(1)[0][0]
    if len(counts) == 1:
        return most, ()
    blank = len(texts) - counts.total()
    told = (
        f"{where}: the rows name {len(counts)} instructions, and {blank} of {len(texts)} none; those get the most"
        f" frequent: '{most[:80]}'"
    )
    if blank and told not in warnings:
        warnings.append(told)
    return most, tuple(text if text.strip() else most for text in texts)
