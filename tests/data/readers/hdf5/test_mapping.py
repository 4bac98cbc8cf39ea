"""HDF5 files of a free layout, read through a mapping."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from expected_facts import assert_as_expected, assert_frames, load_expected

from vlaft.data.layout import apply_layout
from vlaft.data.readers.hdf5.source import open_hdf5
from vlaft.errors import ConfigError, DataError

MIXED: dict[str, Any] = {
    "episodes": "episodes/traj_*",
    "action": ["cmd/ee_delta", "cmd/gripper"],
    "state": ["proprio"],
    "cameras": {
        "front": {"path": "camera/front_jpeg", "encoding": "jpeg"},
        "wrist": {"path": "camera/wrist_chw", "layout": "CHW"},
        "small": {"path": "camera/small_float", "range": "float01"},
    },
    "instruction": {"attribute": "instruction"},
    "fps": {"attribute": "control_hz"},
}
AUTOMATIC = {**MIXED, "cameras": {name: camera["path"] for name, camera in MIXED["cameras"].items()}}


def mixed(samples: Path) -> Path:
    return samples / "hdf5" / "generic_mixed.hdf5"


@pytest.mark.parametrize("mapping", [MIXED, AUTOMATIC], ids=["spelled out", "automatic"])
def test_mixed_file_holds_what_is_expected(samples: Path, mapping: dict[str, Any]) -> None:
    facts = load_expected(samples, "hdf5_generic_mixed")
    source = open_hdf5(mixed(samples), mapping)
    assert source.format == "hdf5"
    assert list(source.layout.cameras) == ["front", "wrist", "small"]
    assert_as_expected(source, facts)
    assert_frames(source, "camera/front_jpeg", facts["frames"])
    assert_frames(source, "camera/wrist_chw", facts["frames_wrist_chw"], tolerance=0.001)
    assert_frames(source, "camera/small_float", facts["frames_small_float_times_255"], tolerance=0.5)
    episode = apply_layout(source.read(source.episodes()[0]), source.layout)
    assert episode.state is not None and episode.state.shape == (4, 7)


def test_frames_turn_and_swap(samples: Path) -> None:
    plain = open_hdf5(mixed(samples), MIXED)
    camera = {"path": "camera/wrist_chw", "rotate": 90, "swap_rb": True}
    turned = open_hdf5(mixed(samples), {**MIXED, "cameras": {"wrist": camera}})
    (before,) = plain.read(plain.episodes()[0]).cameras["camera/wrist_chw"].read([3])
    (after,) = turned.read(turned.episodes()[0]).cameras["camera/wrist_chw"].read([3])
    np.testing.assert_array_equal(after, np.rot90(before)[..., ::-1])


def test_unknown_layout_is_answered_with_every_part_of_a_mapping(samples: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_hdf5(mixed(samples))
    sentence = str(caught.value)
    assert "episodes='episodes/traj_*' action='[cmd/ee_delta, cmd/gripper]' cameras='{front_jpeg:" in sentence
    assert "instruction='{attribute: instruction}' fps='{attribute: control_hz}'" in sentence


def test_a_mapping_that_names_nothing_lists_what_there_is(samples: Path) -> None:
    with pytest.raises(DataError, match=r"episodes='traj_\*' names nothing; type .*episodes='episodes/traj_\*'"):
        open_hdf5(mixed(samples), {**MIXED, "episodes": "traj_*"})
    with pytest.raises(DataError, match="no array 'cmd/ee_dleta'; did you mean 'cmd/ee_delta'"):
        open_hdf5(mixed(samples), {**MIXED, "action": ["cmd/ee_dleta"]})
    source = open_hdf5(mixed(samples), {**MIXED, "cameras": {"front": "camera/front"}})
    with pytest.raises(DataError, match="no camera 'camera/front'; did you mean 'camera/front_jpeg'"):
        source.read(source.episodes()[0])
    source = open_hdf5(mixed(samples), {**MIXED, "cameras": {"front": "cmd/ee_delta"}})
    with pytest.raises(DataError, match="no encoded images"):
        source.read(source.episodes()[0])
    with pytest.raises(DataError, match="names no action; give action="):
        open_hdf5(mixed(samples), {"episodes": "episodes/traj_*"})


def test_wrong_keys_are_told_together_with_the_nearest_known_one(samples: Path) -> None:
    wrong: dict[str, object] = {
        "episode": "x",
        "action": [],
        "cameras": {"a": {"pth": "x"}, "b": {"path": "y", "rotate": 45, "layout": "chw"}, "c": 3},
        "instruction": {"atribute": "x"},
        "fps": -1,
    }
    with pytest.raises(ConfigError) as caught:
        open_hdf5(mixed(samples), wrong)
    told = str(caught.value)
    for part in ("'episodes'", "'action'", "'path'", "45", "chw", "cameras.c", "did you mean 'attribute'", "'fps'"):
        assert part in told
    assert len(caught.value.problems) == 9


def write_flat(path: Path) -> Path:
    """Two episodes whose number stands at the end of every name: actions_2 and actions_10."""
    with h5py.File(path, "w") as file:
        for i, length in ((10, 4), (2, 3)):
            file[f"actions_{i}"] = np.full((length, 4), i, np.float32)
            file[f"rgb/front_{i}"] = np.full((length, 5, 6, 3), i, np.uint8)
    return path


def test_flat_names_with_a_number_at_the_end(tmp_path: Path) -> None:
    path = write_flat(tmp_path / "flat.h5")
    mapping = {"episodes": "actions_{i}", "action": ["actions_{i}[0:3]"], "cameras": {"front": "rgb/front_{i}"}}
    source = open_hdf5(path, mapping)
    assert [ref.name for ref in source.episodes()] == ["2", "10"]
    episode = apply_layout(source.read(source.episodes()[1]), source.layout)
    assert episode.action is not None
    np.testing.assert_array_equal(episode.action, np.full((4, 3), 10))
    (frame,) = episode.cameras["front"].read([3])
    assert (frame == 10).all()
    guessed = open_hdf5(path, {"episodes": "actions_{i}"})
    assert guessed.layout.action == ("actions_{i}",)
    assert list(guessed.layout.cameras.values()) == ["rgb/front_{i}"]
    with pytest.raises(DataError, match=r"episodes='\"actions_\{i\}\"' action='\[\"actions_\{i\}\"\]'"):
        open_hdf5(path)


def test_groups_at_the_root_and_one_file_per_episode(tmp_path: Path) -> None:
    for i in (1, 0):
        with h5py.File(tmp_path / f"stack_blocks_{i}.h5", "w") as file:
            for demo in ("demo_11", "demo_2") if i else ("demo_0",):
                file[f"{demo}/action"] = np.zeros((2 + i, 7))
                file[f"{demo}/front"] = np.zeros((2 + i, 4, 4, 3), np.uint8)
            file["action"], file["top"] = np.zeros((5, 7)), np.zeros((5, 4, 4, 3), np.uint8)
    groups = open_hdf5(tmp_path, {"episodes": "demo_*", "instruction": {"file_name": r"(.*)_\d+\.h5"}, "fps": 10})
    names = [ref.name for ref in groups.episodes()]
    assert names == ["stack_blocks_0.h5/demo_0", "stack_blocks_1.h5/demo_2", "stack_blocks_1.h5/demo_11"]
    episode = groups.read(groups.episodes()[2])
    assert (episode.instruction, episode.fps, episode.length) == ("stack blocks", 10.0, 3)
    files = open_hdf5(tmp_path, {"episodes": "file", "action": "action", "cameras": {"top": "top"}})
    assert [ref.name for ref in files.episodes()] == ["stack_blocks_0.h5", "stack_blocks_1.h5"]
    assert files.read(files.episodes()[0]).length == 5


@pytest.mark.parametrize("kind", ["S", "V", "grey", "float255"])
def test_further_encodings(tmp_path: Path, kind: str) -> None:
    from vlaft.data.codec import encode_image

    image = np.zeros((8, 8, 3), np.uint8)
    image[:4] = 200
    data = encode_image(image, "png")
    camera: dict[str, object] = {"path": "cam"}
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["action"] = np.zeros((2, 3))
        if kind == "S":
            file["cam"] = np.array([data, data], f"S{len(data) + 3}")
        elif kind == "V":
            file["cam"] = np.array([data, data], np.dtype(f"V{len(data)}"))
        elif kind == "grey":
            file["cam"] = np.stack([image[..., :1]] * 2)
        else:
            file["cam"] = np.stack([image] * 2).astype(np.float64)
            camera["range"] = "uint8"
    source = open_hdf5(tmp_path / "a.h5", {"episodes": "file", "cameras": {"c": camera}})
    for frame in source.read(source.episodes()[0]).cameras["cam"].read([0, 1]):
        np.testing.assert_array_equal(frame, image)


def test_floats_of_another_range_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["action"] = np.zeros((2, 3))
        file["cam"] = np.full((2, 4, 4, 3), 77.0)
    source = open_hdf5(tmp_path / "a.h5", {"episodes": "file", "cameras": {"c": "cam"}})
    with pytest.raises(DataError, match=r"step 1: the frame has values from 77 to 77 where float01 means 0 to 1"):
        list(source.read(source.episodes()[0]).cameras["cam"].read([1]))
