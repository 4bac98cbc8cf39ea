"""Frames that lie in memory, for episodes that tests make."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlaft.observation.images import Image


@dataclass(frozen=True)
class ArrayFrames:
    """uint8 `[T, height, width, 3]`; implements `vlaft.data.episode.Frames`."""

    array: Sequence[Image] | NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.array)

    def read(self, indices: Sequence[int]) -> Iterator[Image]:
        """Yield the frames of `indices` as they lie in memory."""
        for index in indices:
            yield np.asarray(self.array[index])
