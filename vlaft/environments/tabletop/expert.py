"""The scripted expert: what to do in a scene, from its state alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vlaft.environments.tabletop.scene import GRASP_HEIGHT, Scene, turn

_HOVER = 0.085  # height at which the gripper travels
_NEAR = 0.05  # horizontal distance below which it goes down
_ALIGNED = 0.010  # and below which it closes
_FINGERS_DOWN = 0.012  # height at which it does so


def expert_action(scene: Scene) -> NDArray[np.float64]:
    """Return the action `[7]` that brings the scene's task forward; the same state gives the same action.

    Over the named object at travelling height, down, close, up. Fingers that closed on nothing, or on another object,
    open again.
    """
    action = np.zeros(7)
    limit = scene.setup.max_step
    if scene.held == scene.target_index:
        action[2] = limit
        return action
    action[6] = 1.0
    offset = scene.objects[scene.target_index, :2] - scene.gripper[:2]
    distance = float(np.hypot(*offset))
    height = float(scene.gripper[2])
    if scene.held is not None or not scene.is_open:
        action[2] = np.clip(_HOVER - height, 0.0, limit)  # let go, and away from what is there
        return action
    if distance <= _ALIGNED and height <= GRASP_HEIGHT - 0.01:
        action[6] = 0.0
        return action
    goal = _HOVER if distance > _NEAR else _FINGERS_DOWN
    move = offset * min(1.0, limit / max(distance, 1e-12))
    action[:2] = turn(move, -scene.setup.frame_angle)
    action[2] = np.clip(goal - height, -limit, limit)
    return action
