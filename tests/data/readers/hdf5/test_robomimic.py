"""robomimic and LIBERO files."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
from expected_facts import assert_as_expected, assert_frames, load_expected

from vlaft.data.layout import apply_layout
from vlaft.data.readers.hdf5.source import open_hdf5
from vlaft.data.standardize.steps import standardize
from vlaft.errors import ConfigError, DataError

LIBERO = "move_the_potato_to_the_top_of_the_cooking_utensils"


def write_robomimic(path: Path, lengths: dict[str, int], camera: str = "agentview_image") -> Path:
    """A small file whose actions count steps and whose frames say their step in every pixel."""
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["total"] = sum(lengths.values())
        for name, length in lengths.items():
            demo = data.create_group(name)
            demo.attrs["num_samples"] = length
            steps = np.arange(length)
            demo["actions"] = np.tile(steps[:, None], (1, 7)).astype(np.float64)
            frames = np.broadcast_to(steps[:, None, None, None], (length, 4, 6, 3)).astype(np.uint8)
            demo.create_dataset(f"obs/{camera}", data=frames, chunks=(3, 4, 6, 3) if length > 2 else None)
            demo["obs/robot0_eef_pos"] = np.zeros((length, 3))
    return path


@pytest.mark.parametrize(
    ("path", "expected", "format"),
    [
        ("robomimic_image.hdf5", "hdf5_robomimic_image", "robomimic"),
        (f"libero_raw/{LIBERO}_demo.hdf5", "hdf5_libero_raw", "libero"),
        (f"libero_regenerated/KITCHEN_SCENE3_{LIBERO}_demo.hdf5", "hdf5_libero_regenerated", "libero"),
        ("libero_regenerated", "hdf5_libero_regenerated", "libero"),
    ],
)
def test_real_files_hold_what_is_expected(samples: Path, path: str, expected: str, format: str) -> None:
    facts = load_expected(samples, expected)
    source = open_hdf5(samples / "hdf5" / path)
    assert source.format == format
    assert_as_expected(source, facts)
    assert_frames(source, f"obs/{facts['main_camera']}", facts["frames"], tolerance=0.001)


def test_masks_become_splits_and_filter_keys_choose(samples: Path) -> None:
    path = samples / "hdf5" / "robomimic_image.hdf5"
    splits = {ref.name: ref.split for ref in open_hdf5(path).episodes()}
    assert splits == {f"demo_{i}": "valid" if i in (3, 7) else "train" for i in range(8)}
    kept = open_hdf5(path, {"filter_key": "20_percent"}).episodes()
    assert [ref.name for ref in kept] == ["demo_0", "demo_5"]
    assert [ref.index for ref in kept] == [0, 1]
    with pytest.raises(DataError, match="no filter key '20_percen'; did you mean '20_percent'"):
        open_hdf5(path, {"filter_key": "20_percen"})


def test_libero_is_rotated_and_its_gripper_inverted(samples: Path) -> None:
    source = open_hdf5(samples / "hdf5" / "libero_raw")
    raw = source.read(source.episodes()[0])
    episode = standardize(apply_layout(raw, source.layout), source.layout.steps)
    (stored,) = raw.cameras["obs/agentview_rgb"].read([2])
    (upright,) = episode.cameras["agentview"].read([2])
    np.testing.assert_array_equal(upright, stored[::-1, ::-1])
    assert episode.action is not None and episode.state is not None
    gripper = np.asarray(raw.arrays["actions"])[:, 6]
    np.testing.assert_array_equal(episode.action[:, 6], 1 - np.clip(gripper, 0, 1))
    assert set(np.unique(episode.action[:, 6])) <= {0, 1}
    assert episode.state.shape == (3, 8)
    assert any("observation after the action" in warning for warning in source.warnings)


def test_robomimic_stays_upright_and_its_gripper_is_scaled(samples: Path) -> None:
    source = open_hdf5(samples / "hdf5" / "robomimic_image.hdf5")
    assert source.layout.steps == ("scale_gripper", "invert_gripper")
    episode = standardize(apply_layout(source.read(source.episodes()[0]), source.layout), source.layout.steps)
    assert episode.action is not None
    assert episode.action[0, 6] == 1 and episode.action[-1, 6] == 0  # starts open, ends closed
    assert not any(name.startswith("next_obs") for name in episode.arrays)


def test_numbers_sort_as_numbers_and_frames_come_in_order(tmp_path: Path) -> None:
    path = write_robomimic(tmp_path / "data.bin", {"demo_10": 7, "demo_2": 5, "demo_1": 1})
    source = open_hdf5(path)
    assert [ref.name for ref in source.episodes()] == ["demo_1", "demo_2", "demo_10"]
    assert source.warnings == []
    episode = source.read(source.episodes()[2])
    frames = list(episode.cameras["obs/agentview_image"].read([0, 2, 3, 6]))
    assert [int(frame.max()) for frame in frames] == [0, 2, 3, 6]
    assert source.read(source.episodes()[0]).length == 1


def test_episodes_survive_pickling(tmp_path: Path) -> None:
    source = open_hdf5(write_robomimic(tmp_path / "a.hdf5", {"demo_0": 4}))
    again = pickle.loads(pickle.dumps(source))
    episode = pickle.loads(pickle.dumps(again.read(again.episodes()[0])))
    assert episode.arrays["actions"].shape == (4, 7)
    (frame,) = episode.cameras["obs/agentview_image"].read([3])
    assert frame.shape == (4, 6, 3) and (frame == 3).all()


def test_false_metadata_is_a_warning_and_empty_demonstrations_are_left_out(tmp_path: Path) -> None:
    path = write_robomimic(tmp_path / "a.hdf5", {"demo_0": 4, "demo_1": 0})
    with h5py.File(path, "a") as file:
        file["data"].attrs["total"] = 99
        file["data/demo_0"].attrs["num_samples"] = 5
        file["mask/train"] = np.array([b"demo_0", b"demo_8"])
        file["mask/valid"] = np.array([b"demo_0"])
    source = open_hdf5(path)
    assert [(ref.name, ref.split) for ref in source.episodes()] == [("demo_0", "valid")]
    told = "\n".join(source.warnings)
    for part in ("'total' says 99", "num_samples says 5", "demo_1 has no steps", "demo_8", "count as 'valid'"):
        assert part in told


@pytest.mark.parametrize(
    ("where", "attribute", "value", "instruction"),
    [
        ("data/demo_0", "ep_meta", json.dumps({"lang": "open the drawer"}), "open the drawer"),
        ("data", "problem_info", json.dumps({"language_instruction": "close it"}), "close it"),
        ("data", "problem_info", json.dumps({"language_instruction": list("go on")}), "go on"),
        ("data/demo_0", "language_instruction", "lift", "lift"),
        ("data", "ep_meta", "{not json", ""),
    ],
)
def test_instruction_is_found(tmp_path: Path, where: str, attribute: str, value: str, instruction: str) -> None:
    path = write_robomimic(tmp_path / "a.hdf5", {"demo_0": 2})
    with h5py.File(path, "a") as file:
        file[where].attrs[attribute] = value
    source = open_hdf5(path)
    assert source.read(source.episodes()[0]).instruction == instruction
    given = open_hdf5(path, {"instruction": "wave"})
    assert given.read(given.episodes()[0]).instruction == "wave"


def test_shift_pairs_a_step_with_a_later_action(tmp_path: Path) -> None:
    source = open_hdf5(write_robomimic(tmp_path / "a.hdf5", {"demo_0": 4}), {"shift_action": 1})
    episode = source.read(source.episodes()[0])
    assert episode.arrays["actions"][:, 0].tolist() == [1, 2, 3, 3]
    with pytest.raises(ConfigError, match=r"shift_actio.*did you mean 'shift_action'"):
        open_hdf5(tmp_path / "a.hdf5", {"shift_actio": 1})


def test_images_said_to_be_upright_are_not_rotated(tmp_path: Path) -> None:
    path = write_robomimic(tmp_path / "a.hdf5", {"demo_0": 2}, camera="agentview_rgb")
    assert {"rotate": {"degrees": 180}} in open_hdf5(path).layout.steps
    with h5py.File(path, "a") as file:
        file["data"].attrs["macros_image_convention"] = "opencv"
    source = open_hdf5(path)
    assert source.layout.steps == ("clip_gripper", "invert_gripper")
    assert "upright" in source.warnings[0]


def test_files_without_images_ask_to_render(samples: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no camera images.*render the images first.*dataset_states_to_obs"):
        open_hdf5(samples / "broken" / "robosuite_no_images.hdf5")
    path = write_robomimic(tmp_path / "a.hdf5", {"demo_0": 2})
    with h5py.File(path, "a") as file:
        del file["data/demo_0/obs/agentview_image"]
    with pytest.raises(DataError, match="only obs/robot0_eef_pos"):
        open_hdf5(path)


def test_a_folder_joins_files_and_refuses_a_mix(tmp_path: Path) -> None:
    write_robomimic(tmp_path / "task_10.hdf5", {"demo_0": 2})
    write_robomimic(tmp_path / "task_9.hdf5", {"demo_0": 3})
    source = open_hdf5(tmp_path)
    assert [ref.name for ref in source.episodes()] == ["task_9/demo_0", "task_10/demo_0"]
    assert [source.read(ref).length for ref in source.episodes()] == [3, 2]
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["x"] = np.zeros(3)
    with pytest.raises(DataError, match="different layouts"):
        open_hdf5(tmp_path)


def write_env(path: Path, env: dict[str, object], width: int = 7) -> Path:
    write_robomimic(path, {"demo_0": 4})
    with h5py.File(path, "a") as file:
        file["data"].attrs["env_args"] = json.dumps(env)
        del file["data/demo_0/actions"]
        file["data/demo_0/actions"] = np.linspace(-1, 1, 4 * width).reshape(4, width)
    return path


def test_isaac_lab_is_told_by_its_environment_or_its_initial_state(tmp_path: Path) -> None:
    source = open_hdf5(write_env(tmp_path / "rel.hdf5", {"env_name": "Isaac-Lift-Cube-Franka-IK-Rel-v0", "type": 2}))
    assert (source.format, source.layout.steps) == ("isaac-lab", ("scale_gripper",))
    assert source.layout.action_names[6] == "gripper"
    # seven numbers that are nothing like a gripper's at the end: joints, or an absolute pose
    source = open_hdf5(write_env(tmp_path / "reach.hdf5", {"env_name": "Isaac-Reach-Franka-v0", "type": 2}))
    assert (source.layout.steps, source.layout.action_names, source.layout.action_mask) == ((), (), ())
    assert "'Isaac-Reach-Franka-v0' does not tell what the 7 dimensions" in source.warnings[0]
    with h5py.File(tmp_path / "reach.hdf5", "a") as file:
        file["data/demo_0/actions"][:, 6] = [1, 1, -1, -1]
    layout = open_hdf5(tmp_path / "reach.hdf5").layout
    assert (layout.steps, layout.action_names, layout.action_mask[6]) == (("scale_gripper",), (), False)
    path = write_robomimic(tmp_path / "bare.hdf5", {"demo_0": 4})
    with h5py.File(path, "a") as file:
        file["data/demo_0/actions"][:, 6] = [1, 1, -1, -1]
        file["data/demo_0/initial_state/articulation/robot/joint_position"] = np.zeros((1, 9))
    assert open_hdf5(path).format == "isaac-lab"


def test_nothing_is_assumed_of_other_environments(tmp_path: Path) -> None:
    source = open_hdf5(write_env(tmp_path / "gym.hdf5", {"env_name": "PickUp-v0", "type": 2}))
    assert (source.format, source.layout.steps, source.layout.action_names) == ("robomimic-other", (), ())
    assert "'PickUp-v0' does not tell" in source.warnings[0]
    assert open_hdf5(write_env(tmp_path / "eight.hdf5", {"env_name": "PickUp-v0", "type": 2}, width=8)).warnings == []


@pytest.mark.parametrize(
    ("controller", "named", "told"),
    [
        ({"type": "OSC_POSE", "control_delta": True}, True, None),
        ({"type": "OSC_POSE", "control_delta": False}, True, "absolute poses"),
        ({"body_parts": {"right": {"type": "OSC_POSE", "input_type": "absolute"}}}, True, "absolute poses"),
        ({"type": "JOINT_POSITION"}, False, "the controller JOINT_POSITION"),
        ("OSC_POSE", True, None),
    ],
)
def test_robosuites_controller_says_what_the_action_means(
    controller: object, named: bool, told: str | None, tmp_path: Path
) -> None:
    env = {"env_name": "Lift", "type": 1, "env_kwargs": {"controller_configs": controller}}
    source = open_hdf5(write_env(tmp_path / "a.hdf5", env))
    assert source.layout.steps == ("scale_gripper", "invert_gripper")
    assert bool(source.layout.action_names) == named
    warnings = [text for text in source.warnings if "'total'" not in text]
    assert not warnings if told is None else told in warnings[0]


@pytest.mark.parametrize(
    ("simulation", "fps"), [({"dt": 0.005, "decimation": 4}, 50), ({"dt": 0, "decimation": 4}, None), ("fast", None)]
)
def test_isaac_labs_rate_is_that_of_its_physics_over_the_decimation(
    simulation: object, fps: float | None, tmp_path: Path
) -> None:
    source = open_hdf5(write_env(tmp_path / "a.hdf5", {"env_name": "Isaac-Lift-v0", "sim_args": simulation}))
    assert source.read(source.episodes()[0]).fps == (None if fps is None else pytest.approx(fps))
