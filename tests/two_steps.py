"""A user's environment that ends after two steps, and how it goes wrong: what tests of `--env module:factory` name."""

from __future__ import annotations

import os
import signal
from collections.abc import Collection
from typing import Any

import numpy as np

MADE: list[TwoSteps] = []


class TwoSteps:
    """Frames of 100 x 140 pixels, brighter with the seed; done at the second step where the seed is even."""

    LENGTH = 2

    def __init__(self) -> None:
        self.closed = 0
        self.seeds: list[int] = []
        self.actions: list[np.ndarray] = []
        self.steps = 0
        MADE.append(self)

    def reset(self, *, seed: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        assert seed is not None
        self.seeds.append(seed)
        self.steps = 0
        return self.observation(), {"instruction": f"push the red cube {seed}"}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        self.steps += 1
        self.actions.append(action)
        done = self.steps == self.LENGTH
        return self.observation(), 0.0, done, False, {"success": done and self.seeds[-1] % 2 == 0, "dry": np.bool_(1)}

    def observation(self) -> dict[str, Any]:
        frame = np.full((100, 140, 3), 10 * (self.seeds[-1] % 20) + self.steps, np.uint8)
        return {"image": frame, "state": np.zeros(3)}

    def close(self) -> None:
        self.closed += 1


class TwoCameras(TwoSteps):
    """Ten steps, seen by a wrist camera besides; the state tells the step."""

    LENGTH = 10

    def observation(self) -> dict[str, Any]:
        seen = super().observation()
        return {"image": seen["image"], "image_wrist": 255 - seen["image"], "state": np.full(3, 0.1 * self.steps)}


class Sparing(TwoCameras):
    """Draws what it is told to, and keeps account of it."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[tuple[str, ...] | None] = []

    def draw_only(self, cameras: Collection[str] | None) -> None:
        self.drawn.append(None if cameras is None else tuple(cameras))

    def observation(self) -> dict[str, Any]:
        names = {"main": "image", "wrist": "image_wrist"}
        left_out = [] if self.drawn[-1] is None else [names[each] for each in names if each not in self.drawn[-1]]
        return {name: value for name, value in super().observation().items() if name not in left_out}


class WideState(TwoCameras):
    def observation(self) -> dict[str, Any]:
        return super().observation() | {"state": np.zeros(7)}


class NoState(TwoCameras):
    def observation(self) -> dict[str, Any]:
        return {name: value for name, value in super().observation().items() if name != "state"}


class Chatty(TwoSteps):
    def step(self, action: np.ndarray) -> Any:
        print("the motors hum")
        return super().step(action)


class Failing(TwoSteps):
    def step(self, action: np.ndarray) -> Any:
        if self.seeds[-1] == 1:
            raise RuntimeError("a motor\nis hot")
        return super().step(action)


class NoSuccess(TwoSteps):
    def step(self, action: np.ndarray) -> Any:
        return *super().step(action)[:4], {}


class Interrupted(TwoSteps):
    def step(self, action: np.ndarray) -> Any:
        raise KeyboardInterrupt


class Deadly(TwoSteps):
    """Takes its process with it at the second step where the seed is 1."""

    def step(self, action: np.ndarray) -> Any:
        if self.seeds[-1] == 1 and self.steps == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


def stillborn() -> TwoSteps:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def with_argument(argument: str) -> TwoSteps:
    environment = TwoSteps()
    environment.argument = argument  # type: ignore[attr-defined]
    return environment


def broken() -> TwoSteps:
    raise OSError("no robot on /dev/ttyUSB0")


NUMBER = 3
