"""Gripper conventions: OpenVLA's binarising and relative commands, on hand-made arrays and by properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vlaft.data.episode import Episode
from vlaft.data.standardize.actions import (
    binarize,
    clip_gripper,
    invert_gripper,
    relative_to_absolute,
    rescale,
    scale_gripper,
)
from vlaft.data.standardize.steps import standardize
from vlaft.errors import ConfigError, DataError


def commands(low: float = 0.0, high: float = 1.0) -> st.SearchStrategy[np.ndarray]:
    values = st.floats(low, high, width=32)
    return hnp.arrays(np.float32, st.integers(0, 40), elements=values)


def episode_of(gripper: np.ndarray) -> Episode:
    action = np.zeros((len(gripper), 7), np.float32)
    action[:, -1] = gripper
    return Episode(index=0, name="demo", length=len(gripper), action=action)


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ([1, 0.5, 0.5, 0], [1, 0, 0, 0]),  # in between takes what is reached next
        ([0, 0.5, 1, 0.5, 0], [0, 1, 1, 0, 0]),
        ([1, 0.96, 0.95, 0.05, 0.04], [1, 1, 0, 0, 0]),  # the bounds themselves are in between
        ([0, 0.7, 0.3], [0, 0.3, 0.3]),  # a trailing run keeps the raw last value
        ([0.5], [0.5]),
        ([], []),
    ],
)
def test_binarize_takes_the_value_reached_next(given_: list[float], expected: list[float]) -> None:
    np.testing.assert_array_equal(binarize(np.float32(given_)), np.float32(expected))


@given(commands())
@settings(max_examples=100)
def test_binarize_is_idempotent_where_it_is_binary_and_keeps_clear_values(values: np.ndarray) -> None:
    before = values.copy()
    once = binarize(values)
    np.testing.assert_array_equal(binarize(once), once)
    np.testing.assert_array_equal(values, before)
    assert (once[values > np.float32(0.95)] == 1).all()
    assert (once[values < np.float32(0.05)] == 0).all()
    assert set(once.tolist()) <= {0.0, 1.0, *(float(v) for v in values[-1:])}


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ([0, 0, 1, 0, -1, 0], [1, 1, 0, 0, 1, 1]),  # told to close first: it was open
        ([0, -1, 0], [0, 1, 1]),  # told to open first: it was closed
        ([0, 0.1, -0.1], [1, 1, 1]),  # at the threshold there is no command; without one it is open
        ([0.2], [0]),
        ([], []),
    ],
)
def test_relative_commands_become_states(given_: list[float], expected: list[float]) -> None:
    np.testing.assert_array_equal(relative_to_absolute(np.float32(given_)), np.float32(expected))


@given(commands(-1, 1))
@settings(max_examples=100)
def test_relative_commands_follow_a_plain_scan(values: np.ndarray) -> None:
    given_ = [1.0 if v < np.float32(-0.1) else 0.0 if v > np.float32(0.1) else None for v in values]
    first = next((g for g in given_ if g is not None), None)
    state = 1.0 if first is None else 1.0 - first
    expected = []
    for g in given_:
        state = state if g is None else g
        expected.append(state)
    assert relative_to_absolute(values).tolist() == expected


@given(commands(-3, 3))
@settings(max_examples=50)
def test_inverting_twice_and_rescaling_back_give_the_same(values: np.ndarray) -> None:
    episode = episode_of(values)
    twice = invert_gripper(invert_gripper(episode))
    np.testing.assert_allclose(twice.action, episode.action, atol=1e-6)
    there = rescale(values, (-1, 1), (0, 1))
    np.testing.assert_allclose(rescale(there, (0, 1), (-1, 1)), values, atol=1e-5)
    clipped = clip_gripper(episode)
    assert clipped.action is not None and ((clipped.action >= 0) & (clipped.action <= 1)).all()
    np.testing.assert_array_equal(clip_gripper(clipped).action, clipped.action)


def test_robosuite_gripper_becomes_one_for_open() -> None:
    episode = episode_of(np.float32([-1, 1, -0.5, 0.5]))
    libero = standardize(episode, ["clip_gripper", "invert_gripper"])
    assert libero.action is not None
    assert libero.action[:, -1].tolist() == [1, 0, 1, 0.5]
    scaled = scale_gripper(episode, from_range=[1, -1], to_range=[0, 1])
    assert scaled.action is not None
    assert scaled.action[:, -1].tolist() == [1, 0, 0.75, 0.25]


def test_only_the_chosen_dimension_changes_and_nothing_in_place() -> None:
    action = np.full((3, 14), 0.25, np.float32)
    episode = Episode(index=0, name="demo", length=3, action=action)
    changed = invert_gripper(episode, dim=6)
    assert changed.action is not None
    assert (action == 0.25).all()
    assert (changed.action[:, 6] == 0.75).all()
    assert (np.delete(changed.action, 6, axis=1) == 0.25).all()


def test_wrong_gripper_arguments_are_told() -> None:
    episode = episode_of(np.float32([0, 1]))
    with pytest.raises(DataError, match="no dimension 7: there are 7"):
        invert_gripper(episode, dim=7)
    with pytest.raises(ConfigError, match="no width"):
        scale_gripper(episode, from_range=[1, 1])
    with pytest.raises(ConfigError, match="two ends"):
        scale_gripper(episode, to_range=[1])
    with pytest.raises(ConfigError, match="above the upper"):
        clip_gripper(episode, low=1, high=0)
