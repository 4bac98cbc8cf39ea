"""What is odd about demonstrations, each a sentence that says what to type about it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vlaft.data.layout import StepSpec
from vlaft.data.sentences import folded, word
from vlaft.data.standardize.evidence import gripper_dims, gripper_step
from vlaft.inspection.facts import FRAME_STEPS, EpisodeFacts, Inspection
from vlaft.inspection.measures import (
    GripperGuess,
    Motion,
    clipped_shares,
    duplicates,
    guess_gripper,
    looks_absolute,
    motion,
    odd_lengths,
    statistics,
)

_MOST = 0.8  # share of the episodes that makes a habit of the recorder
_IDLE_WARNED = 0.05  # share of idle steps
_FAR = 2.0  # how far a motion may lie beyond q01/q99, in widths of that range
_MOVING = 0.3  # share of steps of at least the usual motion in a stretch where the arm moves; by chance it is a half
_FEWEST_PAIRS = 10  # of neighbouring frames that a habit is seen in
_REPEATED = 0.2  # share of them; a frame or two is dropped by many a recorder
_NAMED = 5  # episodes named one by one in a sentence


@dataclass(frozen=True)
class Findings:
    """What the actions show, and the warnings.

    Attributes:
        grippers: what the raw commands of each gripper mean, as guessed.
        absolute: whether the raw action is made of absolute targets; None where nothing tells.
        idle_share: share of steps in which neither arm nor gripper does anything, after standardizing.
        clipped: per standardized dimension, the share of values that q01/q99 clip.
        warnings: sentences.
    """

    grippers: tuple[GripperGuess, ...]
    absolute: bool | None
    idle_share: float
    clipped: tuple[float, ...]
    warnings: tuple[str, ...]


def find(inspection: Inspection) -> Findings:
    """Look for what is known to go wrong with demonstrations."""
    usable = inspection.standardized
    actions = [episode.standardized for episode in usable if episode.standardized is not None]
    names = usable[0].names if usable else ()
    size = actions[0].shape[1] if actions else 0
    grippers = gripper_dims(size, names)
    absolute = looks_absolute(actions, [episode.state for episode in usable], grippers)
    moved = motion(actions, grippers, bool(absolute))
    raw = _raw_grippers(inspection)
    steps = _ProposedSteps(inspection)
    asked = [inspection.question] if inspection.question else []
    warnings = [*asked, *folded(inspection.told), *_damaged(inspection), *_instructions(inspection), *_rate(inspection)]
    if actions:
        if not absolute:  # targets, of joints or of two arms, are carried as they are, grippers included
            warnings += _gripper_warnings(steps, raw, actions, grippers)
        warnings += _absolute_warnings(inspection, absolute, size, grippers)
        warnings += _end_warnings(steps, actions, moved, bool(absolute))
        warnings += _idle_warnings(steps, moved, bool(absolute), grippers, size)
        warnings += _dimension_warnings(inspection, usable, actions, names, grippers)
    warnings += _copies(inspection)
    warnings += _lengths(inspection)
    warnings += _frames(inspection)
    warnings += _stale_frames(inspection, bool(absolute))
    warnings += steps.together()
    joined = np.concatenate(actions) if actions else np.zeros((0, 0), np.float32)
    clipped = clipped_shares(joined, _full_mask(inspection, size)) if actions else []
    return Findings(raw, absolute, moved.idle_share, tuple(clipped), tuple(dict.fromkeys(warnings)))


def _damaged(inspection: Inspection) -> list[str]:
    sentences = []
    count = len(inspection.episodes)
    if inspection.unreadable:
        sentences.append(
            f"{len(inspection.unreadable)} of {len(inspection.unreadable) + count} episodes cannot be read (the first:"
            f" {inspection.unreadable[0][1]}): repair them, or type --on-error skip when converting"
        )
    bad = [episode.name for episode in inspection.episodes if not np.isfinite(episode.action).all()]
    told = {*bad, *(e.name for e in inspection.episodes for facts in e.cameras.values() if facts.error)}
    refused = [episode for episode in inspection.episodes if episode.refused and episode.name not in told]
    if refused:
        sentences.append(
            f"{len(refused)} of {count} episodes would be refused by a conversion (the first: {refused[0].refused}):"
            " mend the cause, or type --on-error skip when converting"
        )
    if bad:
        sentences.append(
            f"actions hold values that are not finite, in {_some_of(bad)}; these steps are left out of the statistics:"
            " repair these episodes, or type --on-error skip when converting"
        )
    broken = [
        (episode.name, facts.error)
        for episode in inspection.episodes
        for facts in episode.cameras.values()
        if facts.error
    ]
    if broken:
        sentences.append(
            f"frames cannot be decoded in {_some_of(list(dict.fromkeys(name for name, _ in broken)))} (the first:"
            f" {broken[0][1]}): repair them, or type --on-error skip when converting"
        )
    return sentences


def _instructions(inspection: Inspection) -> list[str]:
    empty = [episode.name for episode in inspection.episodes if not episode.instruction.strip()]
    if not empty:
        return []
    give = _type_words(inspection, _own_instruction(inspection) or "instruction='what the robot does'")
    if len(empty) == len(inspection.episodes):
        return [f"no episode has an instruction: {give}"]
    return [
        f"{len(empty)} of {len(inspection.episodes)} episodes have no instruction ({_some_of(empty)}): {give} to give"
        " all the same, or --on-error skip when converting"
    ]


def _own_instruction(inspection: Inspection) -> str:
    """Return the word that takes the instruction from an attribute of the file, where one is called so."""
    entries = inspection.contents.entries if inspection.contents is not None else ()
    for entry in entries:
        name = entry.path.rpartition("@")[2]
        if entry.kind == "attribute" and re.search(r"instruct|lang|task|prompt|goal", name, re.I) and " " in entry.note:
            return word("instruction", {"attribute": name})
    return ""


def _rate(inspection: Inspection) -> list[str]:
    rates = sorted({episode.fps for episode in inspection.episodes if episode.fps is not None})
    if not rates:
        return [f"the control rate is not known: {_type_words(inspection, 'fps=10')} (in Hz, of these recordings)"]
    if len(rates) > 1:
        listed = ", ".join(f"{rate:g}" for rate in rates[:_NAMED])
        least = {"resample": {"fps": float(f"{rates[0]:.6g}")}}
        return [f"episodes differ in their control rate ({listed} Hz): {_with_steps(inspection, least)}"]
    return []


def _raw_grippers(inspection: Inspection) -> tuple[GripperGuess, ...]:
    """Guess what the raw commands mean, by names, format and data."""
    size = inspection.episodes[0].action.shape[1]
    labels = list(inspection.action_names)
    # without names of dimensions, the name of the array that the last one comes from may tell
    last = inspection.layout.action[-1].partition("[")[0].rpartition("/")[2] if inspection.layout.action else ""
    finite = [np.isfinite(episode.action).all(axis=1) for episode in inspection.episodes]
    commands = [episode.action[rows] for episode, rows in zip(inspection.episodes, finite, strict=True)]
    if sum(len(values) for values in commands) == 0:
        return ()
    openings = [
        None if episode.opening is None else episode.opening[rows]
        for episode, rows in zip(inspection.episodes, finite, strict=True)
    ]
    guesses = []
    for dim in gripper_dims(size, labels):
        label = labels[dim] if labels else f"dimension {dim}"
        if dim == size - 1 and "grip" in last.lower() and label in ("gripper", f"dimension {dim}"):
            label = last
        guesses.append(
            guess_gripper([values[:, dim] for values in commands], dim, label, size, inspection.format, openings)
        )
    return tuple(guesses)


def _copies(inspection: Inspection) -> list[str]:
    episodes = [episode for episode in inspection.episodes if np.isfinite(episode.action).all()]
    groups = duplicates([episode.action for episode in episodes])
    if not groups:
        return []
    pairs = [f"{episodes[group[1]].name} = {episodes[group[0]].name}" for group in groups]
    extra = sum(len(group) - 1 for group in groups)
    across = any(len({episodes[number].split for number in group}) > 1 for group in groups)
    why = "held-out episodes repeat trained ones, so a validation says nothing" if across else "copies count twice"
    return [
        f"{extra} of {len(episodes)} episodes repeat the actions of another ({_some_of(pairs)}); {why}:"
        " take the copies out of the source" + (" or do not trust figures of its validation split" if across else "")
    ]


def _lengths(inspection: Inspection) -> list[str]:
    lengths = [episode.steps for episode in inspection.episodes]
    short = [episode.name for episode in inspection.episodes if episode.steps < 2]
    sentences = []
    if short:
        sentences.append(f"fewer than two steps: {_some_of(short)}; take them out of the source")
    odd = [number for number in odd_lengths(lengths) if lengths[number] >= 2]
    if odd:
        named = [f"{inspection.episodes[number].name} with {lengths[number]}" for number in odd]
        sentences.append(
            f"far from the usual {np.median(lengths):.0f} steps: {_some_of(named)}; look at them with --html page.html,"
            " and take failures out of the source"
        )
    return sentences


def _frames(inspection: Inspection) -> list[str]:
    """Look for black, one-coloured and frozen frames, of the cameras that the layout keeps."""
    sentences = []
    if not inspection.references:
        sentences.append(
            "there are no images at all, and examples need images, so a conversion will be refused: fetch the videos or"
            " pictures that belong to the rows, or record with cameras"
        )
    for camera in inspection.labels:
        seen = [(episode.name, episode.cameras[camera]) for episode in inspection.episodes if camera in episode.cameras]
        looked = sum(len(facts.steps) for _, facts in seen)
        if not looked:
            continue
        flat = sum(facts.flat for _, facts in seen)
        black = sum(facts.black for _, facts in seen)
        frozen = [name for name, facts in seen if facts.frozen and facts.flat == 0]
        dull = max(flat, black)
        what = "black" if black == dull else "of one colour"
        if dull == looked:
            sentences.append(f"camera '{camera}' is {what} in every frame looked at: {_without(inspection, camera)}")
        elif dull:
            where = [name for name, facts in seen if max(facts.flat, facts.black)]
            sentences.append(
                f"camera '{camera}' is {what} in {dull} of {looked} frames looked at ({_some_of(where)}):"
                " look at them with --html page.html, and take the episodes out of the source if the camera failed"
            )
        if frozen and len(frozen) == len(seen):
            sentences.append(f"camera '{camera}' always shows the same picture: {_without(inspection, camera)}")
        elif frozen:
            sentences.append(
                f"camera '{camera}' shows one and the same picture throughout {_some_of(frozen)}: take them out of the"
                " source if the camera had stopped"
            )
    steps = _step_names(inspection)
    proposed = [step if isinstance(step, str) else next(iter(step), "") for step in inspection.source_steps]
    for step, name in zip(inspection.source_steps, proposed, strict=True):
        if name in FRAME_STEPS and not any(own in FRAME_STEPS for own in steps):
            sentences.append(
                f"frames of this format are stored upside down or mirrored, and no step turns them:"
                f" {_with_steps(inspection, step)} if the pictures of --html page.html are wrong"
            )
    return sentences


def _stale_frames(inspection: Inspection, absolute: bool) -> list[str]:
    """Look for pictures that stay while the arm moves: the camera is slower than the control rate, or stopped."""
    size = inspection.episodes[0].action.shape[1]
    grippers = gripper_dims(size, inspection.action_names)
    norms = motion([episode.action for episode in inspection.episodes], grippers, absolute).norms
    joined = np.concatenate(norms)
    usual = float(np.nanmedian(joined[joined > 0])) if (joined > 0).any() else np.inf
    sentences = []
    for camera in inspection.labels:
        pairs = same = 0
        where: list[str] = []
        stood: list[str] = []
        for episode, norm in zip(inspection.episodes, norms, strict=True):
            facts = episode.cameras.get(camera)
            if facts is None or facts.frozen:
                continue
            moves = np.append(norm[1:], 0.0) if absolute else norm  # from each step to the next
            moving = {step for step in facts.paired if step < len(moves) and moves[step] >= usual}
            repeats = moving & set(facts.repeated)
            pairs, same = pairs + len(moving), same + len(repeats)
            where += [episode.name] * bool(repeats)
            if facts.still is not None:
                first, last = facts.still
                if (moves[first:last] >= usual).mean() >= _MOVING:
                    stood.append(f"{episode.name}, steps {first} to {last} of {episode.steps}")
        if stood:
            sentences.append(
                f"camera '{camera}' stands still while the arm moves ({_some_of(stood)}): cut these stretches out of"
                " the source, since a policy learns from them not to look"
            )
        elif pairs >= _FEWEST_PAIRS and same >= _REPEATED * pairs:
            rate = inspection.fps
            slower = {"resample": {"fps": float(f"{(rate or 0) * (1 - same / pairs):.2g}")}}
            mend = _with_steps(inspection, slower) if rate and same < pairs else "record again"
            sentences.append(
                f"camera '{camera}' repeats its last picture while the arm moves, in {same / pairs:.0%} of the steps"
                f" looked at ({_some_of(where)}), as one that is slower than the control rate: {mend}"
            )
    return sentences


def _without(inspection: Inspection, camera: str) -> str:
    rest = {label: inspection.references[name] for name, label in inspection.labels.items() if name != camera}
    if not rest:
        return "no other camera is there to train on; record again"
    if inspection.kind == "converted":
        return "convert the source again without it (cameras='{name: path, ...}' lists those to keep)"
    return _type_words(inspection, word("cameras", rest))


def _gripper_warnings(
    steps: _ProposedSteps, raw: Sequence[GripperGuess], actions: Sequence[NDArray[np.float32]], dims: Sequence[int]
) -> list[str]:
    """Warn where the standardized gripper is not 1 = open, 0 = closed; raw ones may be anything."""
    sentences = []
    inspection = steps.inspection
    handled = any("gripper" in name for name in _step_names(inspection))
    size = actions[0].shape[1]
    for dim in dims:
        values = np.concatenate([action[:, dim] for action in actions])
        low, high = float(values.min()), float(values.max())
        inside = low >= -0.01 and high <= 1.01
        guess = next((entry for entry in raw if entry.dim == dim), None)
        said = f"the gripper (dimension {dim}) runs from {low:.3g} to {high:.3g}"
        if handled:
            if not inside:
                sentences.append(
                    f"{said} after the standardizing steps, where 0 (closed) to 1 (open) is expected:"
                    f" {_with_steps(inspection, 'clip_gripper')}, or correct the steps"
                )
        elif guess is None or guess.kind == "constant":
            if guess is not None:
                sentences.append(
                    f"the gripper (dimension {dim}) is always {low:.3g}: if the action should have none,"
                    f" {_with_steps(inspection, {'select_action': {'dims': [d for d in range(size) if d != dim]}})}"
                )
        elif guess.steps is None and guess.kind == "relative":
            close = [*inspection.layout.steps, gripper_step("relative_gripper_to_absolute", dim, size)]
            sentences.append(
                f"{said}, and {guess.why}: {_type_words(inspection, steps_word(close))} if + closes, or"
                f" {steps_word([*close, gripper_step('invert_gripper', dim, size)])} if + opens"
            )
        elif guess.steps is None and inside:
            sentences.append(
                f"{said}, and {guess.why}: nothing to type if {high:.3g} is open, else"
                f" {_with_steps(inspection, gripper_step('invert_gripper', dim, size))}"
            )
        elif guess.steps is None:
            ends = [float(f"{low:.4g}"), float(f"{high:.4g}")]
            upwards = gripper_step("scale_gripper", dim, size, from_range=ends)
            downwards = gripper_step("scale_gripper", dim, size, from_range=ends[::-1])
            up = steps_word([*inspection.layout.steps, upwards])
            down = steps_word([*inspection.layout.steps, downwards])
            sentences.append(
                f"{said} where 0 (closed) to 1 (open) is expected, and {guess.why}:"
                f" {_type_words(inspection, up)} if {high:.3g} is open, or {down} if {low:.3g} is open"
            )
        elif guess.steps:
            where = f"{guess.open_at:.3g} is probably open" if guess.open_at is not None else "commands are relative"
            sentences.append(
                f"{said} and {where} ({guess.why}), where 1 = open, 0 = closed is expected:"
                f" {steps.propose(*guess.steps)}"
            )
    return sentences


def _absolute_warnings(inspection: Inspection, absolute: bool | None, size: int, grippers: Sequence[int]) -> list[str]:
    """Say what absolute targets mean for training."""
    if not absolute:
        return []
    intro = "the actions look like absolute targets (they follow the state), where OpenVLA's are deltas per step: "
    if size in (6, 7) and list(grippers) in ([], [6]):
        step: StepSpec = {"delta_from_absolute": {"against": "previous"}}
        return [
            f"{intro}if they are end-effector poses, {_with_steps(inspection, step, first=True)}; keep them if the"
            " robot is to receive targets"
        ]
    return [f"{intro}keep them if the robot is to receive targets, as ALOHA's do (nothing to type)"]


def _end_warnings(
    steps: _ProposedSteps, actions: Sequence[NDArray[np.float32]], moved: Motion, absolute: bool
) -> list[str]:
    """Look for recorders that begin with an empty action, or pad the end."""
    sentences = []
    long = [number for number, action in enumerate(actions) if len(action) >= 3]
    if len(long) < 2 or moved.zero_below == 0:
        return []
    still = [norm < max(moved.zero_below, 1e-6) for norm in moved.norms]
    elsewhere = float(np.concatenate([still[number][1:-1] for number in long]).mean())
    first = 0.0 if absolute else float(np.mean([still[number][0] for number in long]))
    if first >= _MOST and elsewhere < 0.5:
        sentences.append(
            f"the first action is zero in {round(first * len(long))} of {len(long)} episodes, a habit of the recorder:"
            f" {steps.propose('drop_first', first=True)}"
        )
    padded = float(np.mean([_repeats(actions[number]) or bool(still[number][-1]) for number in long]))
    usual = float(np.mean([(np.diff(actions[number], axis=0) == 0).all(axis=1)[:-1].mean() for number in long]))
    if padded >= _MOST and usual < 0.2 and elsewhere < 0.5:
        sentences.append(
            f"the last action is zero or repeats the one before in {round(padded * len(long))} of {len(long)}"
            f" episodes, which looks like padding: {steps.propose('drop_last', first=True)}"
        )
    return sentences


def _repeats(action: NDArray[np.float32]) -> bool:
    return bool((action[-1] == action[-2]).all())


def _idle_warnings(
    steps: _ProposedSteps, moved: Motion, absolute: bool, grippers: Sequence[int], size: int
) -> list[str]:
    """Say how many steps do nothing."""
    # first steps that are to be dropped anyway count no more
    idle = [flags[1:] if "drop_first" in steps.before else flags for flags in moved.idle]
    share = float(np.concatenate(idle).mean()) if any(len(flags) for flags in idle) else 0.0
    if share < _IDLE_WARNED or "filter_noops" in _step_names(steps.inspection):
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


def _dimension_warnings(
    inspection: Inspection,
    usable: Sequence[EpisodeFacts],
    actions: Sequence[NDArray[np.float32]],
    names: Sequence[str],
    grippers: Sequence[int],
) -> list[str]:
    """Look at every dimension's spread: constant, hardly ever moving, or with single motions far out."""
    sentences = []
    joined = np.concatenate(actions)
    size = joined.shape[1]
    mask = _full_mask(inspection, size)
    figures = {name: np.asarray(values) for name, values in statistics(joined).items()}
    width = figures["q99"] - figures["q01"]
    called = [f"{dim} ({names[dim]})" if names else str(dim) for dim in range(size)]
    constant = np.flatnonzero(figures["min"] == figures["max"]).tolist()
    constant = [dim for dim in constant if dim not in grippers]  # these have a sentence of their own
    if constant and len(constant) < size - len(grippers):
        kept = [dim for dim in range(size) if dim not in constant]
        sentences.append(
            f"action dimensions {_some_of([called[dim] for dim in constant])} never change, training sees 0: nothing"
            f" to type if the robot takes them, else {_with_steps(inspection, {'select_action': {'dims': kept}})}"
        )
    elif constant:
        sentences.append("no dimension of the arm's action ever changes: name other arrays with action='[...]'")
    rare = [d for d in range(size) if mask[d] and width[d] <= 0 and figures["min"][d] < figures["max"][d]]
    if rare:
        changed = [mask[dim] and dim not in rare for dim in range(size)]
        sentences.append(
            f"action dimensions {_some_of([called[dim] for dim in rare])} change in fewer than 2 % of the steps, so"
            f" that q01 equals q99 and every change is clipped: {_type_words(inspection, word('action_mask', changed))}"
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
            sentences.append(
                f"action dimension {called[dim]} reaches {far:.3g} in episode {owner} but lies within"
                f" [{figures['q01'][dim]:.3g}, {figures['q99'][dim]:.3g}] in 98 % of the steps, and is clipped to that:"
                " look at the episode with --html page.html, and take it out of the source if it is a mistake"
            )
    for dim in grippers:
        inside = figures["min"][dim] >= -0.01 and figures["max"][dim] <= 1.01
        if len(grippers) == 1 and size == 7 and mask[dim] and inside and dim not in constant:
            changed = [entry != dim for entry in range(size)]
            sentences.append(
                "the gripper would be normalised like a motion, where OpenVLA leaves its 0 to 1 as it is:"
                f" {_type_words(inspection, word('action_mask', changed))}"
            )
    return sentences


def steps_word(steps: Sequence[StepSpec]) -> str:
    """Return the word that sets the layout's steps, quoted for a shell.

    >>> steps_word(["drop_first", {"rotate": {"degrees": 180}}])
    "steps='[drop_first, {rotate: {degrees: 180}}]'"
    """
    return word("steps", list(steps))


def _type_words(inspection: Inspection, *words: str) -> str:
    """Say what to type."""
    verb = "type" if inspection.kind == "source" else "convert the source again with"
    return f"{verb} {' '.join(words)}"


def _with_steps(inspection: Inspection, *steps: StepSpec, first: bool = False) -> str:
    """Say how to add steps to the layout's own, which the word would replace otherwise."""
    known = list(inspection.layout.steps)
    return _type_words(inspection, steps_word([*steps, *known] if first else [*known, *steps]))


@dataclass
class _ProposedSteps:
    """Steps that several sentences propose, so that one word can take them all."""

    inspection: Inspection
    before: list[StepSpec] = field(default_factory=list)
    after: list[StepSpec] = field(default_factory=list)

    def propose(self, *steps: StepSpec, first: bool = False) -> str:
        """Remember the steps and say how to add them alone."""
        (self.before if first else self.after).extend(steps)
        return _with_steps(self.inspection, *steps, first=first)

    def together(self) -> list[str]:
        """Return a sentence with all of them, where there is more than one."""
        if len(self.before) + len(self.after) < 2:
            return []
        steps = [*self.before, *self.inspection.layout.steps, *self.after]
        return [f"all steps proposed here, in one word: {_type_words(self.inspection, steps_word(steps))}"]


def _some_of(names: Sequence[str]) -> str:
    """List the first few names and say how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _full_mask(inspection: Inspection, size: int) -> tuple[bool, ...]:
    """Return the layout's mask, or all True where it says nothing about `size` dimensions."""
    mask = inspection.layout.action_mask
    return tuple(mask) if len(mask) == size else (True,) * size


def _step_names(inspection: Inspection) -> list[str]:
    """Return the names of the layout's standardizing steps."""
    return [step if isinstance(step, str) else next(iter(step), "") for step in inspection.layout.steps]
