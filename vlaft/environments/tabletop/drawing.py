"""Draw a scene as its two cameras see it: uint8 `[84, 84, 3]`, in numpy, thousands of frames a second.

The main camera stands over the table. Its view is slightly oblique: what is higher appears further up and larger, and
the gripper's shadow tells where over the table it is. The wrist camera sits in the palm, looks straight down between
the fingers and moves with them: what is beneath the gripper is in the middle, and larger the lower the gripper is.
Edges are antialiased, so that a fraction of a pixel shows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlaft.environments.tabletop.scene import OBJECT_HEIGHT, OBJECT_RADIUS, REACH, Colour, Scene, SetUp
from vlaft.observation.images import Image

SIZE = 84  # pixels
_OBLIQUE = 0.55  # pixels per metre upwards, over those along the table
_NEARER = 1.6  # growth of what is higher, per metre
_PALM = 0.11  # height of the wrist camera over the fingertips, in metres
_FOCAL = 45.0  # its focal length, in pixels: 86 degrees from edge to edge
_FINGER = 0.012  # half of a finger's width, in metres
_CHECK = 0.075  # side of the table's squares, in metres
_ROWS, _COLUMNS = np.mgrid[:SIZE, :SIZE].astype(np.float32)


@dataclass(frozen=True)
class Camera:
    """The projection of a set-up: table coordinates to pixels.

    Attributes:
        scale: pixels per metre.
        middle: column and row of the table's middle.
        cosine: of the angle by which it is turned.
        sine: likewise.
    """

    scale: float
    middle: tuple[float, float]
    cosine: float
    sine: float

    @classmethod
    def of(cls, setup: SetUp) -> Camera:
        """Return a set-up's camera."""
        middle = ((SIZE - 1) / 2 + setup.shift[0], (SIZE - 1) / 2 + setup.shift[1])
        return cls(setup.scale, middle, float(np.cos(setup.camera_angle)), float(np.sin(setup.camera_angle)))

    def pixel(self, x: float, y: float, z: float = 0.0) -> tuple[float, float]:
        """Return column and row of a point."""
        right = (self.cosine * x - self.sine * y) * self.scale
        away = (self.sine * x + self.cosine * y) * self.scale
        return self.middle[0] + right, self.middle[1] - away - z * self.scale * _OBLIQUE


def draw(scene: Scene) -> Image:
    """Return the frame that the main camera sees: uint8 `[84, 84, 3]`, RGB."""
    setup, camera = scene.setup, Camera.of(scene.setup)
    image = _table(camera, setup.table, setup.checker, setup.surroundings).copy()
    order = np.argsort([-camera.pixel(x, y)[1] for x, y, _ in scene.objects])[::-1]  # what is further away first
    for index in order:
        if index != scene.held:
            _draw_object(image, scene, camera, int(index))
    _draw_gripper(image, scene, camera)
    return np.clip(image * setup.brightness, 0, 255).astype(np.uint8)


def draw_wrist(scene: Scene) -> Image:
    """Return the frame that the wrist camera sees: uint8 `[84, 84, 3]`, RGB; its columns run along the table's x."""
    setup, wrist = scene.setup, Wrist(*(float(value) for value in scene.gripper))
    image = _table_below(wrist, setup)
    for index in range(len(scene.objects)):
        if index != scene.held:
            _draw_below(image, scene, wrist, index)
    if scene.held is not None:
        _draw_below(image, scene, wrist, scene.held)
    _draw_fingers(image, scene)
    return np.clip(image * setup.brightness, 0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=8)  # the same for every frame of a set-up
