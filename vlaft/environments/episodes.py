"""Let a policy act in environments (`interface` says what these are), and count how often it succeeds."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from vlaft.action.execution import Execution, Executor
from vlaft.environments.interface import Environment, Moment
from vlaft.environments.seats import ATTEMPTS, Cameras, Seat, opened_seats
from vlaft.environments.task import MOST_STEPS, Task
from vlaft.environments.workers import WorkerDied
from vlaft.errors import ConfigError, VlaftError
from vlaft.observation.images import Image

_log = logging.getLogger(__name__)

OPEN_LOOP = Execution()  # whole chunks
LARGEST_KEPT = 504  # pixels: a film is smaller, and a thousand large frames do not fit in memory
MOST_KEPT = 300  # frames of an episode, likewise
MOST_DEATHS = 10  # of workers in one rollout
Ending = Literal["success", "step limit", "environment", "worker died"]
ENDINGS: tuple[Ending, ...] = get_args(Ending)

Act = Callable[[list[Moment]], Sequence[NDArray[Any]]]  # a chunk `[K, A]` for what is seen in each environment


@dataclass
class EpisodeOutcome:
    """How one episode went.

    Attributes:
        seed: that the environment was reset with.
        task: name of the task.
        instruction: what was to be done.
        success: whether it was.
        ended: what ended it; a worker that died did so `ATTEMPTS` times.
        steps: how many actions were taken.
        info: the environment's last `info`, without what is not text, number or truth value.
        frames: uint8 `[H, W, 3]` each, from the first to the last; empty where they were not kept. Of frames larger
            than `LARGEST_KEPT`, every second or third pixel; of more than `MOST_KEPT`, every second or fourth, and the
            last.
        actions: `[A]` each, of all steps, where frames were kept.
    """

    seed: int
    instruction: str
    task: str = ""
    success: bool = False
    ended: Ending = "step limit"
    steps: int = 0
    info: dict[str, Any] = field(default_factory=dict)
    frames: list[Image] = field(default_factory=list, repr=False)
    actions: list[NDArray[Any]] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class Rollout:
    """A policy's episodes.

    Attributes:
        episodes: task by task, in the order of their seeds.
        seconds: of the whole loop, without making the environments.
    """

    episodes: tuple[EpisodeOutcome, ...]
    seconds: float

    @property
    def successes(self) -> int:
        """How many episodes succeeded."""
        return sum(episode.success for episode in self.episodes)

    @property
    def success_rate(self) -> float:
        """Their share."""
        return self.successes / len(self.episodes)

    def by_task(self) -> dict[str, Rollout]:
        """Return each task's episodes by themselves; all have the seconds of the whole."""
        tasks = dict.fromkeys(episode.task for episode in self.episodes)
        return {
            task: Rollout(tuple(each for each in self.episodes if each.task == task), self.seconds) for task in tasks
        }

    @property
    def interval(self) -> tuple[float, float]:
        """The rate's Wilson interval of 95 %."""
        return wilson_interval(self.successes, len(self.episodes))


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95 % score interval of a share (Wilson 1927), which holds near 0 and 1 too.

    >>> low, high = wilson_interval(9, 10)
    >>> round(low, 3), round(high, 3)
    (0.596, 0.982)
    """
    from scipy.stats import binomtest  # loaded late, as it takes a second

    interval = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class Job:
    """An episode to be acted: a task, and the seed that its first state comes from."""

    task: Task
    seed: int


def roll_out(
    act: Act,
    make: Callable[[], Environment],
    *,
    seeds: Sequence[int],
    parallel: int = 50,
    execution: Execution = OPEN_LOOP,
    max_steps: int = MOST_STEPS,
    keep: int = 0,
    advance: Callable[[int], None] = lambda count: None,
) -> Rollout:
    """Let a policy act in this process until every episode has ended.

    Environments run side by side and the policy predicts for all of them at once; an environment whose episode has
    ended begins the next. Which episodes share a batch changes an action by rounding at most. The environments are
    closed in the end, also when something fails.

    Args:
        act: the policy.
        make: makes an environment.
        seeds: one per episode.
        parallel: environments at a time.
        execution: how much of each chunk is done before the next is asked for.
        max_steps: ends an episode that its environment does not end.
        keep: keep frames and actions of so many first successes and of so many first failures.
        advance: told of each episode that has ended.

    Raises:
        ConfigError: there are no seeds, or one is negative, or `parallel` is.
        DataError: an environment does not keep to the interface.
        VlaftError: an environment fails.
    """
    check_counts(seeds, parallel)
    task = Task("", make, step_limit=max_steps)
    with opened_seats(task, min(parallel, len(seeds)), processes=False) as seats:
        jobs = [Job(task, seed) for seed in seeds]
        return run_episodes(act, seats, jobs, execution=execution, keep=keep, finished=lambda outcome: advance(1))


def check_counts(seeds: Sequence[int], parallel: int) -> None:
    """Refuse to run no episodes, or none at a time, or with seeds that Gymnasium refuses.

    Raises:
        ConfigError: so it is.
    """
    if not seeds:
        raise ConfigError("no episodes were asked for; give at least 1")
    if parallel < 1:
        raise ConfigError(f"{parallel} environments at a time are too few; give at least 1")
    if min(seeds) < 0:
        raise ConfigError(f"{min(seeds)} is no seed; seeds begin at 0")


def run_episodes(
    act: Act,
    seats: Sequence[Seat],
    jobs: Sequence[Job],
    *,
    execution: Execution = OPEN_LOOP,
    keep: int = 0,
    cameras: Cameras = None,
    finished: Callable[[EpisodeOutcome], None] = lambda outcome: None,
    told: Callable[[str], None] = _log.warning,
) -> Rollout:
    """Do what `roll_out` does, in seats that are there; they are left open.

    All seats take a step before the policy is asked again, so that the same words give the same batches, and with
    them the same actions to the last bit.

    Args:
        act: the policy.
        seats: where environments are.
        jobs: task by task.
        execution: as `roll_out` takes it.
        keep: likewise, of each task.
        cameras: that the policy reads, so that others need not be drawn; None for all.
        finished: told how an episode went as soon as it has ended.
        told: told in a sentence of a worker that died. Its episode is begun again, in a new one; if workers die of it
            `ATTEMPTS` times, it counts as failed.

    Raises:
        VlaftError: an environment fails, or `MOST_DEATHS` workers died.
    """
    began = time.monotonic()
    acting = _Acting(iter(enumerate(jobs)), execution, _Kept(keep), cameras, finished, told)
    running = [slot for seat in seats if (slot := acting.following(seat))]
    while running:
        while any(slot.moment is None for slot in running):  # more than once where a worker dies at it
            running = acting.each(running, _Slot.see)
        asking = [slot for slot in running if slot.executor.wants_chunk]
        for slot, chunk in zip(asking, act([slot.seen for slot in asking]), strict=True) if asking else ():
            slot.executor.add(chunk)
        for slot in running:
            slot.act()
        running = acting.each(running, _Slot.done)
    episodes = tuple(acting.outcomes[number] for number in range(len(jobs)))
    return Rollout(episodes, time.monotonic() - began)


class _Kept:
    """The episodes whose frames are kept, by task and success: the first ones of each."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._kept: dict[tuple[str, bool], dict[int, EpisodeOutcome]] = defaultdict(dict)

    def wanted(self, task: str) -> bool:
        """Say whether an episode that begins now may be among them."""
        return any(len(self._kept[task, success]) < self._keep for success in (True, False))

    def settle(self, number: int, outcome: EpisodeOutcome) -> None:
        """Take an ended episode; drop the frames of one that is not among them any more."""
        kept = self._kept[outcome.task, outcome.success]
        if outcome.frames:
            kept[number] = outcome
        dropped = kept.pop(max(kept)) if len(kept) > self._keep else None
        if dropped is not None:
            dropped.frames, dropped.actions = [], []


