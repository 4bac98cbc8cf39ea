"""How far predicted actions are from the demonstrated ones, per dimension."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlaft.action.tokens import ActionTokenizer
from vlaft.model.openvla import IGNORE_INDEX, OpenVLAOutput

OPEN = 0.5  # a gripper command above is open


@dataclass(frozen=True)
class DimensionMetrics:
    """Means over examples, of one action dimension or, as `overall`, over all dimensions.

    Attributes:
        name: of the dimension.
        token_accuracy: share of tokens that are the demonstrated one.
        within_one_bin: share of action tokens at most one bin away from the demonstrated one.
        l1_normalized: mean distance between decoded tokens, in [-1, 1] units; what training logs as action L1.
        l1_robot: mean distance to the demonstrated value as recorded, in the robot's units: the rounding to bins
            and the clipping to [q01, q99] are part of it. None overall, where units differ.
        saturated: share of predictions in the first or last bin, the ends of the range.
        saturated_demonstrated: the same of the demonstrations.
        non_action: share of predicted tokens that stand for no action; decoded, each would be a full move.
    """

    name: str
    token_accuracy: float
    within_one_bin: float
    l1_normalized: float
    l1_robot: float | None
    saturated: float
    saturated_demonstrated: float
    non_action: float


@dataclass(frozen=True)
class DecodingMetrics:
    """What one way of decoding came to.

    Attributes:
        overall: the mean of `dimensions`.
        dimensions: one per action dimension.
        gripper_f1: F1 of "open", the last dimension above 0.5; None without a gripper, and where neither the
            demonstrations nor the predictions ever open it.
    """

    overall: DimensionMetrics
    dimensions: tuple[DimensionMetrics, ...]
    gripper_f1: float | None


def measure(
    ids: NDArray[np.int64],
    target_ids: NDArray[np.int64],
    predicted: NDArray[np.float64],
    demonstrated: NDArray[np.float32],
    *,
    actions: ActionTokenizer,
    names: Sequence[str],
    gripper: bool,
) -> DecodingMetrics:
    """Compare predictions with demonstrations.

    Args:
        ids: `[N, A]` predicted tokens.
        target_ids: `[N, A]` demonstrated tokens.
        predicted: `[N, A]`, `ids` decoded, in the robot's units.
        demonstrated: `[N, A]`, as recorded, in the robot's units.
        actions: the action tokenizer.
        names: one per dimension.
        gripper: whether the last dimension is a gripper, 1 = open.
    """
    is_action = actions.is_action(ids)
    columns = {
        "token_accuracy": ids == target_ids,
        "within_one_bin": is_action & (abs(_bins(ids, actions) - _bins(target_ids, actions)) <= 1),
        "l1_normalized": abs(actions.decode(ids) - actions.decode(target_ids)),
        "l1_robot": abs(predicted - demonstrated),
        "saturated": is_action & _at_the_end(ids, actions),
        "saturated_demonstrated": _at_the_end(target_ids, actions),
        "non_action": ~is_action,
    }
    means = {key: values.mean(axis=0, dtype=np.float64) for key, values in columns.items()}
    dimensions = tuple(
        DimensionMetrics(name, **{key: float(values[index]) for key, values in means.items()})
        for index, name in enumerate(names)
    )
    whole = {key: float(values.mean()) for key, values in means.items() if key != "l1_robot"}
    overall = DimensionMetrics("all", l1_robot=None, **whole)
    f1 = f1_score(predicted[:, -1] > OPEN, demonstrated[:, -1] > OPEN) if gripper else None
    return DecodingMetrics(overall, dimensions, f1)


def f1_score(predicted: NDArray[np.bool_], demonstrated: NDArray[np.bool_]) -> float | None:
    """Return the harmonic mean of precision and recall; None where nothing is positive on either side.

    >>> f1_score(np.array([True, True, False]), np.array([True, False, False]))
    0.6666666666666666
    """
    both = 2 * int((predicted & demonstrated).sum())
    wrong = int((predicted != demonstrated).sum())
    return both / (both + wrong) if both + wrong else None


def _bins(ids: NDArray[np.int64], actions: ActionTokenizer) -> NDArray[np.int64]:
    return actions.vocab_size - 1 - ids.astype(np.int64)


def _at_the_end(ids: NDArray[np.int64], actions: ActionTokenizer) -> NDArray[np.bool_]:
    """Two tokens decode to the highest value (see `ActionTokenizer`); both count."""
    bins = _bins(ids, actions)
    return (bins <= 0) | (bins >= actions.n_bins - 2)


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
