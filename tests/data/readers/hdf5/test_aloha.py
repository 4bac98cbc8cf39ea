"""ALOHA and ACT recordings, raw and compressed."""

from __future__ import annotations

import io
from pathlib import Path

import h5py
import numpy as np
import pytest
from expected_facts import assert_as_expected, assert_frames, load_expected
from PIL import Image

from vlaft.data.layout import apply_layout
from vlaft.data.readers.hdf5.source import open_hdf5
from vlaft.errors import ConfigError, DataError

RED, BLUE = (200, 30, 20), (20, 30, 200)


def jpeg(colour: tuple[int, int, int]) -> np.ndarray:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(buffer, format="JPEG", quality=95)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def write_aloha(path: Path, length: int = 3, compress: bool | None = None, encoding: str = "raw") -> Path:
    """Frames are red, once their colours are in order: encoded ones hold what the recorder writes, blue."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.attrs["sim"] = False
        if compress is not None:
            file.attrs["compress"] = compress
        file["action"] = np.tile(np.arange(length, dtype=np.float32)[:, None], (1, 14))
        file["observations/qpos"] = np.zeros((length, 14), np.float32)
        images = file.create_group("observations/images")
        if encoding == "raw":
            images["cam_high"] = np.broadcast_to(np.array(RED, np.uint8), (length, 8, 8, 3))
            images["cam_high_depth"] = np.zeros((length, 8, 8), np.uint16)
        elif encoding == "padded":
            data = jpeg(BLUE)
            images["cam_high"] = np.tile(np.pad(data, (0, 50)), (length, 1))
        else:
            images.create_dataset("cam_high", (length,), h5py.vlen_dtype(np.uint8))[:] = [jpeg(BLUE)] * length
    return path


def main_colour(path: Path, **options: object) -> np.ndarray:
    source = open_hdf5(path, options)
    (frame,) = source.read(source.episodes()[0]).cameras["observations/images/cam_high"].read([1])
    return frame.mean(axis=(0, 1))


@pytest.mark.parametrize("name", ["aloha_raw", "aloha_compressed"])
def test_real_files_hold_what_is_expected(samples: Path, name: str) -> None:
    facts = load_expected(samples, f"hdf5_{name}")
    source = open_hdf5(samples / "hdf5" / name)
    assert source.format == "aloha"
    assert_as_expected(source, facts)
    assert_frames(source, f"observations/images/{facts['main_camera']}", facts["frames"])


def test_swap_can_be_switched_off(samples: Path) -> None:
    facts = load_expected(samples, "hdf5_aloha_compressed")
    source = open_hdf5(samples / "hdf5" / "aloha_compressed", {"swap_rb": "no"})
    stored = facts["frames_as_a_jpeg_decoder_returns_them"]
    assert_frames(source, "observations/images/cam_high", stored)
    assert source.warnings == []


def test_pieces_have_their_true_colours(samples: Path) -> None:
    """In true colours the left piece is blue and the right one red (data/README.md); the mean hardly shows it."""
    source = open_hdf5(samples / "hdf5" / "aloha_compressed")
    (frame,) = source.read(source.episodes()[0]).cameras["observations/images/cam_high"].read([0])
    red = frame[..., 0].astype(int) - frame[..., 2]
    columns = np.arange(frame.shape[1])
    strong_red, strong_blue = red > 60, red < -60
    assert strong_red.sum() > 20 and strong_blue.sum() > 20
    assert (strong_blue.sum(0) @ columns) / strong_blue.sum() < (strong_red.sum(0) @ columns) / strong_red.sum()


@pytest.mark.parametrize("encoding", ["padded", "vlen"])
@pytest.mark.parametrize("compress", [True, None])
def test_encoded_frames_are_swapped_raw_ones_are_not(tmp_path: Path, encoding: str, compress: bool | None) -> None:
    path = write_aloha(tmp_path / "a.hdf5", compress=compress, encoding=encoding)
    np.testing.assert_allclose(main_colour(path), RED, atol=4)
    np.testing.assert_allclose(main_colour(path, swap_rb="no"), BLUE, atol=4)
    assert "give swap_rb=no" in open_hdf5(path).warnings[0]
    raw = write_aloha(tmp_path / "raw.hdf5", compress=False)
    np.testing.assert_array_equal(main_colour(raw), RED)
    np.testing.assert_array_equal(main_colour(raw, swap_rb="yes"), BLUE)


def test_depth_is_no_camera_and_base_action_an_array(samples: Path, tmp_path: Path) -> None:
    source = open_hdf5(write_aloha(tmp_path / "a.hdf5"))
    assert source.layout.cameras == {"cam_high": "observations/images/cam_high"}
    mobile = open_hdf5(samples / "hdf5" / "aloha_compressed")
    arrays = mobile.read(mobile.episodes()[0]).arrays
    assert arrays["base_action"].shape == (7, 2)
    assert "compress_len" not in arrays


def test_shift_action_is_off_and_acts_choice_when_true(tmp_path: Path) -> None:
    path = write_aloha(tmp_path / "a.hdf5", length=4)
    for options, first in (
        ({}, [0, 1, 2, 3]),
        ({"shift_action": True}, [0, 0, 1, 2]),
        ({"shift_action": 1}, [1, 2, 3, 3]),
    ):
        source = open_hdf5(path, options)
        episode = apply_layout(source.read(source.episodes()[0]), source.layout)
        assert episode.action is not None
        assert episode.action[:, 0].tolist() == first


def test_instruction_from_attribute_file_name_or_constant(tmp_path: Path) -> None:
    path = write_aloha(tmp_path / "fold_the_towel_episode_3.hdf5")

    def instruction(option: object = None) -> str:
        source = open_hdf5(path, {} if option is None else {"instruction": option})
        return source.read(source.episodes()[0]).instruction

    assert instruction() == ""
    assert instruction("wave") == "wave"
    assert instruction({"file_name": r"(.*)_episode_\d+"}) == "fold the towel"
    with pytest.raises(DataError, match="does not match the file's name"):
        instruction({"file_name": r"^pour_(.*)"})
    with pytest.raises(DataError, match="no text in the attribute 'task'"):
        instruction({"attribute": "task"})
    with h5py.File(path, "a") as file:
        file.attrs["language_instruction"] = "fold it"
        file["words"] = ["fold twice"]
    assert instruction() == "fold it"
    assert instruction({"dataset": "words"}) == "fold twice"


def test_folders_train_and_val_become_splits_and_empty_episodes_are_left_out(tmp_path: Path) -> None:
    write_aloha(tmp_path / "train" / "episode_10.hdf5")
    write_aloha(tmp_path / "train" / "episode_9.hdf5")
    write_aloha(tmp_path / "val" / "episode_0.hdf5", length=1)
    write_aloha(tmp_path / "val" / "episode_1.hdf5", length=0)
    source = open_hdf5(tmp_path)
    assert [(ref.name, ref.split) for ref in source.episodes()] == [
        ("train/episode_9.hdf5", "train"),
        ("train/episode_10.hdf5", "train"),
        ("val/episode_0.hdf5", "valid"),
    ]
    assert source.read(source.episodes()[2]).length == 1
    assert "episode_1.hdf5 has no steps" in source.warnings[0]


def test_wrong_options_are_told_together(tmp_path: Path) -> None:
    path = write_aloha(tmp_path / "a.hdf5")
    with pytest.raises(ConfigError) as caught:
        open_hdf5(path, {"swap_bgr": "yes", "swap_rb": "maybe", "shift_action": "x", "instruction": {"attr": "a"}})
    assert len(caught.value.problems) == 4
