"""Facts of the sample sets under `tests/data`, computed without vlaft: h5py, pyarrow, PyAV and Pillow alone.

`facts(folder, name)` computes what `expected/NAME.json` holds. Run on the folder of the untrimmed originals with
`--check`, it has to give the facts that came with them, which other people's programs computed:

    python tools/sample_facts.py ORIGINALS --check
    python tools/sample_facts.py tests/data --check
"""

from __future__ import annotations

import argparse
import io
import json
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import h5py
import numpy as np
import pyarrow.parquet as pq
from PIL import Image

LIBERO = "move_the_potato_to_the_top_of_the_cooking_utensils_demo.hdf5"
ENCODED_ACTION = ("action/world_vector", "action/rotation_delta", "action/gripper_closedness_action")
INTERNVLA_ACTION = ("action.delta_eef_position", "action.delta_eef_rotation", "action.gripper_close")
COMPUTED = ("episodes", "steps", "episode_names", "steps_per_episode", "instructions", "instruction_per_episode")


@dataclass
class Read:
    """One set as read: an entry per episode, and the first and last frame of the first episode by the fact's name."""

    names: list[Any]
    actions: list[np.ndarray]  # [T, A] each, as stored
    instructions: list[str | None]
    frames: dict[str, list[np.ndarray]] = field(default_factory=dict)
    cameras: dict[str, list[int]] = field(default_factory=dict)  # of the first episode, where they differ between them


def quarters(frame: np.ndarray) -> dict[str, list[float]]:
    """Return the mean colour of a frame `[H, W, 3]` and of its four quarters."""
    h, w = frame.shape[0] // 2, frame.shape[1] // 2
    parts = {
        "mean": frame,
        "top_left": frame[:h, :w],
        "top_right": frame[:h, w:],
        "bottom_left": frame[h:, :w],
        "bottom_right": frame[h:, w:],
    }
    return {name: [round(float(x), 4) for x in part.mean((0, 1), dtype=np.float64)] for name, part in parts.items()}


def ends(frames: Any) -> list[np.ndarray]:
    return [np.asarray(frames[0]), np.asarray(frames[len(frames) - 1])]


def summary(read: Read) -> dict[str, Any]:
    """Return the computed part of a set's facts."""
    joined = np.concatenate(read.actions).astype(np.float64)
    found: dict[str, Any] = {
        "episodes": len(read.actions),
        "steps": len(joined),
        "steps_per_episode": [len(rows) for rows in read.actions],
        "instructions": [text for text in dict.fromkeys(read.instructions) if text is not None],
        "instruction_per_episode": read.instructions,
        "action": {
            "first_of_first_episode": read.actions[0][0].tolist(),
            "last_of_first_episode": read.actions[0][-1].tolist(),
            "first_of_last_episode": read.actions[-1][0].tolist(),
            "last_of_last_episode": read.actions[-1][-1].tolist(),
            "stats": {
                "count": len(joined),
                "mean": joined.mean(0).tolist(),
                "std": joined.std(0).tolist(),
                "min": joined.min(0).tolist(),
                "max": joined.max(0).tolist(),
                "q01": np.percentile(joined, 1, axis=0).tolist(),
                "q99": np.percentile(joined, 99, axis=0).tolist(),
            },
        },
    }
    if read.names:
        found["episode_names"] = read.names
    if read.cameras:
        found["cameras"] = read.cameras
    for key, (first, last) in read.frames.items():
        found[key] = {"first_of_first_episode": quarters(first), "last_of_first_episode": quarters(last)}
    return found


# --- HDF5


def number(name: str) -> int:
    return int("".join(letter for letter in name if letter.isdigit()))


def read_demos(file: Path, camera: str, instruction: str | None) -> Read:
    """Read robomimic's and LIBERO's layout."""
    with h5py.File(file) as root:
        names = sorted(root["data"], key=number)
        demos = [root["data"][name] for name in names]
        frames = ends(demos[0]["obs"][camera])
        return Read(names, [demo["actions"][:] for demo in demos], [instruction] * len(names), {"frames": frames})


def read_aloha(folder: Path, camera: str) -> Read:
    files = sorted(folder.iterdir(), key=lambda path: number(path.stem))
    actions = []
    for path in files:
        with h5py.File(path) as root:
            actions.append(root["action"][:])
    with h5py.File(files[0]) as root:
        stored = ends(root["observations/images"][camera])
    read = Read([path.name for path in files], actions, [None] * len(files), {"frames": stored})
    if stored[0].ndim == 1:  # JPEG bytes, padded; red and blue are exchanged in them
        decoded = [np.asarray(Image.open(io.BytesIO(data.tobytes()))) for data in stored]
        read.frames = {
            "frames": [frame[..., ::-1] for frame in decoded],
            "frames_as_a_jpeg_decoder_returns_them": decoded,
        }
    return read


