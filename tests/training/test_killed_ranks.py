"""One of two processes that train as one is killed at any moment: what was saved stays, and the other says who died.

    VLAFT_KILLS=100 pytest -m slow tests/training/test_killed_ranks.py

The run goes on after each kill from its newest checkpoint, as a launcher would let it, and in the end it has followed
the losses of a run that nobody disturbed.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import tell
from processes import alive
from ranks import Ended, end, start, together
from small_run import Recorder, Small, log_lines, run

from vlaft.training.checkpoints import checkpoint_step, list_checkpoints, newest_good
from vlaft.training.run import Run
from vlaft.training.trainer import train

WORDS = ("data.augment=false", "train.save_every=1", "train.evaluate_every=0", "train.keep_checkpoints=2")
SECONDS = 60  # the longest that the other may take to see it, on a machine that does other things as well


class Tells(Recorder):
    """Writes down which step was saved last: not before it was."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    def saved(self, checkpoint: Path) -> None:
        beside = self.file.with_suffix(".new")  # a kill in between leaves the old number
        beside.write_text(str(checkpoint_step(checkpoint)))
        beside.replace(self.file)


def killed_once(small: Small, folder: Path, chance: random.Random, steps: int) -> tuple[list[Ended], int, bool]:
    """Train in two processes, kill one, and return how both ended, which was killed, and whether they had met."""
    recipe = small.recipe("full", *WORDS, f"train.steps={steps}", "train.batch_size=2")
    met = folder / "met"
    met.unlink(missing_ok=True)

    def work(rank: int) -> None:
        load = Run.load

        def loads(*arguments: object, **options: object) -> None:
            met.touch()
            load(*arguments, **options)  # type: ignore[arg-type]

        Run.load = loads  # type: ignore[method-assign,assignment]
        train(recipe, folder / "run", Tells(folder / "saved"), resume=True)

    pids, said = start(2, work, folder / "said"), folder / "said"
    victim, saves = chance.randrange(2), chance.randrange(4)
    if chance.random() < 0.9:  # else while they look for each other
        _wait_for(met.exists, pids)
    began, saved, pause = time.monotonic(), folder / "saved", 1.0
    for _ in range(saves):  # so that a slow machine sees moments of all kinds as well
        before = _content(saved)
        _wait_for(lambda before=before: _content(saved) != before, pids)  # type: ignore[misc]
        pause, began = time.monotonic() - began, time.monotonic()
    time.sleep(chance.uniform(0, 1.2 * min(pause, 10.0)))
    had_met = met.exists()
    os.kill(pids[victim], signal.SIGKILL)
    if not had_met:  # they wait for each other for as long as they are told to; a launcher ends them
        time.sleep(0.1)
        os.kill(pids[1 - victim], signal.SIGKILL)
    began = time.monotonic()
    ended = end(pids, said, SECONDS)
    assert time.monotonic() - began < SECONDS
    return ended, victim, had_met


def _content(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def _wait_for(come: Callable[[], bool], pids: list[int]) -> None:
    until = time.monotonic() + SECONDS
    while not come() and time.monotonic() < until and all(alive(pid) for pid in pids):
        time.sleep(0.002)


@pytest.mark.parametrize("kills", [2, pytest.param(int(os.environ.get("VLAFT_KILLS", "100")), marks=pytest.mark.slow)])
def test_a_killed_rank_loses_no_checkpoint(
    small: Small, tmp_path: Path, kills: int, request: pytest.FixtureRequest
) -> None:
    chance, steps, told, newest = random.Random(kills), 10 * kills, 0, -1
    for number in range(kills):
        ended, victim, met = killed_once(small, tmp_path, chance, steps)
        if ended[victim].code == 0:
            continue  # all was done before
        survivor = ended[1 - victim]
        if met and survivor.code != 0:
            sentence = f"process {victim} of 2 (number"
            assert survivor.code == 1 and sentence in survivor.said, (number, survivor)
            assert "start all again with --resume" in survivor.said
            told += 1
        saved = int((tmp_path / "saved").read_text()) if (tmp_path / "saved").exists() else -1
        found, warnings = newest_good(tmp_path / "run" / "checkpoints")
        assert warnings == [], (number, warnings)
        there = -1 if found is None else checkpoint_step(found)
        assert there >= max(saved, newest), (number, there, saved, newest)
        newest = there
        if number % 10 == 9:
            tell(request.config, f"{number + 1} kills: {told} sentences, step {newest} of {steps} saved")
        assert len(list_checkpoints(tmp_path / "run" / "checkpoints")) <= 3
    tell(request.config, f"{kills} kills of one of two ranks: {told} sentences, step {newest} of {steps} saved")
    assert told > 0
    last = max(newest, 0) + 2
    recipe = small.recipe("full", *WORDS, f"train.steps={last}", "train.batch_size=2")
    together(2, lambda rank: train(recipe, tmp_path / "run", Recorder(), resume=True) and None, tmp_path / "said")
    run(small.recipe("full", *WORDS, f"train.steps={last}", "train.save_every=1000"), tmp_path / "undisturbed")
    ours, theirs = (
        {line["step"]: line["loss"] for line in log_lines(tmp_path / name)} for name in ("run", "undisturbed")
    )
    assert ours == pytest.approx(theirs, rel=1e-4) and len(ours) == last