@dataclass
class _Acting:
    """What the episodes of a rollout have in common."""

    waiting: Iterator[tuple[int, Job]]
    execution: Execution
    kept: _Kept
    cameras: Cameras
    finished: Callable[[EpisodeOutcome], None]
    told: Callable[[str], None]
    outcomes: dict[int, EpisodeOutcome] = field(default_factory=dict)
    deaths: int = 0

    def following(self, seat: Seat) -> _Slot | None:
        """Begin the next episode in a seat."""
        number, job = next(self.waiting, (None, None))
        if number is None or job is None:
            return None
        return _Slot(seat, job, number, self.kept.wanted(job.task.name), self.execution, self.cameras)

    def each(self, slots: list[_Slot], goes_on: Callable[[_Slot], bool]) -> list[_Slot]:
        """Hear what every seat answers; return the episodes that go on, and those begun in the place of others."""
        going = []
        for slot in slots:
            try:
                ended = not goes_on(slot)
            except WorkerDied as death:
                ended = not self._again(slot, death)
            if ended:
                self._finish(slot)
            if next_slot := self.following(slot.seat) if ended else slot:
                going.append(next_slot)
        return going

    def _finish(self, slot: _Slot) -> None:
        self.kept.settle(slot.number, slot.outcome)
        self.outcomes[slot.number] = slot.outcome
        self.finished(slot.outcome)

    def _again(self, slot: _Slot, death: WorkerDied) -> bool:
        """Say that a worker died; return whether its episode was begun again."""
        self.deaths += 1
        where = f"{slot.job.task.name}, seed {slot.job.seed}, step {slot.outcome.steps}: the worker died ({death})"
        if self.deaths >= MOST_DEATHS:
            raise VlaftError(
                f"{where}, the {MOST_DEATHS}th to do so, perhaps for want of memory; give fewer --workers"
            ) from death
        slot.attempt += 1
        if slot.attempt > ATTEMPTS:
            slot.outcome.ended = "worker died"
            self.told(f"{where} for the {ATTEMPTS}rd time; the episode counts as failed")
            return False
        self.told(f"{where}; its episode is begun again")
        slot.begin(self.execution)
        return True


