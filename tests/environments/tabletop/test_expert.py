"""The scripted expert does what it is asked, from any state."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from vlaft.environments.tabletop.environment import MAX_STEPS, TabletopEnv
from vlaft.environments.tabletop.expert import expert_action
from vlaft.environments.tabletop.scene import SETUP_A, SETUP_B, Scene, SetUp, new_scene

BOTH = pytest.mark.parametrize("setup", [SETUP_A, SETUP_B], ids=lambda setup: setup.name)


def finish(scene: Scene) -> int:
    """Let the expert act until something is picked up; return the number of steps."""
    for number in range(MAX_STEPS):
        if scene.picked_up is not None:
            return number
        scene.step(expert_action(scene))
    return MAX_STEPS


@BOTH
@pytest.mark.parametrize("noise", [0.0, 0.15])
def test_it_picks_up_what_it_is_told(setup: SetUp, noise: float) -> None:
    steps = []
    for seed in range(150):
        scene = new_scene(setup, np.random.default_rng(seed), noise=noise)
        steps.append(finish(scene))
        assert scene.picked_up == scene.target, seed
    assert max(steps) < MAX_STEPS - 5 and min(steps) >= 5


@BOTH
def test_actions_are_within_limits_and_follow_from_the_state(setup: SetUp) -> None:
    space = TabletopEnv(setup).action_space
    for seed in range(20):
        scene = new_scene(setup, np.random.default_rng(seed), noise=0.1)
        for _ in range(MAX_STEPS):
            before = copy.deepcopy(scene)
            action = expert_action(scene)
            assert (expert_action(before) == action).all()
            assert (before.objects == scene.objects).all() and (before.gripper == scene.gripper).all()
            assert np.hypot(*action[:2]) <= setup.max_step + 1e-9 and action.astype(np.float32) in space
            assert (action[3:6] == 0).all() and action[6] in (0, 1)
            scene.step(action)


@BOTH
def test_it_opens_after_closing_on_nothing(setup: SetUp) -> None:
    scene = new_scene(setup, np.random.default_rng(3))
    scene.is_open, scene.gripper = False, np.array([*scene.objects[0, :2] + 0.05, 0.01])
    assert expert_action(scene)[6] == 1.0
    finish(scene)
    assert scene.picked_up == scene.target


@BOTH
def test_it_lets_go_of_another_object(setup: SetUp) -> None:
    scene = new_scene(setup, np.random.default_rng(4))
    scene.gripper = scene.objects[1].copy()
    scene.step(np.zeros(7))
    assert scene.held == 1
    finish(scene)
    assert scene.picked_up == scene.target
