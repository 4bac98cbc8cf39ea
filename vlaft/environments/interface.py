"""What an environment must be for a policy to act in it, and the sentences for one that is not.

Any Gymnasium environment will do that keeps to this:

* an observation is a mapping with the frame under `image`, or the frame itself: uint8 `[H, W, 3]`, RGB, of any size;
* `info["instruction"]` says what is to be done, at `reset` and, where it changes, at `step`;
* `info["success"]` (or `info["is_success"]`) says at each `step` whether it has been done; once is enough;
* `step` takes the action in the units of the model's statistics, float32 `[A]`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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
class Outcome:
    """What an environment answers to an action.

    Attributes:
        frame: uint8 `[H, W, 3]`.
        instruction: None where it has not been said again.
        ended: whether the environment ended the episode.
        success: whether what was to be done has been done.
        info: of `info`, what is text, number or truth value.
    """

    frame: Image
    instruction: str | None
    ended: bool
    success: bool
    info: dict[str, Any]


@contextmanager
def opened_environments(make: Callable[[], Environment], count: int) -> Iterator[list[Environment]]:
    """Give environments, and close them in the end, however the block ends.

    Args:
        make: makes one; not called more often than `count`.
        count: how many.

    Raises:
        DataError: what it makes is no single environment, or the same one twice.
        VlaftError: it fails.
    """
    environments: list[Environment] = []
    try:
        for _ in range(count):
            environments.append(_made(make, environments))
        yield environments
    finally:
        for environment in environments:
            try:
                getattr(environment, "close", lambda: None)()
            except Exception as error:  # what was found before counts
                _log.warning("an environment could not be closed (%s)", described(error))


def begin(environment: Environment, seed: int) -> tuple[Image, str]:
    """Reset an environment; return the first frame and the instruction.

    Raises:
        DataError: it does not keep to the interface.
        VlaftError: it fails.
    """
    with _told(f"reset(seed={seed})"):
        answer = environment.reset(seed=seed)
    observation, info = _parts(answer, "reset", ("observation", "info"))
    if not isinstance(info.get("instruction"), str):
        raise DataError("the environment's reset() gives no info['instruction']; the policy must be told what to do")
    return _frame(observation), info["instruction"]


def step(environment: Environment, action: NDArray[np.float32], seed: int, number: int) -> Outcome:
    """Do an action.

    Args:
        environment: in the middle of an episode.
        action: float32 `[A]`.
        seed: of the episode, for the sentence when something fails.
        number: of the action in the episode, likewise.

    Raises:
        DataError: the environment does not keep to the interface.
        VlaftError: it fails.
    """
    with _told(f"step() {number} of the episode with seed {seed}"):
        answer = environment.step(action)
    names = ("observation", "reward", "terminated", "truncated", "info")
    observation, _, terminated, truncated, info = _parts(answer, "step", names)
    instruction = info.get("instruction")
    return Outcome(
        frame=_frame(observation),
        instruction=instruction if isinstance(instruction, str) else None,
        ended=_truth(terminated, "terminated") or _truth(truncated, "truncated"),
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


def _made(make: Callable[[], Environment], before: list[Environment]) -> Environment:
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


def _parts(answer: Any, method: str, names: tuple[str, ...]) -> tuple[Any, ...]:
    if not isinstance(answer, tuple | list) or len(answer) != len(names):
        found = f"{len(answer)} values" if isinstance(answer, tuple | list) else type(answer).__name__
        raise DataError(f"the environment's {method}() must return {', '.join(names)}, not {found}")
    if not isinstance(answer[-1], Mapping):
        raise DataError(f"the environment's {method}() must return info as a mapping, not {type(answer[-1]).__name__}")
    return tuple(answer)


def _frame(observation: Any) -> Image:
    if isinstance(observation, Mapping):
        if "image" not in observation:
            keys = ", ".join(map(str, observation)) or "none"
            raise DataError(f"the environment's observations have no 'image' (keys: {keys})")
        observation = observation["image"]
    if (
        not isinstance(observation, np.ndarray)
        or observation.dtype != np.uint8
        or observation.ndim != 3
        or observation.shape[2] != 3
        or not observation.size
    ):
        found = type(observation).__name__
        if hasattr(observation, "dtype") and hasattr(observation, "shape"):
            found += f" {observation.dtype} {[*observation.shape]}"
        raise DataError(f"the environment's image must be a numpy array, uint8 [height, width, 3], not {found}")
    return np.array(observation, order="C")  # a copy, for an environment may draw its next frame over this one


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
    return {key: value for key, value in values.items() if isinstance(value, str | int | float | None)}
