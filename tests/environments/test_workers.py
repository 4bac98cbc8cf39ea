"""Worker processes: what they answer, how they die, and that none is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import two_steps
from processes import alive, gone
from repository import ROOT

from vlaft.environments.episodes import ENDINGS, Job, run_episodes
from vlaft.environments.interface import Moment
from vlaft.environments.registry import tasks_named
from vlaft.environments.seats import WorkerSeat, how_many, opened_seats
from vlaft.environments.task import Task
from vlaft.environments.workers import Defect, Worker, WorkerDied, answered, close_workers
from vlaft.errors import ConfigError, MissingExtra, UsageError, VlaftError


def fail_with(name: str) -> None:
    raise {
        "usage": UsageError("typed wrongly"),
        "config": ConfigError(["one", "two"]),
        "extra": MissingExtra("it", "that", "more"),
        "defect": KeyError("a defect"),
    }[name]


def die(number: int) -> None:
    os.kill(os.getpid(), number)


def leave(code: int) -> None:
    os._exit(code)


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    close_workers([worker])
    assert not alive(worker.pid)


def test_what_a_worker_answers(worker: Worker) -> None:
    worker.ask(os.getpid)
    assert worker.answer() == worker.pid != os.getpid()
    for name, kind, text in [
        ("usage", UsageError, "typed wrongly"),
        ("config", ConfigError, "one\ntwo"),
        ("extra", VlaftError, r"it needs that: pip install 'vlaft\[more\]'"),
        ("defect", Defect, "KeyError: 'a defect'"),
    ]:
        worker.ask(fail_with, name)
        with pytest.raises(kind, match=text):
            worker.answer()
    worker.ask(os.getcwd)
    assert answered([worker]) == [worker] and worker.answer() == str(Path.cwd())


@pytest.mark.parametrize(
    ("function", "argument", "told"), [(die, signal.SIGKILL, "SIGKILL"), (leave, 7, "it exited with code 7")]
)
def test_how_a_worker_died_is_told(function: Any, argument: int, told: str) -> None:
    worker = Worker()
    worker.ask(function, argument)
    with pytest.raises(WorkerDied, match=told):
        worker.answer()
    with pytest.raises(WorkerDied, match=told):
        worker.ask(os.getpid)
    close_workers([worker])


def test_a_worker_dies_with_the_process_that_asks() -> None:
    """Killed as it is, in the middle of a computation."""
    source = (
        "import time\nfrom vlaft.environments.workers import Worker\n"
        "worker = Worker()\nworker.ask(abs, -1)\nworker.answer()\nworker.ask(time.sleep, 600)\n"
        "print(worker.pid, flush=True)\ntime.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert alive(pid)
    process.kill()
    process.wait()
    assert gone(pid)


class Steady:
    """A policy of zeros that kills a worker in the middle of an episode."""

    def __init__(self, seats: list[Any], at: dict[int, int]) -> None:
        self.seats, self.at, self.calls = seats, at, 0

    def __call__(self, moments: list[Moment]) -> list[Any]:
        import numpy as np

        self.calls += 1
        if self.calls in self.at:
            os.kill(self.seats[self.at[self.calls]].worker.pid, signal.SIGKILL)
        return [np.zeros((1, 7))] * len(moments)


def test_a_dead_worker_loses_its_episode_only() -> None:
    (task,) = tasks_named("two_steps:TwoSteps")
    told: list[str] = []
    with opened_seats(task, 2, processes=True) as seats:
        before = [seat.worker.pid for seat in seats]  # type: ignore[union-attr]
        jobs = [Job(task, seed) for seed in range(5)]
        rollout = run_episodes(Steady(list(seats), {2: 1}), seats, jobs, keep=9, told=told.append)
        after = [seat.worker.pid for seat in seats]  # type: ignore[union-attr]
    assert not any(map(alive, [*before, *after]))
    assert after[0] == before[0] and after[1] != before[1]
    (sentence,) = told
    assert sentence == "two_steps:TwoSteps, seed 1, step 2: the worker died (SIGKILL); its episode is begun again"
    assert [(each.seed, each.success, each.steps, each.ended) for each in rollout.episodes] == [
        (seed, seed % 2 == 0, 2, "environment" if seed % 2 else "success") for seed in range(5)
    ]
    assert all(len(each.frames) == 3 for each in rollout.episodes)
    with opened_seats(task, 2, processes=False) as local:
        here = run_episodes(Steady([], {}), local, jobs, keep=9)
    for one, other in zip(rollout.episodes, here.episodes, strict=True):
        assert (one.instruction, one.info) == (other.instruction, other.info)
        assert all((a == b).all() for a, b in zip(one.frames, other.frames, strict=True))


def test_an_episode_that_kills_its_workers_counts_as_failed() -> None:
    (task,) = tasks_named("two_steps:Deadly")
    told: list[str] = []
    with opened_seats(task, 2, processes=True) as seats:
        rollout = run_episodes(Steady([], {}), seats, [Job(task, seed) for seed in range(4)], told=told.append)
    ended = [each.ended for each in rollout.episodes]
    assert ended == ["success", "worker died", "success", "environment"] and set(ended) < set(ENDINGS)
    assert len(told) == 3 and "for the 3rd time; the episode counts as failed" in told[-1]
    assert not rollout.episodes[1].success


def test_workers_that_die_all_the_time_end_it_with_a_sentence() -> None:
    (task,) = tasks_named("two_steps:Deadly")
    with (
        opened_seats(task, 1, processes=True) as seats,
        pytest.raises(VlaftError, match=r"the worker died \(SIGKILL\), the 10th to do so, .*; give fewer --workers"),
    ):
        run_episodes(Steady([], {}), seats, [Job(task, 1)] * 9, told=lambda sentence: None)
    pids = [seat.worker.pid for seat in seats]  # type: ignore[union-attr]
    assert not any(map(alive, pids))
    with (
        pytest.raises(VlaftError, match=r"makes the environment died 3 times \(SIGKILL\)"),
        opened_seats(tasks_named("two_steps:stillborn")[0], 1, processes=True),
    ):
        raise AssertionError("nothing to sit on")


def test_an_environment_that_fails_there_is_told_as_here() -> None:
    (task,) = tasks_named("two_steps:Failing")
    with (
        pytest.raises(VlaftError, match=r"step\(\) 1 of the episode with seed 1 failed: RuntimeError: a motor is hot"),
        opened_seats(task, 2, processes=True) as seats,
    ):
        run_episodes(Steady([], {}), seats, [Job(task, seed) for seed in range(2)])
    assert not any(alive(seat.worker.pid) for seat in seats if isinstance(seat, WorkerSeat))


def test_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlaft.environments import seats

    monkeypatch.setattr(seats, "available_cpus", lambda: 8)
    monkeypatch.setattr(seats, "free_memory", lambda: 10 * 2**30)
    cheap, real = Task("a", two_steps.TwoSteps), Task("b", two_steps.TwoSteps, memory=2**30)
    assert how_many([cheap], 16, None) == how_many([cheap, real], 16, None) == (16, False)
    assert how_many([real], 16, None) == (8, True) and how_many([real], 3, None) == (3, True)
    assert how_many([Task("c", two_steps.TwoSteps, memory=2**31), real], 16, None) == (4, True)
    assert how_many([Task("d", two_steps.TwoSteps, memory=2**40)], 16, None) == (1, True)
    assert how_many([cheap], 16, 5) == (5, True) and how_many([real], 16, 0) == (16, False)
