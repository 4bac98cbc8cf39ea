"""How weights were trained, as a merged checkpoint remembers it and its model card tells it.

Only what may be published: names, numbers and versions, no paths of the machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from vlaft.trained import Trained

_MEASURES = ("val_loss", "val_action_accuracy", "val_action_l1")


def training_record(trained: Trained) -> dict[str, Any] | None:
    """Return the recipe, the data and the measured figures of a run, or None where there is no run.

    What a run does not tell (any more) is left out.
    """
    if trained.run is None:
        return None
    recipe = _recipe(trained.run)
    adapt, train = _mapping(recipe.get("adapt")), _mapping(recipe.get("train"))
    record: dict[str, Any] = {
        "recipe": trained.recipe,
        "method": adapt.get("method"),
        "checkpoint": trained.weights.name,
    }
    if adapt.get("method") == "lora":
        record["lora"] = {key: value for key, value in _mapping(adapt.get("lora")).items() if key != "targets"}
    record["quantize"] = adapt.get("quantize")
    keys = ("batch_size", "accumulation", "optimizer", "learning_rate", "weight_decay", "seed")
    record["train"] = {key: train[key] for key in keys if key in train}
    record["augment"] = _mapping(recipe.get("data")).get("augment")
    record["data"] = [source for path in data_paths(trained) for source in _sources(path)]
    report = _json(trained.run / "report.json")
    record["parameters"] = {key: report.get(f"{key}_parameters") for key in ("trainable", "total")}
    record["measured"] = _measured(trained.run, trained.weights.name)
    record["versions"] = _mapping(_json(trained.run / "environment.json").get("versions"))
    return record


def data_paths(trained: Trained) -> list[Path]:
    """Return the converted datasets that a run was trained on, those that are still there."""
    found = _mapping(_recipe(trained.run).get("data")).get("path") if trained.run else None
    listed = [found] if isinstance(found, str) else found if isinstance(found, list) else []
    return [Path(path) for path in listed if isinstance(path, str) and (Path(path) / "dataset.json").is_file()]


def _sources(path: Path) -> list[dict[str, Any]]:
    info = _json(path / "dataset.json")
    sources = info.get("sources")
    keys = ("name", "format", "preset", "episodes", "steps", "fps", "weight")
    return [
        {key: source[key] for key in keys if source.get(key) is not None}
        for source in (sources if isinstance(sources, list) else [])
        if isinstance(source, Mapping)
    ]


def _measured(run: Path, checkpoint: str) -> dict[str, Any]:
    """Return the last figures on held-out examples at or before the checkpoint's step."""
    step = int(checkpoint.rpartition("-")[2]) if checkpoint.rpartition("-")[2].isdigit() else None
    measured: dict[str, Any] = {}
    try:
        lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return measured
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if not isinstance(entry, dict) or "val_loss" not in entry:
            continue
        if step is None or entry.get("step", 0) <= step:
            measured = {key: entry[key] for key in ("step", *_MEASURES) if key in entry}
    return measured


def _recipe(run: Path) -> Mapping[str, Any]:
    try:
        return _mapping(yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}


def _json(path: Path) -> Mapping[str, Any]:
    try:
        return _mapping(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
