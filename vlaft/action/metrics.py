"""How far predicted actions are from the demonstrated ones, per dimension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlaft.action.written import Compared, Written

OPEN = 0.5  # a gripper command above is open


@dataclass(frozen=True)
class DimensionMetrics:
    """Means over examples, of one action dimension or, as `overall`, over all dimensions.

    Attributes:
        name: of the dimension.
        l1_normalized: mean distance between the written value and the demonstrated one as the head would write it, in
            [-1, 1] units; what training logs as action L1.
        l1_robot: mean distance to the demonstrated value as recorded, in the robot's units: the rounding to bins
            and the clipping to [q01, q99] are part of it. None overall, where units differ.
        saturated: share of predictions at the ends of the range.
        saturated_demonstrated: the same of the demonstrations.
        token_accuracy: share of tokens that are the demonstrated one; this and the rest are None without tokens.
        within_one_bin: share of action tokens at most one bin away from the demonstrated one.
        non_action: share of predicted tokens that stand for no action; decoded, each would be a full move.
    """

    name: str
    l1_normalized: float
    l1_robot: float | None
    saturated: float
    saturated_demonstrated: float
    token_accuracy: float | None = None
    within_one_bin: float | None = None
    non_action: float | None = None


@dataclass(frozen=True)
class ActionMetrics:
    """What one way of writing actions came to.

    Attributes:
        overall: the mean of `dimensions`.
        dimensions: one per action dimension.
        gripper_f1: F1 of "open", the last dimension above 0.5; None without a gripper, and where neither the
            demonstrations nor the predictions ever open it.
        steps: of chunks, each of their K steps alone, the action at the frame itself first; empty of one action at a
            time.
    """

    overall: DimensionMetrics
    dimensions: tuple[DimensionMetrics, ...]
    gripper_f1: float | None
    steps: tuple[ActionMetrics, ...] = ()


def measure_actions(
    written: Written,
    target: Written,
    predicted: NDArray[np.float64],
    demonstrated: NDArray[np.float32],
    *,
    ends: tuple[float, float],
    names: Sequence[str],
    gripper: bool,
) -> ActionMetrics:
    """Compare predictions with demonstrations.

    Args:
        written: what the model wrote, `[N, K, A]`.
        target: the demonstrated actions, as the model's head would write them.
        predicted: `[N, K, A]`, `written` in the robot's units.
        demonstrated: `[N, K, A]`, as recorded, in the robot's units.
        ends: least and largest value that the head is meant to write; what reaches them counts as saturated.
        names: one per dimension.
        gripper: whether the last dimension is a gripper, 1 = open.
    """
    columns: dict[str, NDArray] = {
        "l1_normalized": abs(written.actions - target.actions),
        "l1_robot": abs(predicted - demonstrated),
        "saturated": _at_an_end(written.actions, ends),
        "saturated_demonstrated": _at_an_end(target.actions, ends),
    }
    if written.token_ids is not None and target.token_ids is not None and written.is_action is not None:
        columns["saturated"] = columns["saturated"] & written.is_action
        columns["token_accuracy"] = written.token_ids == target.token_ids
        columns["within_one_bin"] = written.is_action & (abs(written.token_ids - target.token_ids) <= 1)
        columns["non_action"] = ~written.is_action
    opened = (predicted[..., -1] > OPEN, demonstrated[..., -1] > OPEN) if gripper else None

    def over(steps: slice) -> ActionMetrics:
        return _means(
            {key: values[:, steps] for key, values in columns.items()},
            names,
            f1_score(*(each[:, steps] for each in opened)) if opened is not None else None,
        )

    chunk = predicted.shape[1]
    steps = tuple(over(slice(step, step + 1)) for step in range(chunk)) if chunk > 1 else ()
    return replace(over(slice(None)), steps=steps)


def _means(columns: Mapping[str, NDArray], names: Sequence[str], f1: float | None) -> ActionMetrics:
    """Return the means of columns `[N, K, A]`, per dimension and over all."""
    means = {key: values.mean(axis=(0, 1), dtype=np.float64) for key, values in columns.items()}
    dimensions = tuple(
        DimensionMetrics(name, **{key: float(values[index]) for key, values in means.items()})
        for index, name in enumerate(names)
    )
    over_all = {key: float(values.mean()) for key, values in means.items() if key != "l1_robot"}
    overall = DimensionMetrics("all", l1_robot=None, **over_all)
    return ActionMetrics(overall, dimensions, f1)


def _at_an_end(actions: NDArray[np.float64], ends: tuple[float, float]) -> NDArray[np.bool_]:
    return (actions <= ends[0]) | (actions >= ends[1])


def f1_score(predicted: NDArray[np.bool_], demonstrated: NDArray[np.bool_]) -> float | None:
    """Return the harmonic mean of precision and recall; None where nothing is positive on either side.

    >>> f1_score(np.array([True, True, False]), np.array([True, False, False]))
    0.6666666666666666
    """
    both = 2 * int((predicted & demonstrated).sum())
    wrong = int((predicted != demonstrated).sum())
    return both / (both + wrong) if both + wrong else None


@dataclass(frozen=True)
class Metrics:
    """Means over the examples that were summed.

    Attributes:
        loss: of tokens, cross-entropy in nats per label, end-of-sequence included.
        action_accuracy: share of action tokens predicted exactly (argmax over the whole vocabulary); None of a head
            without tokens.
        action_l1: mean absolute difference of decoded actions, in normalised units ([-1, 1]).
        first_action_l1: the same of each chunk's first action; this and the next are None of one action at a time.
        later_actions_l1: of those behind it.
    """

    loss: float
    action_accuracy: float | None
    action_l1: float
    first_action_l1: float | None = None
    later_actions_l1: float | None = None


class MetricSums:
    """Running sums of one device.

    `[losses, their terms, correct tokens, tokens, differences, values, first actions' differences, their values]`.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(8, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, loss: Tensor, compared: Compared) -> None:
        """Add one forward pass with labels. Nothing is read back from the device.

        Args:
            loss: the pass's, a scalar.
            compared: its actions beside the demonstrated ones.
        """
        difference = (compared.actions - compared.demonstrated).abs()
        tokens = difference.new_zeros(()) if compared.correct is None else compared.correct.sum()
        values = difference.new_full((), difference.numel())
        first = difference[:, 0]
        self.sums += torch.stack(
            [
                loss.detach().double() * compared.terms,
                compared.terms.double(),
                tokens.double(),
                values.double() if compared.correct is not None else tokens.double(),
                difference.sum(dtype=torch.float64),
                values.double(),
                first.sum(dtype=torch.float64),
                difference.new_full((), first.numel()).double(),
            ]
        )

    def read(self) -> Metrics:
        """Return the means so far and begin anew: the one transfer from the device."""
        loss, terms, correct, tokens, difference, values, first, firsts = self.sums.tolist()
        self.sums.zero_()
        accuracy = correct / tokens if tokens else None
        metrics = Metrics(loss / max(terms, 1), accuracy, difference / max(values, 1))
        if values == firsts:
            return metrics
        return replace(
            metrics, first_action_l1=first / firsts, later_actions_l1=(difference - first) / (values - firsts)
        )
