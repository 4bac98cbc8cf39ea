"""Damaged, hostile and merely wrong HDF5 files: one sentence each, never anything else."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from vlaft.data.layout import apply_layout
from vlaft.data.readers.hdf5.source import open_hdf5
from vlaft.errors import DataError, VlaftError

DEMO = "data/demo_0"
MAPPING: dict[str, object] = {
    "episodes": "data/demo_*",
    "action": "actions",
    "cameras": {"front": "obs/front_jpeg"},
    "instruction": {"attribute": "told"},
}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A whole little file, with raw and encoded frames."""
    from vlaft.data.codec import encode_image

    frames = np.random.default_rng(0).integers(0, 255, (4, 6, 6, 3), np.uint8)
    path = tmp_path / "demos.hdf5"
    with h5py.File(path, "w") as file:
        file.create_group("data").attrs["total"] = 8
        file["data"].attrs["told"] = "stack"
        for name in ("demo_0", "demo_1"):
            demo = file.create_group(f"data/{name}")
            demo["actions"] = np.linspace(-1, 1, 28).reshape(4, 7)
            demo.create_dataset("obs/agentview_image", data=frames, chunks=(1, 6, 6, 3), compression="gzip")
            demo["obs/eef_pos"] = np.zeros((4, 3))
            encoded = demo.create_dataset("obs/front_jpeg", (4,), h5py.vlen_dtype(np.uint8))
            for i, frame in enumerate(frames):
                encoded[i] = np.frombuffer(encode_image(frame, "jpeg"), np.uint8)
    return path


def read_everything(path: Path, options: dict[str, object] | None = None) -> int:
    """Open, and read every array and every frame; return the number of frames."""
    source = open_hdf5(path, options)
    count = 0
    for ref in source.episodes():
        episode = apply_layout(source.read(ref), source.layout)
        for name in episode.arrays:
            assert len(episode.arrays[name]) == episode.length
        for frames in episode.cameras.values():
            count += sum(image.shape[2] == 3 for image in frames.read(range(len(frames))))
    return count


def read_or_refuse(path: Path) -> None:
    """Everything but a known error is a failure; known errors are one line."""
    for options in ({}, MAPPING):
        try:
            read_everything(path, options)
        except VlaftError as error:
            assert str(error).strip() and "\n" not in str(error)
            assert str(error).isprintable()


def test_the_good_file_is_good(good: Path) -> None:
    assert read_everything(good) == 8
    assert read_everything(good, MAPPING) == 8


def test_truncated_anywhere(good: Path) -> None:
    data = good.read_bytes()
    cuts = [*range(0, len(data), 997), 1, 7, 8, 9, 96, len(data) - 1]
    for cut in cuts:
        good.write_bytes(data[:cut])
        with pytest.raises(DataError, match=r"truncated|damaged|no HDF5 file|is not there"):
            read_everything(good)


def test_random_damage(good: Path) -> None:
    """Bit flips and overwritten bytes, mostly near the structures that describe the file."""
    data = good.read_bytes()
    marks = [match.start() for match in re.finditer(rb"TREE|HEAP|SNOD|GCOL|demo_|actions", data)]
    generator = random.Random(7)
    for _ in range(60):
        broken = bytearray(data)
        for _ in range(generator.choice([1, 4, 32])):
            near = generator.choice(marks) + generator.randrange(300)
            place = generator.choice([near, generator.randrange(len(data))]) % len(data)
            broken[place] = generator.choice([broken[place] ^ 1 << generator.randrange(8), 0, 255])
        good.write_bytes(broken)
        read_or_refuse(good)


def external_link(file: h5py.File) -> None:
    del file[f"{DEMO}/actions"]
    file[f"{DEMO}/actions"] = h5py.ExternalLink("/etc/hostname", "/x")


def link_over_a_link(file: h5py.File) -> None:
    del file[f"{DEMO}/actions"]
    file["door"] = h5py.ExternalLink("elsewhere.hdf5", "/")
    file[f"{DEMO}/actions"] = h5py.SoftLink("/door/data/demo_0/actions")


def soft_loop(file: h5py.File) -> None:
    del file[f"{DEMO}/actions"]
    file[f"{DEMO}/actions"] = h5py.SoftLink(f"/{DEMO}/again")
    file[f"{DEMO}/again"] = h5py.SoftLink(f"/{DEMO}/actions")


def hard_loop(file: h5py.File) -> None:
    file[f"{DEMO}/inside"] = file[DEMO]


def dangling(file: h5py.File) -> None:
    del file[f"{DEMO}/actions"]
    file[f"{DEMO}/actions"] = h5py.SoftLink("/nowhere")


