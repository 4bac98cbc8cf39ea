"""The folder that a run writes: what was asked for, on what, with which versions, and how far it has come.

`run.json` names the base, the best and the last checkpoint; `recipe.yaml` runs the same again; `environment.json`
says where it ran; `log.jsonl` has one line per logged step; `report.json` puts predicted beside measured.
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vlaft.config import RecipeConfig
from vlaft.errors import ConfigError, VlaftError
from vlaft.output_folder import sync
from vlaft.trained import RUN_FILE, read_status

RECIPE_FILE = "recipe.yaml"
LOG_FILE = "log.jsonl"
_PACKAGES = ("vlaft", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors", "numpy", "pyarrow")
# Settings that may differ between a run and its continuation: they change when something is written or for how
# long training goes on, not what a step computes.
_FREE_KEYS = {
    "name",
    "description",
    "data.workers",
    "data.reuse_features",
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
        with self._writing(self.path):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        self._replace(RECIPE_FILE, recipe)
        self.replace_json("dataset_statistics.json", statistics)
        self.replace_json("environment.json", environment)

    @contextmanager
    def replaced(self) -> Iterator[None]:
        """Move what is in the folder aside while a new run is created in its place, then delete it."""
        old = self.path.with_name(f".{self.path.name}.old")
        if self.writes and self.path.is_dir():
            with self._writing(self.path):
                shutil.rmtree(old, ignore_errors=True)
                self.path.rename(old)
        yield
        if self.writes:
            shutil.rmtree(old, ignore_errors=True)

    def check_resumable(self) -> None:
        """Refuse to continue a folder that holds something, but no run.

        Raises:
            ConfigError: as said.
        """
        there = self.path.is_dir() and any(not path.name.startswith(".") for path in self.path.iterdir())
        if there and not (self.path / RECIPE_FILE).is_file():
            raise ConfigError(
                f"{self.path}: there is no {RECIPE_FILE}, so this is no run that --resume could continue;"
                " name the run's folder with --out"
            )

    def read_status(self) -> dict[str, Any]:
        """Return `run.json`, or an empty dict before it was written.

        Raises:
            CheckpointError: it is damaged.
        """
        return read_status(self.path) if (self.path / RUN_FILE).is_file() else {}

    def write_status(self, **values: Any) -> None:
        """Change keys of `run.json`, aside and renamed."""
        self.replace_json(RUN_FILE, self.read_status() | values)

    def replace_json(self, name: str, content: Any) -> None:
        """Write a JSON file aside and rename it into place."""
        self._replace(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def _replace(self, name: str, text: str) -> None:
        if not self.writes:
            return
        partial = self.path / f".{name}.partial"
        with self._writing(self.path / name):
            partial.write_text(text, encoding="utf-8")
            sync(partial)
            partial.replace(self.path / name)

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise VlaftError(
                f"{path}: cannot be written ({error.strerror or error}); make room and continue with --resume"
            ) from error

    def log(self, line: Mapping[str, Any]) -> None:
        """Append a line to `log.jsonl`."""
        if self.writes:
            path = self.path / LOG_FILE
            with self._writing(path), path.open("a", encoding="utf-8") as file:
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
        self._replace(LOG_FILE, "".join(f"{line}\n" for line in kept))


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
