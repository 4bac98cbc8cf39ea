"""Make `tests/data` from the untrimmed sample sets: fewer steps and episodes, no pixel and no number changed.

    python tools/trim_samples.py ORIGINALS/data tests/data

Frames of HDF5 files are copied, videos are cut at key frames without being encoded again, records of TFRecord files are
copied or lose whole features. What is true of the result is computed by `sample_facts.py`, which is without vlaft.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import av
import google_crc32c
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sample_facts import COMPUTED, SETS, SPLIT_SETS, facts, messages, records

INTERNVLA = [range(start, start + 12) for start in (102, 98, 96, 96)]  # of each episode: the gripper closes in them
GR00T = 16  # rows of each episode at least; on to where no kept frame needs one that is cut off
BRIDGE_LEFT_OUT = ("steps/observation/image_2", "steps/language_embedding")
ENCODINGS = {"train": [[(0, 0), (0, 1)], [(2, 0)]], "val": [[(1, 0)]]}  # new shards: (old shard, record)
FACTS = ("path", "format", "cameras", "main_camera", "fps")  # taken over from the original's facts


# --- HDF5


def copy_rows(source: h5py.Group, target: h5py.Group, rows: slice, length: int) -> None:
    """Copy a group with `rows` of every dataset whose first (or second, for lengths of JPEGs) axis counts steps."""
    for name, value in source.attrs.items():
        target.attrs[name] = value
    for name, item in source.items():
        if isinstance(item, h5py.Group):
            copy_rows(item, target.create_group(name), rows, length)
            continue
        cut = item[:, rows] if name == "compress_len" else item[rows] if item.shape[:1] == (length,) else item[()]
        if item.dtype.kind == "O":
            made = target.create_dataset(name, cut.shape, item.dtype)
            for index, value in enumerate(cut):
                made[index] = value
        elif item.ndim == 4:
            options = {"compression": "gzip", "compression_opts": 9, "shuffle": item.dtype.kind == "f"}
            target.create_dataset(name, data=cut, chunks=(1, *item.shape[1:]), **options)
        else:
            target.create_dataset(name, data=cut)


def around_the_gripper(gripper: np.ndarray, before: int, after: int) -> slice:
    """Return the rows from `before` to `after` the gripper's first change, or the first rows where it has none."""
    changes = np.nonzero(np.diff(gripper.ravel()))[0] + 1
    start = max(0, int(changes[0]) - before) if len(changes) else 0
    return slice(start, start + before + after)


def trim_demos(source: Path, target: Path, before: int, after: int) -> None:
    """Trim a robomimic or LIBERO file."""
    with h5py.File(source) as old, h5py.File(target, "w") as new:
        new.create_group("data").attrs.update(old["data"].attrs)
        total = 0
        for name, demo in old["data"].items():
            rows = around_the_gripper(demo["actions"][:, 6], before, after)
            made = new["data"].create_group(name)
            copy_rows(demo, made, rows, len(demo["actions"]))
            total += len(made["actions"])
            if "num_samples" in demo.attrs:
                made.attrs["num_samples"] = len(made["actions"])
        if "total" in old["data"].attrs:
            new["data"].attrs["total"] = total
        if "mask" in old:
            old.copy("mask", new)


def trim_file(source: Path, target: Path, steps: int) -> None:
    """Trim an ALOHA file, one episode, to its first steps."""
    with h5py.File(source) as old, h5py.File(target, "w") as new:
        copy_rows(old, new, slice(0, steps), len(old["action"]))


def trim_mixed(source: Path, target: Path) -> None:
    with h5py.File(source) as old, h5py.File(target, "w") as new:
        new.attrs.update(old.attrs)
        for index, (name, trajectory) in enumerate(old["episodes"].items()):
            gripper = trajectory["cmd/gripper"][:]
            rows = around_the_gripper(gripper, 2, 2 + index)
            copy_rows(trajectory, new.require_group("episodes").create_group(name), rows, len(gripper))


