"""Meta-World's tasks as environments of ours, and their scripted experts.

env = MetaWorldEnv("push-v3")
observation, info = env.reset(seed=1)

Needs `vlaft[metaworld]`, and an OpenGL library that draws without a screen.
"""

from __future__ import annotations

import atexit
import warnings
from collections.abc import Collection
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlaft.environments.metaworld.tasks import CAMERAS, EPISODE_STEPS, INSTRUCTIONS
from vlaft.environments.opengl import drawing
from vlaft.environments.task import ExpertEpisode
from vlaft.errors import DataError, MissingExtra
from vlaft.observation.images import Image

SIZE = 224
METRES = 0.01  # of a move of 1: Meta-World's `action_scale`
_VIEWS = {"main": ("image", "corner4"), "wrist": ("image_wrist", "gripperPOV")}
_UPSIDE_DOWN = ("corner4",)  # as it stands in Meta-World's model
_DISTURBANCE = 0.5  # standard deviation of what is added to a disturbed action, of a range of -1 to 1

_Observation = dict[str, NDArray[Any]]


class MetaWorldEnv:
    """One of Meta-World's tasks.

    * Observation: `image`, from a camera near the gripper, and `image_wrist`, from the gripper: uint8 `[224, 224, 3]`;
      `state`, float32 `[4]`: the gripper's x, y, z in metres, and how far it is open (0 to 1).
    * Action: float32 `[4]` as Meta-World has it: a move, 1 cm for each 1, and the fingers' force, 1 to close and -1 to
      open, all within -1 to 1. Or `[7]` as OpenVLA has it: the move in metres, roll, pitch, yaw without effect, and the
      gripper, 1 = open, 0 = closed.
    * `info`: `instruction`, `success`, and Meta-World's own numbers.
    * Nothing ends an episode but Meta-World's limit of 500 steps. Shadows and reflections are not drawn: it would take
      most of the time.
    """

    def __init__(self, task: str) -> None:
        """Make the simulator.

        Raises:
            MissingExtra: Meta-World is not installed.
            VlaftError: nothing here can draw.
        """
        library = _library()
        self.instruction = INSTRUCTIONS[task]
        self._world = library.worlds[task]()
        # what Meta-World does for its own environments of one task with the goal in sight (`env_dict`)
        self._world._partially_observable = False
        del self._world.sawyer_observation_space
        self._world._freeze_rand_vec = False
        self._world._set_task_called = True
        self._world.seeded_rand_vec = True
        self._expert = library.experts[task]
        with drawing("Meta-World"):
            self._renderer = library.mujoco.Renderer(self._world.model, SIZE, SIZE)
        for flag in (library.mujoco.mjtRndFlag.mjRND_SHADOW, library.mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._renderer.scene.flags[flag] = False
        self._seen: NDArray[np.float64] | None = None
        self._drawn: Collection[str] = CAMERAS

    def draw_only(self, cameras: Collection[str] | None) -> None:
        """Leave out, from now on, the frames of other cameras (`main`, `wrist`); None draws all."""
        self._drawn = CAMERAS if cameras is None else cameras

    def reset(self, *, seed: int | None = None) -> tuple[_Observation, dict[str, Any]]:
        """Begin an episode; the same seed gives the same one."""
        if seed is not None:
            self._world.seed(seed)
        self._seen, _ = self._world.reset()
        return self._observation(), {"instruction": self.instruction}

    def step(self, action: ArrayLike) -> tuple[_Observation, float, bool, bool, dict[str, Any]]:
        """Do an action.

        Raises:
            DataError: it is not four or seven finite numbers, or no episode has begun.
        """
        reward, limit, info = self._act(as_metaworld(np.asarray(action, np.float64)))
        return self._observation(), reward, False, limit, info

    def close(self) -> None:
        """Give back what draws."""
        self._renderer.close()
        self._world.close()

    def demonstrate(self, seed: int, disturbed: float = 0.0) -> ExpertEpisode:
        """Return Meta-World's scripted expert's episode of a seed, up to its success.

        Args:
            seed: of the scene and the disturbances.
            disturbed: share of steps at which noise is added to what is done; what is recorded is what the expert
                wanted.
        """
        generator, expert = np.random.default_rng([seed, 1]), self._expert()
        observation, _ = self.reset(seed=seed)
        frames: dict[str, list[Image]] = {"main": [], "wrist": []}
        actions, states, success = [], [], False
        for _ in range(EPISODE_STEPS):
            frames["main"].append(observation["image"])
            frames["wrist"].append(observation["image_wrist"])
            states.append(observation["state"])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that wishes are larger than what is done, which is clipped
                wanted = np.clip(expert.get_action(self._seen), -1, 1).astype(np.float32)
            actions.append(wanted)
            done = wanted
            if generator.random() < disturbed:
                done = np.clip(wanted + generator.normal(0, _DISTURBANCE, 4), -1, 1).astype(np.float32)
            observation, _, _, limit, info = self.step(done)
            success = bool(info["success"])
            if success or limit:
                break
        shown = {camera: np.stack(each) for camera, each in frames.items()}
        return ExpertEpisode(self.instruction, success, shown, np.stack(actions), np.stack(states))

    def _act(self, action: NDArray[np.float64]) -> tuple[float, bool, dict[str, Any]]:
        if self._seen is None:
            raise DataError("no episode has begun; call reset() first")
        self._seen, reward, _, limit, info = self._world.step(action)
        return float(reward), bool(limit), {**info, "success": bool(info["success"])}

    def _observation(self) -> _Observation:
        assert self._seen is not None
        observation: _Observation = {"state": self._seen[:4].astype(np.float32)}
        for camera, (name, view) in _VIEWS.items():
            if camera in self._drawn:
                self._renderer.update_scene(self._world.data, camera=view)
                frame = self._renderer.render()
                observation[name] = frame[::-1, ::-1].copy() if view in _UPSIDE_DOWN else frame
        return observation


def as_metaworld(action: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return an action `[4]` or `[7]` as Meta-World takes it, `[4]` within -1 to 1.

    >>> as_metaworld(np.array([0.01, 0, -0.005, 0, 0, 0, 1])).tolist()
    [1.0, 0.0, -0.5, -1.0]

    Raises:
        DataError: it is no such action.
    """
    if action.shape not in ((4,), (7,)) or not np.isfinite(action).all():
        found = action.tolist() if action.size <= 7 else f"an array {[*action.shape]}"
        raise DataError(f"Meta-World takes actions of four or of seven finite numbers, not {found}")
    if len(action) == 7:
        action = np.array([*action[:3] / METRES, 1 - 2 * action[6]])
    return np.clip(action, -1, 1)


def as_openvla(actions: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return Meta-World's actions `[T, 4]` as OpenVLA's `[T, 7]`: moves in metres, no rotation, 1 = open.

    >>> as_openvla(np.array([[1, 0, -0.5, -1]], np.float32)).astype(float).round(3).tolist()
    [[0.01, 0.0, -0.005, 0.0, 0.0, 0.0, 1.0]]
    """
    padded = np.zeros((len(actions), 7), np.float32)
    padded[:, :3] = actions[:, :3] * METRES
    padded[:, 6] = (1 - actions[:, 3]) / 2
    return padded


def demonstrate(task: str, seed: int, disturbed: float | None) -> ExpertEpisode:
    """Return an expert's episode, in an environment that is kept for the next of the same task."""
    if task not in _kept:
        _close_kept()  # each takes 200 MB
        _kept[task] = MetaWorldEnv(task)
        atexit.register(_close_kept)  # once MuJoCo has registered what takes down its display, so that it runs before
    return _kept[task].demonstrate(seed, disturbed or 0.0)


_kept: dict[str, MetaWorldEnv] = {}


def _close_kept() -> None:
    while _kept:
        _kept.popitem()[1].close()


@cache
def _library() -> SimpleNamespace:
    """Import Meta-World, told to draw without a screen."""
    with drawing("Meta-World"):
        try:
            import metaworld.policies
            import mujoco
            from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        except ModuleNotFoundError as error:
            missing = (error.name or "metaworld").partition(".")[0]
            raise MissingExtra("metaworld", missing, "metaworld") from error
    return SimpleNamespace(mujoco=mujoco, worlds=ALL_V3_ENVIRONMENTS, experts=metaworld.policies.ENV_POLICY_MAP)
