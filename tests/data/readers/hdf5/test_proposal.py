"""What is proposed for HDF5 files of layouts that nobody foresaw: typed literally, it reads them."""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from vlaft.cli.main import main
from vlaft.data.readers.hdf5.proposal import propose
from vlaft.data.readers.hdf5.source import open_hdf5
from vlaft.errors import DataError

STEPS = 4


def frames(steps: int = STEPS, size: int = 12) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (steps, size, size, 3), dtype=np.uint8)


def moves(width: int, steps: int = STEPS) -> np.ndarray:
    return np.random.default_rng(width).normal(size=(steps, width)).astype(np.float32)


def encoded(file: h5py.Group, name: str, steps: int = STEPS) -> None:
    rows = file.create_dataset(name, (steps,), h5py.vlen_dtype(np.uint8))
    for step, frame in enumerate(frames(steps)):
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG")
        rows[step] = np.frombuffer(buffer.getvalue(), np.uint8)


def commands_beside_observations(file: h5py.File) -> None:
    file.attrs["control_hz"] = 5.0
    for number in range(3):
        group = file.create_group(f"episodes/traj_{number:03d}")
        group.attrs["instruction"] = "put the cup on the shelf"
        group["cmd/ee_delta"], group["cmd/gripper"] = moves(6), moves(1)[:, 0]
        encoded(group, "camera/front_jpeg")
        group["camera/wrist_chw"] = frames().transpose(0, 3, 1, 2)
        group["camera/depth"] = frames()[..., 0]


def days_and_episodes(file: h5py.File) -> None:
    for day in (1, 2):
        for number in (0, 10):
            group = file.create_group(f"day_{day}/run_{number}")
            group.attrs["task"] = "open the drawer"
            group["robot/joint_command"], group["robot/gripper_command"] = moves(7), moves(1)
            for camera in (0, 1):
                group[f"cam_{camera}/rgb"] = frames().astype(np.float32)  # 0 to 255, not 0 to 1


def names_without_numbers(file: h5py.File) -> None:
    for name in ("pick anna's cup", "pick: the {odd} one", "pick [last]"):
        file[f"{name}/delta_pos"], file[f"{name}/delta_rot"], file[f"{name}/grip_cmd"] = moves(3), moves(3), moves(1)
        file[f"{name}/anna's view: {{1}}, 2.5 #rgb"] = frames()
    file["calibration/matrix"] = np.eye(4)


def flat_with_numbers(file: h5py.File) -> None:
    for number in (2, 10):
        file[f"recorded/actions_{number}"], file[f"recorded/front_{number}"] = moves(7), frames()


def one_episode_without_groups(file: h5py.File) -> None:
    file["language"] = "wipe the table"
    file["command"], file["rgb"] = moves(7), frames()


def one_observation_more(file: h5py.File) -> None:
    for number in range(2):
        file[f"ep_{number}/control"] = moves(7)
        file[f"ep_{number}/rgb"], file[f"ep_{number}/joints"] = frames(STEPS + 1), moves(8, STEPS + 1)


def nothing_called_action(file: h5py.File) -> None:
    for number in range(2):
        file[f"ep_{number}/a"], file[f"ep_{number}/img"] = moves(7), frames()


ZOO: dict[Callable[[h5py.File], None], dict[str, Any]] = {
    commands_beside_observations: {"episodes": 3, "action": 7, "cameras": 2, "instruction": "put the cup on the shelf"},
    days_and_episodes: {"episodes": 4, "action": 8, "cameras": 2, "instruction": "open the drawer"},
    names_without_numbers: {"episodes": 3, "action": 7, "cameras": 1},
    flat_with_numbers: {"episodes": 2, "action": 7, "cameras": 1},
    one_episode_without_groups: {"episodes": 1, "action": 7, "cameras": 1, "instruction": "wipe the table"},
    one_observation_more: {"episodes": 2, "action": 7, "cameras": 1},
    nothing_called_action: {"episodes": 2, "action": 7, "cameras": 1},
}


