"""Episodes as a LeRobot v3.0 dataset, one folder for each while they are recorded, and then all together.

    pieces/<name>/    rows.parquet, one .mp4 per camera, episode.json
    out/              meta/, data/chunk-000/file-000.parquet, videos/<camera>/chunk-000/file-000.mp4, ...

A piece appears whole or not at all. In the dataset each episode has video files of its own (the format lets many share
one), so that nothing is encoded twice, and its rows are one row group.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vlaft.documents import WrongValue, read_as
from vlaft.errors import DataError
from vlaft.files import read_json, write_json

# H.264 with colour in full resolution, so that small coloured things are to a trained policy what they are to one that
# acts: 43 dB on Meta-World's frames at 7 kB each. With colour in half, as is common, it is 37 dB at any size.
CRF = 8
_PIXELS = "yuv444p"
_GROUP = 2  # frames between key frames, as LeRobot writes them, so that single frames are found fast
_FILES_PER_CHUNK = 1000
_QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
_INDICES = ("timestamp", "frame_index", "episode_index", "index", "task_index")

_Stats = dict[str, list[float]]


@dataclass(frozen=True)
class Shape:
    """What all episodes of a dataset have in common.

    Attributes:
        fps: steps per second.
        robot: its kind.
        action: names of an action's numbers.
        state: likewise.
    """

    fps: int
    robot: str
    action: tuple[str, ...]
    state: tuple[str, ...]


@dataclass(frozen=True)
class Piece:
    """One recorded episode on disk; of one that is left out, only how it went.

    Attributes:
        name: of its folder.
        instruction: what was to be done.
        success: whether it was.
        length: steps.
        cameras: camera to height and width.
        stats: of each camera: LeRobot's statistics, over some of its pixels.
    """

    name: str
    instruction: str
    success: bool
    length: int
    cameras: Mapping[str, tuple[int, int]]
    stats: Mapping[str, Mapping[str, list[float]]]


def write_piece(
    folder: Path,
    name: str,
    shape: Shape,
    *,
    instruction: str,
    success: bool,
    frames: Mapping[str, NDArray[np.uint8]],
    actions: NDArray[np.float32],
    states: NDArray[np.float32],
) -> Piece:
    """Write an episode; of one that failed, only that it did.

    Args:
        folder: of the pieces.
        name: of this one.
        shape: of the dataset.
        instruction: what was to be done.
        success: whether it was.
        frames: camera to frames, uint8 `[T, H, W, 3]`.
        actions: float32 `[T, A]`.
        states: float32 `[T, S]`.
    """
    aside = folder / f".{name}"
    if aside.is_dir():
        shutil.rmtree(aside)
    aside.mkdir(parents=True)
    kept = frames if success else {}
    piece = Piece(
        name,
        instruction,
        success,
        len(actions),
        {camera: (int(each.shape[1]), int(each.shape[2])) for camera, each in kept.items()},
        {camera: _image_stats(each) for camera, each in kept.items()},
    )
    if success:
        table = pa.table({"action": _vectors(actions), "observation.state": _vectors(states)})
        pq.write_table(table, aside / "rows.parquet")
        for camera, each in frames.items():
            _write_video(aside / f"{camera}.mp4", each, shape.fps)
    write_json(aside / "episode.json", asdict(piece), durable=False)
    aside.rename(folder / name)
    return read_as(Piece, asdict(piece))  # as a later call will find it


def read_piece(folder: Path, name: str) -> Piece | None:
    """Return a piece that is there.

    Raises:
        DataError: it is damaged.
    """
    path = folder / name / "episode.json"
    if not path.is_file():
        return None
    try:
        return read_as(Piece, read_json(path))
    except WrongValue as error:
        raise DataError(f"{path}: {error}; remove the folder {path.parent}") from None


def write_dataset(out: Path, pieces_folder: Path, pieces: Sequence[Piece], shape: Shape) -> int:
    """Put pieces together, in their order.

    Args:
        out: an empty folder.
        pieces_folder: where they are.
        pieces: those to take, at least one, all with the same cameras.
        shape: of the dataset.

    Returns:
        The number of steps.
    """
    cameras = {f"observation.images.{camera}": camera for camera in pieces[0].cameras}
    tasks = list(dict.fromkeys(piece.instruction for piece in pieces))
    rows, episodes, first = [], [], 0
    for number, piece in enumerate(pieces):
        table = _rows(pq.read_table(pieces_folder / piece.name / "rows.parquet"), number, first, shape.fps)
        table = table.append_column("task_index", pa.array([tasks.index(piece.instruction)] * piece.length, pa.int64()))
        rows.append(table)
        episodes.append(_episode(piece, number, first, cameras, shape.fps) | _flat(_table_stats(table)))
        for key, camera in cameras.items():
            video = out / "videos" / key / _file(number, "mp4")
            video.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(pieces_folder / piece.name / f"{camera}.mp4", video)
        first += piece.length
    data = out / "data" / _file(0, "parquet")
    data.parent.mkdir(parents=True)
    with pq.ParquetWriter(data, rows[0].schema) as writer:
        for table in rows:
            writer.write_table(table, row_group_size=len(table))
    meta = out / "meta"
    (meta / "episodes" / "chunk-000").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(episodes), meta / "episodes" / _file(0, "parquet"))
    pq.write_table(_tasks(tasks), meta / "tasks.parquet")
    stats = _table_stats(pa.concat_tables(rows)) | {
        key: _pooled([piece.stats[camera] for piece in pieces]) for key, camera in cameras.items()
    }
    write_json(meta / "stats.json", {key: _nested(key, each) for key, each in stats.items()}, durable=False)
    write_json(meta / "info.json", _info(pieces, tasks, first, cameras, shape), durable=False)
    return first


def _file(number: int, ending: str) -> str:
    chunk, file = divmod(number, _FILES_PER_CHUNK)
    return f"chunk-{chunk:03d}/file-{file:03d}.{ending}"


def _vectors(values: NDArray[np.float32]) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(values, np.float32).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _rows(table: pa.Table, number: int, first: int, fps: int) -> pa.Table:
    steps = np.arange(len(table))
    return (
        table.append_column("timestamp", pa.array((steps / fps).astype(np.float32)))
        .append_column("frame_index", pa.array(steps, pa.int64()))
        .append_column("episode_index", pa.array(np.full(len(table), number), pa.int64()))
        .append_column("index", pa.array(steps + first, pa.int64()))
    )


def _episode(piece: Piece, number: int, first: int, cameras: Mapping[str, str], fps: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "episode_index": number,
        "tasks": [piece.instruction],
        "length": piece.length,
        "data/chunk_index": 0,
        "data/file_index": 0,
        "dataset_from_index": first,
        "dataset_to_index": first + piece.length,
        "meta/episodes/chunk_index": 0,
        "meta/episodes/file_index": 0,
    }
    for key, camera in cameras.items():
        row[f"videos/{key}/chunk_index"], row[f"videos/{key}/file_index"] = divmod(number, _FILES_PER_CHUNK)
        row[f"videos/{key}/from_timestamp"], row[f"videos/{key}/to_timestamp"] = 0.0, piece.length / fps
        row |= {f"stats/{key}/{name}": _nested(key, {name: each})[name] for name, each in piece.stats[camera].items()}
    return row


def _tasks(tasks: Sequence[str]) -> pa.Table:
    """Return the instructions as pandas writes a table whose index they are, which is how LeRobot looks them up."""
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), "task": list(tasks)})
    columns = [
        {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy, "metadata": None}
        for name, kind, numpy in (("task_index", "int64", "int64"), ("task", "unicode", "object"))
    ]
    pandas = {"index_columns": ["task"], "column_indexes": [], "columns": columns, "pandas_version": "2.0.0"}
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def _info(
    pieces: Sequence[Piece], tasks: Sequence[str], steps: int, cameras: Mapping[str, str], shape: Shape
) -> dict[str, Any]:
    features: dict[str, Any] = {}
    for key, camera in cameras.items():
        height, width = pieces[0].cameras[camera]
        features[key] = {
            "dtype": "video",
            "shape": [height, width, 3],
            "names": ["height", "width", "channels"],
            "info": {
                "video.height": height,
                "video.width": width,
                "video.codec": "h264",
                "video.pix_fmt": _PIXELS,
                "video.is_depth_map": False,
                "video.fps": shape.fps,
                "video.channels": 3,
                "has_audio": False,
            },
        }
    for key, names in (("observation.state", shape.state), ("action", shape.action)):
        features[key] = {"dtype": "float32", "shape": [len(names)], "names": list(names)}
    for key in _INDICES:
        features[key] = {"dtype": "float32" if key == "timestamp" else "int64", "shape": [1], "names": None}
    place = "chunk-{chunk_index:03d}/file-{file_index:03d}"
    return {
        "codebase_version": "v3.0",
        "robot_type": shape.robot,
        "total_episodes": len(pieces),
        "total_frames": steps,
        "total_tasks": len(tasks),
        "chunks_size": _FILES_PER_CHUNK,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": shape.fps,
        "splits": {"train": f"0:{len(pieces)}"},
        "data_path": f"data/{place}.parquet",
        "video_path": f"videos/{{video_key}}/{place}.mp4",
        "features": features,
    }


def _write_video(path: Path, frames: NDArray[np.uint8], fps: int) -> None:
    import av

    with av.open(str(path), "w") as container:
        # Without looking ahead: with it, x264 now and then (1 of some 1,000 times) writes the same frames differently.
        plain = "weightp=0:mbtree=0:rc-lookahead=0"
        options = {"crf": str(CRF), "g": str(_GROUP), "bf": "0", "x264-params": plain}
        stream = container.add_stream("libx264", rate=Fraction(fps), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = _PIXELS
        stream.thread_count = 1  # as many episodes are recorded at a time as there are CPUs
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def _stats(values: NDArray[Any]) -> _Stats:
    """Return LeRobot's statistics of `[N, D]`."""
    values = values.astype(np.float64)
    stats = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    stats |= {name: np.quantile(values, share, axis=0) for name, share in _QUANTILES.items()}
    return {name: each.tolist() for name, each in stats.items()} | {"count": [len(values)]}