@dataclass
class _Slot:
    """A seat in the middle of an episode."""

    seat: Seat
    job: Job
    number: int
    keep: bool
    execution: Execution
    cameras: Cameras
    attempt: int = 1

    def __post_init__(self) -> None:
        self.begin(self.execution)

    def begin(self, execution: Execution) -> None:
        """Begin the episode, or begin it again."""
        self.executor = Executor(execution)
        self.outcome = EpisodeOutcome(self.job.seed, "", self.job.task.name)
        self.moment: Moment | None = None
        self.every = 1
        self.seat.begin(self.job.task, self.job.seed, self._looked_through)

    @property
    def _looked_through(self) -> Cameras:
        """Cameras of the next moment: the policy's where it will be asked, and the main one where a film is made."""
        if self.cameras is None:
            return None
        asked = self.cameras if self.executor.wants_chunk else ()
        return tuple(dict.fromkeys(("main", *asked))) if self.keep else tuple(asked)

    @property
    def seen(self) -> Moment:
        """What could be seen last."""
        assert self.moment is not None
        return self.moment

    def see(self) -> bool:
        """Look at the first moment, where the episode has just begun."""
        if self.moment is None:
            self._look(self.seat.answer())
            self.outcome.instruction = self.seen.instruction
        return True

    def act(self) -> None:
        """Begin the next action."""
        outcome = self.outcome
        outcome.steps += 1
        action = self.executor.next_action().astype(np.float32)
        if self.keep:
            outcome.actions.append(action.copy())
        self.seat.step(action, outcome.seed, outcome.steps, self.seen.instruction, self._looked_through)

    def done(self) -> bool:
        """Wait until the action is done; return whether the episode goes on."""
        answer, outcome = self.seat.answer(), self.outcome
        outcome.success, outcome.info = answer.success, answer.info
        limit = outcome.steps >= self.job.task.step_limit
        ends = answer.ended or answer.success or limit
        if ends:
            reached = limit or answer.truncated
            outcome.ended = "success" if answer.success else "step limit" if reached else "environment"
        self._look(answer.moment, last=ends)
        return not ends

    def _look(self, moment: Moment, last: bool = False) -> None:
        self.moment = replace(moment, task=self.job.task.name, seed=self.job.seed)
        frames, steps = self.outcome.frames, self.outcome.steps
        if not self.keep or (steps % self.every and not last):
            return
        frame = moment.frame
        pixels = -(-max(frame.shape[:2]) // LARGEST_KEPT)
        frames.append(frame if pixels == 1 else frame[::pixels, ::pixels].copy())
        if len(frames) > MOST_KEPT and not last:
            self.every *= 2
            del frames[1::2]