def _table(camera: Camera, plain: Colour, checker: float, around: Colour) -> NDArray[np.float32]:
    right = (_COLUMNS - camera.middle[0]) / camera.scale
    away = (camera.middle[1] - _ROWS) / camera.scale
    x = camera.cosine * right + camera.sine * away
    y = camera.cosine * away - camera.sine * right
    inside = np.clip((REACH + 0.05 - np.maximum(abs(x), abs(y))) * camera.scale + 0.5, 0, 1)[..., None]
    table = np.asarray(plain, np.float32)
    if checker:
        table = table + checker * (((x // _CHECK + y // _CHECK) % 2) * 2 - 1)[..., None]
    surroundings = np.asarray(around, np.float32)
    return (surroundings + (table - surroundings) * inside).astype(np.float32)


@dataclass(frozen=True)
class Wrist:
    """The projection of the wrist camera: table coordinates to pixels.

    Attributes:
        x: of the gripper, in metres, and of the camera.
        y: likewise.
        z: height of the fingertips; the camera is higher.
    """

    x: float
    y: float
    z: float

    def scale(self, z: float) -> float:
        """Return pixels per metre at a height over the table."""
        return _FOCAL / (self.z + _PALM - z)

    def pixel(self, x: float, y: float, z: float = 0.0) -> tuple[float, float]:
        """Return column and row of a point."""
        scale, middle = self.scale(z), (SIZE - 1) / 2
        return middle + (x - self.x) * scale, middle - (y - self.y) * scale


def _table_below(wrist: Wrist, setup: SetUp) -> NDArray[np.float32]:
    """Return what lies beneath objects and fingers; columns are x and rows are y, so that each is reckoned alone."""
    scale = wrist.scale(0.0)
    offsets = (_COLUMNS[0] - (SIZE - 1) / 2) / scale
    along = (wrist.x + offsets, wrist.y - offsets)
    inside_x, inside_y = (np.clip((REACH + 0.05 - abs(each)) * scale + 0.5, 0, 1) for each in along)
    image = np.empty((SIZE, SIZE, 3), np.float32)
    image[:] = setup.table
    if setup.checker:
        # 1 and -1 by turns, and in between within half a pixel of a square's edge
        x, y = (np.clip((0.5 - abs((each / _CHECK + 0.5) % 2 - 1)) * 2 * _CHECK * scale, -1, 1) for each in along)
        image -= (setup.checker * np.outer(y, x)).astype(np.float32)[..., None]
    if min(inside_x.min(), inside_y.min()) < 1:
        _blend(image, 1 - np.minimum(inside_y[:, None], inside_x), setup.surroundings)
    return image


def _draw_below(image: NDArray[np.float32], scene: Scene, wrist: Wrist, index: int) -> None:
    x, y, z = (float(value) for value in scene.objects[index])
    colour = scene.setup.objects[scene.colours[index]]
    layers = ((0.0, 0.62), (OBJECT_HEIGHT / 2, 0.62), (OBJECT_HEIGHT, 1.06))
    for height, light in layers:
        u, v = wrist.pixel(x, y, z + height)
        radius = OBJECT_RADIUS * wrist.scale(z + height)
        if scene.setup.shape == "disc":
            _disc(image, u, v, radius, _scaled(colour, light))
        else:
            _bar(image, (u - radius, u + radius), (v - 0.9 * radius, v + 0.9 * radius), _scaled(colour, light))


def _draw_fingers(image: NDArray[np.float32], scene: Scene) -> None:
    """Two bars from the fingertips to the palm, which is out of the picture on either side."""
    near = _FOCAL / (_PALM - (OBJECT_HEIGHT if scene.held is not None else 0.0))  # what is held hides the tips
    gap, half, middle = _gap(scene) * near, _FINGER * near, (SIZE - 1) / 2
    rows = (middle - half, middle + half)
    _bar(image, (-1.0, middle - gap), rows, _scaled(scene.setup.gripper, 0.75))
    _bar(image, (middle + gap, float(SIZE)), rows, _scaled(scene.setup.gripper, 0.9))


def _draw_object(image: NDArray[np.float32], scene: Scene, camera: Camera, index: int) -> None:
    x, y, z = scene.objects[index]
    colour = scene.setup.objects[scene.colours[index]]
    radius = OBJECT_RADIUS * camera.scale * (1 + _NEARER * z)
    u, v = camera.pixel(x, y, z)
    top = camera.pixel(x, y, z + OBJECT_HEIGHT)[1]
    shade, light = _scaled(colour, 0.62), _scaled(colour, 1.06)
    if scene.setup.shape == "disc":
        for height in (v, (v + top) / 2):
            _disc(image, u, height, radius, shade)
        _disc(image, u, top, radius, light)
    else:
        for height in (v, (v + top) / 2):
            _box(image, u, height, radius, radius * 0.9, camera, shade)
        _box(image, u, top, radius, radius * 0.9, camera, light)


def _draw_gripper(image: NDArray[np.float32], scene: Scene, camera: Camera) -> None:
    """The shadow on the table, what is held, two fingers, the hand over them and its light."""
    x, y, z = scene.gripper
    setup, near = scene.setup, 1 + _NEARER * z
    u, v = camera.pixel(x, y)
    _disc(image, u, v, 5.0 + 10.0 * z, (0.0, 0.0, 0.0), 0.42 - 0.9 * z)
    if scene.held is not None:
        _draw_object(image, scene, camera, scene.held)
    gap = _gap(scene) * camera.scale * near
    u, v = camera.pixel(x, y, z + OBJECT_HEIGHT * 0.6)
    dark, half = _scaled(setup.gripper, 0.75), 1.5 * near
    for side in (-1.0, 1.0):
        du, dv = side * (gap + half) * camera.cosine, side * (gap + half) * camera.sine
        _box(image, u + du, v - dv, half, 3.0 * near, camera, dark)
    u, v = camera.pixel(x, y, z + 0.075)
    _box(image, u, v, gap + 2 * half, 2.1 * near, camera, setup.gripper)
    _disc(image, u, v, 2.3 * near, setup.lights[0 if scene.is_open else 1])


def _gap(scene: Scene) -> float:
    """Return half of the distance between the fingers, in metres."""
    return 0.045 if scene.is_open else OBJECT_RADIUS if scene.held is not None else 0.006


def _scaled(colour: Colour, factor: float) -> Colour:
    return colour[0] * factor, colour[1] * factor, colour[2] * factor


def _window(u: float, v: float, radius: float) -> tuple[slice, slice]:
    reach = radius + 1.5
    left, right = max(int(u - reach), 0), min(int(u + reach) + 2, SIZE)
    top, bottom = max(int(v - reach), 0), min(int(v + reach) + 2, SIZE)
    return slice(top, max(bottom, top)), slice(left, max(right, left))


def _disc(image: NDArray[np.float32], u: float, v: float, radius: float, colour: Colour, opacity: float = 1.0) -> None:
    window = _window(u, v, radius)
    cover = radius + 0.5 - np.hypot(_COLUMNS[window] - u, _ROWS[window] - v)
    _blend(image[window], np.clip(cover, 0, 1) * opacity, colour)


def _box(
    image: NDArray[np.float32],
    u: float,
    v: float,
    half_width: float,
    half_height: float,
    camera: Camera,
    colour: Colour,
) -> None:
    """Fill a rectangle that lies along the table's axes."""
    window = _window(u, v, half_width + half_height)
    right, down = _COLUMNS[window] - u, _ROWS[window] - v
    across = np.clip(half_width + 0.5 - abs(camera.cosine * right - camera.sine * down), 0, 1)
    _blend(
        image[window],
        across * np.clip(half_height + 0.5 - abs(camera.sine * right + camera.cosine * down), 0, 1),
        colour,
    )


def _bar(image: NDArray[np.float32], columns: tuple[float, float], rows: tuple[float, float], colour: Colour) -> None:
    """Fill a rectangle that lies along the frame's edges, from one column and row to another."""
    (window_x, cover_x), (window_y, cover_y) = (_cover(*each) for each in (columns, rows))
    _blend(image[window_y, window_x], np.outer(cover_y, cover_x), colour)


def _cover(low: float, high: float) -> tuple[slice, NDArray[np.float32]]:
    """Return which pixels of a row lie between two places, and how much of each does."""
    first, last = max(int(low) - 1, 0), min(int(high) + 2, SIZE)
    pixels = _COLUMNS[0, first : max(last, first)]
    return slice(first, max(last, first)), np.clip(np.minimum(pixels + 0.5 - low, high - pixels + 0.5), 0, 1)


def _blend(part: NDArray[np.float32], cover: NDArray[np.float32], colour: Colour) -> None:
    part += (np.asarray(colour, np.float32) - part) * cover[..., None]
