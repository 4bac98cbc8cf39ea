"""Normalised actions `[B, K, A]` as a head writes them, with what only tokens have beside them where it is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Written:
    """Actions that a head wrote by itself, in the host's memory.

    Attributes:
        actions: float64 `[B, K, A]`, normalised.
        token_ids: int64 `[B, K, A]`, of a head that writes tokens; else None.
        is_action: bool `[B, K, A]`, False where a token stands for no action, which `actions` shows as a full move;
            None of a head without tokens.
    """

    actions: NDArray[np.float64]
    token_ids: NDArray[np.int64] | None = None
    is_action: NDArray[np.bool_] | None = None

    def __getitem__(self, rows: Sequence[int] | NDArray[np.integer]) -> Written:
        """Return some of the B rows."""
        return Written(*(None if field is None else field[rows] for field in self._fields()))  # type: ignore[arg-type]

    @classmethod
    def joined(cls, parts: Sequence[Written]) -> Written:
        """Return the rows of several, one after the other."""
        columns = zip(*(part._fields() for part in parts), strict=True)
        return cls(*(None if column[0] is None else np.concatenate(column) for column in columns))  # type: ignore[arg-type]

    def _fields(self) -> tuple[NDArray | None, ...]:
        return self.actions, self.token_ids, self.is_action


@dataclass(frozen=True)
class Compared:
    """Actions of a forward pass with labels beside the demonstrated ones, on the model's device.

    Attributes:
        actions: float32 `[B, K, A]`, normalised.
        demonstrated: float32 `[B, K, A]`, as this head would write them.
        correct: bool `[B, K, A]`, whether the token is the demonstrated one; None of a head without tokens.
        terms: number of terms that the loss is the mean of, a scalar.
    """

    actions: Tensor
    demonstrated: Tensor
    correct: Tensor | None
    terms: Tensor
