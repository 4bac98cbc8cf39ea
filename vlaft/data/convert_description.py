"""What `dataset.json` says of one source."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from vlaft.data.convert_plan import SurveyedSource, camera_column
from vlaft.data.opened_source import OpenedSource
from vlaft.data.store import MAIN_CAMERA


def describe_source(source: OpenedSource, found: SurveyedSource) -> dict[str, Any]:
    """Return how a source was read and what was found in it, as plain values.

    `state_statistics` are the state's real ones: `dataset_statistics.json` has zeros in their place (`proprio`), as
    OpenVLA's fine-tuning writes.
    """
    columns = [MAIN_CAMERA, *(camera_column(name) for name in found.cameras[1:])]
    action = found.statistics["action"]
    return {
        "name": source.name,
        "path": str(source.request.path),
        "format": source.source.format,
        "preset": source.request.preset,
        "weight": source.request.weight,
        "episodes": len(found.episodes),
        "steps": found.statistics["num_transitions"],
        "fps": found.fps,
        "instructions": list(found.instructions),
        "cameras": dict(zip(columns, found.cameras, strict=True)),
        "action": {
            "dimensions": len(action["mean"]),
            "names": list(found.action_names),
            "mask": action["mask"],
        },
        "state_statistics": found.state_statistics,
        "layout": asdict(source.layout),
    }
