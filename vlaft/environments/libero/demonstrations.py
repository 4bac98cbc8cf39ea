"""Demonstrations of LIBERO's object tasks by the scripted expert, in the simulator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlaft.environments.libero.environment import kept_environment, observed
from vlaft.environments.libero.expert import Picker, Scene
from vlaft.environments.libero.tasks import STEP_LIMITS
from vlaft.environments.task import ExpertEpisode
from vlaft.observation.images import Image

_DISTURBANCE = 0.5  # standard deviation of what is added to a disturbed move, of a range of -1 to 1
_DOWN = np.diag([1.0, -1, -1])  # the hand's axes in the world's when it looks straight down
_CORNERS = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, 8).T

_Bounds = Callable[[], tuple[NDArray[np.float64], NDArray[np.float64]]]


class Sight:
    """What the expert knows of a scene, read from the simulator.

    Args:
        world: LIBERO's own environment, in an object task, in which an episode has begun.
    """

    def __init__(self, world: Any) -> None:
        thing, basket = world.obj_of_interest
        self._data = world.sim.data
        self._thing, rim = _bounds(world, thing), _bounds(world, basket)()[1][2]
        self._rim, self._inside = float(rim), f"{basket}_contain_region"
        robot = world.robots[0]
        self._hand, self._axes = robot.eef_site_id, robot.robot_model.eef_name

    def scene(self) -> Scene:
        """Return what it is like now."""
        low, high = self._thing()
        turned = _DOWN @ self._data.get_body_xmat(self._axes).reshape(3, 3).T
        tilt = np.array([turned[2, 1] - turned[1, 2], turned[0, 2] - turned[2, 0], turned[1, 0] - turned[0, 1]]) / 2
        return Scene(
            hand=self._data.site_xpos[self._hand].copy(),
            tilt=tilt,  # of small angles
            thing=(low + high) / 2,
            low=float(low[2]),
            high=float(high[2]),
            goal=self._data.get_site_xpos(self._inside).copy(),
            rim=self._rim,
        )


def demonstrate(
    suite: str, index: int, seed: int, disturbed: float | None, *, fast_render: bool = False
) -> ExpertEpisode:
    """Return the expert's episode of a seed, up to its success, in an environment that is kept for the next.

    It begins in none of the initial states, in which policies are evaluated.

    Args:
        suite: the task's.
        index: of the task in it.
        seed: of the scene and the disturbances.
        disturbed: share of steps at which noise is added to the move that is done; what is recorded is what the expert
            wanted.
        fast_render: as `LiberoEnv` has it.
    """
    env = kept_environment(suite, index, fast_render=fast_render)
    generator = np.random.default_rng([seed, 1])
    observation = observed(env.scatter(seed))
    sight, expert = Sight(env.world), Picker()
    frames: dict[str, list[Image]] = {"main": [], "wrist": []}
    actions: list[NDArray[np.float32]] = []
    states, success = [], False
    while not success and len(actions) < STEP_LIMITS[suite]:
        frames["main"].append(observation["image"])
        frames["wrist"].append(observation["image_wrist"])
        states.append(observation["state"])
        wanted = expert.action(sight.scene())
        actions.append(wanted)
        observation, _, success, _, _ = env.step(disturb(wanted, generator, disturbed or 0.0))
    shown = {camera: np.stack(each) for camera, each in frames.items()}
    return ExpertEpisode(env.instruction, success, shown, np.stack(actions), np.stack(states))


def disturb(action: NDArray[np.float32], generator: np.random.Generator, share: float) -> NDArray[np.float32]:
    """Return an action `[7]`, or now and then one whose move is another."""
    if generator.random() >= share:
        return action
    move = np.clip(action[:3] + generator.normal(0, _DISTURBANCE, 3), -1, 1)
    return np.concatenate([move, action[3:]]).astype(np.float32)


def _bounds(world: Any, name: str) -> _Bounds:
    """Return what says between which corners a thing lies, by the boxes that it is made of."""
    model, data = world.sim.model, world.sim.data
    root = model.body_rootid[world.env.obj_body_id[name]]
    solid = (model.body_rootid[model.geom_bodyid] == root) & (model.geom_contype != 0)
    parts = np.flatnonzero(solid)
    corners = _CORNERS * model.geom_size[parts][:, None]

    def bounds() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        turned = corners @ data.geom_xmat[parts].reshape(-1, 3, 3).transpose(0, 2, 1)
        places = (turned + data.geom_xpos[parts][:, None]).reshape(-1, 3)
        return places.min(0), places.max(0)

    return bounds
