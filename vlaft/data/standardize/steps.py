"""Standardize an episode: named steps that bring a source's actions and frames into OpenVLA's convention.

First the steps on time (which steps of an episode stay, and at which control rate), then those on frames, which stay
undecoded until they are read; those on the action are in `vlaft.data.standardize.actions`. Then what checks and applies
them all.

A step is a function `Episode -> Episode` with keyword arguments; a layout names them in order, as `"drop_first"` or
`{"resample": {"fps": 5}}`. The convention they lead to: end-effector deltas (metres, radians, per control step), then
the gripper, 1 = open, 0 = closed; frames upright as the robot's own evaluation shows them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import get_type_hints

import numpy as np
from numpy.typing import NDArray

from vlaft.data.episode import Episode, MappedFrames
from vlaft.data.layout import StepSpec, read_reference
from vlaft.data.standardize.actions import (
    append_constant,
    axis_angle_to_euler,
    binarize_gripper,
    clip_gripper,
    delta_from_absolute,
    euler_to_axis_angle,
    invert_gripper,
    quaternion_to_axis_angle,
    quaternion_to_euler,
    relabel_from_state,
    relative_gripper_to_absolute,
    require_action,
    resolve_dims,
    scale_action,
    scale_gripper,
    select_action,
    take_from,
)
from vlaft.documents import fits, in_words, shown
from vlaft.errors import ConfigError, DataError, did_you_mean
from vlaft.observation.images import Image


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
    return episode.select(moving_steps(action, threshold, held))


def moving_steps(action: NDArray[np.floating], threshold: float = 1e-4, gripper: int | None = -1) -> NDArray[np.int64]:
    """Return which steps of `action` `[T, A]` `filter_noops` keeps, in their order."""
    motion = action if gripper is None else np.delete(action, gripper, axis=1)
    moves = np.linalg.norm(motion.astype(np.float64), axis=1) >= threshold
    kept: list[int] = []
    for step in range(len(action)):
        if moves[step] or (gripper is not None and kept and action[step, gripper] != action[kept[-1], gripper]):
            kept.append(step)
    return np.asarray(kept, dtype=np.int64)


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


def rotate(episode: Episode, *, degrees: int = 180, cameras: list[str] | None = None) -> Episode:
    """Rotate every frame counter-clockwise by a multiple of 90 degrees.

    180 is what OpenVLA does with LIBERO's frames, in its dataset and in its evaluation alike.

    Args:
        episode: the episode.
        degrees: multiple of 90; negative is clockwise.
        cameras: our camera names, or None for all.
    """
    if degrees % 90:
        raise ConfigError(f"frames rotate by multiples of 90 degrees, not by {degrees}")
    return _map_frames(episode, cameras, partial(_rotated, quarter_turns=degrees // 90 % 4))


def flip_rows(episode: Episode, *, cameras: list[str] | None = None) -> Episode:
    """Put the bottom row on top (a mirror, not a rotation), for renderers that write OpenGL's order."""
    return _map_frames(episode, cameras, _flipped)


def swap_red_blue(episode: Episode, *, cameras: list[str] | None = None) -> Episode:
    """Exchange red and blue, for frames that were written as BGR and read as RGB."""
    return _map_frames(episode, cameras, _swapped)


def _rotated(image: Image, quarter_turns: int) -> Image:
    return np.ascontiguousarray(np.rot90(image, quarter_turns))


def _flipped(image: Image) -> Image:
    return np.ascontiguousarray(image[::-1])


def _swapped(image: Image) -> Image:
    return np.ascontiguousarray(image[..., ::-1])


def _map_frames(episode: Episode, cameras: list[str] | None, function: Callable[[Image], Image]) -> Episode:
    known = list(episode.cameras)
    for name in cameras or ():
        if name not in episode.cameras:
            raise DataError(
                f"episode '{episode.name}' has no camera '{name}'{did_you_mean(name, known)}"
                f" (it has: {', '.join(known) or 'none'})"
            )
    chosen = known if cameras is None else cameras
    mapped = {name: MappedFrames(f, function) if name in chosen else f for name, f in episode.cameras.items()}
    return replace(episode, cameras=mapped)


