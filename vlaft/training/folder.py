"""The folder that a run writes: what was asked for, on what, with which versions, and how far it has come.

`run.json` names the base, the best and the last checkpoint; `recipe.yaml` runs the same again; `environment.json`
says where it ran, and the checksums of the base's tensors; `log.jsonl` has one line per logged step; `report.json`
puts predicted beside measured. The first three carry their own checksum.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Collection, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vlaft.action.statistics import STATISTICS_FILE
from vlaft.checksums import SEAL, content_checksum, sealed, unsealed
from vlaft.errors import ConfigError, VlaftError
from vlaft.files import disk_errors, staged, sync
from vlaft.pages.curves import LOG_FILE
from vlaft.recipe.settings import RecipeConfig
from vlaft.training.events import flat_settings
from vlaft.weights.trained import (
    BASE_CHECKSUMS,
    ENVIRONMENT_FILE,
    RUN_FILE,
    read_document,
    read_status,
)

RECIPE_FILE = "recipe.yaml"
_RECIPE_SEAL = f"# {SEAL}: "  # begins the recipe's last line
CONTINUE = "; make room and continue with --resume"
_OWN_FILES = {RUN_FILE, RECIPE_FILE, LOG_FILE, STATISTICS_FILE, ENVIRONMENT_FILE, "checkpoints"}
_PACKAGES = ("vlaft", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors", "numpy", "pyarrow")
# Settings that may differ between a run and its continuation: they change when something is written or for how
# long training goes on, or how processes share the work, not what a step computes.
_FREE_KEYS = {
    "name",
    "description",
    "data.workers",
    "data.reuse_features",
    "train.log_every",
    "train.save_every",
    "train.evaluate_every",
    "train.evaluate_env_every",
    "train.keep_checkpoints",
    "train.early_stopping",
    "train.trackers",
    "train.parallel",
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

    def create(
        self,
        recipe: str,
        statistics: Mapping[str, Any],
        environment: Mapping[str, Any],
        status: Mapping[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        """Write what is known before the first step: a new run's folder at once, whole; the lock of it is held.

        Args:
            recipe: for `recipe.yaml`.
            statistics: for `dataset_statistics.json`.
            environment: for `environment.json`.
            status: keys of `run.json`.
            resume: change the files of the run that is there, if there is one.
            overwrite: replace what is there.

        Raises:
            VlaftError: the folder cannot be written, or holds something that is not to be replaced.
        """
        if not self.writes:
            return
        continued = resume and (self.path / RECIPE_FILE).is_file()
        files = {
            RECIPE_FILE: f"{recipe}{_RECIPE_SEAL}{content_checksum(recipe)}\n",
            STATISTICS_FILE: _json(statistics),
            ENVIRONMENT_FILE: _json(sealed(environment)),
            RUN_FILE: _json(sealed(self.read_status() | dict(status) if continued else status)),
        }
        if continued:
            for name, text in files.items():
                self._replace(name, text)
            return
        with staged(self.path, overwrite=overwrite) as folder:
            (folder / self.checkpoints.name).mkdir()
            for name, text in files.items():
                (folder / name).write_text(text, encoding="utf-8")

    def check_resumable(self) -> None:
        """Refuse to continue a folder that holds something, but no run, or one whose recipe is not as it was written.

        Raises:
            ConfigError: as said.
        """
        there = self.path.is_dir() and any(self.path.iterdir())
        if there and not (self.path / RECIPE_FILE).is_file():
            raise ConfigError(
                f"{self.path}: there is no {RECIPE_FILE}, so this is no run that --resume could continue;"
                " name the run's folder with --out"
            )
        if there:
            self.check_recipe()

    def check_recipe(self) -> bool:
        """Hold `recipe.yaml` against its checksum; say whether it carries one.

        Raises:
            ConfigError: it cannot be read, or does not match.
        """
        path = self.path / RECIPE_FILE
        try:
            text, mark, recorded = path.read_text(encoding="utf-8").rpartition(_RECIPE_SEAL)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read ({error})") from None
        if mark and recorded.strip() != content_checksum(text):
            raise ConfigError(
                f"{path}: the file does not match its checksum; take it from a copy of the run (if the change is meant,"
                " delete its last line)"
            )
        return bool(mark)

    def holds_nothing(self) -> bool:
        """Say whether here is a run that failed before its first checkpoint, and nothing besides."""
        try:
            there = {path.name for path in self.path.iterdir()}
            return (
                there <= _OWN_FILES
                and self.read_status().get("status") == "failed"
                and not any(self.checkpoints.iterdir())
            )
        except (OSError, VlaftError):
            return False

    def read_status(self) -> dict[str, Any]:
        """Return `run.json`, or an empty dict before it was written.

        Raises:
            CheckpointError: it is damaged.
        """
        return unsealed(read_status(self.path)) if (self.path / RUN_FILE).is_file() else {}

    def read_base_checksums(self) -> str | None:
        """Return the checksums of the base's tensors that the run began with, or None where it did not note them.

        Raises:
            CheckpointError: the file that says so is damaged.
        """
        path = self.path / ENVIRONMENT_FILE
        return read_document(path).get(BASE_CHECKSUMS) if path.is_file() else None

    def write_status(self, **values: Any) -> None:
        """Change keys of `run.json`, aside and renamed."""
        self.replace_json(RUN_FILE, sealed(self.read_status() | values))

    def replace_json(self, name: str, content: Any) -> None:
        """Write a JSON file aside and rename it into place."""
        self._replace(name, _json(content))

    def _replace(self, name: str, text: str) -> None:
        if not self.writes:
            return
        partial = self.path / f".{name}.partial"
        with disk_errors(self.path / name, CONTINUE):
            try:
                partial.write_text(text, encoding="utf-8")
                sync(partial)
                partial.replace(self.path / name)
            finally:
                partial.unlink(missing_ok=True)  # Ctrl-C or SIGTERM came in between

    def log(self, line: Mapping[str, Any]) -> None:
        """Append a line to `log.jsonl`."""
        if self.writes:
            path = self.path / LOG_FILE
            with disk_errors(path, CONTINUE), path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def truncate_log(self, step: int) -> None:
        """Drop the lines after `step`: a continued run writes them again."""
        path = self.path / LOG_FILE
        if not self.writes or not path.is_file():
            return
        kept = []
        with disk_errors(path, CONTINUE):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        for line in lines:
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue  # a line that a kill cut short
        self._replace(LOG_FILE, "".join(f"{line}\n" for line in kept))


def check_same_recipe(old: RecipeConfig, new: RecipeConfig, folder: Path, free: Collection[str] = frozenset()) -> None:
    """Refuse to continue a run under settings that would make it another run.

    Args:
        old: settings of the run.
        new: those that it is to be continued with.
        folder: of the run, for errors.
        free: further settings that may differ.

    Raises:
        ConfigError: each setting that differs, in one sentence.
    """
    before, after = (
        {key: list(value) if isinstance(value, tuple) else value for key, value in flat_settings(asdict(one)).items()}
        for one in (old, new)
    )
    different = [
        key for key in before if before[key] != after.get(key) and key not in {"train.steps", *_FREE_KEYS, *free}
    ]
    if old.train.schedule.name in ("cosine", "linear") and old.train.steps != new.train.steps:
        different.append("train.steps")  # the schedule's shape depends on it
    if different:
        told = ", ".join(f"{key} (was {before[key]}, now {after.get(key)})" for key in different)
        raise ConfigError(f"{folder}: --resume continues the run as it was, but these settings differ: {told}")


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def command_line() -> list[str]:
    """Return the words that started this process."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
