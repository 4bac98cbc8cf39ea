"""Steps on the action: rotations against known turns, grippers against hand-made arrays, and both by properties."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial.transform import Rotation

from vlaft.data.episode import Episode
from vlaft.data.standardize.actions import (
    axis_angle_to_euler,
    binarize,
    clip_gripper,
    delta_from_absolute,
    euler_to_axis_angle,
    invert_gripper,
    quaternion_to_axis_angle,
    quaternion_to_euler,
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


angles = hnp.arrays(np.float32, st.tuples(st.integers(1, 12), st.just(3)), elements=st.floats(-1.5, 1.5, width=32))


def pose_episode(rotation: np.ndarray, names: tuple[str, ...] = ()) -> Episode:
    steps = len(rotation)
    position = np.cumsum(np.full((steps, 3), 0.25, np.float32), axis=0)
    action = np.concatenate([position, rotation, np.ones((steps, 1))], axis=1).astype(np.float32)
    return Episode(index=0, name="demo", length=steps, action=action, action_names=names)


def test_a_quarter_turn_about_each_axis_is_the_same_in_every_representation() -> None:
    quarter = math.pi / 2
    euler = np.diag([quarter, 0.5, quarter]).astype(np.float32)  # a pitch of 90 degrees would be degenerate
    axis_angle = euler.copy()  # about one axis, both are the angle at this axis
    quaternion = np.zeros((3, 4), np.float32)
    for axis, angle in enumerate([quarter, 0.5, quarter]):
        quaternion[axis, axis], quaternion[axis, 3] = math.sin(angle / 2), math.cos(angle / 2)
    first = np.roll(quaternion, 1, axis=1)
    for changed in (
        axis_angle_to_euler(pose_episode(axis_angle)),
        quaternion_to_euler(pose_episode(quaternion)),
        quaternion_to_euler(pose_episode(first), order="wxyz"),
        quaternion_to_axis_angle(pose_episode(quaternion * 3)),  # of any length
        euler_to_axis_angle(pose_episode(euler)),
    ):
        assert changed.action is not None and changed.action.shape == (3, 7)
        np.testing.assert_allclose(changed.action[:, 3:6], euler, atol=1e-6)
        assert (changed.action[:, 6] == 1).all()


def test_euler_is_roll_pitch_yaw_about_fixed_axes() -> None:
    roll, pitch, yaw = 0.3, -0.4, 1.1
    x = np.array([[1, 0, 0], [0, math.cos(roll), -math.sin(roll)], [0, math.sin(roll), math.cos(roll)]])
    y = np.array([[math.cos(pitch), 0, math.sin(pitch)], [0, 1, 0], [-math.sin(pitch), 0, math.cos(pitch)]])
    z = np.array([[math.cos(yaw), -math.sin(yaw), 0], [math.sin(yaw), math.cos(yaw), 0], [0, 0, 1]])
    changed = euler_to_axis_angle(pose_episode(np.float32([[roll, pitch, yaw]])))
    assert changed.action is not None
    np.testing.assert_allclose(Rotation.from_rotvec(changed.action[0, 3:6]).as_matrix(), z @ y @ x, atol=1e-6)


@given(angles)
@settings(max_examples=60)
def test_euler_and_axis_angle_are_inverse(rotation: np.ndarray) -> None:
    episode = pose_episode(rotation)
    back = axis_angle_to_euler(euler_to_axis_angle(episode))
    np.testing.assert_allclose(back.action, episode.action, atol=2e-5)


@given(angles, st.sampled_from(["euler", "axis_angle"]), st.sampled_from(["next", "previous"]))
@settings(max_examples=60)
def test_deltas_of_poses_compose_back_to_them(rotation: np.ndarray, kind: str, against: str) -> None:
    episode = pose_episode(rotation)
    deltas = delta_from_absolute(episode, against=against, rotation=kind)
    assert deltas.length == episode.length - 1
    assert deltas.action is not None and deltas.action.shape == (deltas.length, 7)
    make = Rotation.from_rotvec if kind == "axis_angle" else lambda values: Rotation.from_euler("xyz", values)
    turned = make(rotation[0].astype(np.float64))
    for delta in deltas.action:
        np.testing.assert_allclose(delta[:3], 0.25, atol=1e-5)
        turned = make(delta[3:6].astype(np.float64)) * turned
    np.testing.assert_allclose(turned.as_matrix(), make(rotation[-1].astype(np.float64)).as_matrix(), atol=1e-4)


def test_deltas_against_the_state_keep_every_step_and_do_not_wrap() -> None:
    near_pi = math.pi - 0.05
    state = np.float32([[1, 2, 3, 0, 0, near_pi, 0]])
    episode = replace(pose_episode(np.float32([[0, 0, -near_pi]])), state=state)
    deltas = delta_from_absolute(episode, against="state")
    assert deltas.action is not None and deltas.length == 1
    np.testing.assert_allclose(deltas.action[0, :3], [-0.75, -1.75, -2.75], atol=1e-6)
    np.testing.assert_allclose(deltas.action[0, 3:6], [0, 0, 0.1], atol=1e-5)
    assert deltas.action[0, 6] == 1


def test_joint_targets_become_deltas_without_rotation() -> None:
    action = np.arange(12, dtype=np.float32).reshape(3, 4) ** 2
    episode = Episode(index=0, name="demo", length=3, action=action)
    deltas = delta_from_absolute(episode, against="next", dims=[0, 1, 2], rotation_dims=[])
    assert deltas.action is not None
    np.testing.assert_array_equal(deltas.action[:, :3], np.diff(action, axis=0)[:, :3])
    np.testing.assert_array_equal(deltas.action[:, 3], action[:-1, 3])


def test_names_follow_the_dimensions() -> None:
    names = ("x", "y", "z", "qw", "qx", "qy", "qz", "gripper")
    episode = pose_episode(np.float32([[1, 0, 0, 0]]), names)
    changed = quaternion_to_euler(episode, dims=["qx", "qy", "qz", "qw"])
    assert changed.action_names == ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
    assert changed.action is not None
    np.testing.assert_allclose(changed.action[0, 3:6], 0, atol=1e-7)
    assert episode.action_names == names


def test_what_is_no_rotation_is_refused() -> None:
    with pytest.raises(DataError, match="quaternion of zeros"):
        quaternion_to_euler(pose_episode(np.zeros((2, 4), np.float32)))
    with pytest.raises(ConfigError, match="order 'zyxw'"):
        quaternion_to_euler(pose_episode(np.ones((2, 4), np.float32)), order="zyxw")
    with pytest.raises(ConfigError, match="has 3 dimensions, not 2"):
        axis_angle_to_euler(pose_episode(np.zeros((1, 3), np.float32)), dims=[3, 4])
    with pytest.raises(ConfigError, match="state, previous or next"):
        delta_from_absolute(pose_episode(np.zeros((1, 3), np.float32)), against="last")
    with pytest.raises(DataError, match="has no state"):
        delta_from_absolute(pose_episode(np.zeros((1, 3), np.float32)), against="state")


def test_degrees_are_no_radians() -> None:
    degrees = np.array([[0, 0, 10], [0, -178.3, 0]], np.float32)
    for step in (axis_angle_to_euler, euler_to_axis_angle):
        with pytest.raises(DataError, match=r"step 1: an angle of -178\.3 radians.*degrees.*scale_action"):
            step(pose_episode(degrees))
    axis_angle_to_euler(pose_episode(degrees / 60))  # unwrapped radians may pass a turn or so
