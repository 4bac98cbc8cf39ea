"""What is odd about demonstrations, each a sentence that says what to type about it."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from vlaft.data.folded import folded
from vlaft.data.gripper_evidence import gripper_dims
from vlaft.data.inspection import FRAME_STEPS, Inspection
from vlaft.data.inspection_action_warnings import (
    absolute_warnings,
    dimension_warnings,
    end_warnings,
    gripper_warnings,
    idle_warnings,
)
from vlaft.data.inspection_advice import (
    NAMED,
    ProposedSteps,
    full_mask,
    some_of,
    step_names,
    type_words,
    with_steps,
)
from vlaft.data.inspection_gripper import GripperGuess, guess_gripper
from vlaft.data.inspection_measures import clipped_shares, duplicates, looks_absolute, motion, odd_lengths
from vlaft.data.typed_words import word


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
    steps = ProposedSteps(inspection)
    asked = [inspection.question] if inspection.question else []
    warnings = [*asked, *folded(inspection.told), *_damaged(inspection), *_instructions(inspection), *_rate(inspection)]
    if actions:
        if not absolute:  # targets, of joints or of two arms, are carried as they are, grippers included
            warnings += gripper_warnings(steps, raw, actions, grippers)
        warnings += absolute_warnings(inspection, absolute, size, grippers)
        warnings += end_warnings(steps, actions, moved, bool(absolute))
        warnings += idle_warnings(steps, moved, bool(absolute), grippers, size)
        warnings += dimension_warnings(inspection, usable, actions, names, grippers)
    warnings += _copies(inspection)
    warnings += _lengths(inspection)
    warnings += _frames(inspection)
    warnings += steps.together()
    joined = np.concatenate(actions) if actions else np.zeros((0, 0), np.float32)
    clipped = clipped_shares(joined, full_mask(inspection, size)) if actions else []
    return Findings(raw, absolute, moved.idle_share, tuple(clipped), tuple(dict.fromkeys(warnings)))


def _damaged(inspection: Inspection) -> list[str]:
    found = []
    count = len(inspection.episodes)
    if inspection.unreadable:
        found.append(
            f"{len(inspection.unreadable)} of {len(inspection.unreadable) + count} episodes cannot be read (the first:"
            f" {inspection.unreadable[0][1]}): repair them, or type --on-error skip when converting"
        )
    bad = [episode.name for episode in inspection.episodes if not np.isfinite(episode.action).all()]
    told = {*bad, *(e.name for e in inspection.episodes for facts in e.cameras.values() if facts.error)}
    refused = [episode for episode in inspection.episodes if episode.refused and episode.name not in told]
    if refused:
        found.append(
            f"{len(refused)} of {count} episodes would be refused by a conversion (the first: {refused[0].refused}):"
            " mend the cause, or type --on-error skip when converting"
        )
    if bad:
        found.append(
            f"actions hold values that are not finite, in {some_of(bad)}; these steps are left out of the statistics:"
            " repair these episodes, or type --on-error skip when converting"
        )
    broken = [
        (episode.name, facts.error)
        for episode in inspection.episodes
        for facts in episode.cameras.values()
        if facts.error
    ]
    if broken:
        found.append(
            f"frames cannot be decoded in {some_of(list(dict.fromkeys(name for name, _ in broken)))} (the first:"
            f" {broken[0][1]}): repair them, or type --on-error skip when converting"
        )
    return found


def _instructions(inspection: Inspection) -> list[str]:
    empty = [episode.name for episode in inspection.episodes if not episode.instruction.strip()]
    if not empty:
        return []
    give = type_words(inspection, _own_instruction(inspection) or "instruction='what the robot does'")
    if len(empty) == len(inspection.episodes):
        return [f"no episode has an instruction: {give}"]
    return [
        f"{len(empty)} of {len(inspection.episodes)} episodes have no instruction ({some_of(empty)}): {give} to give"
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
        return [f"the control rate is not known: {type_words(inspection, 'fps=10')} (in Hz, of these recordings)"]
    if len(rates) > 1:
        listed = ", ".join(f"{rate:g}" for rate in rates[:NAMED])
        least = {"resample": {"fps": float(f"{rates[0]:.6g}")}}
        return [f"episodes differ in their control rate ({listed} Hz): {with_steps(inspection, least)}"]
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
    found = []
    for dim in gripper_dims(size, labels):
        label = labels[dim] if labels else f"dimension {dim}"
        if dim == size - 1 and "grip" in last.lower() and label in ("gripper", f"dimension {dim}"):
            label = last
        found.append(
            guess_gripper([values[:, dim] for values in commands], dim, label, size, inspection.format, openings)
        )
    return tuple(found)


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
        f"{extra} of {len(episodes)} episodes repeat the actions of another ({some_of(pairs)}); {why}:"
        " take the copies out of the source" + (" or do not trust figures of its validation split" if across else "")
    ]


def _lengths(inspection: Inspection) -> list[str]:
    lengths = [episode.steps for episode in inspection.episodes]
    short = [episode.name for episode in inspection.episodes if episode.steps < 2]
    found = []
    if short:
        found.append(f"fewer than two steps: {some_of(short)}; take them out of the source")
    odd = [number for number in odd_lengths(lengths) if lengths[number] >= 2]
    if odd:
        named = [f"{inspection.episodes[number].name} with {lengths[number]}" for number in odd]
        found.append(
            f"far from the usual {np.median(lengths):.0f} steps: {some_of(named)}; look at them with --html page.html,"
            " and take failures out of the source"
        )
    return found


def _frames(inspection: Inspection) -> list[str]:
    """Look for black, one-coloured and frozen frames, of the cameras that the layout keeps."""
    found = []
    if not inspection.references:
        found.append(
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
            found.append(f"camera '{camera}' is {what} in every frame looked at: {_without(inspection, camera)}")
        elif dull:
            where = [name for name, facts in seen if max(facts.flat, facts.black)]
            found.append(
                f"camera '{camera}' is {what} in {dull} of {looked} frames looked at ({some_of(where)}):"
                " look at them with --html page.html, and take the episodes out of the source if the camera failed"
            )
        if frozen and len(frozen) == len(seen):
            found.append(f"camera '{camera}' always shows the same picture: {_without(inspection, camera)}")
        elif frozen:
            found.append(
                f"camera '{camera}' shows one and the same picture throughout {some_of(frozen)}: take them out of the"
                " source if the camera had stopped"
            )
    steps = step_names(inspection)
    proposed = [step if isinstance(step, str) else next(iter(step), "") for step in inspection.source_steps]
    for step, name in zip(inspection.source_steps, proposed, strict=True):
        if name in FRAME_STEPS and not any(own in FRAME_STEPS for own in steps):
            found.append(
                f"frames of this format are stored upside down or mirrored, and no step turns them:"
                f" {with_steps(inspection, step)} if the pictures of --html page.html are wrong"
            )
    return found


def _without(inspection: Inspection, camera: str) -> str:
    rest = {label: inspection.references[name] for name, label in inspection.labels.items() if name != camera}
    if not rest:
        return "no other camera is there to train on; record again"
    if inspection.kind == "converted":
        return "convert the source again without it (cameras='{name: path, ...}' lists those to keep)"
    return type_words(inspection, word("cameras", rest))
