"""What an environment says of itself before it is made: cameras, words, actions, limits, what it costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlaft.environments.interface import Environment

MOST_STEPS = 1000  # ends an episode of an environment that says no limit


@dataclass(frozen=True)
class ExpertEpisode:
    """One episode of a scripted expert.

    Attributes:
        instruction: what was to be done.
        success: whether it was.
        frames: camera to frames, uint8 `[T, H, W, 3]`; the main camera's first.
        actions: float32 `[T, A]`, as the expert wanted them, before disturbances.
        states: float32 `[T, S]`, as the environment observes them.
    """

    instruction: str
    success: bool
    frames: Mapping[str, NDArray[np.uint8]]
    actions: NDArray[np.float32]
    states: NDArray[np.float32]


@dataclass(frozen=True)
class Expert:
    """How a task is demonstrated.

    Attributes:
        demonstrate: takes a seed, and the share of steps at which the robot does something else than it was told, or
            None for the expert's own; the same words give the same episode.
        rate: actions per second.
        action: names of its numbers.
        state: likewise.
        robot: kind of robot, for the dataset.
        padded: names of OpenVLA's seven numbers, where `pad` turns actions into these.
        pad: turns actions `[T, A]` into `[T, 7]`.
        fast: demonstrates with frames that are drawn faster, and coarser than a policy that acts sees them.
    """

    demonstrate: Callable[[int, float | None], ExpertEpisode]
    rate: int
    action: tuple[str, ...]
    state: tuple[str, ...]
    robot: str
    padded: tuple[str, ...] = ()
    pad: Callable[[NDArray[np.float32]], NDArray[np.float32]] | None = None
    fast: Callable[[int, float | None], ExpertEpisode] | None = None


@dataclass(frozen=True)
class Task:
    """One environment under the name that `--env` takes.

    Attributes:
        name: such as `metaworld:push-v3`; a worker process finds the task again by it.
        make: makes the environment.
        cameras: what it observes, the main one first; None where that shows at its first step.
        instruction: what is to be done; None where each episode says.
        actions: the conventions that it takes, as names of an action's numbers; none where any width may be tried.
        unnorm_keys: names that a model may have given to the statistics of its demonstrations; the first that it has
            is used.
        step_limit: ends an episode.
        waiting_steps: done by the environment at a reset, before anything is counted.
        states: how many first states there are, one to a seed, from the first again after the last; None: any number.
        memory: bytes that a process with one takes; None: it is acted in within this process.
        expert: demonstrates it.
    """

    name: str
    make: Callable[[], Environment]
    cameras: tuple[str, ...] | None = None
    instruction: str | None = None
    actions: tuple[tuple[str, ...], ...] = ()
    unnorm_keys: tuple[str, ...] = ()
    step_limit: int = MOST_STEPS
    waiting_steps: int = 0
    states: int | None = None
    memory: int | None = None
    expert: Expert | None = None

    def described(self) -> dict[str, Any]:
        """Return what can be told of it, JSON-able."""
        return {
            "name": self.name,
            "cameras": self.cameras,
            "instruction": self.instruction,
            "actions": self.actions,
            "unnorm_keys": self.unnorm_keys,
            "step_limit": self.step_limit,
            "waiting_steps": self.waiting_steps,
            "states": self.states,
            "recorded": self.expert is not None,
        }
