"""Where environments are: one to a seat, in this process or in a worker of its own.

A seat is asked and answers later, so that several worker processes compute at the same time; in this process it
computes when it is asked. It has one environment, which is made anew when another task is begun.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vlaft.environments.interface import Environment, begin, close, made, step
from vlaft.environments.registry import tasks_named
from vlaft.environments.task import Task
from vlaft.environments.workers import Worker, WorkerDied, at_end, close_workers
from vlaft.errors import VlaftError
from vlaft.machine import available_cpus, free_memory

ATTEMPTS = 3  # at an episode, or at making an environment, whose worker dies
_SHARE = 0.8  # of the free memory that environments may take

Cameras = Collection[str] | None  # that will be looked through, as `interface.begin` and `interface.step` take them


class Seat(Protocol):
    """One of these is asked at a time; `answer` gives what came of it."""

    def prepare(self, task: Task) -> None:
        """Make the task's environment; the answer is None."""

    def begin(self, task: Task, seed: int, cameras: Cameras) -> None:
        """Begin an episode; the answer is a `Moment`."""

    def step(self, action: NDArray[np.float32], seed: int, number: int, instruction: str, cameras: Cameras) -> None:
        """Do an action, as `interface.step` does; the answer is an `Outcome`."""

    def answer(self) -> Any:
        """Return what the last thing asked gave.

        Raises:
            VlaftError: the environment failed, or does not keep to the interface.
            WorkerDied: its process ended; the seat is as new.
        """


class LocalSeat:
    """An environment in this process.

    Args:
        beside: says which environments there are besides, none of which may be handed out again.
    """

    def __init__(self, beside: Callable[[], list[Environment]] = list) -> None:
        self.environment: Environment | None = None
        self._beside = beside
        self._task = ""
        self._answer: Any = None

    def prepare(self, task: Task) -> None:
        """Make the task's environment, unless it is there."""
        if self.environment is None or self._task != task.name:
            self.close()
            self.environment, self._task = made(task.make, self._beside()), task.name

    def begin(self, task: Task, seed: int, cameras: Cameras) -> None:
        """Begin an episode."""
        self.prepare(task)
        assert self.environment is not None
        self._answer = begin(self.environment, seed, cameras)

    def step(self, action: NDArray[np.float32], seed: int, number: int, instruction: str, cameras: Cameras) -> None:
        """Do an action."""
        assert self.environment is not None
        self._answer = step(self.environment, action, seed, number, instruction, cameras)

    def answer(self) -> Any:
        """Return what was computed."""
        return self._answer

    def close(self) -> None:
        """Close the environment."""
        if self.environment is not None:
            close(self.environment)
            self.environment = None


class WorkerSeat:
    """An environment in a process of its own; it finds the task by its name."""

    def __init__(self) -> None:
        self.worker = Worker()

    def prepare(self, task: Task) -> None:
        """Make the task's environment there."""
        self._ask(_prepare, task.name)

    def begin(self, task: Task, seed: int, cameras: Cameras) -> None:
        """Begin an episode there."""
        self._ask(_begin, task.name, seed, cameras)

    def step(self, action: NDArray[np.float32], seed: int, number: int, instruction: str, cameras: Cameras) -> None:
        """Do an action there."""
        self._ask(_step, action, seed, number, instruction, cameras)

    def answer(self) -> Any:
        """Wait for it."""
        try:
            return self.worker.answer()
        except WorkerDied:
            close_workers([self.worker])
            self.worker = Worker()
            raise

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> None:
        with suppress(WorkerDied):  # `answer` finds it out too, and says so
            self.worker.ask(function, *arguments)


@contextmanager
def opened_seats(task: Task, count: int, *, processes: bool) -> Iterator[list[LocalSeat] | list[WorkerSeat]]:
    """Give seats with a task's environment in each; in the end all are closed, however the block ends.

    Args:
        task: to begin with.
        count: how many.
        processes: each in a process of its own.

    Raises:
        DataError: what the task's factory makes is no single environment, or the same one twice.
        VlaftError: it fails, or the processes die of it.
    """
    if not processes:
        local: list[LocalSeat] = []
        try:
            for _ in range(count):
                local.append(LocalSeat(lambda: [each.environment for each in local if each.environment is not None]))
                local[-1].prepare(task)
            yield local
        finally:
            for seat in local:
                seat.close()
        return
    seats: list[WorkerSeat] = []
    try:
        for _ in range(count):
            seats.append(WorkerSeat())
            seats[-1].prepare(task)
        for each in seats:
            _prepared(each, task)
        yield seats
    finally:
        close_workers([each.worker for each in seats])


def how_many(tasks: Sequence[Task], parallel: int, workers: int | None) -> tuple[int, bool]:
    """Return how many environments run side by side, and whether each has a process of its own.

    What is cheap (the tabletop), and what belongs to the user and may be a robot, runs in this process. A real
    simulator gets as many processes as there are CPUs, and memory for them.

    Args:
        tasks: what will be acted in.
        parallel: most of them at a time.
        workers: so many processes, or 0 for none; None chooses.
    """
    if workers is not None:
        return workers or parallel, workers > 0
    needs = [task.memory for task in tasks if task.memory is not None]
    if len(needs) < len(tasks):
        return parallel, False
    return max(1, min(parallel, available_cpus(), int(_SHARE * free_memory() / max(needs)))), True


def _prepared(seat: WorkerSeat, task: Task) -> None:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            seat.answer()
            return
        except WorkerDied as death:
            if attempt == ATTEMPTS:
                raise VlaftError(
                    f"{task.name}: the process that makes the environment died {ATTEMPTS} times ({death}), perhaps for"
                    " want of memory; give fewer --workers"
                ) from death
            seat.prepare(task)


# What runs in the worker: its one seat, which is closed when the process ends.

_here = LocalSeat()
at_end(_here.close)


def _prepare(name: str) -> None:
    _here.prepare(_task(name))


def _begin(name: str, seed: int, cameras: Cameras) -> Any:
    _here.begin(_task(name), seed, cameras)
    return _here.answer()


def _step(action: NDArray[np.float32], seed: int, number: int, instruction: str, cameras: Cameras) -> Any:
    _here.step(action, seed, number, instruction, cameras)
    return _here.answer()


def _task(name: str) -> Task:
    return tasks_named(name)[0]
