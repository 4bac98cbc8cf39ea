"""A mini base, demonstrations converted for it, and a listener that remembers what it was told."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vlaft.recipe.resolve import resolve
from vlaft.recipe.settings import RecipeConfig
from vlaft.training import trainer
from vlaft.training.events import Banner, EvaluationLine, Listener, RunSummary, StepLine
from vlaft.training.trainer import train

TIMES = ("samples_per_second", "data_seconds", "seconds_left")


@dataclass(frozen=True)
class Small:
    """A base and a dataset of 40 training and 8 held-out examples."""

    base: Path
    data: Path

    def recipe(self, name: str, *words: str) -> RecipeConfig:
        return resolve(name, [], [*self.words(name), *words])

    def words(self, name: str = "") -> list[str]:
        """Settings under which a recipe takes seconds on the mini model."""
        words = [f"base='{self.base}'", f"data.path='{self.data}'", "data.workers=0", "train.log_every=1"]
        return [*words, "train.batch_size=4", "train.accumulation=1", "train.steps=3"]


@dataclass
class Recorder(Listener):
    """A listener that remembers."""

    banner: Banner | None = None
    lines: list[StepLine] = field(default_factory=list)
    evaluations: list[EvaluationLine] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    summary: RunSummary | None = None

    def started(self, banner: Banner) -> None:
        self.banner = banner

    def stepped(self, line: StepLine) -> None:
        self.lines.append(line)

    def evaluated(self, line: EvaluationLine) -> None:
        self.evaluations.append(line)

    def saved(self, checkpoint: Path) -> None:
        assert checkpoint.is_dir()

    def warned(self, sentence: str) -> None:
        self.warnings.append(sentence)

    def finished(self, summary: RunSummary) -> None:
        self.summary = summary

    @property
    def losses(self) -> list[float]:
        return [line.loss for line in self.lines]


def run(recipe: RecipeConfig, out: Path, **options: Any) -> Recorder:
    """Train and return what was told."""
    recorder = Recorder()
    train(recipe, out, recorder, **options)
    return recorder


def checkpoint_content(out: Path, name: str) -> dict[str, Any]:
    """Return everything that a checkpoint says; two runs that agree bit for bit say the same.

    Tensors as type, shape and bytes; not the files themselves, because safetensors writes its metadata in any order.
    """
    folder = out / "checkpoints" / name
    content: dict[str, Any] = {"state": json.loads((folder / "state.json").read_text())}
    del content["state"]["crc32c"]  # of the list of files as well
    for file in content["state"].pop("files"):
        if file.endswith(".safetensors"):
            for key, tensor in load_file(folder / file).items():
                data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                content[f"{file}: {key}"] = (str(tensor.dtype), tuple(tensor.shape), data)
        else:
            content[file] = (folder / file).read_bytes()
    assert len(content) > 10
    return content


def log_lines(out: Path) -> list[dict[str, Any]]:
    """Return the log without what a clock says."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


class Stopped(Exception):
    """What a test stops a run with."""


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the run die after `step`, without a chance to save."""
    original = trainer.Run.step

    def step_or_die(self: trainer.Run, *arguments, **keywords):  # type: ignore[no-untyped-def]
        if self.progress.step == step:
            raise Stopped
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(trainer.Run, "step", step_or_die)