def _image_stats(frames: NDArray[np.uint8]) -> _Stats:
    """Return the statistics of a camera's channels, in 0 to 1, over every fourth pixel of every eighth frame."""
    some = frames[::8, ::4, ::4].reshape(-1, 3) / 255
    return _stats(some) | {"count": [len(frames[::8])]}


def _table_stats(table: pa.Table) -> dict[str, _Stats]:
    columns = {name: np.array(table[name].to_pylist()).reshape(len(table), -1) for name in table.column_names}
    return {name: _stats(values) for name, values in columns.items()}


def _pooled(parts: Sequence[Mapping[str, list[float]]]) -> _Stats:
    """Return the statistics of all parts together; quantiles are the parts' mean, as LeRobot pools them."""
    counts = np.array([part["count"][0] for part in parts], np.float64)
    weights = counts / counts.sum()

    def of(name: str) -> NDArray[np.float64]:
        return np.array([part[name] for part in parts], np.float64)

    mean = weights @ of("mean")
    variance = weights @ (of("std") ** 2 + (of("mean") - mean) ** 2)
    pooled = {"min": of("min").min(0), "max": of("max").max(0), "mean": mean, "std": np.sqrt(variance)}
    pooled |= {name: weights @ of(name) for name in _QUANTILES}
    return {name: each.tolist() for name, each in pooled.items()} | {"count": [int(counts.sum())]}


def _nested(key: str, stats: Mapping[str, list[float]]) -> dict[str, Any]:
    """Return a camera's statistics as `[3, 1, 1]`, which is how LeRobot keeps them."""
    if not key.startswith("observation.images."):
        return dict(stats)
    return {
        name: [int(value) for value in each] if name == "count" else [[[value]] for value in each]
        for name, each in stats.items()
    }


def _flat(stats: Mapping[str, _Stats]) -> dict[str, list[float]]:
    return {f"stats/{key}/{name}": each for key, part in stats.items() for name, each in part.items()}
