"""A scripted expert for LIBERO's object tasks: it picks one thing up from above and lets it fall into the basket.

It knows where things are. What it does is decided by what it sees at each step, so that it comes back to its way when
the arm is knocked aside, and begins again when it has lost the thing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

REACH = 0.05  # metres that LIBERO's controller takes a move of 1 for
TURN = 0.5  # radians, likewise
_GAIN = 1.6  # of what is missing, so much is asked for
_TURN_GAIN = 0.5
_HOVER = 0.06  # metres over the thing, before going down to it
_CLEARANCE = 0.04  # metres between the thing and what it is carried over
_DEEP = 0.035  # metres that fingers reach down along a thing
_LOWEST = 0.012  # of the point between the fingertips; lower, they touch the floor
_CLOSING = 9  # steps in which the fingers close
_PATIENCE = 20  # steps to wait for a thing that does not fall, or a place that is not reached
_LOST = 0.03  # metres by which a thing has moved in the hand: it is not held

_Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Scene:
    """Where things are, metres.

    Attributes:
        hand: the point between the fingertips `[3]`.
        tilt: the rotation that would make the gripper look straight down, axis times angle `[3]`, in the world's axes.
        thing: the middle of what is to be picked up `[3]`.
        low: its lowest point.
        high: its highest.
        goal: the middle of the basket's inside `[3]`.
        rim: height of the basket's rim.
    """

    hand: _Vector
    tilt: _Vector
    thing: _Vector
    low: float
    high: float
    goal: _Vector
    rim: float


class Picker:
    """The expert in the middle of an episode.

    It goes over the thing, down, closes the fingers, goes up, over the basket, and opens the fingers.
    """

    def __init__(self) -> None:
        self._phase, self._steps = "over", 0
        self._held = np.zeros(3)  # from the thing to the hand, when it was grasped

    def action(self, scene: Scene) -> NDArray[np.float32]:
        """Return what to do, float32 `[7]`: move, rotation, both within -1 to 1, and the gripper, 1 = open."""
        self._decide(scene)
        move = np.clip(_GAIN * (self._wanted(scene) - scene.hand) / REACH, -1, 1)
        turn = np.clip(_TURN_GAIN * scene.tilt / TURN, -1, 1)
        return np.array([*move, *turn, self._phase in ("over", "down", "open")], np.float32)

    def _wanted(self, scene: Scene) -> _Vector:
        """Return where the hand should be."""
        grasp = max(scene.high - _DEEP, (scene.high + scene.low) / 2 - 0.005, _LOWEST)
        if self._phase in ("down", "close"):
            return np.array([*scene.thing[:2], grasp])
        if self._phase == "over":
            return np.array([*scene.thing[:2], scene.high + _HOVER])
        # from here on the thing is in the hand
        over = scene.rim + _CLEARANCE + (scene.hand[2] - scene.low)
        if self._phase == "up":
            return np.array([*scene.hand[:2], over])
        above = scene.goal[:2] + scene.hand[:2] - scene.thing[:2]
        if self._phase == "carry":
            return np.array([*above, over])
        return np.array([*above, scene.rim + 0.02 + (scene.hand[2] - scene.thing[2])])

    def _decide(self, scene: Scene) -> None:
        """Go on to what comes next, or back to the beginning."""
        self._steps += 1
        missing = np.abs(self._wanted(scene) - scene.hand)
        aside, above = float(np.hypot(*missing[:2])), float(missing[2])
        late = self._steps > _PATIENCE
        slipped = float(np.linalg.norm(scene.hand - scene.thing - self._held))
        if self._phase in ("up", "carry", "lower") and slipped > _LOST:
            self._go_on("over")
        elif self._phase == "over" and aside < 0.008 and above < 0.03:
            self._go_on("down")
        elif self._phase == "down" and (max(above, aside) < 0.006 or late):
            self._go_on("close")
        elif self._phase == "close" and self._steps > _CLOSING:
            self._held = scene.hand - scene.thing
            self._go_on("up")
        elif self._phase == "up" and above < 0.03:
            self._go_on("carry")
        elif self._phase == "carry" and aside < 0.02:
            self._go_on("lower")
        elif self._phase == "lower" and aside < 0.01 and (above < 0.015 or late):
            self._go_on("open")
        elif self._phase == "open" and late:  # it has not fallen into the basket
            self._go_on("over")

    def _go_on(self, phase: str) -> None:
        self._phase, self._steps = phase, 0
