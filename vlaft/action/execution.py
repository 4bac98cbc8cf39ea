"""How chunks become what a robot does: so many actions of each in turn, or a mean of those that overlap."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlaft.errors import ConfigError, DataError

DECAY = 0.01  # ACT's: of two chunks that speak of a step, the one made a step later weighs exp(-DECAY) of the earlier


@dataclass(frozen=True)
class Execution:
    """How the chunks of a policy are executed.

    Attributes:
        actions: N: so many of a chunk's first actions are done before the next chunk is asked for; None does all K.
        ensemble: ask at each step, and do the weighted mean of what all chunks so far say of it (temporal ensembling:
            Zhao et al. 2023, arXiv 2304.13705, section IV.B); the oldest weighs most, `DECAY` says by how much.
    """

    actions: int | None = None
    ensemble: bool = False

    def __post_init__(self) -> None:
        """Refuse what contradicts itself.

        Raises:
            ConfigError: fewer than one action, or a number of them with an ensemble, which asks at each step.
        """
        if self.actions is not None and self.actions < 1:
            raise ConfigError(f"{self.actions} actions of a chunk are too few to execute; give at least 1")
        if self.actions is not None and self.ensemble:
            raise ConfigError("an ensemble asks for a chunk at each step: give --execute or --ensemble, not both")

    def check(self, chunk: int) -> None:
        """Refuse to execute more actions than a policy's chunks have.

        Raises:
            ConfigError: so it is.
        """
        if self.actions is not None and self.actions > chunk:
            raise ConfigError(f"--execute {self.actions}: the policy writes chunks of {chunk}; give at most {chunk}")


class Executor:
    """The chunks of one episode; ask for one while `wants_chunk`, and take an action per step."""

    def __init__(self, execution: Execution) -> None:
        self._execution = execution
        self._queue: deque[NDArray[np.float64]] = deque()  # what is still to be done of the last chunk
        self._chunks: deque[NDArray[np.float64]] = deque()  # of an ensemble: what each chunk says from now on

    @property
    def wants_chunk(self) -> bool:
        """Whether the next action needs another chunk."""
        return not self._queue

    def add(self, chunk: ArrayLike) -> None:
        """Take a chunk `[K, A]` that begins at the next step.

        Raises:
            DataError: it is no such array.
        """
        actions = np.asarray(chunk, np.float64)
        if actions.ndim != 2 or not len(actions):
            raise DataError(f"a chunk has to be [K, A], K actions of A numbers, not {list(actions.shape)}")
        if not self._execution.ensemble:
            self._queue.extend(actions[: self._execution.actions])
            return
        self._chunks.append(actions)
        weights = np.exp(-DECAY * np.arange(len(self._chunks)))
        said = np.stack([each[0] for each in self._chunks])
        self._queue.append(weights @ said / weights.sum())
        self._chunks = deque(each[1:] for each in self._chunks if len(each) > 1)

    def next_action(self) -> NDArray[np.float64]:
        """Return the action `[A]` of the next step."""
        return self._queue.popleft()