def trim_hdf5(source: Path, target: Path) -> None:
    trim_demos(source / "robomimic_image.hdf5", target / "robomimic_image.hdf5", 2, 1)
    for folder, before, after in (("libero_raw", 1, 2), ("libero_regenerated", 1, 1)):
        (target / folder).mkdir()
        for file in (source / folder).iterdir():
            trim_demos(file, target / folder / file.name, before, after)
    # Step 2 of the raw recording is step 5 of the compressed one; a test compares them.
    for folder, steps in (("aloha_raw", [5, 4]), ("aloha_compressed", [7, 5, 5])):
        (target / folder).mkdir()
        files = sorted((source / folder).iterdir(), key=lambda path: int(path.stem.split("_")[1]))
        for file, count in zip(files, steps, strict=True):
            trim_file(file, target / folder / file.name, count)
    trim_mixed(source / "generic_mixed.hdf5", target / "generic_mixed.hdf5")


# --- LeRobot


def cut_video(source: Path, target: Path, parts: Iterable[range]) -> None:
    """Write chosen runs of frames one behind the other, the packets as they are; a run begins at a key frame."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = old.streams.video[0]
        made = new.add_stream_from_template(stream, opaque=True)
        packets = [packet for packet in old.demux(stream) if packet.size]
        duration = int(1 / stream.average_rate / stream.time_base)
        order = {pts: index for index, pts in enumerate(sorted(packet.pts for packet in packets))}
        begin = 0
        for part in parts:
            kept = [packet for packet in packets if order[packet.pts] in part]
            assert kept[0].is_keyframe and order[kept[0].pts] == part.start, f"{source}: no key frame at {part.start}"
            at = packets.index(kept[0])
            assert packets[at : at + len(kept)] == kept, f"{source}: frames of {part} need frames behind it"
            for packet in kept:
                shift = (begin - part.start) * duration
                packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                packet.stream = made
                new.mux(packet)
            begin += len(part)


def closed_length(video: Path, at_least: int) -> int:
    """Return how many first frames of a video, `at_least` so many, can be decoded without the packets behind them."""
    with av.open(str(video)) as container:
        times = [packet.pts for packet in container.demux(container.streams.video[0]) if packet.size]
    order = sorted(times)
    return next(n for n in range(at_least, len(times) + 1) if sorted(times[:n]) == order[:n])


def statistics_of(table: pa.Table) -> dict[str, Any]:
    """Return LeRobot's statistics of an episode's numbers."""
    found = {}
    for name in table.column_names:
        values = table[name].to_pylist()
        if isinstance(values[0], (bytes, str, dict)):
            continue
        rows = np.array(values, np.float64).reshape(len(values), -1)
        parts = {"min": rows.min(0), "max": rows.max(0), "mean": rows.mean(0), "std": rows.std(0)}
        found[name] = {key: value.tolist() for key, value in parts.items()} | {"count": [len(rows)]}
    return found


def with_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    index = table.schema.get_field_index(name)
    return (
        table if index < 0 else table.set_column(index, table.field(index), pa.array(values, table.field(index).type))
    )


def cut_rows(table: pa.Table, rows: range, offset: int) -> pa.Table:
    """Return rows of an episode as an episode of its own: time and numbers count from its beginning."""
    first = table["timestamp"][0].as_py()
    rate = 1 / (table["timestamp"][1].as_py() - first)
    table = table.slice(rows.start, len(rows))
    table = with_column(table, "timestamp", [first + i / round(rate) for i in range(len(rows))])
    table = with_column(table, "frame_index", range(len(rows)))
    return with_column(table, "index", range(offset, offset + len(rows)))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=4) + "\n")


def trim_v2(source: Path, target: Path, rows: list[range], left_out: tuple[str, ...]) -> None:
    """Trim a LeRobot dataset of one parquet file and one video an episode."""
    shutil.copytree(source / "meta", target / "meta", copy_function=shutil.copyfile)
    for name in left_out:
        (target / "meta" / name).unlink()
    episodes, statistics, offset = [], [], 0
    lines = (source / "meta/episodes.jsonl").read_text().splitlines()
    for number, (line, kept) in enumerate(zip(lines, rows, strict=True)):
        name = f"data/chunk-000/episode_{number:06d}.parquet"
        table = cut_rows(pq.read_table(source / name), kept, offset)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, target / name, compression="zstd", compression_level=19)
        episodes.append(json.loads(line) | {"length": len(kept)})
        statistics.append({"episode_index": number, "stats": statistics_of(table)})
        offset += len(kept)
        for video in source.glob(f"videos/*/*/episode_{number:06d}.mp4"):
            cut_video(video, target / video.relative_to(source), [kept])
    told = {"episodes": episodes}
    if (source / "meta/episodes_stats.jsonl").is_file():
        told["episodes_stats"] = statistics
    for name, values in told.items():
        (target / f"meta/{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    edit_json(target / "meta/info.json", total_frames=offset)


def trim_v3(source: Path, target: Path, rows: list[range]) -> None:
    """Trim a LeRobot dataset of joined files; its statistics, which nothing reads, are left out."""
    (target / "meta/episodes/chunk-000").mkdir(parents=True)
    shutil.copyfile(source / "meta/tasks.parquet", target / "meta/tasks.parquet")
    shutil.copyfile(source / "meta/info.json", target / "meta/info.json")
    name = "meta/episodes/chunk-000/file-000.parquet"
    episodes = pq.read_table(source / name)
    episodes = episodes.select([column for column in episodes.column_names if not column.startswith("stats/")])
    old = episodes.to_pydict()
    camera = next(key.split("/")[1] for key in old if key.startswith("videos/"))
    data = pq.read_table(source / "data/chunk-000/file-000.parquet")
    parts, offset = [], 0
    for number, kept in enumerate(rows):
        table = data.slice(old["dataset_from_index"][number], old["length"][number])
        parts.append(cut_rows(table, kept, offset))
        offset += len(kept)
    begins = np.cumsum([0, *(len(kept) for kept in rows)]).tolist()
    fps = json.loads((source / "meta/info.json").read_text())["fps"]
    files = old[f"videos/{camera}/file_index"]
    from_frame = [sum(len(r) for r, f in zip(rows[:i], files, strict=False) if f == files[i]) for i in range(len(rows))]
    changes = {
        "dataset_from_index": begins[:-1],
        "dataset_to_index": begins[1:],
        "length": [len(kept) for kept in rows],
        f"videos/{camera}/from_timestamp": [frame / fps for frame in from_frame],
        f"videos/{camera}/to_timestamp": [(a + len(kept)) / fps for a, kept in zip(from_frame, rows, strict=True)],
    }
    for column, values in changes.items():
        episodes = with_column(episodes, column, values)
    pq.write_table(episodes.replace_schema_metadata(None), target / name)
    (target / "data/chunk-000").mkdir(parents=True)
    joined = pa.concat_tables(parts)
    pq.write_table(joined, target / "data/chunk-000/file-000.parquet", compression="zstd", compression_level=19)
    for file in sorted(set(files)):
        runs = []
        for number, kept in enumerate(rows):
            if files[number] == file:
                begin = round(old[f"videos/{camera}/from_timestamp"][number] * fps)
                runs.append(range(begin + kept.start, begin + kept.stop))
        video = f"videos/{camera}/chunk-000/file-{file:03d}.mp4"
        cut_video(source / video, target / video, runs)
    edit_json(target / "meta/info.json", total_frames=offset)


def trim_lerobot(source: Path, target: Path) -> None:
    name = "v2.0-gr00t_pick_place"
    videos = sorted((source / name / "videos").rglob("*.mp4"))
    trim_v2(source / name, target / name, [range(closed_length(video, GR00T)) for video in videos], ("stats.json",))
    unread = ("stats.json", "stats_gr00t.json")
    trim_v2(source / "v2.1-internvla_pick_place", target / "v2.1-internvla_pick_place", INTERNVLA, unread)
    trim_v3(source / "v3.0-internvla_pick_place", target / "v3.0-internvla_pick_place", INTERNVLA)
    name = "v2.1-pusht_image"
    shutil.copytree(source / name, target / name, copy_function=shutil.copyfile)


# --- RLDS


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def message(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def without(record: bytes, left_out: tuple[str, ...]) -> bytes:
    """Return a serialized `tf.train.Example` without some of its features; the others as they are."""
    made = b""
    for number, features in messages(record):
        kept = b""
        for inner, entry in messages(features):
            if dict(messages(entry))[1].decode() not in left_out:
                kept += message(inner, entry)
        made += message(number, kept)
    return made


def masked(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def write_records(file: Path, payloads: list[bytes]) -> int:
    with file.open("wb") as out:
        for payload in payloads:
            size = struct.pack("<Q", len(payload))
            out.write(size + masked(size) + payload + masked(payload))
    return sum(map(len, payloads))


def write_split(folder: Path, name: str, split: str, shards: list[list[bytes]]) -> None:
    """Write the shards of a split and tell `dataset_info.json`."""
    sizes = [
        write_records(folder / f"{name}-{split}.tfrecord-{index:05d}-of-{len(shards):05d}", payloads)
        for index, payloads in enumerate(shards)
    ]
    path = folder / "dataset_info.json"
    info = json.loads(path.read_text())
    entry = next(entry for entry in info["splits"] if entry["name"] == split)
    entry.update(numBytes=str(sum(sizes)), shardLengths=[str(len(payloads)) for payloads in shards])
    path.write_text(json.dumps(info, indent=2) + "\n")


def drop_feature(tree: Any, path: list[str]) -> None:
    """Take a feature out of `features.json`, whose levels are dictionaries of features or sequences of them."""
    if "sequence" in tree:
        drop_feature(tree["sequence"]["feature"], path)
    elif len(path) == 1:
        del tree["featuresDict"]["features"][path[0]]
    else:
        drop_feature(tree["featuresDict"]["features"][path[0]], path[1:])


def trim_rlds(source: Path, target: Path) -> None:
    for name in ("bridge_dataset", "encodings"):
        (target / name / "1.0.0").mkdir(parents=True)
        for file in (source / name / "1.0.0").iterdir():
            if ".tfrecord-" not in file.name:
                shutil.copyfile(file, target / name / "1.0.0" / file.name)
    old, new = source / "bridge_dataset/1.0.0", target / "bridge_dataset/1.0.0"
    features = json.loads((new / "features.json").read_text())
    for left_out in BRIDGE_LEFT_OUT:
        drop_feature(features, left_out.split("/"))
    (new / "features.json").write_text(json.dumps(features, indent=1) + "\n")
    for split in ("train", "val"):
        shard = old / f"bridge_dataset-{split}.tfrecord-00000-of-00001"
        write_split(new, "bridge_dataset", split, [[without(record, BRIDGE_LEFT_OUT) for record in records(shard)]])
    old, new = source / "encodings/1.0.0", target / "encodings/1.0.0"
    for split, shards in ENCODINGS.items():
        files = [list(records(old / f"encodings-{split}.tfrecord-{i:05d}-of-00003")) for i in range(3)]
        write_split(new, "encodings", split, [[files[a][b] for a, b in shard] for shard in shards])


def trim_values(source: Path, target: Path) -> None:
    """Keep TensorFlow's values of the kept episodes of `encodings`, under their new positions."""
    told = json.loads((source / "rlds_encodings_values.json").read_text())
    begins = {"train": [0, 2, 3], "val": [0, 1, 3]}  # position of each old shard's first record
    new_names = {}
    for split, shards in ENCODINGS.items():
        kept = [begins[split][a] + b for shard in shards for a, b in shard]
        new_names |= {f"{split}/{old:02d}": f"{split}/{new:02d}" for new, old in enumerate(kept)}
    episodes = []
    for episode in told["episodes"]:
        key = f"{episode['split']}/{episode['position']:02d}"
        if key in new_names:
            episodes.append(episode | {"position": int(new_names[key][-2:])})

    def renamed(keys: Iterable[str]) -> dict[str, str]:
        """Return the kept keys, `SPLIT/EPISODE/FEATURE`, with their new names."""
        parts = {key: key.split("/", 2) for key in keys}
        names = {key: (new_names.get(f"{split}/{episode}"), rest) for key, (split, episode, rest) in parts.items()}
        return {key: f"{new}/{rest}" for key, (new, rest) in names.items() if new is not None}

    text = {new: told["text"][old] for old, new in renamed(told["text"]).items()}
    told |= {"episodes": episodes, "text": text}
    (target / "rlds_encodings_values.json").write_text(as_text(told))
    with np.load(source / "rlds_encodings_values.npz", allow_pickle=False) as values:
        np.savez_compressed(
            target / "rlds_encodings_values.npz", **{new: values[old] for old, new in renamed(values.files).items()}
        )


