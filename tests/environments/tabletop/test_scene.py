"""How the tabletop moves, by hand and by its invariants."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlaft.environments.tabletop.scene import (
    CEILING,
    GRASP_HEIGHT,
    GRASP_RADIUS,
    LIFTED,
    REACH,
    SETUP_A,
    SETUP_B,
    SETUPS,
    SPACING,
    Scene,
    SetUp,
    new_scene,
    place_objects,
    turn,
)

CLOSE, OPEN = 0.0, 1.0
BOTH = pytest.mark.parametrize("setup", [SETUP_A, SETUP_B], ids=lambda setup: setup.name)
coordinates = st.floats(-1, 1)


def scene_with(gripper: tuple[float, float, float], setup: SetUp = SETUP_A, **changes: Any) -> Scene:
    """A red object in the middle, a blue one to its right."""
    objects = np.array([[0.0, 0.0, 0.0], [0.15, 0.0, 0.0]])
    return Scene(setup, "red", ("red", "blue"), objects, np.array(gripper), **changes)


def action(x: float = 0, y: float = 0, z: float = 0, gripper: float = OPEN) -> np.ndarray:
    return np.array([x, y, z, 0, 0, 0, gripper])


def test_turning() -> None:
    assert turn(np.array([1.0, 0.0]), np.pi / 2) == pytest.approx([0, 1], abs=1e-12)
    assert turn(turn(np.array([0.3, -0.2]), 0.7), -0.7) == pytest.approx([0.3, -0.2])


def test_moves_are_added_along_the_set_ups_axes() -> None:
    scene = scene_with((0, 0, 0.1))
    scene.step(action(0.03, -0.02, 0.04))
    assert scene.gripper == pytest.approx([0.03, -0.02, 0.14])
    turned = scene_with((0, 0, 0.1), SETUP_B)
    turned.step(action(0.04))
    angle = SETUP_B.frame_angle
    assert turned.gripper == pytest.approx([0.04 * np.cos(angle), 0.04 * np.sin(angle), 0.1])


@BOTH
@given(moves=st.lists(st.tuples(coordinates, coordinates, coordinates, st.floats(0, 1)), min_size=1, max_size=12))
@settings(max_examples=40, deadline=None)
def test_moves_are_short_and_stay_within_reach(setup: SetUp, moves: list[tuple[float, float, float, float]]) -> None:
    scene = scene_with((0.1, -0.2, 0.05), setup)
    for x, y, z, gripper in moves:
        before = scene.gripper.copy()
        scene.step(np.array([x, y, z, 3.0, -3.0, 1.0, gripper]))
        moved = scene.gripper - before
        assert np.hypot(*moved[:2]) <= setup.max_step + 1e-9 and abs(moved[2]) <= setup.max_step + 1e-9
        assert (abs(scene.gripper[:2]) <= REACH).all() and 0 <= scene.gripper[2] <= CEILING
        assert scene.is_open == (gripper > 0.5)
        if scene.held is not None:
            assert not scene.is_open and (scene.objects[scene.held] == scene.gripper).all()
        lying = [index for index in range(2) if index != scene.held]
        assert (scene.objects[lying, 2] == 0).all()


def test_rotations_have_no_effect() -> None:
    plain, turned = scene_with((0, 0, 0.1)), scene_with((0, 0, 0.1))
    plain.step(action(0.01, 0.02, 0.03))
    turned.step(action(0.01, 0.02, 0.03) + np.array([0, 0, 0, 1.0, -2.0, 0.5, 0]))
    assert (plain.gripper == turned.gripper).all()


@pytest.mark.parametrize(
    ("place", "held"),
    [
        ((GRASP_RADIUS - 0.001, 0, GRASP_HEIGHT - 0.001), 0),
        ((GRASP_RADIUS + 0.001, 0, 0.01), None),
        ((0, 0, GRASP_HEIGHT + 0.001), None),
        ((0.15, 0.01, 0.01), 1),
    ],
)
def test_fingers_hold_what_is_between_them(place: tuple[float, float, float], held: int | None) -> None:
    scene = scene_with(place)
    scene.step(action(gripper=CLOSE))
    assert scene.held == held and not scene.is_open
    if held is not None:
        assert (scene.objects[held] == scene.gripper).all()


def test_lifting_carrying_and_letting_go() -> None:
    scene = scene_with((0, 0, 0.01))
    scene.step(action(gripper=CLOSE))
    for _ in range(2):
        assert scene.picked_up is None
        scene.step(action(x=0.02, z=0.06, gripper=CLOSE))
    assert scene.gripper[2] >= LIFTED and scene.picked_up == "red"
    scene.step(action())
    assert scene.held is None and scene.picked_up is None and scene.is_open
    assert scene.objects[0] == pytest.approx([0.04, 0, 0])


def test_closed_fingers_that_come_down_on_an_object_do_not_hold_it() -> None:
    scene = scene_with((0, 0, 0.06), is_open=False)
    scene.step(action(z=-0.05, gripper=CLOSE))
    assert scene.held is None
    scene.step(action())
    scene.step(action(gripper=CLOSE))
    assert scene.held == 0


def test_noise_is_relative_and_reproducible() -> None:
    def path(noise: float, seed: int) -> np.ndarray:
        scene = scene_with((0, 0, 0.1), noise=noise, generator=np.random.default_rng(seed))
        places = []
        for _ in range(200):
            scene.gripper = np.array([0.0, 0.0, 0.08])
            scene.step(action(0.03, 0.0, 0.04))
            places.append(scene.gripper - [0, 0, 0.08])
        return np.array(places)

    assert (path(0.1, 1) == path(0.1, 1)).all() and (path(0.1, 1) != path(0.1, 2)).any()
    noisy = path(0.1, 1)
    assert noisy.mean(axis=0) == pytest.approx([0.03, 0, 0.04], abs=0.002)
    assert noisy.std(axis=0) == pytest.approx([0.005] * 3, rel=0.2)  # a tenth of 5 cm
    assert path(0.0, 1) == pytest.approx(np.tile([0.03, 0, 0.04], (200, 1)))
    still = scene_with((0, 0, 0.1), noise=0.5)
    still.step(action())
    assert (still.gripper == [0, 0, 0.1]).all()


@given(seed=st.integers(0, 2**32), count=st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_objects_lie_apart(seed: int, count: int) -> None:
    places = place_objects(np.random.default_rng(seed), count)
    assert places.shape == (count, 3) and (places[:, 2] == 0).all() and abs(places[:, :2]).max() < REACH
    for index in range(count):
        others = np.delete(places, index, axis=0)
        assert (np.linalg.norm(others - places[index], axis=1) >= SPACING).all()


@BOTH
def test_beginnings(setup: SetUp) -> None:
    targets = set()
    for seed in range(40):
        scene, again = (new_scene(setup, np.random.default_rng(seed)) for _ in range(2))
        assert (scene.objects == again.objects).all() and scene.colours == again.colours
        assert (scene.gripper == again.gripper).all()
        assert len(set(scene.colours)) == 3 and set(scene.colours) < set(setup.objects)
        assert scene.colours[scene.target_index] == scene.target
        assert scene.is_open and scene.held is None and scene.picked_up is None
        targets.add(scene.target)
    assert targets == set(setup.objects)


def test_the_set_ups() -> None:
    assert list(SETUPS) == ["tabletop_a", "tabletop_b"]
    assert SETUP_A.instruction("red") == "pick up the red block"
    assert SETUP_B.instruction("white") == "pick up the white disc"
