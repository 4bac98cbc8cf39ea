"""Let a policy act in environments (`interface` says what these are), and count how often it succeeds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlaft.action.execution import Execution, Executor
from vlaft.environments.interface import Environment, Moment, begin, opened_environments, step
from vlaft.errors import ConfigError
from vlaft.observation.images import Image

OPEN_LOOP = Execution()  # whole chunks
LARGEST_KEPT = 504  # pixels: a film is smaller, and a thousand large frames do not fit in memory

Act = Callable[[list[Moment]], Sequence[NDArray[Any]]]  # a chunk `[K, A]` for what is seen in each environment


@dataclass
class EpisodeOutcome:
    """How one episode went.

    Attributes:
        seed: that the environment was reset with.
        instruction: what was to be done.
        success: whether it was.
        steps: how many actions were taken.
        info: the environment's last `info`, without what is not text, number or truth value.
        frames: uint8 `[H, W, 3]` each, from the first to the last; empty where they were not kept. Of frames larger
            than `LARGEST_KEPT`, every second or third pixel.
        actions: `[A]` each, likewise.
    """

    seed: int
    instruction: str
    success: bool = False
    steps: int = 0
    info: dict[str, Any] = field(default_factory=dict)
    frames: list[Image] = field(default_factory=list, repr=False)
    actions: list[NDArray[Any]] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class Rollout:
    """A policy's episodes.

    Attributes:
        episodes: in the order of their seeds.
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


def roll_out(
    act: Act,
    make: Callable[[], Environment],
    *,
    seeds: Sequence[int],
    parallel: int = 50,
    execution: Execution = OPEN_LOOP,
    max_steps: int = 1000,
    keep: int = 0,
    advance: Callable[[int], None] = lambda count: None,
) -> Rollout:
    """Let a policy act until every episode has ended.

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
        keep: keep frames and actions of so many first episodes.
        advance: told of each episode that has ended.

    Raises:
        ConfigError: there are no seeds, or one is negative, or `parallel` is.
        DataError: an environment does not keep to the interface.
        VlaftError: an environment fails.
    """
    check_counts(seeds, parallel)
    with opened_environments(make, min(parallel, len(seeds))) as environments:
        return run_episodes(
            act, environments, seeds=seeds, execution=execution, max_steps=max_steps, keep=keep, advance=advance
        )


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
    environments: Sequence[Environment],
    *,
    seeds: Sequence[int],
    execution: Execution = OPEN_LOOP,
    max_steps: int = 1000,
    keep: int = 0,
    advance: Callable[[int], None] = lambda count: None,
) -> Rollout:
    """Do what `roll_out` does, in environments that are there; they are left open."""
    began = time.monotonic()
    waiting = iter(enumerate(seeds))
    outcomes: dict[int, EpisodeOutcome] = {}

    def following(environment: Environment) -> _Slot | None:
        number, seed = next(waiting, (None, 0))
        if number is None:
            return None
        moment = begin(environment, seed)
        outcomes[number] = EpisodeOutcome(seed, moment.instruction)
        return _Slot(environment, outcomes[number], moment, number < keep, Executor(execution))

    running = [slot for slot in map(following, environments) if slot is not None]
    while running:
        asking = [slot for slot in running if slot.executor.wants_chunk]
        for slot, chunk in zip(asking, act([slot.moment for slot in asking]), strict=True) if asking else ():
            slot.executor.add(chunk)
        going = []
        for slot in running:
            if slot.step(max_steps):
                going.append(slot)
                continue
            advance(1)
            if (other := following(slot.environment)) is not None:
                going.append(other)
        running = going
    return Rollout(tuple(outcomes[number] for number in range(len(seeds))), time.monotonic() - began)


@dataclass
class _Slot:
    """An environment in the middle of an episode."""

    environment: Environment
    outcome: EpisodeOutcome
    moment: Moment
    keep: bool
    executor: Executor

    def __post_init__(self) -> None:
        self._keep_frame()

    def step(self, max_steps: int) -> bool:
        """Do the next action; return whether the episode goes on."""
        outcome = self.outcome
        outcome.steps += 1
        action = self.executor.next_action().astype(np.float32)
        if self.keep:
            outcome.actions.append(action.copy())
        answer = step(self.environment, action, outcome.seed, outcome.steps, self.moment.instruction)
        outcome.success = answer.success
        outcome.info = answer.info
        self.moment = answer.moment
        self._keep_frame()
        return not (answer.ended or answer.success or outcome.steps >= max_steps)

    def _keep_frame(self) -> None:
        if self.keep:
            frame = self.moment.frame
            every = -(-max(frame.shape[:2]) // LARGEST_KEPT)
            self.outcome.frames.append(frame if every == 1 else frame[::every, ::every].copy())
