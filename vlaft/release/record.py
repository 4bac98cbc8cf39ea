"""How weights were trained, as a merged checkpoint remembers it and its model card tells it.

Only what may be published: names, numbers and versions, no paths of the machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from vlaft.documents import WrongValue, read_as
from vlaft.errors import ConfigError
from vlaft.recipe.resolve import resolve
from vlaft.weights.layout import LICENCES
from vlaft.weights.trained import Trained

T = TypeVar("T")


@dataclass(frozen=True)
class _Evaluation:
    """A line of `log.jsonl` about held-out examples."""

    step: int
    val_loss: float
    val_action_accuracy: float | None = None
    val_action_l1: float | None = None


@dataclass(frozen=True)
class _Report:
    """What is told of `report.json`."""

    trainable_parameters: int | None = None
    total_parameters: int | None = None


@dataclass(frozen=True)
class _Environment:
    """What is told of `environment.json`."""

    versions: dict[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class _Source:
    """What is told of a source in `dataset.json`."""

    name: str
    format: str | None = None
    preset: str | None = None
    episodes: int | None = None
    steps: int | None = None
    fps: float | None = None
    weight: float | None = None


@dataclass(frozen=True)
class _Data:
    """What is told of `dataset.json`."""

    sources: list[_Source] = field(default_factory=list)


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
    report = _json(trained.run / "report.json", _Report)
    record["parameters"] = {"trainable": report.trainable_parameters, "total": report.total_parameters}
    record["measured"] = _measured(trained.run, trained.weights.name)
    record["versions"] = dict(_json(trained.run / "environment.json", _Environment).versions)
    return record


def data_paths(trained: Trained) -> list[Path]:
    """Return the converted datasets that a run was trained on, those that are still there."""
    found = _mapping(_recipe(trained.run).get("data")).get("path") if trained.run else None
    listed = [found] if isinstance(found, str) else found if isinstance(found, list) else []
    return [Path(path) for path in listed if isinstance(path, str) and (Path(path) / "dataset.json").is_file()]


def _sources(path: Path) -> list[dict[str, Any]]:
    sources = _json(path / "dataset.json", _Data).sources
    return [{key: value for key, value in asdict(source).items() if value is not None} for source in sources]


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
        except (ValueError, RecursionError):
            continue
        try:
            found = read_as(_Evaluation, entry)
        except WrongValue:
            continue  # not as vlaft writes it
        if step is None or found.step <= step:
            measured = {key: value for key, value in asdict(found).items() if value is not None}
    return measured


def _recipe(run: Path) -> Mapping[str, Any]:
    try:
        return asdict(resolve(run / "recipe.yaml"))
    except ConfigError:
        return {}


def _json(path: Path, kind: type[T]) -> T:
    """Return what is told of a file; of one that is absent or damaged nothing."""
    try:
        return read_as(kind, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return kind()


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def base_licence(base: str, folder: Path) -> str | None:
    """Return the licence's identifier on the Hub, such as `mit`, or None where nothing states it.

    Args:
        base: the base's name.
        folder: the base's local folder, whose `README.md` may begin with a model card's metadata.
    """
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        text = ""
    if text.startswith("---\n"):
        try:
            head = yaml.safe_load(text[4:].partition("\n---")[0])
        except yaml.YAMLError:
            head = None
        if isinstance(head, dict) and isinstance(head.get("license"), str):
            return head["license"]
    return LICENCES.get(base)
