"""What is odd about actions: gripper, absolute targets, padding, idle steps, single dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vlaft.data.gripper_evidence import gripper_step
from vlaft.data.inspection import EpisodeFacts, Inspection
from vlaft.data.inspection_advice import (
    ProposedSteps,
    full_mask,
    some_of,
    step_names,
    steps_word,
    type_words,
    with_steps,
)
from vlaft.data.inspection_gripper import GripperGuess
from vlaft.data.inspection_measures import Motion, statistics
from vlaft.data.layout import StepSpec
from vlaft.data.typed_words import word

_MOST = 0.8  # share of the episodes that makes a habit of the recorder
_IDLE_WARNED = 0.05  # share of idle steps
_FAR = 2.0  # how far a motion may lie beyond q01/q99, in widths of that range


def gripper_warnings(
    steps: ProposedSteps, raw: Sequence[GripperGuess], actions: Sequence[NDArray[np.float32]], dims: Sequence[int]
) -> list[str]:
    """Warn where the standardized gripper is not 1 = open, 0 = closed; raw ones may be anything."""
    found = []
    inspection = steps.inspection
    handled = any("gripper" in name for name in step_names(inspection))
    size = actions[0].shape[1]
    for dim in dims:
        values = np.concatenate([action[:, dim] for action in actions])
        low, high = float(values.min()), float(values.max())
        inside = low >= -0.01 and high <= 1.01
        guess = next((entry for entry in raw if entry.dim == dim), None)
        said = f"the gripper (dimension {dim}) runs from {low:.3g} to {high:.3g}"
        if handled:
            if not inside:
                found.append(
                    f"{said} after the standardizing steps, where 0 (closed) to 1 (open) is expected:"
                    f" {with_steps(inspection, 'clip_gripper')}, or correct the steps"
                )
        elif guess is None or guess.kind == "constant":
            if guess is not None:
                found.append(
                    f"the gripper (dimension {dim}) is always {low:.3g}: if the action should have none,"
                    f" {with_steps(inspection, {'select_action': {'dims': [d for d in range(size) if d != dim]}})}"
                )
        elif guess.steps is None and guess.kind == "relative":
            close = [*inspection.layout.steps, gripper_step("relative_gripper_to_absolute", dim, size)]
            found.append(
                f"{said}, and {guess.why}: {type_words(inspection, steps_word(close))} if + closes, or"
                f" {steps_word([*close, gripper_step('invert_gripper', dim, size)])} if + opens"
            )
        elif guess.steps is None and inside:
            found.append(
                f"{said}, and {guess.why}: nothing to type if {high:.3g} is open, else"
                f" {with_steps(inspection, gripper_step('invert_gripper', dim, size))}"
            )
        elif guess.steps is None:
            ends = [float(f"{low:.4g}"), float(f"{high:.4g}")]
            upwards = gripper_step("scale_gripper", dim, size, from_range=ends)
            downwards = gripper_step("scale_gripper", dim, size, from_range=ends[::-1])
            up = steps_word([*inspection.layout.steps, upwards])
            down = steps_word([*inspection.layout.steps, downwards])
            found.append(
                f"{said} where 0 (closed) to 1 (open) is expected, and {guess.why}:"
                f" {type_words(inspection, up)} if {high:.3g} is open, or {down} if {low:.3g} is open"
            )
        elif guess.steps:
            where = f"{guess.open_at:.3g} is probably open" if guess.open_at is not None else "commands are relative"
            found.append(
                f"{said} and {where} ({guess.why}), where 1 = open, 0 = closed is expected:"
                f" {steps.propose(*guess.steps)}"
            )
    return found


def absolute_warnings(inspection: Inspection, absolute: bool | None, size: int, grippers: Sequence[int]) -> list[str]:
    """Say what absolute targets mean for training."""
    if not absolute:
        return []
    intro = "the actions look like absolute targets (they follow the state), where OpenVLA's are deltas per step: "
    if size in (6, 7) and list(grippers) in ([], [6]):
        step: StepSpec = {"delta_from_absolute": {"against": "previous"}}
        return [
            f"{intro}if they are end-effector poses, {with_steps(inspection, step, first=True)}; keep them if the robot"
            " is to receive targets"
        ]
    return [f"{intro}keep them if the robot is to receive targets, as ALOHA's do (nothing to type)"]


def end_warnings(
    steps: ProposedSteps, actions: Sequence[NDArray[np.float32]], moved: Motion, absolute: bool
) -> list[str]:
    """Look for recorders that begin with an empty action, or pad the end."""
    found = []
    long = [number for number, action in enumerate(actions) if len(action) >= 3]
    if len(long) < 2 or moved.zero_below == 0:
        return []
    still = [norm < max(moved.zero_below, 1e-6) for norm in moved.norms]
    elsewhere = float(np.concatenate([still[number][1:-1] for number in long]).mean())
    first = 0.0 if absolute else float(np.mean([still[number][0] for number in long]))
    if first >= _MOST and elsewhere < 0.5:
        found.append(
            f"the first action is zero in {round(first * len(long))} of {len(long)} episodes, a habit of the recorder:"
            f" {steps.propose('drop_first', first=True)}"
        )
    padded = float(np.mean([_repeats(actions[number]) or bool(still[number][-1]) for number in long]))
    usual = float(np.mean([(np.diff(actions[number], axis=0) == 0).all(axis=1)[:-1].mean() for number in long]))
    if padded >= _MOST and usual < 0.2 and elsewhere < 0.5:
        found.append(
            f"the last action is zero or repeats the one before in {round(padded * len(long))} of {len(long)}"
            f" episodes, which looks like padding: {steps.propose('drop_last', first=True)}"
        )
    return found


def _repeats(action: NDArray[np.float32]) -> bool:
    return bool((action[-1] == action[-2]).all())


def idle_warnings(steps: ProposedSteps, moved: Motion, absolute: bool, grippers: Sequence[int], size: int) -> list[str]:
    """Say how many steps do nothing."""
    # first steps that are to be dropped anyway count no more
    idle = [flags[1:] if "drop_first" in steps.before else flags for flags in moved.idle]
    share = float(np.concatenate(idle).mean()) if any(len(flags) for flags in idle) else 0.0
    if share < _IDLE_WARNED or "filter_noops" in step_names(steps.inspection):
        return []
    said = f"{share:.0%} of the steps are idle (the arm hardly moves and the gripper is held)"
    if absolute:
        return [f"{said}: cut long waits out of the recordings (filter_noops takes deltas only)"]
    place: dict[str, object] = {"threshold": moved.idle_below}
    if not grippers:
        place["gripper"] = None
    elif list(grippers) != [size - 1]:
        place["gripper"] = grippers[0]
    return [f"{said}, which teaches a model to wait: {steps.propose({'filter_noops': place})}"]


def dimension_warnings(
    inspection: Inspection,
    usable: Sequence[EpisodeFacts],
    actions: Sequence[NDArray[np.float32]],
    names: Sequence[str],
    grippers: Sequence[int],
) -> list[str]:
    """Look at every dimension's spread: constant, hardly ever moving, or with single motions far out."""
    found = []
    joined = np.concatenate(actions)
    size = joined.shape[1]
    mask = full_mask(inspection, size)
    figures = {name: np.asarray(values) for name, values in statistics(joined).items()}
    width = figures["q99"] - figures["q01"]
    called = [f"{dim} ({names[dim]})" if names else str(dim) for dim in range(size)]
    constant = np.flatnonzero(figures["min"] == figures["max"]).tolist()
    constant = [dim for dim in constant if dim not in grippers]  # these have a sentence of their own
    if constant and len(constant) < size - len(grippers):
        kept = [dim for dim in range(size) if dim not in constant]
        found.append(
            f"action dimensions {some_of([called[dim] for dim in constant])} never change, training sees 0: nothing"
            f" to type if the robot takes them, else {with_steps(inspection, {'select_action': {'dims': kept}})}"
        )
    elif constant:
        found.append("no dimension of the arm's action ever changes: name other arrays with action='[...]'")
    rare = [d for d in range(size) if mask[d] and width[d] <= 0 and figures["min"][d] < figures["max"][d]]
    if rare:
        changed = [mask[dim] and dim not in rare for dim in range(size)]
        found.append(
            f"action dimensions {some_of([called[dim] for dim in rare])} change in fewer than 2 % of the steps, so that"
            f" q01 equals q99 and every change is clipped: {type_words(inspection, word('action_mask', changed))}"
        )
    for dim in range(size):
        if not mask[dim] or width[dim] <= 0:
            continue
        over, under = figures["max"][dim] - figures["q99"][dim], figures["q01"][dim] - figures["min"][dim]
        if max(over, under) / width[dim] > _FAR:
            far = figures["max"][dim] if over >= under else figures["min"][dim]
            owner = next(
                facts.name for facts, action in zip(usable, actions, strict=True) if (action[:, dim] == far).any()
            )
            found.append(
                f"action dimension {called[dim]} reaches {far:.3g} in episode {owner} but lies within"
                f" [{figures['q01'][dim]:.3g}, {figures['q99'][dim]:.3g}] in 98 % of the steps, and is clipped to that:"
                " look at the episode with --html page.html, and take it out of the source if it is a mistake"
            )
    for dim in grippers:
        inside = figures["min"][dim] >= -0.01 and figures["max"][dim] <= 1.01
        if len(grippers) == 1 and size == 7 and mask[dim] and inside and dim not in constant:
            changed = [entry != dim for entry in range(size)]
            found.append(
                "the gripper would be normalised like a motion, where OpenVLA leaves its 0 to 1 as it is:"
                f" {type_words(inspection, word('action_mask', changed))}"
            )
    return found