@pytest.mark.parametrize("write", ZOO, ids=lambda write: write.__name__)
def test_what_is_proposed_reads_the_file_when_it_is_typed(
    write: Callable[[h5py.File], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recording.h5"
    with h5py.File(path, "w") as file:
        write(file)
    assert main(["inspect", str(path)]) == 1
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and "for example" in told.err
    typed = shlex.split(told.err[told.err.index(" episodes=") :])
    assert typed == [shlex.split(text)[0] for text in propose(path).words]
    capsys.readouterr()
    assert main(["inspect", str(path), *typed, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = ZOO[write]
    assert found["episodes"] == expected["episodes"] and found["steps"] == STEPS * expected["episodes"]
    assert found["action"]["dim"] == expected["action"]
    assert len(found["cameras"]) == len(found["camera_names"]) == expected["cameras"]
    assert found["instructions"] == [expected.get("instruction", "pick up the cup")]
    assert found["damaged"] == []


def test_an_array_that_only_stands_in_is_said_to(tmp_path: Path) -> None:
    path = tmp_path / "recording.h5"
    with h5py.File(path, "w") as file:
        nothing_called_action(file)
    assert "'a' only stands in" in propose(path).remark


def end_to_end(file: h5py.File) -> None:
    file["data/action"], file["data/img"] = moves(7, 9), frames(9)
    file["meta/episode_ends"] = [4, 9]


def arrays_first(file: h5py.File) -> None:
    for number in range(2):
        file[f"actions/episode_{number}"], file[f"images/episode_{number}"] = moves(7), frames()


def no_images(file: h5py.File) -> None:
    file["ep_0/actions"], file["ep_0/poses"] = moves(7), np.zeros((STEPS, 2, 4, 4))


def one_frame_per_group(file: h5py.File) -> None:
    for step in range(STEPS):
        file[f"step_{step}/action"], file[f"step_{step}/rgb"] = np.zeros(7), frames(1, 16)[0]


def frames_without_actions(file: h5py.File) -> None:
    file["ep_0/rgb"] = frames()


def other_counts(file: h5py.File) -> None:
    file["ep_0/actions"], file["ep_0/rgb"] = moves(7, 40), frames()


@pytest.mark.parametrize(
    ("write", "why"),
    [
        (end_to_end, "end to end.*meta/episode_ends"),
        (arrays_first, "one array per episode.*actions/episode_0"),
        (no_images, "no images at all"),
        (one_frame_per_group, "frames one by one.*step_0/rgb"),
        (frames_without_actions, "no actions"),
        (other_counts, "images have 4 rows where 'actions' has 40"),
    ],
)
def test_where_no_words_would_do_it_says_why(write: Callable[[h5py.File], None], why: str, tmp_path: Path) -> None:
    path = tmp_path / "recording.h5"
    with h5py.File(path, "w") as file:
        write(file)
    with pytest.raises(DataError, match=why) as refused:
        open_hdf5(path)
    assert "for example" not in str(refused.value)


def test_videos_beside_a_file_without_images_are_named(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "trajectory.h5", "w") as file:
        no_images(file)
    (tmp_path / "recordings").mkdir()
    (tmp_path / "recordings" / "left.mp4").write_bytes(b"")
    with pytest.raises(DataError, match=r"no images at all.*left\.mp4"):
        open_hdf5(tmp_path / "trajectory.h5")


def test_known_dialects_with_other_frames_get_a_mapping(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "robomimic.h5", "w") as file:
        file["data/demo_0/actions"] = moves(7)
        encoded(file, "data/demo_0/obs/front")
    with h5py.File(tmp_path / "aloha.h5", "w") as file:
        file["action"], file["observations/images/top"] = moves(14), frames().transpose(0, 3, 1, 2)
    for name, episodes in (("robomimic", "data/demo_*"), ("aloha", "file")):
        with pytest.raises(DataError, match=r"another way than.*for example: episodes=") as refused:
            open_hdf5(tmp_path / f"{name}.h5")
        assert f"episodes='{episodes}'" in str(refused.value)


def test_one_observation_more_is_cut_where_the_word_says_so(tmp_path: Path) -> None:
    path = tmp_path / "demos.hdf5"
    with h5py.File(path, "w") as file:
        file["data/demo_0/actions"] = moves(7)
        file["data/demo_0/obs/agentview_image"] = frames(STEPS + 1)
        file["data/demo_0/obs/joints"] = moves(8, STEPS + 1)
    source = open_hdf5(path)
    with pytest.raises(DataError, match=r"has 5 rows, but there are 4 actions; .*type drop_last_observation=true"):
        source.read(source.episodes()[0])
    source = open_hdf5(path, {"drop_last_observation": True})
    episode = source.read(source.episodes()[0])
    np.testing.assert_array_equal(episode.arrays["obs/joints"], moves(8, STEPS + 1)[:-1])
    assert len(episode.cameras["obs/agentview_image"]) == STEPS
    with h5py.File(path, "r+") as file:
        del file["data/demo_0/obs/joints"]
        file["data/demo_0/obs/joints"] = moves(8, STEPS + 2)
    with pytest.raises(DataError, match="has 6 rows, but there are 4 actions"):
        source.read(source.episodes()[0])


def test_a_file_of_isaac_lab_without_images_is_to_be_recorded_with_cameras(tmp_path: Path) -> None:
    path = tmp_path / "dataset.hdf5"
    with h5py.File(path, "w") as file:
        file["data/demo_0/actions"], file["data/demo_0/obs/eef_pos"] = moves(7), moves(3)
        file["data"].attrs["env_args"] = json.dumps({"env_name": "Isaac-Stack-Cube-Franka-IK-Rel-v0", "type": 2})
    with pytest.raises(DataError, match=r"no camera images.*Isaac Lab.*--enable_cameras"):
        open_hdf5(path)
