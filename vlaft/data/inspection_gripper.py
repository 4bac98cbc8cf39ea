"""Guess a gripper's convention from its commands, and the steps that bring it to 1 = open, 0 = closed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vlaft.data.layout import StepSpec

Kind = Literal["binary", "nearly binary", "continuous", "relative", "constant"]

_AGREE = 0.8  # share of the episodes that have to start alike
_FEWEST = 3  # episodes


@dataclass(frozen=True)
class GripperGuess:
    """One gripper dimension of the action.

    Attributes:
        dim: which.
        label: its name, or what stands for one.
        low: least command.
        high: greatest command.
        kind: how the commands are spread; `"relative"` ones say open or close once and then stay at zero.
        open_at: the command that means open (`low` or `high`), or None where nothing tells.
        why: how that was found.
        steps: what brings it to 1 = open, 0 = closed: empty where it is so already, None where it is not known.
    """

    dim: int
    label: str
    low: float
    high: float
    kind: Kind
    open_at: float | None
    why: str
    steps: tuple[StepSpec, ...] | None


def gripper_dims(size: int, names: Sequence[str]) -> list[int]:
    """Return the dimensions that are called grippers; without names, the last of seven (OpenVLA's order)."""
    if names:
        return [number for number, name in enumerate(names) if "grip" in name.lower()]
    return [6] if size == 7 else []


def guess_gripper(
    commands: Sequence[NDArray[np.floating]], dim: int, label: str, size: int, format: str
) -> GripperGuess:
    """Guess the convention of one dimension.

    What its name says comes first ("gripper_close"), then what the format prescribes (robosuite: -1 = open), then what
    most demonstrations begin with: a hand that goes to take something is open.

    Args:
        commands: per episode `[T]`.
        dim: the dimension.
        label: its name, or that of the array it comes from.
        size: number of dimensions of the action.
        format: the source's format.
    """
    values = np.concatenate([np.asarray(command, dtype=np.float64) for command in commands])
    low, high = float(values.min()), float(values.max())
    kind = _kind(values, low, high)
    opens, why = None, "the data do not tell which end is open"
    firsts = np.asarray([float(command[0]) for command in commands if len(command)])
    at_high = float((firsts > (low + high) / 2).mean()) if len(firsts) else 0.5
    word = label.lower()
    if kind == "constant":
        why = "it never changes"
    elif kind == "relative":
        why = "it is zero but where it changes; taken as + closes, - opens"
    elif "close" in word or "closing" in word:
        opens, why = low, f"by its name, {label}"
    elif any(part in word for part in ("open", "width", "aperture")):
        opens, why = high, f"by its name, {label}"
    elif format in ("robomimic", "libero") and low < -0.5:
        opens, why = low, "robosuite's controllers take -1 as open"
    elif format == "aloha":
        opens, why = high, "ALOHA's gripper targets grow with the opening"
    elif len(firsts) >= _FEWEST and max(at_high, 1 - at_high) >= _AGREE:
        opens = high if at_high >= _AGREE else low
        share = round(max(at_high, 1 - at_high) * len(firsts))
        why = f"{share} of {len(firsts)} episodes begin with it"
    return GripperGuess(dim, label, low, high, kind, opens, why, _steps(kind, low, high, opens, dim, size))


def _kind(values: NDArray[np.float64], low: float, high: float) -> Kind:
    if high - low < 1e-9:
        return "constant"
    levels = np.unique(values.round(6))
    zero = float((np.abs(values) < 0.1 * max(abs(low), abs(high))).mean())
    if zero > 0.5 and low < 0 < high and min(-low, high) > 0.2 * max(-low, high):
        return "relative"
    if len(levels) == 2:
        return "binary"
    near = 0.05 * (high - low)
    return "nearly binary" if ((values < low + near) | (values > high - near)).mean() > 0.9 else "continuous"


def _steps(
    kind: Kind, low: float, high: float, opens: float | None, dim: int, size: int
) -> tuple[StepSpec, ...] | None:
    place = {} if dim == size - 1 else {"dim": dim}
    if kind == "relative":
        return ({"relative_gripper_to_absolute": place} if place else "relative_gripper_to_absolute",)
    if opens is None:
        return None
    # ends that are nearly those of a usual range stand for them
    ends = next((pair for pair in ((0.0, 1.0), (-1.0, 1.0)) if np.allclose((low, high), pair, atol=0.05)), (low, high))
    if ends == (0.0, 1.0):
        if opens == high:
            return ()
        return ({"invert_gripper": place} if place else "invert_gripper",)
    source = list(ends) if opens == high else [ends[1], ends[0]]
    return ({"scale_gripper": {"from_range": [float(f"{end:.4g}") for end in source], **place}},)
