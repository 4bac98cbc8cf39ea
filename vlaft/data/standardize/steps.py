"""Standardize an episode: named steps that bring a source's actions and frames into OpenVLA's convention.

A step is a function `Episode -> Episode` with keyword arguments; a layout names them in order, as `"drop_first"` or
`{"resample": {"fps": 5}}`. The convention they lead to: end-effector deltas (metres, radians, per control step), then
the gripper, 1 = open, 0 = closed; frames upright as the robot's own evaluation shows them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_type_hints

import numpy as np

from vlaft.data.episode import Episode
from vlaft.data.layout import StepSpec
from vlaft.data.standardize.actions import (
    append_constant,
    binarize_gripper,
    clip_gripper,
    invert_gripper,
    relabel_from_state,
    relative_gripper_to_absolute,
    require_action,
    scale_action,
    scale_gripper,
    select_action,
    take_from,
)
from vlaft.data.standardize.frames import flip_rows, rotate, swap_red_blue
from vlaft.data.standardize.rotations import (
    axis_angle_to_euler,
    delta_from_absolute,
    euler_to_axis_angle,
    quaternion_to_axis_angle,
    quaternion_to_euler,
)
from vlaft.data.standardize.timing import drop_first, drop_last, filter_noops, keep_where, resample
from vlaft.documents import fits, in_words, shown
from vlaft.errors import ConfigError, DataError, did_you_mean

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
        found = _argument_problems(STEPS[name], arguments)
        problems += [f"step {number} ({name}): {problem}" for problem in found]
        if not found:
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