def read_mixed(file: Path) -> Read:
    with h5py.File(file) as root:
        names = sorted(root["episodes"])
        groups = [root["episodes"][name] for name in names]
        actions = [np.column_stack([group["cmd/ee_delta"][:], group["cmd/gripper"][:]]) for group in groups]
        camera = groups[0]["camera"]
        frames = {
            "frames": [np.asarray(Image.open(io.BytesIO(x.tobytes()))) for x in ends(camera["front_jpeg"])],
            "frames_wrist_chw": [frame.transpose(1, 2, 0) for frame in ends(camera["wrist_chw"])],
            "frames_small_float_times_255": [frame * 255.0 for frame in ends(camera["small_float"])],
        }
        return Read(names, actions, [group.attrs["instruction"] for group in groups], frames)


# --- LeRobot


def video_ends(file: Path, start: int, stop: int) -> list[np.ndarray]:
    """Return frames `start` and `stop - 1` of a video, counted one by one."""
    wanted = {start, stop - 1}
    with av.open(str(file)) as container:
        found = [
            frame.to_ndarray(format="rgb24") for index, frame in enumerate(container.decode(video=0)) if index in wanted
        ]
    assert len(found) == 2, f"{file} is shorter than its rows"
    return found


def read_lerobot(folder: Path, action: tuple[str, ...], camera: str) -> Read:
    info = json.loads((folder / "meta/info.json").read_text())
    files = sorted((folder / "data").rglob("*.parquet"))
    if info["codebase_version"] == "v3.0":
        table = pq.read_table(folder / "meta/episodes/chunk-000/file-000.parquet").to_pydict()
        rows = pq.read_table(files[0], columns=list(action))
        tables = [rows.slice(a, n) for a, n in zip(table["dataset_from_index"], table["length"], strict=True)]
        names, texts = [f"episode {i}" for i in table["episode_index"]], [tasks[0] for tasks in table["tasks"]]
        videos = sorted((folder / "videos" / camera).rglob("*.mp4"))
    else:
        tables = [pq.read_table(file) for file in files]
        episodes = [json.loads(line) for line in (folder / "meta/episodes.jsonl").read_text().splitlines()]
        names, texts = [file.name for file in files], [episode["tasks"][0] for episode in episodes]
        videos = sorted((folder / "videos").glob(f"chunk-000/{camera}/*.mp4"))
    dtype = np.float32 if str(tables[0].schema.field(action[0]).type).endswith("float>") else np.float64
    actions = []
    for part in tables:
        columns = [np.array(part[name].to_pylist(), dtype) for name in action]
        actions.append(np.column_stack([column.reshape(len(part), -1) for column in columns]))
    if videos:
        frames = video_ends(videos[0], 0, len(actions[0]))
    else:
        cells = tables[0][camera].to_pylist()
        frames = [np.asarray(Image.open(io.BytesIO(cell["bytes"]))) for cell in (cells[0], cells[-1])]
    return Read(names, actions, texts, {"frames": frames})


# --- RLDS


def records(shard: Path) -> Iterator[bytes]:
    """Yield the payloads of a TFRecord file."""
    data, at = shard.read_bytes(), 0
    while at < len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        yield data[at + 12 : at + 12 + size]
        at += 16 + size


def varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 128:
            return value, at


def messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield number and content of the fields of a protobuf message whose fields are all of variable length."""
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        assert tag & 7 == 2
        size, at = varint(data, at)
        yield tag >> 3, data[at : at + size]
        at += size


def example_entries(record: bytes) -> dict[str, bytes]:
    """Return the features of a `tf.train.Example`: name to serialized `Feature`."""
    entries = (dict(messages(entry)) for _, features in messages(record) for _, entry in messages(features))
    return {entry[1].decode(): entry[2] for entry in entries}


def bytes_list(feature: bytes) -> list[bytes]:
    return [value for _, values in messages(feature) for _, value in messages(values)]


def float_list(feature: bytes) -> np.ndarray:
    return np.concatenate([np.frombuffer(x, "<f4") for _, values in messages(feature) for _, x in messages(values)])


def read_bridge(folder: Path, split: str) -> Read:
    """Read one split of the Bridge sample; its frames are not decoded here, for no decoder but TensorFlow's fits."""
    actions, texts = [], []
    for shard in sorted(folder.glob(f"*-{split}.tfrecord-*")):
        for record in records(shard):
            entries = example_entries(record)
            actions.append(float_list(entries["steps/action"]).reshape(-1, 7))
            texts.append(bytes_list(entries["steps/language_instruction"])[0].decode())
    return Read([], actions, texts)


