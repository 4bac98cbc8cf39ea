"""Demonstrations of scripted experts, recorded as a LeRobot v3.0 dataset.

Each finished episode lies in `<out>.partial` until all are there; killed and started again, the same command goes on
where it was. Which episodes a dataset has does not depend on how many processes recorded it: those of the first seeds
whose expert succeeds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlaft.data.lerobot_writer import Piece, Shape, read_piece, write_dataset, write_piece
from vlaft.environments.errands import Errand, run_errands
from vlaft.environments.registry import shipped_tasks, tasks_named
from vlaft.environments.seats import how_many
from vlaft.environments.task import Expert, Task
from vlaft.environments.unfinished import discard, unfinished
from vlaft.errors import ConfigError, DataError
from vlaft.files import disk_errors, locked, staged, write_json

_HOPELESS = 10  # failures beyond as many as there are successes: the expert cannot do it


@dataclass(frozen=True)
class RecordRequest:
    """What to record.

    Attributes:
        envs: as `tasks_named` takes them.
        out: the dataset's folder.
        episodes: of each task.
        seed: of the first episode; the others follow. Far from those that an evaluation begins with: the same seed is
            the same episode, which must not be demonstrated first and then counted.
        disturbed: share of steps at which the robot does something else than the expert wanted; None for the expert's
            own share.
        pad: write actions as OpenVLA's seven numbers.
        fast_render: draw frames faster, and coarser than a policy that acts sees them.
        workers: processes; None chooses (`seats.how_many`).
        overwrite: replace a dataset that is there.
    """

    envs: tuple[str, ...]
    out: Path
    episodes: int = 50
    seed: int = 100_000
    disturbed: float | None = None
    pad: bool = False
    fast_render: bool = False
    workers: int | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Recording:
    """What was recorded.

    Attributes:
        out: the dataset.
        episodes: in it.
        steps: in it.
        failures: task to how many of the expert's episodes failed; they are left out.
        reused: episodes that an earlier call had finished.
    """

    out: Path
    episodes: int
    steps: int
    failures: dict[str, int]
    reused: int


def record(
    request: RecordRequest,
    *,
    advance: Callable[[int], None] = lambda count: None,
    told: Callable[[str], None] = lambda sentence: None,
) -> Recording:
    """Record demonstrations; the dataset appears whole or not at all.

    Args:
        request: what to record.
        advance: told of each success.
        told: told in a sentence of a process that died; its episode is begun again in a new one.

    Raises:
        UsageError: there is no such environment.
        ConfigError: none of it, or environments that do not go into one dataset, or have no expert.
        DataError: the expert fails too often.
        MissingExtra: what the environment needs is not installed.
        VlaftError: another process writes there, the output is in the way, the environment fails, or the disk is full.
    """
    tasks = tasks_to_record(request)
    shape = _shapes(tasks, request)[0]
    asked: dict[str, Any] = {"record": list(request.envs), "disturbed": request.disturbed, "pad": request.pad}
    asked |= {"fast_render": request.fast_render}
    with locked(request.out), unfinished(request.out, asked, overwrite=request.overwrite) as pieces_folder:
        counts = [_Count(task, request) for task in tasks]
        count, processes = how_many(tasks, len(tasks) * request.episodes, request.workers)
        reused = sum(each.take_finished(pieces_folder) for each in counts)
        advance(sum(len(each.successes) for each in counts))
        errands = run_errands(lambda: _next(counts, pieces_folder, request), count, processes=processes, told=told)
        for index, piece in errands:
            if counts[index].add(piece):
                advance(1)
        pieces = [piece for each in counts for piece in each.chosen]
        with staged(request.out, overwrite=request.overwrite) as partial:
            steps = write_dataset(partial, pieces_folder, pieces, shape)
            failures = {each.task.name: each.failed for each in counts}
            said = {"environments": [task.name for task in tasks], "episodes_each": request.episodes}
            said |= {"disturbed": request.disturbed, "fast_render": request.fast_render, "failures": failures}
            said |= {"seeds": {each.task.name: each.seeds for each in counts}}
            write_json(partial / "meta" / "recording.json", said, durable=False)
        discard(pieces_folder, request.out)
    return Recording(request.out, len(pieces), steps, failures, reused)


def tasks_to_record(request: RecordRequest) -> list[Task]:
    """Return the tasks, after a look at whether they can be recorded as asked.

    Raises:
        UsageError: there is no such environment.
        ConfigError: none of it, or environments that do not go into one dataset, or have no expert.
    """
    tasks = [task for env in request.envs for task in tasks_named(env)]
    if request.episodes < 1:
        raise ConfigError("no demonstrations were asked for; give at least 1")
    if request.seed < 0:
        raise ConfigError(f"{request.seed} is no seed; seeds begin at 0")
    if request.disturbed is not None and not 0 <= request.disturbed < 1:
        raise ConfigError(f"--disturb {request.disturbed}: give a share of the steps, from 0 to less than 1")
    shapes = _shapes(tasks, request)
    for task, shape in zip(tasks, shapes, strict=True):
        if shape != shapes[0]:
            raise ConfigError(f"{tasks[0].name} and {task.name} do not go into one dataset; record each by itself")
    if len({task.name for task in tasks}) < len(tasks):
        raise ConfigError("an environment is named twice")
    return tasks


def _shapes(tasks: Sequence[Task], request: RecordRequest) -> list[Shape]:
    shapes = []
    for task in tasks:
        expert = task.expert
        if expert is None:
            known = [each.name for each in shipped_tasks() if each.expert and each.name.startswith(f"{_world(task)}:")]
            hint = f" (those of {_world(task)}: {known[0]} to {known[-1]})" if known else ""
            raise ConfigError(f"{task.name} has no scripted expert, so there is nobody to record{hint}")
        if request.pad and expert.pad is None:
            raise ConfigError(f"{task.name}: its actions are OpenVLA's already; leave --pad-action out")
        if request.fast_render and expert.fast is None:
            raise ConfigError(f"{task.name}: its frames are drawn in one way only; leave --fast-render out")
        shapes.append(_shape(expert, request.pad))
    return shapes


def _world(task: Task) -> str:
    return task.name.partition(":")[0]


def _shape(expert: Expert, pad: bool) -> Shape:
    return Shape(expert.rate, expert.robot, expert.padded if pad else expert.action, expert.state)


class _Count:
    """One task's episodes: which seeds are still to be tried, and how the others went."""

    def __init__(self, task: Task, request: RecordRequest) -> None:
        self.task = task
        self.successes: dict[int, Piece] = {}
        self._wanted, self._first = request.episodes, request.seed
        self._tried = 0  # seeds that were handed out, all from the first on
        self._failures: set[int] = set()

    def take_finished(self, folder: Path) -> int:
        """Take what an earlier call finished; return how many successes."""
        mine = re.compile(rf"{re.escape(_slug(self.task))}-(\d+)")
        found = [(match, path) for path in folder.iterdir() if (match := mine.fullmatch(path.name))]
        pieces = [read_piece(folder, path.name) for match, path in found if int(match[1]) >= self._first]
        # successes first: whether too many fail is not to depend on the order of a folder
        for piece in sorted(filter(None, pieces), key=lambda piece: not piece.success):
            self.add(piece)
        return len(self.successes)

    def next_seed(self) -> int | None:
        """Hand out a seed, or None while enough may succeed."""
        while True:
            pending = self._tried - sum(seed - self._first < self._tried for seed in (*self.successes, *self._failures))
            good = sum(seed - self._first < self._tried for seed in self.successes)
            if good + pending >= self._wanted:
                return None
            seed = self._first + self._tried
            self._tried += 1
            if seed not in self.successes and seed not in self._failures:
                return seed

    def add(self, piece: Piece) -> bool:
        """Take an episode; return whether it is a success.

        Raises:
            DataError: too many have failed.
        """
        seed = int(piece.name.rpartition("-")[2])
        if piece.success:
            self.successes[seed] = piece
            return True
        self._failures.add(seed)
        if len(self._failures) >= _HOPELESS + len(self.successes):
            raise DataError(
                f"{self.task.name}: the expert failed in {len(self._failures)} of"
                f" {len(self._failures) + len(self.successes)} episodes; disturb it less (--disturb), or begin with"
                " another --seed"
            )
        return False

    @property
    def seeds(self) -> list[int]:
        """Seeds of the dataset's episodes."""
        return sorted(self.successes)[: self._wanted]

    @property
    def chosen(self) -> list[Piece]:
        """The dataset's episodes, by seed."""
        return [self.successes[seed] for seed in self.seeds]

    @property
    def failed(self) -> int:
        """Failures among the seeds up to the last that is in the dataset."""
        return sum(seed < self.seeds[-1] for seed in self._failures)


def _next(counts: Sequence[_Count], folder: Path, request: RecordRequest) -> Errand | None:
    for index, each in enumerate(counts):
        if (seed := each.next_seed()) is not None:
            name = each.task.name
            return Errand(f"{name}, seed {seed}", index, record_episode, (name, seed, folder, request))
    return None


def record_episode(name: str, seed: int, folder: Path, request: RecordRequest) -> Piece:
    """Record one episode of an environment into the folder of pieces.

    Raises:
        VlaftError: the environment fails, or the disk is full.
    """
    task = tasks_named(name)[0]
    expert = task.expert
    assert expert is not None
    demonstrate = expert.fast if request.fast_render and expert.fast is not None else expert.demonstrate
    episode = demonstrate(seed, request.disturbed)
    actions = episode.actions if not request.pad or expert.pad is None else expert.pad(episode.actions)
    with disk_errors(folder):
        return write_piece(
            folder,
            f"{_slug(task)}-{seed:08d}",
            _shape(expert, request.pad),
            instruction=episode.instruction,
            success=episode.success,
            frames=episode.frames,
            actions=actions,
            states=episode.states,
        )


def _slug(task: Task) -> str:
    return task.name.replace(":", "-")
