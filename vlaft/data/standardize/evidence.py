"""What the demonstrations themselves show of the gripper, against the rule that a format or a preset brings.

Two things tell which command opens a gripper: its measured fingers, which part where it is told to open, and the habit
of demonstrations to begin with an open hand. A rule that these contradict is not applied: the user is asked.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import yaml
from numpy.typing import NDArray

from vlaft.data.episode import Episode
from vlaft.data.layout import StepSpec
from vlaft.data.source import OpenedSource
from vlaft.errors import DataError

FEWEST_EPISODES = 3  # whose beginnings make a habit
MOST_EPISODES = 0.8  # share of them that have to begin alike
_FINGERS = re.compile(
    r"(^|/|_)(gripper|finger)_(qpos|pos|positions?|states?|joint_pos)$"
)  # robosuite, LIBERO, Isaac Lab
_MIRRORED = 0.25  # largest sum of two mirrored positions, over their distance
_METRES = 0.1  # greatest position of a finger that slides; knuckles turn by more radians
_STROKE = 1e-3  # least spread of the opening that counts as motion: metres, or radians
_FOLLOWS = 0.6  # least share of the fingers' way that agrees with the commands (1: all of it, -1: all against)
_OUTSIDE = 0.05  # how far, and in what share of the steps, a gripper may lie outside of 0 to 1

Opening = NDArray[np.float64]  # [T], larger is wider


def gripper_dims(size: int, names: Sequence[str]) -> list[int]:
    """Return the dimensions that are called grippers; without names, the last of seven (OpenVLA's order)."""
    if names:
        return [number for number, name in enumerate(names) if "grip" in name.lower()]
    return [6] if size == 7 else []


def gripper_step(name: str, dim: int, size: int, **arguments: object) -> StepSpec:
    """Return the standardizing step `name` for the gripper in dimension `dim` of `size`; the last one goes unsaid."""
    arguments = arguments if dim == size - 1 else {**arguments, "dim": dim}
    return {name: arguments} if arguments else name


def finger_opening(episode: Episode) -> Opening | None:
    """Return how far measured fingers are apart `[T]`, or None where the episode does not tell.

    Told by an array called after them, or by the last two columns of the state. Two sliding fingers mirror each other
    (robosuite, LIBERO, Isaac Lab), and what is called a finger or gripper and stays within 0 to 0.1 slides by metres.
    All else may be knuckles, whose angles grow as they close (Robotiq's), or a share of the way (DROID's is
    1 = closed), and tells nothing.
    """
    for name in episode.arrays:
        if not _FINGERS.search(name):
            continue
        with contextlib.suppress(DataError):  # what the layout does not need may be damaged
            values = np.asarray(episode.arrays[name], np.float64)
            values = values.reshape(len(values), -1)
            opening = _mirrored(values) if values.shape[1] == 2 else None
            if opening is None and values.shape[1] in (1, 2) and (np.abs(values - _METRES / 2) <= _METRES / 2).all():
                opening = values.sum(axis=1)
            if opening is not None:
                return opening
    if episode.state is not None and episode.state.shape[1] > 2:
        return _mirrored(episode.state[:, -2:].astype(np.float64))
    return None


def _mirrored(pair: NDArray[np.float64]) -> Opening | None:
    """Return the distance of two fingers `[T]` whose positions `[T, 2]` mirror each other, or None."""
    apart = pair[:, 0] - pair[:, 1]
    if not len(pair) or not np.isfinite(pair).all():
        return None
    # two knuckles that close together are no mirror, however little they move; fingers at rest tremble
    if np.abs(pair.sum(axis=1)).max() > max(_MIRRORED * np.abs(apart).max(), _STROKE):
        return None
    # fingers part further than they ever cross, whichever of the two has the positive axis
    return apart if apart.max() >= -apart.min() else -apart


def opens_with_high(commands: Sequence[NDArray[np.floating]], openings: Sequence[Opening | None]) -> bool | None:
    """Tell from measured fingers whether the higher commands open them; None where that stays open.

    Over every run of steps on one side of the commands' middle, the fingers' way counts for that side, so that they
    may lag behind, and stop at an object.

    Args:
        commands: per episode `[T]`.
        openings: per episode `[T]`, or None.
    """
    pairs = [
        (np.asarray(command, np.float64), opening)
        for command, opening in zip(commands, openings, strict=True)
        if opening is not None and len(opening) == len(command)
    ]
    if not pairs or len(pairs) < len(commands):  # what one episode denies, the others only seem to tell
        return None
    joined = np.concatenate([command for command, _ in pairs])
    middle = (joined.min() + joined.max()) / 2 if len(joined) else 0.0
    agreed = way = 0.0
    for command, opening in pairs:
        high = command > middle
        if not len(high):
            continue
        starts = np.append(np.flatnonzero(np.diff(high, prepend=~high[:1])), len(high) - 1)
        moved = np.diff(opening[starts])
        agreed += float((moved * np.where(high[starts[:-1]], 1, -1)).sum())
        way += float(np.abs(moved).sum())
    if way < _STROKE or abs(agreed) < _FOLLOWS * way:
        return None
    return agreed > 0


@dataclass(frozen=True)
class GripperCheck:
    """What the demonstrations say against the standardizing steps.

    Attributes:
        question: what the user has to answer before anything is converted, or an empty text.
        warnings: what contradicts steps that the user gave, or that were made for this very dataset.
    """

    question: str = ""
    warnings: tuple[str, ...] = ()


def check_gripper(
    opened: OpenedSource,
    actions: Sequence[NDArray[np.float32]],
    names: Sequence[str],
    openings: Sequence[Opening | None],
) -> GripperCheck:
    """Hold the standardized gripper, which is to be 1 = open and 0 = closed, against what the demonstrations show.

    A rule of a format or a preset that they contradict becomes a question. So does a preset's for the very dataset
    that it was made for where the fingers contradict it; there, mere habit is a warning. Steps that the user wrote
    are kept, with a warning where the fingers contradict them.

    Args:
        opened: the source; its layout's steps made the actions.
        actions: standardized, per episode `[T, A]`.
        names: of their dimensions, or empty.
        openings: per episode what `finger_opening` returns after the steps.
    """
    size = actions[0].shape[1] if actions else 0
    questions, warnings = [], []
    for dim in gripper_dims(size, names):
        if not _is_claimed(opened, dim, size):
            continue
        commands = [action[:, dim].astype(np.float64) for action in actions]
        contradiction = _contradiction(commands, openings)
        if contradiction is None:
            continue
        measured, said, ends = contradiction
        steps = opened.layout.steps
        turned = _turned(steps, dim, size) if ends is None else _scaled(steps, ends, dim, size)
        intro = f"{opened.request.path}: {_rule(opened)} would make the gripper (dimension {dim}) 1 = open, 0 = closed"
        if opened.steps_given:
            if measured:
                warnings.append(f"{intro}, but {said}; the steps given are kept ({turned} would turn it around)")
        elif opened.preset_is_for_it and not measured:
            warnings.append(f"{intro}, but {said}; the preset was made for this dataset and is kept (else: {turned})")
        else:
            questions.append(
                f"{intro}, but {said}, so which end is open is not known: give the steps literally,"
                f" {_word(steps)} if that rule holds here, else {turned}"
            )
    return GripperCheck("; ".join(questions), tuple(warnings))


def _is_claimed(opened: OpenedSource, dim: int, size: int) -> bool:
    """Whether steps or mask say that the dimension follows OpenVLA's convention, rather than being carried as it is."""
    mask = opened.layout.action_mask
    return (len(mask) == size and not mask[dim]) or any("gripper" in str(step) for step in opened.layout.steps)


def _contradiction(
    commands: Sequence[Opening], openings: Sequence[Opening | None]
) -> tuple[bool, str, tuple[float, float] | None] | None:
    """Return whether it was measured, what contradicts 1 = open, and the ends where these are not 0 and 1."""
    joined = np.concatenate(commands)
    low, high = float(joined.min()), float(joined.max())
    if high - low < 1e-6:
        return None
    begin = np.asarray([command[0] for command in commands if len(command)])
    at_low = int((begin < (low + high) / 2).sum())
    outside = float(((joined < -_OUTSIDE) | (joined > 1 + _OUTSIDE)).mean()) > _OUTSIDE
    if outside or (_is_switched(joined) and (low > _OUTSIDE or high < 1 - _OUTSIDE)):
        most, end = max((at_low, low), (len(begin) - at_low, high))
        start = f" ({most} of {len(begin)} episodes begin near {end:.4g})"
        return False, f"the gripper then runs from {low:.4g} to {high:.4g}{start}", (low, high)
    follows = opens_with_high(commands, openings)
    if follows is False:
        return True, "the measured fingers open where it gives 0 and close where it gives 1", None
    if follows is None and len(begin) >= FEWEST_EPISODES and at_low >= MOST_EPISODES * len(begin):
        return False, f"{at_low} of {len(begin)} episodes then begin with a closed gripper", None
    return None


def _is_switched(values: Opening) -> bool:
    """Whether the values keep to their two ends, neither of them rare: such commands open and close all the way."""
    near = 0.05 * np.ptp(values)
    low, high = float((values < values.min() + near).mean()), float((values > values.max() - near).mean())
    return min(low, high) > 0.05 and low + high > 0.9


def _rule(opened: OpenedSource) -> str:
    if opened.steps_given:
        return "the steps given"
    if opened.request.preset is not None:
        return f"the preset {opened.request.preset}"
    return f"the rule for {opened.reader.format} files"


def _turned(steps: Sequence[StepSpec], dim: int, size: int) -> str:
    """Write the steps with the gripper turned around: 1 - g once more, or once less."""
    invert, kept = gripper_step("invert_gripper", dim, size), list(steps)
    if invert in kept:
        del kept[len(kept) - 1 - kept[::-1].index(invert)]
    else:
        kept.append(invert)
    return _word(kept)


def _scaled(steps: Sequence[StepSpec], ends: tuple[float, float], dim: int, size: int) -> str:
    """Write both ways to bring the ends to 0 and 1."""
    low, high = (float(f"{end:.4g}") for end in ends)
    up = gripper_step("scale_gripper", dim, size, from_range=[low, high])
    down = gripper_step("scale_gripper", dim, size, from_range=[high, low])
    return f"{_word([*steps, up])} if {high:g} is open then, or {_word([*steps, down])} if {low:g} is"


def _word(steps: Sequence[StepSpec]) -> str:
    """Write the word that sets the steps, quoted for a shell."""
    return f"steps='{yaml.safe_dump(list(steps), default_flow_style=True, sort_keys=False, width=10**6).strip()}'"
