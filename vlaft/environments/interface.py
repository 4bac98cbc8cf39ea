"""What an environment must be for a policy to act in it, and the sentences for one that is not.

Any Gymnasium environment will do that keeps to this:

* an observation is a mapping, named as the columns of a converted dataset are: the main camera's frame under `image`,
  others under `image_<camera>`, the robot's state, if there is one, under `state`; or the main camera's frame itself;
* frames are uint8 `[H, W, 3]`, RGB, of any size; a state is `[S]`, in the units of the model's statistics;
* `info["instruction"]` says what is to be done, at `reset` and, where it changes, at `step`;
* `info["success"]` (or `info["is_success"]`) says at each `step` whether it has been done; once is enough;
* `step` takes the action in the units of the model's statistics, float32 `[A]`.

A simulator spends most of its time on drawing. An environment that can leave it out has a method `draw_only(cameras)`,
which is called before each `reset` and `step` with the names of the cameras that will be looked through afterwards
(`main`, `wrist`), often none, or with None for all; the frames of others may be missing from that observation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vlaft.errors import DataError, VlaftError
from vlaft.observation.images import Image

_log = logging.getLogger(__name__)


class Environment(Protocol):
    """What of Gymnasium's interface is used; `close` is called where there is one."""

    def reset(self, *, seed: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Do an action."""


@dataclass(frozen=True)
class Moment:
    """What a policy reads at one step.

    Attributes:
        frames: camera to frame, uint8 `[H, W, 3]`; the main camera's first. Those may be missing that nobody wanted.
        instruction: what is to be done.
        state: float32 `[S]`, as the environment observes it; None where it observes none.
        task: name of the task that it belongs to.
        seed: of its episode.
    """

    frames: Mapping[str, Image]
    instruction: str
    state: NDArray[np.float32] | None = None
    task: str = ""
    seed: int = 0

    @property
    def frame(self) -> Image:
        """The main camera's frame."""
        return next(iter(self.frames.values()))


@dataclass(frozen=True)
class Outcome:
    """What an environment answers to an action.

    Attributes:
        moment: what can be seen afterwards.
        ended: whether the environment ended the episode.
        truncated: whether it did so because a limit was reached.
        success: whether what was to be done has been done.
        info: of `info`, what is text, number or truth value.
    """

    moment: Moment
    ended: bool
    truncated: bool
    success: bool
    info: dict[str, Any]


def made(make: Callable[[], Environment], before: Sequence[Environment]) -> Environment:
    """Make an environment, another one than those `before`.

    Raises:
        DataError: what it makes is no single environment, or one of those before.
        VlaftError: it fails.
    """
    from gymnasium.vector import VectorEnv

    with _told("factory"):
        environment = make()
    if not (callable(getattr(environment, "reset", None)) and callable(getattr(environment, "step", None))):
        raise DataError(f"the environment's factory makes no environment, but {type(environment).__name__}")
    if isinstance(environment, VectorEnv):
        raise DataError("the environment's factory makes a vector of environments; make a single one")
    if any(environment is other for other in before):
        raise DataError("the environment's factory gives the same one twice; make a new one, or use --batch-size 1")
    return environment


def close(environment: Environment) -> None:
    """Close an environment that can be closed; one that fails at it is told of."""
    try:
        getattr(environment, "close", lambda: None)()
    except Exception as error:  # what was found before counts
        _log.warning("an environment could not be closed (%s)", described(error))


def begin(environment: Environment, seed: int, cameras: Collection[str] | None = None) -> Moment:
    """Reset an environment; return what can be seen first.

    Args:
        environment: to reset.
        seed: of the episode.
        cameras: that will be looked through; None for all.

    Raises:
        DataError: it does not keep to the interface.
        VlaftError: it fails.
    """
    with _told(f"reset(seed={seed})"):
        _draw_only(environment, cameras)
        answer = environment.reset(seed=seed)
    observation, info = _parts(answer, "reset", ("observation", "info"))
    if not isinstance(info.get("instruction"), str):
        raise DataError("the environment's reset() gives no info['instruction']; the policy must be told what to do")
    return _moment(observation, info["instruction"], cameras)


def step(
    environment: Environment,
    action: NDArray[np.float32],
    seed: int,
    number: int,
    instruction: str,
    cameras: Collection[str] | None = None,
) -> Outcome:
    """Do an action.

    Args:
        environment: in the middle of an episode.
        action: float32 `[A]`.
        seed: of the episode, for the sentence when something fails.
        number: of the action in the episode, likewise.
        instruction: that holds unless the environment gives another.
        cameras: that will be looked through afterwards; None for all.

    Raises:
        DataError: the environment does not keep to the interface.
        VlaftError: it fails.
    """
    with _told(f"step() {number} of the episode with seed {seed}"):
        _draw_only(environment, cameras)
        answer = environment.step(action)
    names = ("observation", "reward", "terminated", "truncated", "info")
    observation, _, terminated, truncated, info = _parts(answer, "step", names)
    said = info.get("instruction")
    return Outcome(
        moment=_moment(observation, said if isinstance(said, str) else instruction, cameras),
        ended=_truth(terminated, "terminated") or _truth(truncated, "truncated"),
        truncated=_truth(truncated, "truncated"),
        success=_success(info),
        info=_plain(info),
    )


def described(error: Exception) -> str:
    """Return one line for what a user's code raised."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


@contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except VlaftError:
        raise
    except Exception as error:
        raise VlaftError(f"the environment's {what} failed: {described(error)} (--debug shows where)") from error


def _parts(answer: Any, method: str, names: tuple[str, ...]) -> tuple[Any, ...]:
    if not isinstance(answer, tuple | list) or len(answer) != len(names):
        found = f"{len(answer)} values" if isinstance(answer, tuple | list) else type(answer).__name__
        raise DataError(f"the environment's {method}() must return {', '.join(names)}, not {found}")
    if not isinstance(answer[-1], Mapping):
        raise DataError(f"the environment's {method}() must return info as a mapping, not {type(answer[-1]).__name__}")
    return tuple(answer)


def _draw_only(environment: Environment, cameras: Collection[str] | None) -> None:
    told = getattr(environment, "draw_only", None)
    if callable(told):
        told(cameras)


def _moment(observation: Any, instruction: str, cameras: Collection[str] | None) -> Moment:
    if not isinstance(observation, Mapping):
        return Moment({"main": _frame(observation, "image")}, instruction)
    frames = {}
    if "image" in observation:
        frames["main"] = _frame(observation["image"], "image")
    elif cameras is None or "main" in cameras:
        keys = ", ".join(map(str, observation)) or "none"
        raise DataError(f"the environment's observations have no 'image' (keys: {keys})")
    for key, value in observation.items():
        if str(key).startswith("image_"):
            frames[str(key).removeprefix("image_")] = _frame(value, str(key))
    return Moment(frames, instruction, _state(observation["state"]) if "state" in observation else None)


def _frame(value: Any, name: str) -> Image:
    if (
        not isinstance(value, np.ndarray)
        or value.dtype != np.uint8
        or value.ndim != 3
        or value.shape[2] != 3
        or not value.size
    ):
        raise DataError(
            f"the environment's {name} must be a numpy array, uint8 [height, width, 3], not {_found(value)}"
        )
    return np.array(value, order="C")  # a copy, for an environment may draw its next frame over this one


def _state(value: Any) -> NDArray[np.float32]:
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiu" or value.ndim != 1 or not value.size:
        raise DataError(f"the environment's state must be a numpy array of numbers [S], not {_found(value)}")
    if not np.isfinite(value).all():
        raise DataError("the environment's state has numbers that are not finite")
    return np.array(value, np.float32)


def _found(value: Any) -> str:
    found = type(value).__name__
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        found += f" {value.dtype} {[*value.shape]}"
    return found


def _success(info: Mapping[str, Any]) -> bool:
    for key in ("success", "is_success"):
        if key in info:
            return _truth(info[key], f"info['{key}']")
    raise DataError("the environment's step() gives no info['success']; without it there is nothing to count")


def _truth(value: Any, name: str) -> bool:
    try:
        return bool(value)
    except Exception:  # an array of several
        raise DataError(f"the environment's {name} must be one truth value, not {type(value).__name__}") from None


def _plain(info: Mapping[str, Any]) -> dict[str, Any]:
    values = {str(key): value.item() if isinstance(value, np.generic) else value for key, value in info.items()}
    plain = {key: value for key, value in values.items() if isinstance(value, str | int | float | None)}
    return {key: None if isinstance(value, float) and not isfinite(value) else value for key, value in plain.items()}