# --- all


def trim_broken(source: Path, target: Path) -> None:
    shutil.copytree(source, target, copy_function=shutil.copyfile, ignore=shutil.ignore_patterns("*.hdf5"))
    shutil.rmtree(target / "lerobot_malformed_info/videos/chunk-000/observation.images.wrist")
    with (
        h5py.File(source / "robosuite_no_images.hdf5") as old,
        h5py.File(target / "robosuite_no_images.hdf5", "w") as new,
    ):
        new.create_group("data").attrs.update(old["data"].attrs)
        for name, demo in old["data"].items():
            copy_rows(demo, new["data"].create_group(name), slice(0, 10), len(demo["actions"]))


def as_text(value: Any) -> str:
    """Return JSON with a list of numbers or short texts on one line."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    return (
        re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda match: "[" + re.sub(r",\s*\n\s*", ", ", match[1]) + "]", text) + "\n"
    )


def write_broken_facts(originals: Path, data: Path) -> None:
    told = json.loads((originals / "expected/broken.json").read_text())
    told["broken/lerobot_malformed_info"]["mp4_files"] = len(list((data / "broken").glob("lerobot_mal*/**/*.mp4")))
    with h5py.File(data / "broken/robosuite_no_images.hdf5") as file:
        [demo] = file["data"].values()
        entry = told["broken/robosuite_no_images.hdf5"]
        entry["steps_per_demo"] = [len(demo["actions"])]
        entry["datasets_per_demo"] = {name: list(item.shape) for name, item in demo.items()}
    (data / "expected/broken.json").write_text(as_text(told))


def write_facts(originals: Path, data: Path) -> None:
    """Write `expected/`: names and descriptions of the sets as they were, the rest computed from the result."""
    trim_values(originals / "expected", data / "expected")
    for name in (*SETS, *SPLIT_SETS):
        told = json.loads((originals / f"expected/{name}.json").read_text())
        found = facts(data, name)
        if name in SETS:
            value = merged_facts(told, found)
        else:
            splits = {split: merged_facts(told["splits"][split], found["splits"][split]) for split in told["splits"]}
            value = {key: told[key] for key in FACTS if key in told} | {"splits": splits}
        (data / f"expected/{name}.json").write_text(as_text(value))


def merged_facts(told: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    value = {key: told[key] for key in FACTS if key in told}
    left_out = {name.rpartition("/")[2] for name in BRIDGE_LEFT_OUT}
    value["cameras"] = {name: size for name, size in value["cameras"].items() if name not in left_out}
    value["cameras"] |= {name: size for name, size in found.get("cameras", {}).items() if name in value["cameras"]}
    value |= {key: found[key] for key in COMPUTED if key in found}
    value["action"] = {key: told["action"][key] for key in ("source", "dim", "dtype_as_stored")} | found["action"]
    for key in (key for key in told if key.startswith("frames")):
        # Frames that are not decoded here are those of whole episodes, whose facts remain true.
        value[key] = found.get(key, told[key]) | ({"camera": told[key]["camera"]} if "camera" in told[key] else {})
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("originals", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    work: dict[str, Callable[[Path, Path], None]] = {"hdf5": trim_hdf5, "lerobot": trim_lerobot, "rlds": trim_rlds}
    for name in (*work, "broken", "expected", "LICENSES"):
        shutil.rmtree(options.target / name, ignore_errors=True)
    for name, trim in work.items():
        (options.target / name).mkdir(parents=True)
        trim(options.originals / name, options.target / name)
    trim_broken(options.originals / "broken", options.target / "broken")
    shutil.copytree(options.originals / "LICENSES", options.target / "LICENSES", copy_function=shutil.copyfile)
    (options.target / "expected").mkdir()
    write_broken_facts(options.originals, options.target)
    write_facts(options.originals, options.target)


if __name__ == "__main__":
    main()
