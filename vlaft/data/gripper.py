"""Bring a gripper's commands into OpenVLA's convention: absolute, 1 = open, 0 = closed.

The functions on arrays take and return float32 `[T]`; the standardizing steps below apply them to one action
dimension, the last one unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from vlaft.data.dimensions import require_action, resolve_dims
from vlaft.data.episode import Episode
from vlaft.errors import ConfigError

Commands = NDArray[np.float32]  # [T]


def binarize(commands: Commands, open_above: float = 0.95, closed_below: float = 0.05) -> Commands:
    """Turn continuous opening (1 = open) into 0 or 1: a value in between takes the one that is reached *next*.

    A trailing run of values in between reaches none of them: it keeps the raw last value, as OpenVLA's
    `binarize_gripper_actions` does.

    Args:
        commands: `[T]`, 0 (closed) to 1 (open).
        open_above: values above are open.
        closed_below: values below are closed.
    """
    result = np.empty_like(commands)
    reached = commands[-1] if len(commands) else np.float32(0)
    for step in range(len(commands) - 1, -1, -1):
        if commands[step] > open_above:
            reached = np.float32(1)
        elif commands[step] < closed_below:
            reached = np.float32(0)
        result[step] = reached
    return result


def relative_to_absolute(commands: Commands, threshold: float = 0.1) -> Commands:
    """Turn relative commands (positive closes, negative opens) into the state they lead to: 1 open, 0 closed.

    Before the first command the gripper is taken to be in the opposite state (a gripper that is told to close
    was open); without any command it is open. As OpenVLA's `rel2abs_gripper_actions`.

    Args:
        commands: `[T]`, any unit.
        threshold: commands of at most this size are no command.
    """
    given = np.where(commands < -threshold, 1, np.where(commands > threshold, 0, -1))
    steps = np.flatnonzero(given >= 0)
    if len(steps) == 0:
        return np.ones_like(commands)
    last = np.searchsorted(steps, np.arange(len(commands)), side="right") - 1
    return np.where(last >= 0, given[steps[last]], 1 - given[steps[0]]).astype(np.float32)


def rescale(commands: Commands, from_range: tuple[float, float], to_range: tuple[float, float]) -> Commands:
    """Map the ends of `from_range` linearly to the ends of `to_range`; values outside stay outside.

    Raises:
        ConfigError: `from_range` has no width.
    """
    (low, high), (new_low, new_high) = from_range, to_range
    if low == high:
        raise ConfigError(f"a gripper range from {low} to {high} has no width; give its two different ends")
    scaled = (commands.astype(np.float64) - low) / (high - low) * (new_high - new_low) + new_low
    return scaled.astype(np.float32)


def clip_gripper(episode: Episode, *, low: float = 0.0, high: float = 1.0, dim: int = -1) -> Episode:
    """Clip the gripper to `[low, high]`.

    Where a source says -1 = open, +1 = closed (robosuite, LIBERO), this and `invert_gripper` give 1 = open.
    """
    if low > high:
        raise ConfigError(f"the lower bound {low} is above the upper bound {high}")
    return _change(episode, dim, lambda commands: np.clip(commands, np.float32(low), np.float32(high)))


def invert_gripper(episode: Episode, *, dim: int = -1) -> Episode:
    """Replace the gripper g by 1 - g: from 1 = closed to 1 = open, or back."""
    return _change(episode, dim, lambda commands: np.float32(1) - commands)


def scale_gripper(
    episode: Episode, *, from_range: list[float] | None = None, to_range: list[float] | None = None, dim: int = -1
) -> Episode:
    """Map the gripper linearly from `from_range` (default [-1, 1]) to `to_range` (default [0, 1]).

    A range may run downwards: from [1, -1] to [0, 1] turns -1 = open, +1 = closed into 1 = open, 0 = closed.
    For an opening in metres give its two ends: from [0, 0.08].
    """
    old, new = _pair(from_range or [-1.0, 1.0]), _pair(to_range or [0.0, 1.0])
    return _change(episode, dim, lambda commands: rescale(commands, old, new))


def binarize_gripper(
    episode: Episode, *, open_above: float = 0.95, closed_below: float = 0.05, dim: int = -1
) -> Episode:
    """Make the gripper (0 closed to 1 open) binary by looking ahead; see `binarize`."""
    return _change(episode, dim, lambda commands: binarize(commands, open_above, closed_below))


def relative_gripper_to_absolute(episode: Episode, *, threshold: float = 0.1, dim: int = -1) -> Episode:
    """Turn relative gripper commands (+ closes, - opens) into 1 = open, 0 = closed; see `relative_to_absolute`."""
    return _change(episode, dim, lambda commands: relative_to_absolute(commands, threshold))


def _pair(ends: list[float]) -> tuple[float, float]:
    if len(ends) != 2:
        raise ConfigError(f"a gripper range has two ends, not {len(ends)}")
    return float(ends[0]), float(ends[1])


def _change(episode: Episode, dim: int, function: Callable[[Commands], Commands]) -> Episode:
    action = require_action(episode).copy()
    (column,) = resolve_dims([dim], action.shape[1])
    action[:, column] = function(action[:, column].copy())
    return replace(episode, action=action)
