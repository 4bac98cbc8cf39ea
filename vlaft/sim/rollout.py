"""Let a policy act in environments, and count how often it succeeds.

Any Gymnasium environment will do that keeps to this:

* an observation is a mapping with the frame under `image`, or the frame itself: uint8 `[H, W, 3]`;
* `info["instruction"]` says what is to be done, at `reset` and, where it changes, at `step`;
* `info["success"]` (or `info["is_success"]`) says whether it has been done; once is enough;
* `step` takes the action in the units of the model's statistics, float32 `[A]`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vlaft.data.episode import Image
from vlaft.errors import DataError

Act = Callable[[list[Image], list[str]], Sequence[NDArray[Any]]]  # frames and instructions to actions `[A]`


class Environment(Protocol):
    """What of Gymnasium's interface the loop uses."""

    def reset(self, *, seed: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Do an action."""


@dataclass
class EpisodeOutcome:
    """How one episode went.

    Attributes:
        seed: that the environment was reset with.
        instruction: what was to be done.
        success: whether it was.
        steps: how many actions were taken.
        info: the environment's last `info`, without what is not text, number or truth value.
        frames: uint8 `[H, W, 3]` each, from the first to the last; empty where they were not kept.
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
        seconds: of the whole loop.
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


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the score interval of a share (Wilson 1927), which holds near 0 and 1 too.

    >>> low, high = wilson_interval(9, 10)
    >>> round(low, 3), round(high, 3)
    (0.596, 0.982)
    """
    share, square = successes / trials, z * z / trials
    middle = (share + square / 2) / (1 + square)
    half = z * np.sqrt(share * (1 - share) / trials + square / (4 * trials)) / (1 + square)
    return max(float(middle - half), 0.0), min(float(middle + half), 1.0)


def roll_out(
    act: Act,
    make: Callable[[], Environment],
    *,
    seeds: Sequence[int],
    parallel: int = 50,
    max_steps: int = 1000,
    keep: int = 0,
    advance: Callable[[int], None] = lambda count: None,
) -> Rollout:
    """Let a policy act until every episode has ended.

    Environments run side by side and the policy predicts for all of them at once; an environment whose episode has
    ended begins the next. Which episodes share a batch changes an action by rounding at most.

    Args:
        act: the policy.
        make: makes an environment.
        seeds: one per episode.
        parallel: environments at a time.
        max_steps: ends an episode that its environment does not end.
        keep: keep frames and actions of so many first episodes.
        advance: told of each episode that has ended.

    Raises:
        DataError: there are no seeds, or an environment does not keep to the interface (see the module).
    """
    if not seeds:
        raise DataError("no episodes were asked for")
    began = time.monotonic()
    waiting = iter(enumerate(seeds))
    outcomes: dict[int, EpisodeOutcome] = {}
    environments = [make() for _ in range(min(parallel, len(seeds)))]
    running = [slot for slot in (_begin(env, waiting, outcomes, keep) for env in environments) if slot is not None]
    while running:
        actions = act([slot.frame for slot in running], [slot.instruction for slot in running])
        going = []
        for slot, action in zip(running, actions, strict=True):
            if slot.step(np.asarray(action, np.float32), max_steps):
                going.append(slot)
                continue
            advance(1)
            following = _begin(slot.environment, waiting, outcomes, keep)
            if following is not None:
                going.append(following)
        running = going
    for environment in environments:
        if hasattr(environment, "close"):
            environment.close()
    return Rollout(tuple(outcomes[number] for number in range(len(seeds))), time.monotonic() - began)


@dataclass
class _Slot:
    """An environment in the middle of an episode."""

    environment: Environment
    outcome: EpisodeOutcome
    frame: Image
    instruction: str
    keep: bool

    def step(self, action: NDArray[np.float32], max_steps: int) -> bool:
        """Do an action; return whether the episode goes on."""
        observation, _, terminated, truncated, info = self.environment.step(action)
        outcome = self.outcome
        outcome.steps += 1
        outcome.success = outcome.success or _success(info)
        outcome.info = {key: value for key, value in info.items() if isinstance(value, str | int | float | None)}
        self.frame = _frame(observation)
        self.instruction = str(info.get("instruction", self.instruction))
        if self.keep:
            outcome.frames.append(self.frame)
            outcome.actions.append(action)
        return not (terminated or truncated or outcome.success or outcome.steps >= max_steps)


def _begin(
    environment: Environment, waiting: Iterator[tuple[int, int]], outcomes: dict[int, EpisodeOutcome], keep: int
) -> _Slot | None:
    number, seed = next(waiting, (None, 0))
    if number is None:
        return None
    observation, info = environment.reset(seed=seed)
    instruction = info.get("instruction")
    if not isinstance(instruction, str):
        raise DataError("the environment's reset() gives no info['instruction']; the policy must be told what to do")
    frame = _frame(observation)
    outcomes[number] = EpisodeOutcome(seed, instruction, frames=[frame] if number < keep else [])
    return _Slot(environment, outcomes[number], frame, instruction, number < keep)


def _frame(observation: Any) -> Image:
    if isinstance(observation, Mapping):
        if "image" not in observation:
            keys = ", ".join(map(str, observation)) or "none"
            raise DataError(f"the environment's observations have no 'image' (keys: {keys})")
        observation = observation["image"]
    if not isinstance(observation, np.ndarray) or observation.dtype != np.uint8 or observation.ndim != 3:
        shape = f"{observation.dtype} {observation.shape}" if hasattr(observation, "dtype") else type(observation)
        raise DataError(f"the environment's image must be uint8 [height, width, 3], not {shape}")
    return observation


def _success(info: Mapping[str, Any]) -> bool:
    for key in ("success", "is_success"):
        if key in info:
            return bool(info[key])
    raise DataError("the environment's step() gives no info['success']; without it there is nothing to count")