def external_storage(file: h5py.File) -> None:
    del file[f"{DEMO}/actions"]
    file[DEMO].create_dataset("actions", (4, 7), "f8", external=[("/etc/passwd", 0, 224)])


def virtual_outside(file: h5py.File) -> None:
    del file[f"{DEMO}/actions"]
    layout = h5py.VirtualLayout((4, 7), "f8")
    layout[:] = h5py.VirtualSource("../other/secret.hdf5", "x", (4, 7))
    file.create_virtual_dataset(f"{DEMO}/actions", layout)


def virtual_absent(file: h5py.File) -> None:
    del file[f"{DEMO}/actions"]
    layout = h5py.VirtualLayout((4, 7), "f8")
    layout[:] = h5py.VirtualSource("absent.hdf5", "x", (4, 7))
    file.create_virtual_dataset(f"{DEMO}/actions", layout)


def virtual_of_itself(file: h5py.File) -> None:
    del file[f"{DEMO}/actions"]
    layout = h5py.VirtualLayout((4, 7), "f8")
    layout[:] = h5py.VirtualSource(".", f"/{DEMO}/actions", (4, 7))
    file.create_virtual_dataset(f"{DEMO}/actions", layout)


def texts_for_actions(file: h5py.File) -> None:
    del file[f"{DEMO}/actions"]
    file[f"{DEMO}/actions"] = ["a", "b", "c", "d"]


def references_for_actions(file: h5py.File) -> None:
    del file[f"{DEMO}/actions"]
    file[DEMO].create_dataset("actions", (4,), h5py.ref_dtype)[:] = file[DEMO].ref


def group_for_actions(file: h5py.File) -> None:
    del file[f"{DEMO}/actions"]
    file.create_group(f"{DEMO}/actions")


def no_actions(file: h5py.File) -> None:
    del file[f"{DEMO}/actions"]


def flat_actions(file: h5py.File) -> None:
    del file[f"{DEMO}/actions"]
    file[f"{DEMO}/actions"] = np.zeros(4)


def fewer_images(file: h5py.File) -> None:
    del file[f"{DEMO}/obs/agentview_image"]
    file[f"{DEMO}/obs/agentview_image"] = np.zeros((3, 6, 6, 3), np.uint8)


def more_states(file: h5py.File) -> None:
    del file[f"{DEMO}/obs/eef_pos"]
    file[f"{DEMO}/obs/eef_pos"] = np.zeros((5, 3))


def huge_claim(file: h5py.File) -> None:
    del file[f"{DEMO}/actions"]
    file[DEMO].create_dataset("actions", (10**12, 7), "f8", chunks=(1000, 7))


def large_claim(file: h5py.File) -> None:
    """Fits the memory, but nothing was ever written."""
    for name in ("actions", "obs/agentview_image", "obs/eef_pos", "obs/front_jpeg"):
        del file[f"{DEMO}/{name}"]
    file[DEMO].create_dataset("actions", (900_000, 7), "f8", chunks=(1000, 7))
    file[DEMO].create_dataset("obs/agentview_image", (900_000, 6, 6, 3), "u1", chunks=(1, 6, 6, 3))


def huge_frames(file: h5py.File) -> None:
    del file[f"{DEMO}/obs/agentview_image"]
    file[DEMO].create_dataset("obs/agentview_image", (4, 10**5, 10**5, 3), "u1", chunks=(1, 10, 10, 3))


def not_finite(file: h5py.File) -> None:
    file[f"{DEMO}/actions"][2, 3] = np.nan


def no_demonstrations(file: h5py.File) -> None:
    del file["data"]
    file.create_group("data").attrs["total"] = 0


def only_empty_ones(file: h5py.File) -> None:
    for name in ("demo_0", "demo_1"):
        del file[f"data/{name}/actions"]
        file[f"data/{name}/actions"] = np.zeros((0, 7))


def demo_is_no_group(file: h5py.File) -> None:
    del file["data/demo_0"], file["data/demo_1"]
    file["data/demo_0"] = np.zeros(3)


