"""What a forward pass says about the actions, summed on the device so that reading it costs one transfer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlaft.data.actions import ActionTokenizer
from vlaft.model.openvla import IGNORE_INDEX, OpenVLAOutput


@dataclass(frozen=True)
class Metrics:
    """Means over the examples that were summed.

    Attributes:
        loss: cross-entropy in nats per label, end-of-sequence included.
        action_accuracy: share of action tokens predicted exactly (argmax over the whole vocabulary).
        action_l1: mean absolute difference of decoded actions, in normalised units ([-1, 1]).
    """

    loss: float
    action_accuracy: float
    action_l1: float


class MetricSums:
    """Running sums of one device: `[sum of losses, labels, correct tokens, sum of differences, action tokens]`."""

    def __init__(self, actions: ActionTokenizer, device: torch.device) -> None:
        self.actions = actions
        self.centers = torch.tensor(actions.centers, dtype=torch.float32, device=device)
        self.sums = torch.zeros(5, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, output: OpenVLAOutput) -> None:
        """Add one forward pass with labels. Nothing is read back from the device."""
        assert output.loss is not None and output.logits is not None and output.label_ids is not None
        predicted = output.logits.argmax(dim=-1)
        # Upstream's test for an action token; it leaves the end-of-sequence label out.
        is_action = (output.label_ids >= self.actions.first_id) & (output.label_ids < self.actions.vocab_size)
        difference = (self._decode(predicted) - self._decode(output.label_ids)).abs()
        labels = (output.label_ids != IGNORE_INDEX).sum().double()
        self.sums += torch.stack(
            [
                output.loss.detach().double() * labels,
                labels,
                ((predicted == output.label_ids) & is_action).sum().double(),
                (difference * is_action).sum().double(),
                is_action.sum().double(),
            ]
        )

    def _decode(self, ids: Tensor) -> Tensor:
        index = (self.actions.vocab_size - ids - 1).clamp(0, len(self.centers) - 1)
        return self.centers[index]

    def read(self) -> Metrics:
        """Return the means so far and begin anew: the one transfer from the device."""
        loss, labels, correct, difference, tokens = self.sums.tolist()
        self.sums.zero_()
        return Metrics(loss / max(labels, 1), correct / max(tokens, 1), difference / max(tokens, 1))
