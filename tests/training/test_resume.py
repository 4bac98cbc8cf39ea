"""A run that was stopped, however rudely, ends as an undisturbed one: every bit of its checkpoints and its log."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import faults
import pytest
from small_run import Small, Stopped, checkpoint_content, log_lines, run, stop_after

from vlaft.errors import Interrupted, VlaftError
from vlaft.files import locked, restored
from vlaft.training import trainer
from vlaft.training.folder import RunFolder

STEPS = ("train.steps=6", "train.save_every=2", "train.evaluate_every=2", "train.keep_checkpoints=3")
VARIANTS = {
    "plain": [],
    "dropout": ["adapt.lora.dropout=0.1"],
    "cosine with warm-up and clipping": [
        *("train.schedule.name=cosine", "train.schedule.warmup_steps=2", "train.max_grad_norm=1.0"),
    ],
    "step decay and accumulation": [
        *("train.schedule.name=step", "train.schedule.step_size=2", "train.accumulation=2", "train.batch_size=3"),
    ],
    "linear and LoRA+": ["train.schedule.name=linear", "adapt.lora.plus_ratio=8"],
    "PiSSA": ["adapt.lora.init=pissa", "adapt.lora.rank=4"],
    "DoRA and PiSSA": ["adapt.lora.init=pissa", "adapt.lora.rank=4", "adapt.lora.dora=true"],
    "8-bit optimizer on nf4": ["train.optimizer=paged-adamw-8bit", "adapt.quantize=nf4", "adapt.lora.rank=64"],
    "all in bfloat16": ["precision.frozen=bfloat16", "precision.trained=bfloat16"],
    "threads": ["data.workers=2"],
}


@pytest.mark.parametrize("words", VARIANTS.values(), ids=VARIANTS.keys())
def test_resumed_as_undisturbed(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    _compare_resumed(small, tmp_path, monkeypatch, "lora8", words)


@pytest.mark.parametrize("name", ["full", "sandwich", "last-layer"])
def test_whole_weights_resumed_as_undisturbed(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    _compare_resumed(small, tmp_path, monkeypatch, name, [])


def _compare_resumed(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: list[str]
) -> None:
    recipe = small.recipe(name, *STEPS, *words)
    run(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 3)
        run(recipe, tmp_path / "cut")
    assert not (tmp_path / "cut" / "checkpoints" / "step-000004").exists()
    told = run(recipe, tmp_path / "cut", resume=True)
    assert told.banner is not None and told.banner.first_step == 2
    for step in ("step-000004", "step-000006"):
        assert checkpoint_content(tmp_path / "cut", step) == checkpoint_content(tmp_path / "whole", step)
    assert log_lines(tmp_path / "cut") == log_lines(tmp_path / "whole")


def test_a_finished_run_is_not_trained_on(small: Small, tmp_path: Path) -> None:
    recipe = small.recipe("lora8", *STEPS)
    run(recipe, tmp_path / "run")
    before = checkpoint_content(tmp_path / "run", "step-000006")
    told = run(recipe, tmp_path / "run", resume=True)
    assert told.losses == [] and told.summary is not None and told.summary.steps == 6
    assert checkpoint_content(tmp_path / "run", "step-000006") == before


def test_more_steps_may_be_asked_for(small: Small, tmp_path: Path) -> None:
    run(small.recipe("lora8", *STEPS), tmp_path / "whole")
    run(small.recipe("lora8", *STEPS, "train.steps=4"), tmp_path / "longer")
    told = run(small.recipe("lora8", *STEPS, "train.log_every=5"), tmp_path / "longer", resume=True)
    assert [line.step for line in told.lines] == [5, 6]
    assert checkpoint_content(tmp_path / "longer", "step-000006") == checkpoint_content(
        tmp_path / "whole", "step-000006"
    )


def start(small: Small, out: Path, *words: str) -> subprocess.Popen[str]:
    """Start a real `vlaft train`."""
    command = [sys.executable, "-m", "vlaft", "train", "--recipe", "lora8", "--out", str(out), "--resume"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *small.words(), *words],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=faults.heed_signals,
    )


def wait_for(seen: Path, process: subprocess.Popen[str], seconds: float = 120.0) -> None:
    """Wait until a file or folder is there, looking as often as the machine allows."""
    until = time.monotonic() + seconds
    while not seen.exists():
        if process.poll() is not None or time.monotonic() > until:
            raise AssertionError(f"{seen} never came: {process.communicate()[1]}")


def test_killed_while_a_checkpoint_is_written(small: Small, tmp_path: Path) -> None:
    words = ("train.steps=30", "train.save_every=5", "train.evaluate_every=0", "adapt.lora.rank=64")
    run(small.recipe("lora8", *words), tmp_path / "whole")
    out = tmp_path / "killed"
    for step in (5, 15):
        process = start(small, out, *words)
        partial = out / "checkpoints" / f".step-{step:06d}.partial"
        wait_for(partial, process)
        process.kill()
        process.communicate()
    assert partial.is_dir() and not partial.with_name(f"step-{step:06d}").exists()  # it did hit in the middle
    run(small.recipe("lora8", *words), out, resume=True)
    assert not list((out / "checkpoints").glob(".*"))
    last = checkpoint_content(out, "step-000030")
    assert last == checkpoint_content(tmp_path / "whole", "step-000030")
    assert log_lines(out) == log_lines(tmp_path / "whole")


@pytest.mark.slow
def test_killed_at_random_moments(small: Small, tmp_path: Path) -> None:
    words = ("train.steps=60", "train.save_every=4", "train.evaluate_every=12", "adapt.lora.dropout=0.1")
    run(small.recipe("lora8", *words), tmp_path / "whole")
    out = tmp_path / "killed"
    chance = random.Random(0)
    for _ in range(8):
        process = start(small, out, *words)
        wait_for(out / "run.json", process)
        time.sleep(chance.uniform(0.0, 4.0))
        process.kill()
        process.communicate()
    run(small.recipe("lora8", *words), out, resume=True)
    assert checkpoint_content(out, "step-000060") == checkpoint_content(tmp_path / "whole", "step-000060")
    assert log_lines(out) == log_lines(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_told_to_stop_it_saves_and_exits_with_130(small: Small, tmp_path: Path, number: signal.Signals) -> None:
    words = ("train.steps=100000", "train.save_every=100000", "train.evaluate_every=0")
    out = tmp_path / "run"
    process = start(small, out, *words)
    wait_for(out / "log.jsonl", process)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "Traceback" not in said and "continue with --resume" in said
    saved = [path.name for path in (out / "checkpoints").iterdir()]
    assert len(saved) == 1
    steps = int(saved[0].removeprefix("step-"))
    limit = f"train.steps={steps + 2}"
    run(small.recipe("lora8", *words, limit), out, resume=True)
    run(small.recipe("lora8", *words, limit), tmp_path / "whole")
    name = f"step-{steps + 2:06d}"
    assert checkpoint_content(out, name) == checkpoint_content(tmp_path / "whole", name)


def test_stopped_before_the_first_step_there_is_nothing_to_save(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(self: trainer.Run, **options: bool) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trainer.Run, "load", load)
    with pytest.raises(KeyboardInterrupt):
        run(small.recipe("lora8"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_in_the_last_step_finishes_the_run(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = trainer.Run.step

    def step(self: trainer.Run, *arguments, **keywords):  # type: ignore[no-untyped-def]
        if self.progress.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(trainer.Run, "step", step)
    told = run(small.recipe("lora8"), tmp_path / "run")
    assert told.summary is not None and told.summary.steps == 3
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(Interrupted, match="saved as step-000003"):
        run(small.recipe("lora8", "train.steps=5"), tmp_path / "run")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_new_run_is_there_whole_or_not_at_all(tmp_path: Path, overwrite: bool) -> None:
    """Killed at any event, the folder holds no run or one that can be continued; replaced, the old one or the new."""
    out = tmp_path / "run"

    def create(recipe: str) -> None:
        with locked(out):
            RunFolder(out).create(recipe, {}, {}, {"status": "running"}, overwrite=overwrite)

    def look(at: int, code: int) -> None:
        assert code == -signal.SIGKILL
        if restored(out).exists():
            found = {path.name for path in out.iterdir()}
            files = {"recipe.yaml", "dataset_statistics.json", "environment.json", "run.json", "checkpoints"}
            assert found == files, at
            assert RunFolder(out).read_status() == {"status": "running"}
            recipe, _, _ = (
                (out / "recipe.yaml").read_text().partition("#")
            )  # of the text that stands before its checksum
            assert recipe in (("old", "new") if overwrite else ("new",)), at
            shutil.rmtree(out)
        create("again")
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
        if not overwrite:
            shutil.rmtree(out)
        else:
            create("old")

    if overwrite:
        create("old")
    assert faults.at_each_moment(tmp_path, "kill", lambda: create("new"), look) > 15


def test_a_run_that_appeared_meanwhile_is_not_written_into(small: Small, tmp_path: Path) -> None:
    """As when two are started at once, and the second gets the lock when the first one has ended."""
    run(small.recipe("lora8"), tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(VlaftError, match="run is not empty"):
        run(small.recipe("lora8", "train.seed=1"), tmp_path / "run")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_two_that_continue_one_run(small: Small, tmp_path: Path) -> None:
    """Started at once, one trains and the other is refused before it touches anything."""
    out = tmp_path / "run"
    run(small.recipe("lora8", "train.steps=2", "train.save_every=1", "train.evaluate_every=0"), out)
    before = checkpoint_content(out, "step-000002")
    words = ("train.steps=100000", "train.save_every=100000", "train.evaluate_every=0")
    both = [start(small, out, *words) for _ in range(2)]
    while all(process.poll() is None for process in both):
        time.sleep(0.02)
    refused, trains = sorted(both, key=lambda process: process.poll() is None)
    said = refused.communicate()[1]
    assert refused.returncode == 1 and f"process {trains.pid} on " in said and "is writing there" in said
    assert said.count("\n") == 1
    while len(log_lines(out)) < 5 and trains.poll() is None:
        time.sleep(0.02)
    trains.send_signal(signal.SIGTERM)
    assert "continue with --resume" in trains.communicate(timeout=120)[1]
    steps = [line["step"] for line in log_lines(out)]
    assert steps == list(range(1, len(steps) + 1))
    assert checkpoint_content(out, "step-000002") == before
    assert not list(tmp_path.glob(".*"))


def test_rotating_on_a_broken_disk_is_a_sentence(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def broken(self: Path, target: Path) -> Path:
        if target.name == ".step-000002.old":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", broken)
    recipe = small.recipe("lora8", *STEPS, "train.keep_checkpoints=1", "train.evaluate_every=0")
    told = run(recipe, tmp_path / "run")
    assert "step-000002: an old checkpoint could not be deleted (Input/output error)" in told.warnings[0]
    monkeypatch.undo()
    run(
        small.recipe("lora8", *STEPS, "train.keep_checkpoints=1", "train.evaluate_every=0", "train.steps=8"),
        tmp_path / "run",
        resume=True,
    )
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000008"]
