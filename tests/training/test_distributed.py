"""Several processes train as one: two on CPUs, through torchrun."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from golden_models import base_tensors
from safetensors.torch import load_file
from small_run import Small, log_lines, run

from vlaft.errors import VlaftError
from vlaft.release.merge import merge
from vlaft.training.data import TrainingData
from vlaft.weights.pieces import StoredTensors
from vlaft.weights.trained import TRAINED_FILE, find_trained

WORDS = ("data.augment=false", "train.steps=4", "train.save_every=2", "train.evaluate_every=2", "data.val_examples=7")
CLOSE = 1e-5  # relative: sums over processes are taken in another order


def command(small: Small, out: Path, recipe: str, *words: str) -> list[str]:
    """Return the command of a `vlaft train` in two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    launch += ["-m", "vlaft", "train", "--recipe", recipe, "--out", str(out)]
    return [*launch, *small.words(), *WORDS, "train.batch_size=2", *words]


def train_in_two(small: Small, out: Path, recipe: str, *words: str, resume: bool = False) -> str:
    """Run `vlaft train` in two processes and return what they said."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    more = [*words, *(["--resume"] if resume else [])]
    done = subprocess.run(
        command(small, out, recipe, *more), env=environment, text=True, capture_output=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def assert_same_log(out: Path, expected: Path, first_step: int = 1) -> None:
    ours = [line for line in log_lines(out) if line["step"] >= first_step]
    theirs = [line for line in log_lines(expected) if line["step"] >= first_step]
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for key in ("loss", "action_l1", "grad_norm", "val_loss", "val_action_l1"):
            if key in mine:
                assert mine[key] == pytest.approx(other[key], rel=CLOSE), (key, mine["step"])


def assert_same_weights(out: Path, expected: Path, step: str) -> None:
    for name in ("adapter_model", "trained", "optimizer"):
        theirs = dict(StoredTensors(expected / "checkpoints" / step, name))
        theirs = {key: value for key, value in theirs.items() if not key.startswith("random.")}
        ours = StoredTensors(out / "checkpoints" / step, name)  # one file, or what each process wrote
        assert theirs.keys() <= ours.keys()
        for key, tensor in theirs.items():
            assert ours[key].shape == tensor.shape
            # Adam divides by the root of its second moment, so that rounding shows most where gradients are tiny.
            largest = float((ours[key].float() - tensor.float()).abs().max())
            assert largest <= 1e-4 * max(1.0, float(tensor.float().abs().max())), (name, key, largest)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("lora8", ["train.max_grad_norm=1.0"]),
        pytest.param("full", ["train.gradient_checkpointing=none"], marks=pytest.mark.slow),
        pytest.param("frozen-vision", ["train.accumulation=2", "precision.frozen=bfloat16"], marks=pytest.mark.slow),
    ],
)
def test_two_processes_do_what_one_does(small: Small, tmp_path: Path, recipe: str, words: list[str]) -> None:
    run(small.recipe(recipe, *WORDS, *words), tmp_path / "one")
    said = train_in_two(small, tmp_path / "two", recipe, *words)
    if "precision.frozen=bfloat16" in words:  # rounded to 8 bits in another order: the same only roughly
        ours, theirs = (log_lines(tmp_path / name)[-1]["val_loss"] for name in ("two", "one"))
        assert ours == pytest.approx(theirs, rel=1e-2)
    else:
        assert_same_log(tmp_path / "two", tmp_path / "one")
        assert_same_weights(tmp_path / "two", tmp_path / "one", "step-000004")
    # the main process alone speaks and writes
    assert said.count("4 steps in") == 1 and said.count("step      3 |") == 1
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(
        path.name for path in (tmp_path / "one").iterdir()
    )
    merge(find_trained(tmp_path / "two"), small.base, tmp_path / "merged")
    assert base_tensors(tmp_path / "merged").keys() == base_tensors(small.base).keys()


def test_two_processes_share_the_gradients_of_a_head(small: Small, tmp_path: Path) -> None:
    """OpenVLA-OFT's own trainer leaves each process with a head of its own; here there is one, as in one process."""
    words = ("policy.chunk=3", "train.learning_rate=1e-4")
    run(small.recipe("oft", *WORDS, *words), tmp_path / "one")
    train_in_two(small, tmp_path / "two", "oft", *words)
    assert_same_log(tmp_path / "two", tmp_path / "one")
    assert_same_weights(tmp_path / "two", tmp_path / "one", "step-000004")
    kept = load_file(tmp_path / "two" / "checkpoints" / "step-000004" / TRAINED_FILE)
    assert any(name.startswith("action_head.") for name in kept)


