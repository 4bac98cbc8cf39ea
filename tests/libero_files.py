"""Files in the layout of LIBERO's own demonstrations: frames of 128 pixels, each observation after its row's action."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np


@dataclass
class Demonstration:
    """One demonstration: for each step its state from before the action, the action, and what was seen after it."""

    states: list[np.ndarray] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)
    seen: list[dict[str, np.ndarray]] = field(default_factory=list)

    def add(self, state: np.ndarray, action: np.ndarray, seen: dict[str, np.ndarray]) -> None:
        self.states.append(state)
        self.actions.append(action)
        self.seen.append(seen)


def write_libero_file(
    path: Path, demos: list[Demonstration], *, bddl: str | None = None, language: str | None = None
) -> Path:
    """Write a file as LIBERO's recorder does, with its attributes where they are given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["macros_image_convention"] = "opengl"
        data.attrs["tag"] = "libero-v1"
        data.attrs["num_demos"] = len(demos)
        data.attrs["total"] = sum(len(each.actions) for each in demos)
        data.attrs["env_args"] = json.dumps({"type": 1, "env_kwargs": {"control_freq": 20}})
        if bddl is not None:
            data.attrs["bddl_file_name"] = bddl
        if language is not None:
            data.attrs["problem_info"] = json.dumps({"language_instruction": language})
        for number, each in enumerate(demos):
            _write_demo(data.create_group(f"demo_{number}"), each)
    return path


def _write_demo(demo: h5py.Group, each: Demonstration) -> None:
    last = np.zeros(len(each.actions), np.uint8)
    last[-1] = 1
    demo.attrs["num_samples"] = len(each.actions)
    demo.attrs["init_state"] = each.states[0]
    demo.attrs["model_file"] = "<mujoco/>"
    fingers, place, turned = (
        np.stack([seen[f"robot0_{name}"] for seen in each.seen]) for name in ("gripper_qpos", "eef_pos", "eef_quat")
    )
    demo["actions"], demo["states"] = np.stack(each.actions), np.stack(each.states)
    demo["rewards"], demo["dones"] = last, last
    demo["robot_states"] = np.concatenate([fingers, place, turned], 1)
    obs = demo.create_group("obs")
    obs["agentview_rgb"] = np.stack([seen["agentview_image"] for seen in each.seen])
    obs["eye_in_hand_rgb"] = np.stack([seen["robot0_eye_in_hand_image"] for seen in each.seen])
    obs["gripper_states"], obs["ee_pos"], obs["ee_ori"] = fingers, place, turned[:, :3]
    obs["ee_states"] = np.concatenate([place, turned[:, :3]], 1)
    obs["joint_states"] = np.stack([seen["robot0_joint_pos"] for seen in each.seen])
