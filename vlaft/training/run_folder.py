"""The folder that a run writes: what was asked for, on what, with which versions, and how far it has come.

`run.json` names the base, the best and the last checkpoint; `recipe.yaml` runs the same again; `environment.json`
says where it ran; `log.jsonl` has one line per logged step; `report.json` puts predicted beside measured.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vlaft.config import RecipeConfig
from vlaft.errors import ConfigError, VlaftError
from vlaft.output_folder import sync
from vlaft.trained import RUN_FILE, write_json

RECIPE_FILE = "recipe.yaml"
LOG_FILE = "log.jsonl"
_PACKAGES = ("vlaft", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors", "numpy", "pyarrow")
# Settings that may differ between a run and its continuation: they change when something is written or for how
# long training goes on, not what a step computes.
_FREE_KEYS = {
    "name",
    "description",
    "data.workers",
    "train.log_every",
    "train.save_every",
    "train.evaluate_every",
    "train.keep_checkpoints",
    "train.early_stopping",
    "train.trackers",
}


def environment(command: list[str], device: str) -> dict[str, Any]:
    """Return versions, machine and command for `environment.json`."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "command": command,
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
    }


class RunFolder:
    """Reads and writes the files of one run. Only the main process of a distributed run writes."""

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path = path
        self.writes = writes

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints lie."""
        return self.path / "checkpoints"

    def create(self, recipe: str, statistics: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        """Write what is known before the first step.

        Raises:
            VlaftError: the folder cannot be written.
        """
        if not self.writes:
            return
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            (self.path / RECIPE_FILE).write_text(recipe, encoding="utf-8")
            write_json(self.path / "dataset_statistics.json", statistics)
            write_json(self.path / "environment.json", environment)
        except OSError as error:
            raise VlaftError(f"{self.path}: cannot be written ({error.strerror})") from error

    def read_status(self) -> dict[str, Any]:
        """Return `run.json`, or an empty dict before it was written."""
        try:
            content = json.loads((self.path / RUN_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise VlaftError(f"{self.path / RUN_FILE}: cannot be read ({error})") from error
        return content if isinstance(content, dict) else {}

    def write_status(self, **values: Any) -> None:
        """Change keys of `run.json`, aside and renamed."""
        self.replace_json(RUN_FILE, self.read_status() | values)

    def replace_json(self, name: str, content: Any) -> None:
        """Write a JSON file aside and rename it into place."""
        if not self.writes:
            return
        partial = self.path / f".{name}.partial"
        try:
            write_json(partial, content)
            sync(partial)
            partial.replace(self.path / name)
        except OSError as error:
            raise VlaftError(f"{self.path / name}: cannot be written ({error.strerror})") from error

    def log(self, line: Mapping[str, Any]) -> None:
        """Append a line to `log.jsonl`."""
        if self.writes:
            with (self.path / LOG_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def truncate_log(self, step: int) -> None:
        """Drop the lines after `step`: a continued run writes them again."""
        path = self.path / LOG_FILE
        if not self.writes or not path.is_file():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue  # a line that a kill cut short
        partial = self.path / f".{LOG_FILE}.partial"
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        partial.replace(path)


def check_same_recipe(old: RecipeConfig, new: RecipeConfig, folder: Path) -> None:
    """Refuse to continue a run under settings that would make it another run.

    Raises:
        ConfigError: each setting that differs, in one sentence.
    """
    before, after = _flat(asdict(old)), _flat(asdict(new))
    different = [key for key in before if before[key] != after.get(key) and key not in _FREE_KEYS | {"train.steps"}]
    if old.train.schedule.name in ("cosine", "linear") and old.train.steps != new.train.steps:
        different.append("train.steps")  # the schedule's shape depends on it
    if different:
        told = ", ".join(f"{key} (was {before[key]}, now {after.get(key)})" for key in different)
        raise ConfigError(f"{folder}: --resume continues the run as it was, but these settings differ: {told}")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def command_line() -> list[str]:
    """Return the words that started this process."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
