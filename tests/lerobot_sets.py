"""Small LeRobot sets as tests write them, and what a conversion would read of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlaft.data.layout import apply_layout
from vlaft.data.readers.lerobot.source import LeRobotReader
from vlaft.errors import DataError

CAMERA = "observation.images.top"
FPS = 10
LENGTHS = (6, 5)


def video(path: Path, levels: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for index, level in enumerate(levels):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), level, np.uint8), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def columns(number: int, length: int, first: int = 0) -> dict[str, Any]:
    return {
        "action": pa.array([[float(number), step / 10.0] for step in range(length)], pa.list_(pa.float32())),
        "observation.state": pa.array([[1.0 * step] * 3 for step in range(length)], pa.list_(pa.float32(), 3)),
        "timestamp": pa.array([step / FPS for step in range(length)], pa.float32()),
        "frame_index": pa.array(range(length), pa.int64()),
        "episode_index": pa.array([number] * length, pa.int64()),
        "index": pa.array(range(first, first + length), pa.int64()),
        "task_index": pa.array([number % 2] * length, pa.int64()),
    }


def info(version: str) -> dict[str, Any]:
    v3 = version == "v3.0"
    place = "chunk-{chunk_index:03d}/file-{file_index:03d}" if v3 else "episode_{episode_index:06d}"
    return {
        "codebase_version": version,
        "total_episodes": 2,
        "fps": FPS,
        "chunks_size": 1000,
        "splits": {"train": "0:2"},
        "data_path": f"data/{place}.parquet" if v3 else f"data/chunk-{{episode_chunk:03d}}/{place}.parquet",
        "video_path": f"videos/{{video_key}}/{place}.mp4"
        if v3
        else f"videos/chunk-{{episode_chunk:03d}}/{{video_key}}/{place}.mp4",
        "features": {
            "action": {"dtype": "float32", "shape": [2], "names": ["x", "y"]},
            "observation.state": {"dtype": "float32", "shape": [3]},
            CAMERA: {"dtype": "video", "shape": [32, 32, 3], "info": {"video.is_depth_map": False}},
        },
    }


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_v2(root: Path, videos: bool = True) -> Path:
    write_json(root / "meta/info.json", info("v2.1"))
    rows = [{"episode_index": n, "tasks": [f"task {n}"], "length": length} for n, length in enumerate(LENGTHS)]
    write_lines(root / "meta/episodes.jsonl", rows)
    write_lines(root / "meta/tasks.jsonl", [{"task_index": n, "task": f"task {n}"} for n in range(2)])
    (root / "data/chunk-000").mkdir(parents=True)
    for number, length in enumerate(LENGTHS):
        pq.write_table(pa.table(columns(number, length)), root / f"data/chunk-000/episode_{number:06d}.parquet")
        if videos:
            levels = [100 * number + 20 + 8 * step for step in range(length)]
            video(root / f"videos/chunk-000/{CAMERA}/episode_{number:06d}.mp4", levels)
    return root


def make_v3(root: Path, starts: tuple[float, ...] = (0.0, 0.6), row_group: int = 100) -> Path:
    write_json(root / "meta/info.json", info("v3.0"))
    tasks = pa.table({"task_index": [1, 0], "task": ["task 1", "task 0"]})  # not in the order of the index
    pq.write_table(tasks, root / "meta/tasks.parquet")
    tables = [pa.table(columns(n, length, first=6 * n)) for n, length in enumerate(LENGTHS)]
    (root / "data/chunk-000").mkdir(parents=True)
    pq.write_table(pa.concat_tables(tables), root / "data/chunk-000/file-000.parquet", row_group_size=row_group)
    levels = [100 * n + 20 + 8 * step for n, length in enumerate(LENGTHS) for step in range(length)]
    video(root / f"videos/{CAMERA}/chunk-000/file-000.mp4", levels)
    episodes = {
        "episode_index": [0, 1],
        "length": list(LENGTHS),
        "data/chunk_index": [0, 0],
        "data/file_index": [0, 0],
        f"videos/{CAMERA}/chunk_index": [0, 0],
        f"videos/{CAMERA}/file_index": [0, 0],
        f"videos/{CAMERA}/from_timestamp": list(starts),
        f"videos/{CAMERA}/to_timestamp": [starts[1], starts[1] + 0.5],
    }
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    pq.write_table(pa.table(episodes), root / "meta/episodes/chunk-000/file-000.parquet")
    return root


def with_two_cameras(real: Path, root: Path) -> Path:
    """Copy a v3.0 set of one camera to `root`, with its film once more as the film of a wrist camera."""
    shutil.copytree(real, root)
    value = json.loads((root / "meta/info.json").read_text())
    (old,) = (name for name in value["features"] if name.startswith("observation.images."))
    names = ("observation.images.front", "observation.images.wrist")
    feature = value["features"].pop(old)
    value["features"] |= dict.fromkeys(names, feature)
    write_json(root / "meta/info.json", value)
    for name in names:
        shutil.copytree(root / "videos" / old, root / "videos" / name)
    shutil.rmtree(root / "videos" / old)
    for path in (root / "meta/episodes").rglob("*.parquet"):
        table = pq.read_table(path)
        kept = {name: table[name] for name in table.column_names if old not in name}
        placed = {name: table[name] for name in table.column_names if old in name}
        for camera in names:
            kept |= {name.replace(old, camera): column for name, column in placed.items()}
        pq.write_table(pa.table(kept), path)
    return root


def edit_info(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = root / "meta/info.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_rows(root: Path, number: int, **changed: Any) -> None:
    """Replace columns of one episode's file; None drops one."""
    length = len(next((values for values in changed.values() if values is not None), range(LENGTHS[number])))
    table = columns(number, length) | changed
    table = {name: values for name, values in table.items() if values is not None}
    pq.write_table(pa.table(table), root / f"data/chunk-000/episode_{number:06d}.parquet")


def read_all(root: Path) -> tuple[LeRobotReader, list[Any]]:
    """Read everything there is, as a conversion would."""
    source = LeRobotReader(root)
    episodes = [apply_layout(source.read(ref), source.layout) for ref in source.episodes()]
    for episode in episodes:
        for frames in episode.cameras.values():
            assert len(list(frames.read(range(episode.length)))) == episode.length
    return source, episodes


def refused(root: Path, pattern: str) -> None:
    with pytest.raises(DataError, match=pattern) as caught:
        read_all(root)
    assert "\n" not in str(caught.value)


def warned(root: Path, pattern: str) -> list[Any]:
    import re

    source, episodes = read_all(root)
    assert any(re.search(pattern, text) for text in source.warnings), source.warnings
    assert all("\n" not in text for text in source.warnings)
    return episodes
