"""Guess a gripper's convention from its commands, and the steps that bring it to 1 = open, 0 = closed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vlaft.data.gripper import relative_to_absolute
from vlaft.data.gripper_evidence import FEWEST_EPISODES, MOST_EPISODES, Opening, gripper_step, opens_with_high
from vlaft.data.layout import StepSpec

Kind = Literal["binary", "nearly binary", "continuous", "relative", "constant"]


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


def guess_gripper(
    commands: Sequence[NDArray[np.floating]],
    dim: int,
    label: str,
    size: int,
    format: str,
    openings: Sequence[Opening | None] | None = None,
) -> GripperGuess:
    """Guess the convention of one dimension.

    The measured fingers tell it, else what most demonstrations begin with: a hand that goes to take something is open.
    What its name says ("gripper_close"), or the format prescribes (robosuite: -1 = open), holds where neither tells,
    and where they agree; where they contradict it, nothing is known.

    Args:
        commands: per episode `[T]`.
        dim: the dimension.
        label: its name, or that of the array it comes from.
        size: number of dimensions of the action.
        format: the source's format.
        openings: per episode how far the fingers are apart `[T]`, or None.
    """
    values = np.concatenate([np.asarray(command, dtype=np.float64) for command in commands])
    low, high = float(values.min()), float(values.max())
    kind = _kind(values, low, high)
    openings = openings or [None] * len(commands)
    if kind == "constant":
        return GripperGuess(dim, label, low, high, kind, None, "it never changes", None)
    if kind == "relative":
        closes, why = _closes_with_positive(commands, openings)
        return GripperGuess(dim, label, low, high, kind, None, why, _relative_steps(closes, dim, size))
    shown, seen = _shown(commands, low, high, opens_with_high(commands, openings))
    ruled, rule = _ruled(label, format, low, high)
    if ruled is None:
        opens, why = shown, seen
    elif shown is None or shown == ruled:
        opens, why = ruled, rule
    else:
        opens, why = None, f"it is not known which end is open: {high if ruled == high else low:.3g} {rule}, but {seen}"
    return GripperGuess(dim, label, low, high, kind, opens, why, _steps(low, high, opens, dim, size))


def _ruled(label: str, format: str, low: float, high: float) -> tuple[float | None, str]:
    """Return the command that should be open by name or format, and which of them says so."""
    word = label.lower()
    if "close" in word or "closing" in word:
        return low, f"by its name, {label}"
    if any(part in word for part in ("open", "width", "aperture")):
        return high, f"by its name, {label}"
    if format in ("robomimic", "libero") and low < -0.5:
        return low, "robosuite's controllers take -1 as open"
    if format == "isaac-lab" and low < -0.5:
        return high, "Isaac Lab's binary joint action takes +1 as open"
    if format == "aloha":
        return high, "ALOHA's gripper targets grow with the opening"
    return None, ""


def _shown(
    commands: Sequence[NDArray[np.floating]], low: float, high: float, measured: bool | None
) -> tuple[float | None, str]:
    """Return the command that is open by what the demonstrations show, and how that was found."""
    if measured is not None:
        opens = high if measured else low
        return opens, f"the measured fingers open with {opens:.3g}"
    firsts = np.asarray([float(command[0]) for command in commands if len(command)])
    at_high = int((firsts > (low + high) / 2).sum())
    most = max(at_high, len(firsts) - at_high)
    if len(firsts) < FEWEST_EPISODES or most < MOST_EPISODES * len(firsts):
        return None, "the data do not tell which end is open"
    opens = high if at_high == most else low
    return opens, f"{most} of {len(firsts)} episodes begin with {opens:.3g}"


def _closes_with_positive(
    commands: Sequence[NDArray[np.floating]], openings: Sequence[Opening | None]
) -> tuple[bool | None, str]:
    """Tell whether relative commands above zero close, as OpenVLA takes them, and how that was found."""
    intro = "it is zero but where it changes"
    closes = opens_with_high([relative_to_absolute(command.astype(np.float32)) for command in commands], openings)
    if closes is not None:
        return closes, f"{intro}; the measured fingers {'close' if closes else 'open'} with +"
    given = [np.asarray(command)[np.abs(command) > 0.1 * np.abs(command).max()] for command in commands if len(command)]
    firsts = [float(command[0]) for command in given if len(command)]
    closing = sum(first > 0 for first in firsts)
    most = max(closing, len(firsts) - closing)
    if len(firsts) < FEWEST_EPISODES or most < MOST_EPISODES * len(firsts):
        return None, f"{intro}; the data do not tell whether + closes or opens"
    closes = closing == most
    return closes, f"{intro}; {most} of {len(firsts)} episodes begin with {'+' if closes else '-'}, which should close"


def _relative_steps(closes: bool | None, dim: int, size: int) -> tuple[StepSpec, ...] | None:
    if closes is None:
        return None
    names = ["relative_gripper_to_absolute", *([] if closes else ["invert_gripper"])]
    return tuple(gripper_step(name, dim, size) for name in names)


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


def _steps(low: float, high: float, opens: float | None, dim: int, size: int) -> tuple[StepSpec, ...] | None:
    if opens is None:
        return None
    # ends that are nearly those of a usual range stand for them
    ends = next((pair for pair in ((0.0, 1.0), (-1.0, 1.0)) if np.allclose((low, high), pair, atol=0.05)), (low, high))
    if ends == (0.0, 1.0):
        return () if opens == high else (gripper_step("invert_gripper", dim, size),)
    source = list(ends) if opens == high else [ends[1], ends[0]]
    return (gripper_step("scale_gripper", dim, size, from_range=[float(f"{end:.4g}") for end in source]),)
