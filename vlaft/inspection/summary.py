"""An inspection as plain values, for `vlaft inspect --json` and for the tables and pages that people read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from vlaft.data.convert.plan import camera_column
from vlaft.data.sentences import word
from vlaft.data.store import MAIN_CAMERA, camera_columns
from vlaft.inspection.facts import EpisodeFacts, Inspection, Shape, instructions_of
from vlaft.inspection.measures import histograms, statistics
from vlaft.inspection.warnings import Findings


def summarize(inspection: Inspection, findings: Findings) -> dict[str, Any]:
    """Return what was found as one JSON-like dictionary.

    `action` is the raw action: the arrays that the layout names, joined, unchanged; `standardized` the action that a
    conversion would store; `state` names the arrays that the state is joined from. Cameras have the names and sizes
    `[height, width, channels]` of the source; `policy` are settings of a policy that writes chunks, as words for
    `vlaft train` (see `policy_words`); `damaged` holds the episodes of which something cannot be read, those of
    `unreadable` included. `question` is what has to be answered before a conversion, or None.
    """
    layout = inspection.layout
    splits = list(dict.fromkeys(episode.split for episode in inspection.episodes))
    return {
        "path": str(inspection.path),
        "name": inspection.name,
        "kind": inspection.kind,
        "format": inspection.format,
        "preset": inspection.preset,
        **_counts(inspection.episodes),
        "cameras": {name: list(shape) for name, shape in inspection.shapes.items()},
        "camera_names": dict(inspection.labels),
        "fps": inspection.fps,
        "instructions": inspection.instructions,
        "instruction_per_episode": [
            episode.instruction if inspection.instructions else None for episode in inspection.episodes
        ],
        "action": {
            "source": list(layout.action),
            "dim": inspection.action.shape[1],
            "names": list(inspection.action_names),
            "stats": statistics(inspection.action),
            "histograms": [asdict(histogram) for histogram in histograms(inspection.action)],
        },
        "state": list(layout.state),
        "policy": policy_words(inspection),
        "standardized": _standardized(inspection, findings),
        "absolute": findings.absolute,
        "idle_share": findings.idle_share,
        "grippers": [asdict(guess) for guess in findings.grippers],
        "splits": {
            split: _of_split(
                [episode for episode in inspection.episodes if episode.split == split],
                inspection.split_shapes.get(split, inspection.shapes),
            )
            for split in splits
            if split is not None
        },
        "unreadable": [{"episode": name, "why": why} for name, why in inspection.unreadable],
        "question": inspection.question or None,
        "damaged": [{"episode": name, "why": why} for name, why in inspection.damaged],
        "contents": None if inspection.contents is None else asdict(inspection.contents),
        "warnings": list(findings.warnings),
    }


def policy_words(inspection: Inspection) -> list[str]:
    """Return what a policy that writes chunks should read and write here, as far as it differs from the released one.

    K is about a second of actions (openvla-oft's advice: 25 at 25 Hz, 5 at 5 Hz), and at most half of an episode (the
    median one), since only what has K actions to come is an example; unknown where the rate is. The cameras are those
    that a conversion keeps and that show something. The state is read where every episode has one, unless it never
    changes.
    """
    usable = inspection.standardized
    if not usable:
        return []
    words = []
    lengths = [len(facts.standardized) for facts in usable if facts.standardized is not None]
    chunk = min(round(inspection.fps or 1), math.ceil(np.median(lengths) / 2))
    if chunk > 1:
        words.append(f"policy.chunk={chunk}")
    others = [name for name in list(inspection.labels)[1:] if name in inspection.shapes]
    further = [name for name in others if not _shows_nothing(name, inspection.episodes)]
    columns = [MAIN_CAMERA, *(camera_column(inspection.labels[name]) for name in further)]
    if further:
        words.append(word("policy.cameras", list(camera_columns(columns))))
    states = [facts.state for facts in usable]
    if all(state is not None and state.shape[1:] == states[0].shape[1:] for state in states):  # type: ignore[union-attr]
        joined = np.concatenate([state for state in states if state is not None])
        if joined.size and (joined != joined[0]).any():
            words.append("policy.state=true")
    return words


def _shows_nothing(camera: str, episodes: Sequence[EpisodeFacts]) -> bool:
    """Say whether all frames of a camera that were looked at, if any were, are of one colour."""
    seen = [facts.cameras[camera] for facts in episodes if camera in facts.cameras]
    looked_at = sum(len(each.steps) for each in seen)
    return looked_at > 0 and sum(each.flat for each in seen) == looked_at


def _counts(episodes: Sequence[EpisodeFacts]) -> dict[str, Any]:
    return {
        "episodes": len(episodes),
        "steps": sum(episode.steps for episode in episodes),
        "steps_per_episode": [episode.steps for episode in episodes],
        "episode_names": [episode.name for episode in episodes],
    }


def _of_split(episodes: Sequence[EpisodeFacts], shapes: Mapping[str, Shape]) -> dict[str, Any]:
    action = np.concatenate([episode.action for episode in episodes])
    return {
        **_counts(episodes),
        "cameras": {name: list(shape) for name, shape in shapes.items()},
        "instructions": instructions_of(episodes),
        "action": {"dim": action.shape[1], "stats": statistics(action)},
    }


def _standardized(inspection: Inspection, findings: Findings) -> dict[str, Any] | None:
    usable = inspection.standardized
    if not usable:
        return None
    action = np.concatenate([episode.standardized for episode in usable if episode.standardized is not None])
    size = action.shape[1]
    mask = inspection.layout.action_mask
    return {
        "steps": list(inspection.layout.steps),
        "rows": len(action),
        "dim": size,
        "names": list(usable[0].names),
        "mask": list(mask) if len(mask) == size else [True] * size,
        "stats": statistics(action),
        "clipped": list(findings.clipped),
        "histograms": [asdict(histogram) for histogram in histograms(action)],
    }
