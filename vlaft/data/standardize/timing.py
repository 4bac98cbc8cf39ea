"""Standardizing steps on time: which steps of an episode stay, and at which control rate."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from vlaft.data.episode import Episode
from vlaft.data.layout import read_reference
from vlaft.data.standardize.actions import require_action, resolve_dims
from vlaft.errors import ConfigError, DataError


def drop_first(episode: Episode) -> Episode:
    """Drop the first step (BridgeData V2 records an all-zero action there)."""
    return episode.select(np.arange(min(1, episode.length), episode.length))


def drop_last(episode: Episode) -> Episode:
    """Drop the last step (in RLDS its action may be padding)."""
    return episode.select(np.arange(max(episode.length - 1, 0)))


def filter_noops(episode: Episode, *, threshold: float = 1e-4, gripper: int | None = -1) -> Episode:
    """Drop the steps in which nothing is commanded: no motion, and the gripper as at the last kept step.

    No motion is a Euclidean norm below `threshold` over all dimensions but the gripper's, in the action's own
    units. Before the first kept step the norm alone decides. As OpenVLA's script that regenerates LIBERO.

    Args:
        episode: the episode; its action is made of deltas.
        threshold: of the norm.
        gripper: the gripper's dimension, or None when all dimensions count as motion.
    """
    action = require_action(episode)
    held = None if gripper is None else resolve_dims([gripper], action.shape[1])[0]
    motion = action if held is None else np.delete(action, held, axis=1)
    moves = np.linalg.norm(motion.astype(np.float64), axis=1) >= threshold
    kept: list[int] = []
    for step in range(len(action)):
        if moves[step] or (held is not None and kept and action[step, held] != action[kept[-1], held]):
            kept.append(step)
    return episode.select(np.asarray(kept, dtype=np.int64))


def keep_where(episode: Episode, *, source: str, above: float = 0.5) -> Episode:
    """Keep the steps where the array that `source` names (one column; a success flag, a mask) is above `above`."""
    values = read_reference(episode, source)
    if values.shape[1] != 1:
        raise DataError(f"'{source}' has {values.shape[1]} columns; a mask has one, name it as {source}[0]")
    return episode.select(np.flatnonzero(values[:, 0] > above))


def resample(episode: Episode, *, fps: float, delta_dims: list[int | str] | None = None) -> Episode:
    """Lower the control rate to `fps` (Hz): each new step covers the old steps that begin within its interval.

    A delta dimension becomes the sum over the interval, so that the total motion stays; any other dimension
    (an absolute target, the gripper) takes its last value. Frames, state and arrays are those at the start of
    the interval. Old step i begins at i / old rate, so where the rates do not divide, intervals hold now one
    step more and now one less. Rotation deltas are summed as well, which holds for the small ones of one step.

    Args:
        episode: the episode, with a known rate.
        fps: the new rate, not above the episode's own.
        delta_dims: which dimensions are deltas. The default is OpenVLA's first six of seven; an action of any
            other size has to say it (`[]` for absolute targets).

    Raises:
        DataError: no rate is known, the new one is higher, or the size of the action leaves the default open.
        ConfigError: `fps` is not a positive number.
    """
    action = require_action(episode)
    if not (np.isfinite(fps) and fps > 0):
        raise ConfigError(f"a control rate of {fps} Hz is not possible; give a positive number")
    if delta_dims is None and action.shape[1] != 7:
        raise DataError(
            f"which of the {action.shape[1]} action dimensions are deltas is not known; list them in delta_dims"
            " ([] when all are absolute)"
        )
    deltas = resolve_dims(list(range(6)) if delta_dims is None else delta_dims, action.shape[1], episode.action_names)
    if episode.fps is None:
        raise DataError(f"the control rate of episode '{episode.name}' is not known; set the layout's fps")
    if fps > episode.fps * (1 + 1e-9):
        raise DataError(f"episode '{episode.name}' runs at {episode.fps:g} Hz and cannot be resampled up to {fps:g} Hz")
    starts = _interval_starts(episode.length, episode.fps, fps)
    coarse = episode.select(starts)
    if episode.length == 0:
        return replace(coarse, fps=fps)
    last = np.append(starts[1:], episode.length) - 1
    changed = action[last]
    changed[:, deltas] = np.add.reduceat(action[:, deltas].astype(np.float64), starts, axis=0)
    return replace(coarse, action=changed, fps=fps)


def _interval_starts(length: int, old: float, new: float) -> NDArray[np.int64]:
    # 1e-6 of an interval: 3 * (1 / 30) falls short of 0.1 in floating point and still begins the next interval
    interval = np.floor(np.arange(length) * (new / old) + 1e-6).astype(np.int64)
    return np.flatnonzero(np.diff(interval, prepend=-1)).astype(np.int64)
