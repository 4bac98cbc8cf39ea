"""A table, some objects and a gripper: the simulator's state, how it moves, and what a set-up fixes.

Positions are metres. x points right and y away from the robot on an untilted table whose middle is the origin; z is
the height of the fingertips over the table. There is no contact physics: an object is held from the moment that the
fingers close around it, and falls straight down when they open.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from vlaft.errors import DataError

Colour = tuple[float, float, float]  # RGB, 0..255

REACH = 0.25  # the gripper and the objects stay within this distance of the middle, along x and along y
CEILING = 0.16  # highest z of the fingertips
OBJECT_RADIUS = 0.03  # half an object's width
OBJECT_HEIGHT = 0.035
GRASP_RADIUS = 0.022  # fingers that close within this horizontal distance of an object's middle hold it
GRASP_HEIGHT = 0.035  # and if they are below this height
LIFTED = 0.10  # an object is picked up when it is held this high
SPACING = 0.11  # smallest distance between the middles of two objects


@dataclass(frozen=True)
class SetUp:
    """What differs from one robot's world to another's.

    Attributes:
        name: of the set-up.
        objects: colour word to colour; an episode shows three of them.
        noun: what the objects are called in instructions.
        shape: `block` or `disc`.
        max_step: longest move of one step, in metres, horizontally and vertically.
        frame_angle: by how much the axes of an action are turned against those of the table, in radians.
        camera_angle: by how much the camera is turned about the vertical, in radians.
        scale: pixels per metre, of a frame of 84 pixels.
        shift: pixels by which the table's middle lies from the frame's, right and down.
        table: colour of the table.
        checker: by how many levels the table's squares differ from `table`; 0 for a plain one.
        surroundings: colour around the table.
        gripper: colour of the gripper.
        lights: colours of the gripper's light while it is open and while it is closed.
        brightness: factor on everything.
    """

    name: str
    objects: dict[str, Colour]
    noun: str = "block"
    shape: str = "block"
    max_step: float = 0.06
    frame_angle: float = 0.0
    camera_angle: float = 0.0
    scale: float = 124.0
    shift: tuple[float, float] = (0.0, 5.0)
    table: Colour = (196, 186, 168)
    checker: float = 0.0
    surroundings: Colour = (92, 96, 104)
    gripper: Colour = (48, 50, 56)
    lights: tuple[Colour, Colour] = ((80, 230, 110), (250, 70, 60))
    brightness: float = 1.0

    def instruction(self, target: str) -> str:
        """Return the instruction to pick up the object of a colour."""
        return f"pick up the {target} {self.noun}"


SETUP_A = SetUp(
    name="tabletop_a",
    objects={"red": (205, 50, 45), "green": (50, 150, 70), "blue": (45, 85, 205), "yellow": (235, 195, 40)},
)

SETUP_B = SetUp(
    name="tabletop_b",
    objects={"red": (190, 40, 60), "blue": (60, 110, 215), "yellow": (225, 205, 70), "purple": (135, 60, 165)},
    noun="disc",
    shape="disc",
    max_step=0.045,
    frame_angle=-0.12,
    camera_angle=0.25,
    scale=114.0,
    shift=(0.0, 3.0),
    table=(118, 132, 124),
    checker=7.0,
    surroundings=(58, 46, 42),
    gripper=(222, 206, 170),
    lights=((90, 200, 250), (255, 90, 200)),
    brightness=0.95,
)

SETUPS = {setup.name: setup for setup in (SETUP_A, SETUP_B)}


@dataclass
class Scene:
    """The state of one episode; `step` changes it in place.

    Attributes:
        setup: what is fixed.
        target: colour word of the object to pick up.
        colours: colour words of the objects on the table, N of them.
        objects: float64 `[N, 3]`, position of each object's underside.
        gripper: float64 `[3]`, position of the fingertips.
        is_open: whether the fingers are open.
        held: index of the object between the fingers, or None.
        noise: standard deviation of each coordinate of a move, as a share of the move's length.
        generator: source of the noise.
    """

    setup: SetUp
    target: str
    colours: tuple[str, ...]
    objects: NDArray[np.float64]
    gripper: NDArray[np.float64]
    is_open: bool = True
    held: int | None = None
    noise: float = 0.0
    generator: Generator = field(default_factory=np.random.default_rng)

    @property
    def target_index(self) -> int:
        """Index of the object to pick up."""
        return self.colours.index(self.target)

    @property
    def picked_up(self) -> str | None:
        """Colour word of the object that has been picked up, or None."""
        if self.held is None or self.gripper[2] < LIFTED:
            return None
        return self.colours[self.held]

    def step(self, action: NDArray[Any]) -> None:
        """Move by an action and open or close.

        Args:
            action: `[7]`: x, y, z in metres along the set-up's action axes, roll, pitch and yaw in radians (without
                effect: the gripper points down), gripper (open above 0.5). A longer move than `max_step` is
                shortened.
        """
        x, y, z = (float(value) for value in action[:3])
        limit = self.setup.max_step
        across = turn(np.array([x, y]), self.setup.frame_angle)
        across *= min(1.0, limit / max(float(np.hypot(*across)), 1e-12))
        move = np.array([*across, np.clip(z, -limit, limit)])
        if self.noise:
            move += self.generator.normal(0.0, self.noise, 3) * np.linalg.norm(move)
        low, high = (-REACH, -REACH, 0.0), (REACH, REACH, CEILING)
        self.gripper = np.clip(self.gripper + move, low, high)
        is_open = bool(action[6] > 0.5)
        if is_open and self.held is not None:
            self.objects[self.held, 2] = 0.0
            self.held = None
        elif not is_open and self.is_open:
            self.held = self._within_fingers()
        self.is_open = is_open
        if self.held is not None:
            self.objects[self.held] = self.gripper

    def _within_fingers(self) -> int | None:
        if self.gripper[2] > GRASP_HEIGHT:
            return None
        distances = np.hypot(*(self.objects[:, :2] - self.gripper[:2]).T)
        nearest = int(distances.argmin())
        return nearest if distances[nearest] <= GRASP_RADIUS else None


def turn(vector: NDArray[np.float64], angle: float) -> NDArray[np.float64]:
    """Return a vector `[2]` turned counter-clockwise by an angle in radians."""
    cosine, sine = np.cos(angle), np.sin(angle)
    return np.array([cosine * vector[0] - sine * vector[1], sine * vector[0] + cosine * vector[1]])


def place_objects(generator: Generator, count: int) -> NDArray[np.float64]:
    """Return positions `[count, 3]` on the table, no two of them closer than `SPACING`."""
    edge = REACH - 0.02
    while True:
        places = generator.uniform(-edge, edge, (count, 2))
        between = np.linalg.norm(places[:, None] - places[None], axis=-1) + np.eye(count)
        if between.min() >= SPACING:
            return np.concatenate([places, np.zeros((count, 1))], axis=1)


def new_scene(
    setup: SetUp, generator: Generator, *, objects: int = 3, noise: float = 0.0, target: str | None = None
) -> Scene:
    """Return the beginning of an episode: objects and gripper at random places, one object named.

    Args:
        setup: what is fixed.
        generator: source of the random numbers, kept for the motion noise of the episode's steps.
        objects: how many there are.
        noise: standard deviation of each coordinate of a move, as a share of the move's length.
        target: colour word of the object to name; None draws it.

    Raises:
        DataError: the set-up has no object of that colour.
    """
    if target is not None and target not in setup.objects:
        raise DataError(f"{setup.name} has no {target} {setup.noun}; it has {', '.join(setup.objects)}")
    colours = tuple(str(colour) for colour in generator.choice(list(setup.objects), size=objects, replace=False))
    if target is not None:
        colours = (target, *[colour for colour in colours if colour != target][: objects - 1])
    places = place_objects(generator, objects)
    gripper = np.array([*generator.uniform(-0.2, 0.2, 2), generator.uniform(0.10, 0.14)])
    return Scene(setup, colours[0], colours, places, gripper, noise=noise, generator=generator)
