"""The tabletop as Gymnasium's own checker and a user see it."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from vlaft.environments.tabletop.drawing import draw_wrist
from vlaft.environments.tabletop.environment import EPISODE_STEPS, TabletopEnv
from vlaft.environments.tabletop.recording import expert_action
from vlaft.environments.tabletop.scene import SETUP_A, SETUP_B, SetUp
from vlaft.errors import DataError

BOTH = pytest.mark.parametrize("setup", [SETUP_A, SETUP_B], ids=lambda setup: setup.name)
STILL = np.array([0, 0, 0, 0, 0, 0, 1], np.float32)


@BOTH
def test_gymnasium_has_nothing_to_say(setup: SetUp) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*not able to test alternative render modes.*")  # it has only one
        warnings.filterwarnings("ignore", message=".*recommend using a symmetric and normalized space.*")  # metres
        check_env(TabletopEnv(setup))


@BOTH
def test_a_seed_is_an_episode(setup: SetUp) -> None:
    def episode(seed: int) -> tuple[list[np.ndarray], list[dict]]:
        env = TabletopEnv(setup)
        observation, info = env.reset(seed=seed)
        frames, infos = [observation["image"]], [info]
        for number in range(8):
            observation, _, _, _, info = env.step(STILL + np.float32(0.01 * number) * np.eye(7, dtype=np.float32)[0])
            frames.append(observation["image"])
            infos.append(info)
        return frames, infos

    first, again, other = episode(5), episode(5), episode(6)
    assert all((one == two).all() for one, two in zip(first[0], again[0], strict=True)) and first[1] == again[1]
    assert (first[0][0] != other[0][0]).any()


def test_resetting_without_a_seed_goes_on_from_the_last() -> None:
    env, same = TabletopEnv(), TabletopEnv()
    for each in (env, same):
        each.reset(seed=1)
    following, again = env.reset()[0], same.reset()[0]
    assert (following["image"] == again["image"]).all()
    assert (following["image"] != env.reset(seed=1)[0]["image"]).any()


@BOTH
def test_an_episode_of_the_expert(setup: SetUp) -> None:
    env = TabletopEnv(setup)
    for seed in range(10):
        observation, info = env.reset(seed=seed)
        assert env.scene is not None
        assert info == {"instruction": setup.instruction(env.scene.target), "success": False, "picked_up": None}
        steps, ended = 0, False
        while not ended:
            assert observation in env.observation_space
            assert (env.render() == observation["image"]).all()
            assert (draw_wrist(env.scene) == observation["image_wrist"]).all()
            assert observation["state"] == pytest.approx([*env.scene.gripper, float(env.scene.is_open)])
            observation, reward, ended, truncated, info = env.step(expert_action(env.scene).astype(np.float32))
            steps += 1
            assert not truncated and reward == float(ended)
        assert observation in env.observation_space and steps < EPISODE_STEPS
        assert info["success"] is True and info["picked_up"] == env.scene.target


def test_the_wrong_object_ends_the_episode() -> None:
    env = TabletopEnv(noise=0.0)
    env.reset(seed=2)
    assert env.scene is not None
    scene, asked = env.scene, env.scene.target
    scene.target = scene.colours[1]
    actions = []
    while scene.picked_up is None:
        actions.append(expert_action(scene))
        scene.step(actions[-1])
    env.reset(seed=2)
    for action in actions:
        _, reward, terminated, truncated, info = env.step(action)
    assert (reward, terminated, truncated, info["success"]) == (0.0, True, False, False)
    assert info["picked_up"] == scene.colours[1] != asked and info["instruction"].split()[-2] == asked


def test_time_runs_out() -> None:
    env = TabletopEnv()
    env.reset(seed=0)
    ends = [env.step(STILL)[2:4] for _ in range(EPISODE_STEPS)]
    assert ends == [(False, False)] * (EPISODE_STEPS - 1) + [(False, True)]


@pytest.mark.parametrize(
    ("action", "told"),
    [
        (np.zeros(6), r"not \[0\.0, 0\.0, 0\.0, 0\.0, 0\.0, 0\.0\]"),
        (np.array([np.nan] * 7), "not .nan, "),
        (np.zeros((100, 7)), r"not an array \[100, 7\]"),
    ],
)
def test_other_actions_are_refused(action: np.ndarray, told: str) -> None:
    env = TabletopEnv()
    env.reset(seed=0)
    with pytest.raises(DataError, match=f"takes actions of seven finite numbers, {told}"):
        env.step(action)


def test_reset_comes_first() -> None:
    with pytest.raises(DataError, match="call reset"):
        TabletopEnv().step(STILL)
    with pytest.raises(DataError, match="call reset"):
        TabletopEnv().render()