def mask_of_numbers(file: h5py.File) -> None:
    file["mask/train"] = np.arange(3)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (external_link, "link to another file.*followed only inside"),
        (link_over_a_link, "link to another file"),
        (soft_loop, "runs in a circle"),
        (hard_loop, "too deep or too many"),
        (dangling, "no dataset 'actions'"),
        (external_storage, "keeps its values in another file"),
        (virtual_outside, "reads outside of its folder"),
        (virtual_absent, "absent; copy it beside"),
        (virtual_of_itself, "outside of its folder|circle"),
        (texts_for_actions, r"'actions' has shape \(4,\) and type object"),
        (references_for_actions, r"'actions' has shape \(4,\) and type object"),
        (group_for_actions, "no dataset 'actions'"),
        (no_actions, "demo_0 has no dataset 'actions'"),
        (flat_actions, r"not \[T, A\] numbers"),
        (fewer_images, "demo_0: 'obs/agentview_image' has 3 rows, but there are 4 actions"),
        (more_states, "demo_0: 'obs/eef_pos' has 5 rows, but there are 4 actions"),
        (huge_claim, r"not \[T, A\] numbers"),
        (large_claim, "claims shape .* but stores only 0 bytes"),
        (huge_frames, "size that can't be right"),
        (not_finite, "'demo_0', step 2: the action is not finite"),
        (no_demonstrations, "holds no demonstrations"),
        (only_empty_ones, "holds no demonstrations"),
        (demo_is_no_group, "holds no demonstrations"),
        (mask_of_numbers, "filter key 'train' is no list of names"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_wrong_file_is_one_sentence(good: Path, damage: Callable[[h5py.File], None], sentence: str) -> None:
    with h5py.File(good, "a") as file:
        damage(file)
    with pytest.raises(DataError, match=sentence) as caught:
        read_everything(good)
    assert str(good) in str(caught.value) or "demo_0" in str(caught.value)
    read_or_refuse(good)  # the same file through a mapping


def test_virtual_datasets_inside_the_folder_are_read(good: Path) -> None:
    source = good.with_name("parts.h5part")
    with h5py.File(source, "w") as file:
        file["x"] = np.full((4, 7), 0.5)
    with h5py.File(good, "a") as file:
        del file[f"{DEMO}/actions"]
        layout = h5py.VirtualLayout((4, 7), "f8")
        layout[:] = h5py.VirtualSource(source.name, "x", (4, 7))
        file.create_virtual_dataset(f"{DEMO}/actions", layout)
    opened = open_hdf5(good)
    np.testing.assert_array_equal(opened.read(opened.episodes()[0]).arrays["actions"], np.full((4, 7), 0.5))
    with h5py.File(source, "w") as file:  # the source itself may not lead outside either
        file["x"] = h5py.ExternalLink("/etc/hostname", "/x")
    with pytest.raises(DataError, match="link to another file"):
        open_hdf5(good)


def test_a_damaged_frame_names_its_step(good: Path) -> None:
    with h5py.File(good, "a") as file:
        file[f"{DEMO}/obs/front_jpeg"][2] = np.arange(9, dtype=np.uint8)
        file["data/demo_1/obs/front_jpeg"][1] = np.zeros(0, np.uint8)
    source = open_hdf5(good, MAPPING)
    for ref, step in zip(source.episodes(), (2, 1), strict=True):
        with pytest.raises(DataError, match=rf"{ref.name}, camera '.*front_jpeg', step {step}:"):
            list(source.read(ref).cameras["obs/front_jpeg"].read(range(4)))


def test_a_damaged_chunk_names_its_step(good: Path) -> None:
    with h5py.File(good) as file:
        chunk = file[f"{DEMO}/obs/agentview_image"].id.get_chunk_info(3)
    data = bytearray(good.read_bytes())
    data[chunk.byte_offset : chunk.byte_offset + chunk.size] = b"\xff" * chunk.size
    good.write_bytes(data)
    source = open_hdf5(good)
    frames = source.read(source.episodes()[0]).cameras["obs/agentview_image"]
    assert len(list(frames.read([0, 1, 2]))) == 3
    with pytest.raises(DataError, match=r"demo_0, camera '.*agentview_image', step 3 can't be read"):
        list(frames.read([3]))


def test_not_hdf5_at_all(tmp_path: Path) -> None:
    empty = tmp_path / "empty.hdf5"
    empty.write_bytes(b"")
    with pytest.raises(DataError, match="no HDF5 file"):
        open_hdf5(empty)
    empty.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(DataError, match="git lfs pull"):
        open_hdf5(empty)
    with pytest.raises(DataError, match="git lfs pull"):
        open_hdf5(tmp_path)
    empty.unlink()
    with pytest.raises(DataError, match="holds no HDF5 files"):
        open_hdf5(tmp_path)
    with pytest.raises(DataError, match="is not there"):
        open_hdf5(tmp_path / "absent.hdf5")
    with h5py.File(tmp_path / "bare.hdf5", "w"):
        pass
    with pytest.raises(DataError, match="holds no datasets at all"):
        open_hdf5(tmp_path / "bare.hdf5")


def test_a_file_that_vanished_is_one_sentence(good: Path) -> None:
    source = open_hdf5(good)
    episode = source.read(source.episodes()[0])
    good.unlink()
    with pytest.raises(DataError, match="is not there"):
        episode.arrays["actions"]
    with pytest.raises(DataError, match="is not there"):
        list(episode.cameras["obs/agentview_image"].read([0]))
