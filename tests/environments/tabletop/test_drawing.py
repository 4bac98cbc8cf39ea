"""Pictures of the tabletop: what is where, in which colour."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest

from vlaft.environments.tabletop.drawing import SIZE, Camera, Wrist, draw, draw_wrist
from vlaft.environments.tabletop.scene import CEILING, OBJECT_HEIGHT, REACH, SETUP_A, SETUP_B, Scene, SetUp, new_scene

BOTH = pytest.mark.parametrize("setup", [SETUP_A, SETUP_B], ids=lambda setup: setup.name)


def scene_of(setup: SetUp, objects: list[tuple[float, float]], gripper: tuple[float, float, float]) -> Scene:
    places = np.array([[x, y, 0.0] for x, y in objects])
    colours = tuple(setup.objects)[: len(objects)]
    return Scene(setup, colours[0], colours, places, np.array(gripper))


def at(frame: np.ndarray, camera: Camera, x: float, y: float, z: float = 0.0) -> np.ndarray:
    column, row = camera.pixel(x, y, z)
    return frame[round(row), round(column)].astype(float)


@BOTH
def test_objects_are_where_the_camera_puts_them(setup: SetUp) -> None:
    scene = scene_of(setup, [(0.15, 0.1), (-0.15, 0.1), (0.0, -0.15)], (0.0, 0.1, 0.12))
    frame, camera = draw(scene), Camera.of(setup)
    assert frame.shape == (SIZE, SIZE, 3) and frame.dtype == np.uint8
    for (x, y, _), name in zip(scene.objects, scene.colours, strict=True):
        wanted = np.clip(np.array(setup.objects[name]) * 1.06 * setup.brightness, 0, 255)
        assert at(frame, camera, x, y, OBJECT_HEIGHT) == pytest.approx(wanted, abs=1)
        beside = at(frame, camera, x, y - 0.07)
        assert beside == pytest.approx(np.array(setup.table) * setup.brightness, abs=setup.checker + 1)
    assert frame[0, 0] == pytest.approx(np.array(setup.surroundings) * setup.brightness, abs=1)


@BOTH
def test_objects_are_always_in_the_picture(setup: SetUp) -> None:
    camera, edge = Camera.of(setup), REACH - 0.02
    for x in (-edge, edge):
        for y in (-edge, edge):
            column, row = camera.pixel(x, y)
            assert 2 <= column < SIZE - 2 and 2 <= row < SIZE - 2
            for z in (0.0, CEILING):  # the hand over it may stand out of the picture
                draw(scene_of(setup, [(0.1, 0.0), (-0.1, 0.0)], (np.sign(x) * REACH, np.sign(y) * REACH, z)))


def test_the_camera_is_oblique_and_turned() -> None:
    camera = Camera.of(SETUP_A)
    assert camera.pixel(0, 0) == pytest.approx((41.5, 46.5))
    assert camera.pixel(0.1, 0.2) == pytest.approx((41.5 + 12.4, 46.5 - 24.8))
    assert camera.pixel(0, 0, 0.1)[1] < camera.pixel(0, 0)[1]
    turned = Camera.of(SETUP_B)
    column, row = turned.pixel(0.1, 0.0)
    assert (column - 41.5, 44.5 - row) == pytest.approx((11.4 * np.cos(0.25), 11.4 * np.sin(0.25)))


@BOTH
def test_the_same_scene_gives_the_same_picture_and_stays_as_it_is(setup: SetUp) -> None:
    scenes = [new_scene(setup, np.random.default_rng(seed)) for seed in range(3)]
    before = [(scene.objects.copy(), scene.gripper.copy()) for scene in scenes]
    frames = [draw(scene) for scene in scenes]
    others = [draw(new_scene(other, np.random.default_rng(9))) for other in (SETUP_A, SETUP_B)]
    assert (others[0] != others[1]).any()
    for scene, frame, (objects, gripper) in zip(scenes, frames, before, strict=True):
        assert (draw(copy.deepcopy(scene)) == frame).all()
        assert (scene.objects == objects).all() and (scene.gripper == gripper).all()
    assert (frames[0] != frames[1]).any()


@BOTH
def test_a_millimetre_shows(setup: SetUp) -> None:
    frames = [
        draw(scene_of(setup, [(0.1, 0.1), (-0.1, 0.1)], (x, 0.0, z))) for x, z in [(0, 0.1), (0.001, 0.1), (0, 0.101)]
    ]
    assert (frames[0] != frames[1]).any() and (frames[0] != frames[2]).any() and (frames[1] != frames[2]).any()


@BOTH
def test_the_light_tells_open_from_closed(setup: SetUp) -> None:
    scene = scene_of(setup, [(0.2, 0.2), (-0.2, 0.2)], (0.0, 0.0, 0.05))
    camera = Camera.of(setup)
    for is_open, colour in zip((True, False), setup.lights, strict=True):
        scene.is_open = is_open
        light = at(draw(scene), camera, 0, 0, 0.05 + 0.075)
        assert light == pytest.approx(np.clip(np.array(colour) * setup.brightness, 0, 255), abs=2)


@BOTH
def test_a_held_object_moves_with_the_gripper(setup: SetUp) -> None:
    scene = scene_of(setup, [(0.0, 0.0), (-0.2, 0.2)], (0.0, 0.0, 0.01))
    on_the_table = draw(scene)
    scene.step(np.array([0, 0, 0, 0, 0, 0, 0.0]))
    for _ in range(3):
        scene.step(np.array([0, 0, 0.04, 0, 0, 0, 0.0]))
    lifted, camera = draw(scene), Camera.of(setup)
    assert (lifted != on_the_table).any()
    place = at(lifted, camera, 0.0, -0.02)  # where the object was there is table in the gripper's shadow now
    assert np.ptp(place) < 40 and place.max() < max(setup.table)


@BOTH
def test_what_is_nearer_hides_what_is_behind(setup: SetUp) -> None:
    camera = Camera.of(setup)
    for places in ([(0.0, 0.0), (0.0, 0.03)], [(0.0, 0.03), (0.0, 0.0)]):
        scene = scene_of(setup, places, (0.2, 0.2, 0.12))
        nearer = scene.colours[places.index((0.0, 0.0))]
        wanted = np.clip(np.array(setup.objects[nearer]) * 1.06 * setup.brightness, 0, 255)
        assert at(draw(scene), camera, 0.0, 0.0, OBJECT_HEIGHT) == pytest.approx(wanted, abs=1)


@pytest.mark.parametrize(
    ("setup", "means"), [(SETUP_A, (167.3566, 161.3158, 148.6200)), (SETUP_B, (93.3445, 96.9146, 91.1724))]
)
def test_pictures_stay_what_they_are(setup: SetUp, means: tuple[float, float, float]) -> None:
    """The base learned from set-up A's, and docs/demo.md tells of results on set-up B's."""
    frames = np.stack([draw(new_scene(setup, np.random.default_rng(seed))) for seed in range(20)])
    assert frames.mean(axis=(0, 1, 2)) == pytest.approx(means, abs=0.002)


@BOTH
def test_the_wrist_camera_sees_what_is_below_the_gripper(setup: SetUp) -> None:
    for x, y, z in ((0.1, 0.05, 0.12), (-0.2, 0.2, 0.05)):
        scene = scene_of(setup, [(x + 0.02, y + 0.06), (-0.15, -0.2)], (x, y, z))
        frame, wrist = draw_wrist(scene), Wrist(x, y, z)
        assert frame.shape == (SIZE, SIZE, 3) and frame.dtype == np.uint8
        column, row = wrist.pixel(x + 0.02, y + 0.06, OBJECT_HEIGHT)
        assert column > (SIZE - 1) / 2 > row  # to the right, and above: away from the robot
        wanted = np.clip(np.array(setup.objects[scene.colours[0]]) * 1.06 * setup.brightness, 0, 255)
        assert frame[round(row), round(column)] == pytest.approx(wanted, abs=1)
        beneath = np.array(setup.table) * setup.brightness
        assert frame[SIZE // 2, SIZE // 2] == pytest.approx(beneath, abs=setup.checker + 1)  # between the fingers


@BOTH
def test_it_moves_with_the_gripper_and_sees_more_the_lower_it_is(setup: SetUp) -> None:
    def seen(x: float, z: float) -> np.ndarray:
        return draw_wrist(scene_of(setup, [(0.0, 0.05), (-0.2, 0.2)], (x, 0.0, z)))

    def size(frame: np.ndarray) -> int:
        top = np.array(setup.objects[next(iter(setup.objects))]) * 1.06 * setup.brightness
        return int((abs(frame - np.clip(top, 0, 255)).max(axis=2) < 2).sum())

    high, low = (seen(0.0, z) for z in (0.12, 0.02))
    assert size(low) > 2 * size(high) > 0
    assert (seen(0.001, 0.12) != high).any() and (seen(0.0, 0.121) != high).any()
    main = [draw(scene_of(setup, [(0.0, 0.05), (-0.2, 0.2)], (x, 0.0, 0.1))) for x in (-0.2, 0.2)]
    assert (main[0][50:70] == main[1][50:70]).mean() > 0.9  # the main camera stays where it is
    assert size(seen(-0.2, 0.05)) == 0  # and this one has left the object behind


@BOTH
def test_the_fingers_tell_open_from_closed_and_held(setup: SetUp) -> None:
    scene = scene_of(setup, [(0.0, 0.0), (-0.2, 0.2)], (0.0, 0.0, 0.01))

    def between() -> int:
        """Return the pixels of the middle row that no finger covers."""
        row = draw_wrist(scene)[SIZE // 2].astype(float)
        fingers = [np.clip(np.array(setup.gripper) * light * setup.brightness, 0, 255) for light in (0.75, 0.9)]
        return int(min((abs(row[None] - np.array(fingers)[:, None]).max(axis=2) > 2).all(axis=0).sum(), SIZE))

    opened = between()
    scene.step(np.array([0, 0, 0, 0, 0, 0, 0.0]))
    assert scene.held == 0
    held, frame = between(), draw_wrist(scene)
    top = np.clip(np.array(setup.objects[scene.colours[0]]) * 1.06 * setup.brightness, 0, 255)
    assert frame[SIZE // 2, SIZE // 2] == pytest.approx(top, abs=1)
    scene.held, scene.objects[0] = None, (0.2, 0.2, 0.0)
    assert opened > held > between() > 0


@BOTH
def test_the_tables_squares_lie_where_the_main_camera_sees_them(setup: SetUp) -> None:
    chequered = replace(setup, checker=20.0, brightness=1.0)
    scene = scene_of(chequered, [(0.24, 0.24), (-0.24, 0.24)], (0.0, -0.05, 0.12))
    main, wrist_frame = draw(scene), draw_wrist(scene)
    camera, wrist = Camera.of(chequered), Wrist(0.0, -0.05, 0.12)
    for x, y in ((-0.11, -0.19), (-0.04, -0.19), (0.04, -0.19), (0.11, -0.19), (0.11, -0.12)):
        column, row = wrist.pixel(x, y)
        assert wrist_frame[round(row), round(column)] == pytest.approx(at(main, camera, x, y), abs=1)


def test_drawing_the_wrist_changes_nothing_and_draws_no_lots() -> None:
    scene = new_scene(SETUP_B, np.random.default_rng(1))
    before = copy.deepcopy(scene)
    first, again = draw_wrist(scene), draw_wrist(copy.deepcopy(scene))
    assert (first == again).all()
    assert (scene.objects == before.objects).all() and (scene.gripper == before.gripper).all()
    assert scene.generator.bit_generator.state == before.generator.bit_generator.state
