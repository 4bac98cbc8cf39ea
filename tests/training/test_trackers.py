"""Curves to trackers: what they are told, and that their absence or failure is told in a sentence."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from small_base import convert_small, write_small_base

from vlaft.cli.main import main
from vlaft.errors import MissingExtra, VlaftError
from vlaft.pages.curves import LOG_FILE
from vlaft.recipe.checks import TRACKERS
from vlaft.recipe.resolve import resolve
from vlaft.training import events as module
from vlaft.training.events import Trackers, check_trackers


class Recorder:
    """Stands for an accelerate tracker."""

    name = "recorder"

    def __init__(self, **options: Any) -> None:
        self.options, self.lines, self.calls = options, [], []
        self.fail = ""
        made.append(self)

    def _call(self, name: str) -> None:
        if self.fail == name:
            raise ConnectionError(f"no network\nfor {name}")
        self.calls.append(name)

    def start(self) -> None:
        self._call("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._call("store")
        self.settings = values

    def log(self, values: dict[str, float], step: int) -> None:
        self._call("log")
        self.lines.append({"step": step, **values})

    def finish(self) -> None:
        self._call("finish")


made: list[Recorder] = []


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    made.clear()
    monkeypatch.setattr(module, "find_spec", lambda name: SimpleNamespace())
    for name in TRACKERS:
        monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, Recorder)
    PartialState()
    return made


def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "wandb" else SimpleNamespace())
    check_trackers(["tensorboard", "trackio"])
    with pytest.raises(MissingExtra, match=r"train.trackers=\[wandb\] needs wandb: pip install 'vlaft\[wandb\]'"):
        check_trackers(["tensorboard", "wandb"])


def test_a_run_tells_its_trackers_what_it_logs(recorders: list[Recorder], tmp_path: Path) -> None:
    base = write_small_base(tmp_path / "base")
    data = convert_small(base, tmp_path / "data")
    words = ["train", "--base", str(base), "--data", str(data), "--out", str(tmp_path / "run"), "--recipe", "lora8"]
    words += ["train.batch_size=2", "train.evaluate_every=2", "train.log_every=1", "data.workers=0"]
    words += ["train.trackers=[tensorboard,wandb]"]
    assert main([*words, "train.steps=2"]) == 0
    tensorboard, wandb = recorders
    assert tensorboard.options["purge_step"] == 1 and wandb.options["name"] == "run"
    assert wandb.settings["train.steps"] == 2 and wandb.settings["adapt.lora.rank"] == 8
    logged = [json.loads(line) for line in (tmp_path / "run" / LOG_FILE).read_text().splitlines()]
    assert len(logged) == 3 and "val_loss" in logged[2]
    numbers = [{key: value for key, value in line.items() if type(value) in (int, float)} for line in logged]
    assert tensorboard.lines == wandb.lines == numbers
    assert tensorboard.calls == ["start", "log", "log", "log", "finish"] and wandb.calls[-1] == "finish"
    assert main([*words, "train.steps=3", "--resume"]) == 0
    assert recorders[2].options["purge_step"] == 3
    assert [line["step"] for line in recorders[2].lines] == [3, 3]


def test_a_missing_package_stops_before_the_base_is_looked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    words = ["train", "--data", str(tmp_path), "--base", str(tmp_path / "absent"), "--out", str(tmp_path / "run")]
    assert main([*words, "train.trackers=[trackio]"]) == 1
    assert capsys.readouterr().err == "error: train.trackers=[trackio] needs trackio: pip install 'vlaft[trackio]'\n"


def test_failures_are_told_and_survived(recorders: list[Recorder], tmp_path: Path) -> None:
    recipe = resolve("lora8", words=["train.trackers=[tensorboard,wandb,wandb]"])
    told: list[str] = []
    trackers = Trackers(told.append)
    trackers.start(recipe, tmp_path, 0)
    first, second = recorders  # named twice, started once
    first.fail = "log"
    trackers.log({"step": 1, "loss": 0.5, "best": True, "memory_bytes": None})
    trackers.log({"step": 2, "loss": 0.25})
    assert told == ["recorder gets no more curves (no network for log); log.jsonl goes on"]
    assert first.lines == [] and second.lines == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    second.fail = "finish"
    trackers.close()
    assert told[1:] == ["recorder could not be closed (no network for finish); log.jsonl has all"]
    trackers.close()
    assert len(told) == 2


def test_one_that_cannot_start_closes_the_others(
    recorders: list[Recorder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Recorder):
        def start(self) -> None:
            raise RuntimeError("api_key not configured")

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Broken)
    recipe = resolve("lora8", words=["train.trackers=[tensorboard,wandb]"])
    with (
        pytest.raises(VlaftError, match=r"wandb cannot start \(api_key not configured\); train without it"),
        closing(Trackers(print)) as trackers,
    ):
        trackers.start(recipe, tmp_path, 0)
    assert recorders[0].calls == ["start", "finish"]


def test_tensorboard_files(tmp_path: Path) -> None:
    """With the package itself, where it is installed."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    PartialState()
    recipe = resolve("lora8", words=["train.trackers=[tensorboard]"])
    for first in (0, 2):  # the second call continues after step 2
        trackers = Trackers(print)
        trackers.start(recipe, tmp_path, first)
        for step in range(first + 1, first + 4):
            trackers.log({"step": step, "loss": 1.0 / step + first})
        trackers.close()
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert events.Scalars("loss")[2].value == pytest.approx(1 / 3 + 2)
