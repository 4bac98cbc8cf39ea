"""The tabletop as a Gymnasium environment.

env = TabletopEnv(SETUP_B)
observation, info = env.reset(seed=1)
observation["image"], info["instruction"]
observation, reward, terminated, truncated, info = env.step(action)
info["success"]
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray

from vlaft.environments.tabletop.drawing import SIZE, draw, draw_wrist
from vlaft.environments.tabletop.scene import CEILING, REACH, SETUP_B, Scene, SetUp, new_scene
from vlaft.errors import DataError
from vlaft.observation.images import Image

EPISODE_STEPS = 30
CONTROL_RATE = 5  # actions per second
MOTION_NOISE = 0.1  # standard deviation of each coordinate of a move, as a share of the move's length

_Observation = dict[str, NDArray[Any]]


class TabletopEnv(gymnasium.Env[_Observation, NDArray[np.float32]]):
    """Three objects of different colours on a table, one of which the instruction names; pick it up.

    * Observation: `image` and `image_wrist`, uint8 `[84, 84, 3]`; `state`, float32 `[4]`: x, y, z in metres, gripper
      (1 open, 0 closed).
    * Action, float32 `[7]`: x, y, z in metres, roll, pitch, yaw in radians (without effect), gripper (1 = open), as
      OpenVLA has it. Moves longer than the set-up's `max_step` are shortened.
    * `info`: `instruction`; `success`, whether the named object has been picked up; `picked_up`, which one has.
    * An episode ends when any object has been picked up (reward 1 for the named one), or after 30 steps.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_RATE}  # noqa: RUF012  Gymnasium's own declaration
    render_mode = "rgb_array"

    def __init__(self, setup: SetUp = SETUP_B, noise: float = MOTION_NOISE) -> None:
        self.setup = setup
        self.noise = noise
        self.observation_space = spaces.Dict(  # type: ignore[assignment]
            {
                "image": spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8),
                "image_wrist": spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8),
                "state": spaces.Box(
                    np.array([-REACH, -REACH, 0, 0], np.float32), np.array([REACH, REACH, CEILING, 1], np.float32)
                ),
            }
        )
        limit, turn = setup.max_step, np.pi
        self.action_space = spaces.Box(
            np.array([-limit, -limit, -limit, -turn, -turn, -turn, 0], np.float32),
            np.array([limit, limit, limit, turn, turn, turn, 1], np.float32),
        )
        self.scene: Scene | None = None
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[_Observation, dict]:
        """Begin an episode; the same seed gives the same one.

        Args:
            seed: as Gymnasium has it.
            options: `target`, the colour word of the object to name; else it is drawn.

        Raises:
            DataError: the set-up has no object of that colour.
        """
        super().reset(seed=seed)
        target = (options or {}).get("target")
        self.scene = new_scene(self.setup, self.np_random, noise=self.noise, target=target)
        self._steps = 0
        return self._observation(), self._info()

    def step(self, action: ArrayLike) -> tuple[_Observation, float, bool, bool, dict]:
        """Do an action.

        Raises:
            DataError: there is no episode, or the action is not seven finite numbers.
        """
        scene = self._scene()
        values = np.asarray(action, np.float64)
        if values.shape != (7,) or not np.isfinite(values).all():
            found = values.tolist() if values.size <= 7 else f"an array {[*values.shape]}"
            raise DataError(f"the tabletop takes actions of seven finite numbers, not {found}")
        scene.step(values)
        self._steps += 1
        info = self._info()
        ended = scene.picked_up is not None
        return self._observation(), float(info["success"]), ended, self._steps >= EPISODE_STEPS and not ended, info

    def render(self) -> Image:  # type: ignore[override]
        """Return the main camera's frame, uint8 `[84, 84, 3]`."""
        return draw(self._scene())

    def _scene(self) -> Scene:
        if self.scene is None:
            raise DataError("no episode has begun; call reset() first")
        return self.scene

    def _observation(self) -> _Observation:
        scene = self._scene()
        state = np.array([*scene.gripper, float(scene.is_open)], np.float32)
        return {"image": draw(scene), "image_wrist": draw_wrist(scene), "state": state}

    def _info(self) -> dict[str, Any]:
        scene = self._scene()
        picked = scene.picked_up
        return {
            "instruction": self.setup.instruction(scene.target),
            "success": picked == scene.target,
            "picked_up": picked,
        }
