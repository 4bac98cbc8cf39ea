"""The scripted expert, and its demonstrations as an HDF5 file in robomimic's layout.

    python -m vlaft.environments.tabletop.recording --out demos.hdf5 --episodes 50

`vlaft convert demos.hdf5 --preset tabletop` reads it.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from vlaft.environments.tabletop.environment import CONTROL_RATE, EPISODE_STEPS, TabletopEnv
from vlaft.environments.tabletop.scene import GRASP_HEIGHT, SETUP_B, SETUPS, Scene, SetUp, turn
from vlaft.errors import ConfigError, VlaftError
from vlaft.files import output_file

# More noise than in evaluation, and now and then a disturbance, so that demonstrations show how to come back to the way
# (as DART does: Laskey et al. 2017, arXiv 1703.09327): what is recorded is what the expert wanted.
RECORDING_NOISE = 0.15
DISTURBED = 0.12  # share of steps


# The expert's way, in metres.
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


@dataclass(frozen=True)
class Demonstration:
    """One episode of the expert.

    Attributes:
        instruction: what was done.
        frames: uint8 `[T, 84, 84, 3]`, of the main camera.
        wrist_frames: likewise, of the wrist camera.
        actions: float32 `[T, 7]`, as commanded, before the noise.
        states: float32 `[T, 4]`, as `TabletopEnv` observes them.
        success: whether it was done.
    """

    instruction: str
    frames: NDArray[np.uint8]
    wrist_frames: NDArray[np.uint8]
    actions: NDArray[np.float32]
    states: NDArray[np.float32]
    success: bool


def demonstrate(
    setup: SetUp,
    seed: int,
    target: str | None = None,
    noise: float = RECORDING_NOISE,
    disturbed: float = DISTURBED,
) -> Demonstration:
    """Return the expert's episode of a seed: the same one each time.

    Args:
        setup: which robot.
        seed: of the scene, the noise and the disturbances.
        target: colour word of the object to pick up; None draws it.
        noise: as `TabletopEnv` takes it.
        disturbed: share of steps at which the robot does something else than it was told.
    """
    env = TabletopEnv(setup, noise)
    generator = np.random.default_rng([seed, 1])
    observation, info = env.reset(seed=seed, options={"target": target})
    observed: dict[str, list[NDArray[Any]]] = {name: [] for name in observation}
    actions = []
    for number in range(EPISODE_STEPS):
        assert env.scene is not None
        action = expert_action(env.scene).astype(np.float32)
        for name, value in observation.items():
            observed[name].append(value)
        actions.append(action)
        if number < EPISODE_STEPS // 2 and generator.random() < disturbed:  # what is left is enough to succeed
            action = _disturb(action, generator, setup.max_step)
        observation, _, terminated, truncated, info = env.step(action)
        if terminated or truncated:
            break
    frames, wrist_frames, states = (np.stack(observed[name]) for name in ("image", "image_wrist", "state"))
    return Demonstration(info["instruction"], frames, wrist_frames, np.stack(actions), states, bool(info["success"]))


def _disturb(action: NDArray[np.float32], generator: np.random.Generator, limit: float) -> NDArray[np.float32]:
    """Return an action that was knocked aside, or whose fingers did the opposite."""
    changed = action.copy()
    if generator.random() < 0.5:
        changed[6] = 1.0 - changed[6]
    else:
        changed[:3] += generator.normal(0.0, 0.5 * limit, 3).astype(np.float32)
    return changed


def record_demonstrations(path: Path, setup: SetUp, seeds: Sequence[int]) -> int:
    """Write one demonstration per seed, of each object in turn; the file appears whole or not at all.

    Returns:
        The number of frames.

    Raises:
        ConfigError: there are no seeds, or one is negative.
        VlaftError: the file exists or cannot be written.
    """
    if not seeds:
        raise ConfigError("no demonstrations were asked for; give at least 1")
    if min(seeds) < 0:
        raise ConfigError(f"{min(seeds)} is no seed; seeds begin at 0")
    if path.exists():
        raise VlaftError(f"{path} exists; name another file, or remove it first")
    frames, colours = 0, list(setup.objects)
    with output_file(path, overwrite=False) as partial, h5py.File(partial, "w") as file:
        data = file.create_group("data")
        env = {"env_name": setup.name, "env_kwargs": {"control_freq": CONTROL_RATE}}
        data.attrs["env_args"] = json.dumps(env)
        for number, seed in enumerate(seeds):
            demonstration = demonstrate(setup, seed, colours[number % len(colours)])
            demo = data.create_group(f"demo_{number}")
            demo.attrs["num_samples"] = len(demonstration.actions)
            demo.attrs["seed"] = seed
            demo.attrs["language_instruction"] = demonstration.instruction
            demo["actions"] = demonstration.actions
            demo["obs/robot_state"] = demonstration.states
            cameras = {"agentview": demonstration.frames, "robot0_eye_in_hand": demonstration.wrist_frames}
            for camera, images in cameras.items():  # named as robomimic names them
                chunks = (1, *images.shape[1:])
                demo.create_dataset(f"obs/{camera}_image", data=images, chunks=chunks, compression=4)
            frames += len(demonstration.actions)
        data.attrs["total"] = frames
    return frames


def main(arguments: Sequence[str] | None = None) -> int:
    """Record from the command line; return the exit code: 0 done, 1 user error, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m vlaft.environments.tabletop.recording", description="Record demonstrations."
    )
    parser.add_argument("--out", type=Path, required=True, help="HDF5 file to write")
    parser.add_argument("--setup", choices=list(SETUPS), default=SETUP_B.name, help="which robot")
    parser.add_argument("--episodes", type=int, default=50, help="how many demonstrations")
    parser.add_argument("--seed", type=int, default=100_000, help="of the first; the others follow")
    options = parser.parse_args(arguments)
    try:
        frames = record_demonstrations(
            options.out, SETUPS[options.setup], range(options.seed, options.seed + options.episodes)
        )
    except VlaftError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, Exception) as error:
        if not isinstance(error, KeyboardInterrupt) and not _stopped:
            raise
        print("error: interrupted", file=sys.stderr)  # h5py makes errors of its own of what is raised amid its calls
        return 130
    print(f"{options.episodes} demonstrations of {options.setup}, {frames} frames: {options.out}")
    return 0


_stopped: list[int] = []  # signals that came


def _stop(number: int, frame: object) -> None:
    _stopped.append(number)
    raise KeyboardInterrupt


if __name__ == "__main__":
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _stop)  # ends as Ctrl-C does, and leaves nothing behind
    sys.exit(main())
