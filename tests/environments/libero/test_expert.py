"""The scripted expert without the simulator: a hand that goes where it is told, and a thing that it may hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from vlaft.cli.main import main
from vlaft.environments.libero.demonstrations import disturb
from vlaft.environments.libero.expert import REACH, Picker, Scene
from vlaft.environments.libero.tasks import DEMONSTRATED, STATE
from vlaft.environments.recording import RecordRequest, tasks_to_record
from vlaft.environments.registry import tasks_named
from vlaft.errors import ConfigError


@dataclass
class Hand:
    """A world without forces: each step goes a third of the way, and fingers hold what they close around."""

    thing: np.ndarray
    size: float  # height of the thing
    hand: np.ndarray = field(default_factory=lambda: np.array([-0.15, 0.0, 0.25]))
    goal: np.ndarray = field(default_factory=lambda: np.array([0.0, 0.26, 0.07]))
    tilt: np.ndarray = field(default_factory=lambda: np.array([0.0, 0.03, 0.0]))
    opening: float = 1.0
    held: np.ndarray | None = None

    def scene(self) -> Scene:
        half = self.size / 2
        low, high = self.thing[2] - half, self.thing[2] + half
        return Scene(self.hand.copy(), self.tilt.copy(), self.thing.copy(), low, high, self.goal, rim=0.14)

    def step(self, action: np.ndarray) -> bool:
        assert action.shape == (7,) and action.dtype == np.float32 and np.abs(action[:6]).max() <= 1
        assert action[6] in (0, 1)
        self.hand = self.hand + action[:3] * REACH / 3
        self.tilt = self.tilt - 0.1 * action[3:6]
        self.opening = np.clip(self.opening + (0.2 if action[6] else -0.2), 0, 1)
        if self.opening > 0.5:
            self.held = None
        elif self.held is None and np.abs(self.thing - self.hand)[:2].max() < 0.015 and self._around():
            self.held = self.thing - self.hand
        if self.held is not None:
            self.thing = self.hand + self.held
        elif np.abs(self.thing - self.goal)[:2].max() < 0.05:
            self.thing[2] = self.goal[2]
        else:
            self.thing[2] = self.size / 2
        return bool(self.held is None and np.abs(self.thing - self.goal).max() < 0.06)

    def _around(self) -> bool:
        return bool(abs(self.hand[2] - self.thing[2]) <= self.size / 2 + 0.005)


def acted(world: Hand, *, drop_at: int = -1, share: float = 0.0) -> int | None:
    expert, generator = Picker(), np.random.default_rng(0)
    for number in range(280):
        if number == drop_at:
            world.opening, world.held = 1.0, None
        if world.step(disturb(expert.action(world.scene()), generator, share)):
            return number + 1
    return None


@pytest.mark.parametrize("size", [0.017, 0.076, 0.146])
def test_it_carries_a_thing_into_the_basket(size: float) -> None:
    world = Hand(np.array([-0.12, -0.24, size / 2]), size)
    steps = acted(world)
    assert steps is not None and 60 < steps < 200
    assert np.abs(world.tilt).max() < 0.02 and world.hand[2] > 0.14  # it looks down, and is over the rim


def test_it_begins_again_with_what_it_has_lost_or_missed() -> None:
    steps = acted(Hand(np.array([0.05, -0.1, 0.038]), 0.076))
    again = acted(Hand(np.array([0.05, -0.1, 0.038]), 0.076), drop_at=50)
    knocked = acted(Hand(np.array([0.05, -0.1, 0.038]), 0.076), share=0.2)
    assert steps is not None and again is not None and knocked is not None
    assert again > steps + 20 and knocked > steps


def test_disturbances_change_the_move_alone() -> None:
    generator = np.random.default_rng(0)
    action = np.array([0.9, 0, -0.9, 0.1, 0.2, 0.3, 1], np.float32)
    assert all(disturb(action, generator, 0.0) is action for _ in range(20))
    changed = [disturb(action, generator, 0.5) for _ in range(200)]
    moved = [each for each in changed if not np.array_equal(each, action)]
    assert 70 < len(moved) < 130 and all(np.abs(each[:3]).max() <= 1 for each in moved)
    assert all(np.array_equal(each[3:], action[3:]) and each.dtype == np.float32 for each in moved)


def test_which_tasks_are_recorded(tmp_path: Path) -> None:
    (task,) = tasks_named("libero:libero_object:3")
    assert task.expert is not None and task.expert.fast is not None
    assert (task.expert.rate, task.expert.state) == (20, STATE) and len(task.expert.action) == 7
    assert {suite: [*indices] for suite, indices in DEMONSTRATED.items()} == {"libero_object": [*range(10)]}
    for name in ("libero:libero_goal:0", "libero:libero_spatial:9"):
        told = (
            rf"{name} has no scripted expert, .*\(those of libero: libero:libero_object:0 to libero:libero_object:9\)"
        )
        with pytest.raises(ConfigError, match=told):
            tasks_to_record(RecordRequest((name,), tmp_path / "demos"))
    with pytest.raises(ConfigError, match="tabletop: its frames are drawn in one way only; leave --fast-render out"):
        tasks_to_record(RecordRequest(("tabletop",), tmp_path / "demos", fast_render=True))
    assert main(["evaluate", "run", "--env", "libero:libero_object:3", "--fast-render"]) == 2