@pytest.mark.parametrize("recipe", [pytest.param("lora8", marks=pytest.mark.slow), "full"])
def test_two_processes_resume(small: Small, tmp_path: Path, recipe: str) -> None:
    run(small.recipe(recipe, *WORDS), tmp_path / "one")
    train_in_two(small, tmp_path / "two", recipe, "train.steps=2")
    shutil.copytree(tmp_path / "two", tmp_path / "fewer")
    said = train_in_two(small, tmp_path / "two", recipe, resume=True)
    assert "steps  2 of 4 done" in said
    assert_same_log(tmp_path / "two", tmp_path / "one")
    assert_same_weights(tmp_path / "two", tmp_path / "one", "step-000004")
    # what two processes wrote, one can go on with, with half the examples in a step
    told = run(small.recipe(recipe, *WORDS, "train.batch_size=2"), tmp_path / "fewer", resume=True)
    assert [line.step for line in told.lines] == [3, 4]
    assert len(told.warnings) == 1 and "a step had 4 examples and now has 2" in told.warnings[0]


@pytest.mark.slow
def test_ranks_that_outlive_their_launcher_do_not_meet_the_restart(small: Small, tmp_path: Path) -> None:
    """The launcher and the main process are killed; the other one, stopped, stands for one that hangs in a network."""
    out = tmp_path / "run"
    recipe = small.recipe("lora8", *WORDS, "train.batch_size=2", "train.steps=100000", "train.evaluate_every=0")
    launcher = subprocess.Popen(
        command(small, out, "lora8", "train.steps=100000", "train.evaluate_every=0"),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + 180
    while not (out / "checkpoints" / "step-000002").exists():
        assert launcher.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    main, other = (int(line.split()[0]) for line in (tmp_path / ".run.lock").read_text().splitlines())
    os.kill(other, signal.SIGSTOP)
    launcher.kill()
    launcher.wait()
    with pytest.raises(VlaftError, match=f"process {main} on .* is writing there"):
        run(recipe, out, resume=True)
    os.kill(main, signal.SIGKILL)
    while Path(f"/proc/{main}").exists() and "State:\tZ" not in Path(f"/proc/{main}/status").read_text():
        time.sleep(0.05)
    with pytest.raises(VlaftError, match="is writing there"):
        run(recipe, out, resume=True)
    os.kill(other, signal.SIGKILL)
    while Path(f"/proc/{other}").exists() and "State:\tZ" not in Path(f"/proc/{other}/status").read_text():
        time.sleep(0.05)
    first = replace(recipe, train=replace(recipe.train, steps=find_step(out) + 1))
    assert len(run(first, out, resume=True).lines) == 1


def find_step(out: Path) -> int:
    """Return the step of the newest checkpoint."""
    return int(sorted((out / "checkpoints").glob("step-*"))[-1].name.removeprefix("step-"))


def test_ranks_read_different_examples(small: Small) -> None:
    recipe = small.recipe("lora8")
    seen: list[list[Any]] = []
    for rank in (0, 1):
        data = TrainingData.open(recipe, small.base, rank=rank, world_size=2)
        seen.append([next(data.loader).action.tolist() for _ in range(5)])
    examples = [json.dumps(action) for rank in seen for batch in rank for action in batch]
    assert len(examples) == len(set(examples)) == 40