STEPS: dict[str, Callable[..., Episode]] = {
    function.__name__: function
    for function in (
        drop_first,
        drop_last,
        filter_noops,
        keep_where,
        resample,
        relabel_from_state,
        select_action,
        scale_action,
        append_constant,
        take_from,
        delta_from_absolute,
        axis_angle_to_euler,
        euler_to_axis_angle,
        quaternion_to_euler,
        quaternion_to_axis_angle,
        clip_gripper,
        invert_gripper,
        scale_gripper,
        binarize_gripper,
        relative_gripper_to_absolute,
        rotate,
        flip_rows,
        swap_red_blue,
    )
}


@dataclass(frozen=True)
class Step:
    """One checked step: its name in `STEPS` and its keyword arguments."""

    name: str
    arguments: Mapping[str, object]

    def apply(self, episode: Episode) -> Episode:
        """Return the changed episode; `episode` itself is never changed.

        Raises:
            DataError, ConfigError: the step does not fit the episode.
        """
        return STEPS[self.name](episode, **self.arguments)


def parse_steps(steps: Sequence[StepSpec]) -> list[Step]:
    """Check names and arguments of `steps` against `STEPS`.

    Raises:
        ConfigError: unknown steps or arguments (with the nearest known one), missing arguments, or values of a
            wrong type; all problems together.
    """
    problems: list[str] = []
    parsed: list[Step] = []
    if isinstance(steps, str) or not isinstance(steps, Sequence):
        raise ConfigError(f"steps is a list of standardizing steps, not {steps!r}")
    for number, spec in enumerate(steps, start=1):
        if isinstance(spec, str):
            name, arguments = spec, {}
        elif isinstance(spec, Mapping) and len(spec) == 1:
            name, given = next(iter(spec.items()))
            if given is not None and not isinstance(given, Mapping):
                problems.append(f"step {number} ({name}): write its arguments as {{{name}: {{argument: value}}}}")
                continue
            arguments = dict(given or {})
        else:
            problems.append(f"step {number} is {spec!r}: write the name of a step, or {{name: {{argument: value}}}}")
            continue
        if name not in STEPS:
            hint = did_you_mean(str(name), list(STEPS)) or f" (known: {', '.join(STEPS)})"
            problems.append(f"step {number}: unknown standardizing step '{name}'{hint}")
            continue
        wrong = _argument_problems(STEPS[name], arguments)
        problems += [f"step {number} ({name}): {problem}" for problem in wrong]
        if not wrong:
            parsed.append(Step(name, arguments))
    if problems:
        raise ConfigError(problems)
    return parsed


def standardize(episode: Episode, steps: Sequence[StepSpec]) -> Episode:
    """Apply `steps` in order to an episode that has had `apply_layout`.

    Raises:
        ConfigError: a step or an argument is wrong.
        DataError: a step does not fit the episode, or nothing of the episode is left; the sentence names the
            step and the episode.
    """
    require_action(episode)
    for step in parse_steps(steps):
        try:
            with np.errstate(all="ignore"):  # what is not finite afterwards is refused below
                changed = step.apply(episode)
        except (DataError, ConfigError) as error:
            raise DataError(f"{error} (standardizing step '{step.name}' of episode '{episode.name}')") from error
        if changed.length == 0:
            raise DataError(
                f"episode '{episode.name}' has no steps left after '{step.name}' (it had {episode.length});"
                " leave the episode out, or change the standardizing steps"
            )
        bad = np.flatnonzero(~np.isfinite(require_action(changed)).all(axis=1))
        if len(bad):
            raise DataError(
                f"episode '{episode.name}', step {bad[0]}: the action is not finite after '{step.name}' (the state,"
                " or an argument of this standardizing step, is not finite or too large)"
            )
        episode = changed
    return episode


def _argument_problems(function: Callable[..., Episode], arguments: Mapping[str, object]) -> list[str]:
    hints = get_type_hints(function)
    parameters = list(inspect.signature(function).parameters.values())[1:]
    known = [parameter.name for parameter in parameters]
    problems = []
    for name, value in arguments.items():
        if name not in known:
            hint = did_you_mean(str(name), known) or f" (known: {', '.join(known) or 'none'})"
            problems.append(f"unknown argument '{name}'{hint}")
        elif not fits(value, hints[name]):
            problems.append(f"{name} is {shown(value)}, which is not {in_words(hints[name])}")
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.name not in arguments:
            problems.append(f"the argument '{parameter.name}' is missing")
    return problems
