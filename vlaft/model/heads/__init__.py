"""What a policy writes: one module per head, and what all of them have in common.

A head turns hidden states into normalised actions `[B, K, A]`: K actions of A dimensions from one forward pass. Whoever
trains, evaluates, compares or serves a model reads these, and what only some heads have (token ids) where it is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

    from vlaft.observation.batch import Observation


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


class Head(Protocol):
    """What trainer, evaluation, checks and policies ask of a head."""

    def loss(self, hidden: Tensor, label_ids: Tensor) -> Any:
        """Return the model's output, with its loss, for hidden states `[B, R, D]` at the R label positions."""

    def compared(self, output: Any, batch_size: int) -> Compared:
        """Return the actions of an output of `loss` beside the demonstrated ones; nothing waits for the device."""

    def predict(self, model: Any, observation: Observation, size: int, **options: Any) -> Written:
        """Write actions of `size` dimensions for each row of `observation`."""
