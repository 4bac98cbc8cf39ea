"""What a policy writes: one module per head, and what all of them have in common.

A head turns hidden states into normalised actions `[B, K, A]`: K actions of A dimensions from one forward pass. Whoever
trains, evaluates, compares or serves a model reads these, and what only some heads have (token ids) where it is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from vlaft.action.written import Compared, Written

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from vlaft.observation.batch import Observation


class Head(Protocol):
    """What trainer, evaluation, checks and policies ask of a head."""

    @property
    def ends(self) -> tuple[float, float]:
        """The least and the largest value that it is meant to write."""

    def loss(self, hidden: Tensor, label_ids: Tensor, actions: Tensor | None) -> Any:
        """Return the model's output, with its loss, for hidden states `[B, R, D]` at the R label positions."""

    def compared(self, output: Any, batch_size: int) -> Compared:
        """Return the actions of an output of `loss` beside the demonstrated ones; nothing waits for the device."""

    def as_written(self, actions: NDArray[np.floating]) -> Written:
        """Return normalised actions `[B, K, A]` as this head would write them."""

    def predict(self, model: Any, observation: Observation, size: int, **options: Any) -> Written:
        """Write actions of `size` dimensions for each row of `observation`."""

    def predict_both(
        self, model: Any, observation: Observation, demonstrated: Written
    ) -> tuple[Written | None, Written]:
        """Write actions teacher-forced, where that is another thing (else None), and as `predict` does."""
