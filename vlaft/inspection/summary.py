"""An inspection as plain values, for `vlaft inspect --json` and for the tables and pages that people read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from vlaft.inspection.facts import EpisodeFacts, Inspection, Shape, instructions_of
from vlaft.inspection.measures import histograms, statistics
from vlaft.inspection.warnings import Findings


def summarize(inspection: Inspection, findings: Findings) -> dict[str, Any]:
    """Return what was found as one JSON-like dictionary.

    `action` is the raw action: the arrays that the layout names, joined, unchanged; `standardized` the action that a
    conversion would store; `state` names the arrays that the state is joined from. Cameras have the names and sizes
    `[height, width, channels]` of the source; `damaged` holds the episodes of which something cannot be read, those of
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