def read_encodings(expected: Path, split: str) -> Read:
    """Read one split of the encodings from the values that TensorFlow decoded, not from the shards."""
    told = json.loads((expected / "rlds_encodings_values.json").read_text())
    with np.load(expected / "rlds_encodings_values.npz", allow_pickle=False) as values:
        episodes = [episode for episode in told["episodes"] if episode["split"] == split]
        keys = [f"{split}/{episode['position']:02d}/steps/" for episode in episodes]
        actions = [np.column_stack([values[key + name] for name in ENCODED_ACTION]) for key in keys]
        image = keys[0] + "observation/image"
        frames = {"frames": ends(values[image]), "frames_accurate_dct": ends(values[image + "#accurate_dct"])}
        sizes = {name: list(values[f"{keys[0]}observation/{name}"].shape[1:]) for name in ("image", "wrist_png")}
    names = [episode["episode_id"] for episode in episodes]
    return Read(names, actions, [episode["language_instruction"] for episode in episodes], frames, sizes)


# --- all of them

POTATO = "move the potato to the top of the cooking utensils"
SETS: dict[str, Callable[[Path], Read]] = {
    "hdf5_robomimic_image": lambda data: read_demos(data / "hdf5/robomimic_image.hdf5", "agentview_image", None),
    "hdf5_libero_raw": lambda data: read_demos(data / "hdf5/libero_raw" / LIBERO, "agentview_rgb", POTATO),
    "hdf5_libero_regenerated": lambda data: read_demos(
        data / f"hdf5/libero_regenerated/KITCHEN_SCENE3_{LIBERO}", "agentview_rgb", POTATO
    ),
    "hdf5_aloha_raw": lambda data: read_aloha(data / "hdf5/aloha_raw", "top"),
    "hdf5_aloha_compressed": lambda data: read_aloha(data / "hdf5/aloha_compressed", "cam_high"),
    "hdf5_generic_mixed": lambda data: read_mixed(data / "hdf5/generic_mixed.hdf5"),
    "lerobot_v2.0_gr00t_pick_place": lambda data: read_lerobot(
        data / "lerobot/v2.0-gr00t_pick_place", ("action",), "observation.images.ego_view"
    ),
    "lerobot_v2.1_internvla_pick_place": lambda data: read_lerobot(
        data / "lerobot/v2.1-internvla_pick_place", INTERNVLA_ACTION, "video.ego_view"
    ),
    "lerobot_v2.1_pusht_image": lambda data: read_lerobot(
        data / "lerobot/v2.1-pusht_image", ("action",), "observation.image"
    ),
    "lerobot_v3.0_internvla_pick_place": lambda data: read_lerobot(
        data / "lerobot/v3.0-internvla_pick_place", ("action",), "observation.images.ego_view"
    ),
}
SPLIT_SETS: dict[str, Callable[[Path, str], Read]] = {
    "rlds_bridge_dataset": lambda data, split: read_bridge(data / "rlds/bridge_dataset/1.0.0", split),
    "rlds_encodings": lambda data, split: read_encodings(data / "expected", split),
}


def facts(data: Path, name: str) -> dict[str, Any]:
    """Return the computed facts of a set; of RLDS sets per split, as in `expected/`."""
    if name in SETS:
        return summary(SETS[name](data))
    return {"splits": {split: summary(SPLIT_SETS[name](data, split)) for split in ("train", "val")}}


def differences(found: Any, told: Any, where: str) -> Iterator[str]:
    """Compare computed facts with given ones, key by key of what was computed."""
    if isinstance(found, dict):
        for key, value in found.items():
            yield from differences(value, told[key], f"{where}/{key}")
    elif isinstance(found, list) and found and isinstance(found[0], float):
        # Pixels of videos and JPEGs depend on the decoder by about a level; actions and raw pixels do not.
        tolerance = 1.0 if "/frames" in where else 1e-12
        if not np.allclose(found, told, rtol=1e-9, atol=tolerance):
            yield f"{where}: {found} instead of {told}"
    elif found != told and not where.endswith("/episode_names"):
        yield f"{where}: {found} instead of {told}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of the sample sets")
    parser.add_argument("--check", action="store_true", help="compare with its expected/ instead of printing")
    options = parser.parse_args()
    wrong = 0
    for name in (*SETS, *SPLIT_SETS):
        found = facts(options.data, name)
        if not options.check:
            print(name, json.dumps(found))
            continue
        told = json.loads((options.data / f"expected/{name}.json").read_text())
        problems = list(differences(found, told, name))
        print(f"{name}: {problems or 'as expected'}")
        wrong += len(problems)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
