"""Chunks are done in their order, all or so many of each, or as ACT's mean of what overlaps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlaft.action.execution import DECAY, Execution, Executor
from vlaft.errors import ConfigError


def executed(execution: Execution, chunks: np.ndarray, steps: int) -> tuple[np.ndarray, list[int]]:
    """Return the actions of an episode and the steps at which a chunk was asked for; `chunks` is `[T, K, A]`."""
    executor, actions, asked = Executor(execution), [], []
    for step in range(steps):
        if executor.wants_chunk:
            asked.append(step)
            executor.add(chunks[step])
        actions.append(executor.next_action())
    return np.stack(actions), asked


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 25))
def test_open_loop_asks_after_so_many_actions(size: int, count: int, steps: int) -> None:
    count = min(count, size)
    chunks = np.random.default_rng(0).normal(size=(steps, size, 2))
    actions, asked = executed(Execution(count), chunks, steps)
    assert asked == list(range(0, steps, count))
    assert np.array_equal(actions, [chunks[step - step % count, step % count] for step in range(steps)])
    whole, asked_whole = executed(Execution(), chunks, steps)
    assert asked_whole == list(range(0, steps, size))
    assert np.array_equal(whole, [chunks[step - step % size, step % size] for step in range(steps)])


@given(st.integers(1, 9), st.integers(1, 25))
def test_an_ensemble_weighs_the_oldest_most(size: int, steps: int) -> None:
    chunks = np.random.default_rng(1).normal(size=(steps, size, 3))
    actions, asked = executed(Execution(ensemble=True), chunks, steps)
    assert asked == list(range(steps))
    for step in range(steps):
        made = range(max(0, step - size + 1), step + 1)  # the steps whose chunks speak of this one, oldest first
        weights = np.exp(-DECAY * np.arange(len(made)))
        expected = np.average([chunks[at, step - at] for at in made], axis=0, weights=weights)
        assert np.allclose(actions[step], expected, rtol=1e-12, atol=1e-12)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="0 actions of a chunk are too few"):
        Execution(0)
    with pytest.raises(ConfigError, match="not both"):
        Execution(4, ensemble=True)
    with pytest.raises(ConfigError, match="--execute 9: the policy writes chunks of 8; give at most 8"):
        Execution(9).check(8)
    Execution(8).check(8)
    Execution(ensemble=True).check(1)
