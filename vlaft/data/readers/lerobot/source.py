"""Reader of LeRobot datasets, v2.0, v2.1 and v3.0, without the LeRobot package.

Opening reads metadata and one parquet footer; reading an episode reads its rows; frames are decoded when asked for.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vlaft.data.episode import Episode, Frames, gather
from vlaft.data.layout import Layout
from vlaft.data.readers.lerobot.meta import EpisodeMeta, Metadata, read_metadata
from vlaft.data.readers.lerobot.pictures import ImageColumnFrames, PictureFiles, find_pictures, list_pictures
from vlaft.data.readers.lerobot.rows import (
    ColumnArrays,
    RowReader,
    Slices,
    chunk_columns,
    is_list,
    is_number,
    is_text,
    modality_slices,
    read_schema,
)
from vlaft.data.readers.lerobot.video import VideoFrames
from vlaft.data.readers.reader import EpisodeRef
from vlaft.data.sentences import word
from vlaft.errors import DataError

_RATE_OFF = 0.05  # how far the timestamps' rate may be off the one claimed, as a share of it
_LABELS = frozenset({"valid", "invalid", "success", "failure", "true", "false"})
_TEXT_COLUMNS = ("task", "language_instruction", "instruction")
_TELLING = ("task_description", "task", "instruction", "language", "coarse_action")
_ACTIONS = ("action", "actions")
_STATES = ("observation.state", "state")
_PREFIX = re.compile(r"^(?:observation\.)?(?:images?|video)\.|^observation\.")
_MAIN = ("top", "ego", "front", "base", "exterior", "high", "main")
_WRIST = ("wrist", "hand", "gripper")


class LeRobotReader:
    """An opened LeRobot dataset (a `Reader`); picklable, so that worker processes need not open it again.

    Arrays are the number columns under their own names, plus `action.<part>` and `state.<part>` where
    `meta/modality.json` (GR00T) names slices. Cameras are the feature keys with a video or picture for every episode.
    """

    def __init__(self, path: Path, options: Mapping[str, object] | None = None) -> None:
        """Open the dataset in the folder `path`.

        Raises:
            DataError: this is no LeRobot dataset, its data were not downloaded, or an option is unknown.
        """
        if options:
            raise DataError(f"{path}: the LeRobot reader has no option '{min(options)}'")
        self.path = Path(path)
        self._meta = read_metadata(self.path)
        self.name = _name(self.path)
        self.format = f"lerobot-{self._meta.version}"
        self.warnings: list[str] = _Sentences(self._meta.warnings)
        self._rows = RowReader()
        self._whole_files = not self._meta.version.startswith("v3")
        schema = read_schema(self.path / self._meta.episodes[0].data)
        self._chunks = chunk_columns(schema)
        widths = column_widths(schema, self._meta.features)
        self._slices = modality_slices(self._meta.modality, widths, self.warnings)
        self._columns, self._loose = find_pictures(self._meta, schema, self.warnings)
        cameras = [*self._meta.cameras, *self._columns, *self._loose]
        order = {key: position for position, key in enumerate(self._meta.features)}
        self._cameras = tuple(sorted(dict.fromkeys(cameras), key=lambda key: order.get(key, len(order))))
        self.layout: Layout = default_layout(
            self._meta.features, widths, self._slices, self._chunks, self._cameras, self._meta.fps, self.warnings
        )

    def episodes(self) -> Sequence[EpisodeRef]:
        """List the episodes by LeRobot's episode_index."""
        return [
            EpisodeRef(position, f"episode_{meta.number:06d}", meta.split, (meta.data, meta.number))
            for position, meta in enumerate(self._meta.episodes)
        ]

    def read(self, ref: EpisodeRef) -> Episode:
        """Read one episode's rows.

        Raises:
            DataError: the episode's parquet file is damaged.
        """
        meta = self._meta.episodes[ref.index]
        path = self.path / meta.data
        rows = self._rows.read(path, meta.number, whole_file=self._whole_files, where=ref.name, warnings=self.warnings)
        length = len(rows.positions)
        if meta.length is not None and meta.length != length:
            self.warnings.append(
                f"{ref.name}: the metadata say {meta.length} steps, the file has {length}; the file was believed"
            )
        arrays = ColumnArrays(rows.table, self._slices, self._chunks, f"{path}: {ref.name}")
        times = self._times(arrays, length, ref.name)
        self._check_order(arrays, f"{path}: {ref.name}")
        instruction, own = find_instruction(rows.table, self._meta, meta.tasks, ref.name, self.warnings)
        cameras: dict[str, Frames] = {}
        for key in self._cameras:
            where = f"{ref.name}, camera '{key}'"
            if key in self._columns:
                cameras[key] = ImageColumnFrames(path, key, rows.positions, self.path, where)
            elif key in self._loose:
                cameras[key] = PictureFiles(list_pictures(self.path, key, meta.number), where)
            else:
                cameras[key] = self._video(meta, key, times, where)
        return Episode(
            index=ref.index,
            name=ref.name,
            length=length,
            instruction=instruction,
            instructions=own,
            arrays=arrays,
            cameras=cameras,
            split=meta.split,
            fps=self._meta.fps,
        )

    def _video(self, meta: EpisodeMeta, key: str, times: NDArray[np.float64], where: str) -> VideoFrames:
        span = meta.videos[key]
        return VideoFrames(
            path=self.path / span.path,
            where=where,
            times=times,
            fps=self._meta.fps,
            start=span.start,
            stop=span.stop,
            place=span.place,
            warnings=self.warnings,
        )

    def _times(self, arrays: ColumnArrays, length: int, where: str) -> NDArray[np.float64]:
        """Return each row's time in seconds `[T]`: the timestamp column, or the rate's grid where that is unusable."""
        fps = self._meta.fps
        grid = np.arange(length) / (fps or 1.0)
        if "timestamp" not in arrays:
            return grid
        with np.errstate(invalid="ignore"):  # what a damaged file holds is judged below
            times = np.asarray(arrays["timestamp"], np.float64).reshape(length, -1)
        if times.shape[1] != 1 or not np.isfinite(times).all() or (np.diff(times[:, 0]) < 0).any():
            self.warnings.append(f"{where}: the column timestamp does not rise; times were taken from fps")
            return grid
        if fps is not None and length > 1:
            between = np.diff(times[:, 0])
            spacing = float(np.median(between))
            # a pause moves the mean alone, an uneven clock the median alone
            if min(abs(spacing * fps - 1), abs(float(between.mean()) * fps - 1)) > _RATE_OFF:
                measured = f"{1 / spacing:.3g}" if spacing > 0 else "..."
                self.warnings.append(
                    f"{where}: the timestamps are {spacing:.3g} s apart while info.json says {fps:g} fps;"
                    f" fps was believed (give fps={measured} otherwise)"
                )
        return times[:, 0]

    def _check_order(self, arrays: ColumnArrays, where: str) -> None:
        """Refuse rows out of order: frame i belongs to row i. One column alone that falls is only warned about."""
        with np.errstate(invalid="ignore"):
            falling = [
                name
                for name in ("frame_index", "timestamp")
                if name in arrays and (np.diff(np.asarray(arrays[name], np.float64).reshape(-1)) < 0).any()
            ]
        if len(falling) == 2:
            raise DataError(
                f"{where}: the rows are out of order (frame_index and timestamp fall); sort them by frame_index"
            )
        if falling == ["frame_index"]:
            self.warnings.append(f"{where}: the column frame_index does not rise; the order of the rows was believed")


class _Sentences(list[str]):
    """Sentences, each once: reading an episode again repeats nothing."""

    def append(self, sentence: str) -> None:
        if sentence not in self:
            super().append(sentence)


def looks_like_lerobot(path: Path) -> bool:
    """Whether the folder has a `meta` folder with LeRobot's files, whatever is in them."""
    meta = path / "meta"
    return any((meta / name).exists() for name in ("info.json", "episodes.jsonl", "tasks.jsonl", "tasks.parquet"))


def download(repo_id: str) -> Path:
    """Fetch a dataset from the Hugging Face Hub (or find it in the local cache) and return its folder.

    Only metadata, parquet files, videos and pictures are fetched, nothing else that the repository holds.

    Raises:
        DataError: there is no such dataset, it is gated, or the Hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    patterns = ["meta/*.json", "meta/*.jsonl", "meta/*.parquet", "meta_data/info.json"]
    patterns += ["data/*.parquet", "videos/*.mp4", "video/*.mp4", "images/*.png", "images/*.jpg"]
    try:
        return Path(snapshot_download(repo_id, repo_type="dataset", allow_patterns=patterns))
    except HFValidationError as error:
        raise DataError(f"'{repo_id}' is neither a folder here nor a dataset id of the Hub (owner/name)") from error
    except GatedRepoError as error:
        raise DataError(f"'{repo_id}' is gated: accept its terms on the Hub and log in with 'hf auth login'") from error
    except RepositoryNotFoundError as error:
        raise DataError(f"the Hub has no dataset '{repo_id}' that you may read; check the id, or log in") from error
    except Exception as error:  # the Hub's client raises those of whatever HTTP library it uses
        if not isinstance(error, HfHubHTTPError | OSError | ValueError) and not type(error).__module__.startswith(
            "http"
        ):
            raise
        raise DataError(
            f"'{repo_id}' could not be fetched from the Hub ({' '.join(str(error).split())[:120]});"
            " check the connection, or give the folder of a copy"
        ) from error


def _name(path: Path) -> str:
    """Return the dataset's name: the folder's, or the repository's inside the Hub's cache."""
    folder = path.resolve()
    if folder.parent.name == "snapshots":
        folder = folder.parent.parent
    return re.sub(r"^datasets--.*--", "", folder.name)


def find_instruction(
    table: pa.Table, meta: Metadata, listed: tuple[str, ...], where: str, warnings: list[str]
) -> tuple[str, tuple[str, ...]]:
    """Return the episode's instruction and those of its rows where they differ, as `Episode` holds them.

    The instruction is empty when the dataset does not say.

    Args:
        table: the episode's rows.
        meta: the dataset's metadata, for its tasks table.
        listed: the tasks that the episodes list names, used when no column points at the tasks table.
        where: names the episode in warnings.
        warnings: gets a sentence when rows have none beside others that have, or none has one.
    """
    for name in _candidates(table, meta):
        instruction, own = gather(_texts(table.column(name), meta), where, warnings)
        if instruction:
            return instruction, own
    for text in listed:
        if _is_instruction(text):
            return text.strip(), ()
    if len(meta.tasks) == 1 and "task_index" not in table.schema.names:
        text = next(iter(meta.tasks.values()))
        if _is_instruction(text):
            return text.strip(), ()
    said = "some episodes have no instruction (no column points at a task); give it as instruction=..."
    if said not in warnings:
        warnings.append(said)
    return "", ()


def _candidates(table: pa.Table, meta: Metadata) -> Iterator[str]:
    """Yield the columns that may hold the instruction, the most trustworthy first."""
    names = table.schema.names
    if "task_index" in names:
        yield "task_index"
    yield from (name for name in _TEXT_COLUMNS if name in names and is_text(table.schema.field(name).type))
    annotation = meta.modality.get("annotation")
    keys = [
        str(entry.get("original_key", f"annotation.{part}")) if isinstance(entry, dict) else f"annotation.{part}"
        for part, entry in (annotation if isinstance(annotation, dict) else {}).items()
    ]
    keys += [name for name in names if name.startswith("annotation.")]
    for key in dict.fromkeys(keys):
        if key in names and key != "task_index" and any(word in key for word in _TELLING):
            yield key


def _texts(column: pa.ChunkedArray, meta: Metadata) -> list[str]:
    """Return the instruction that each row of a column names, blank where there is none; nothing for other columns."""
    numbers = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
    if not numbers and not is_text(column.type):
        return []
    values = column.to_pylist()
    if numbers:
        values = [None if value is None or not isfinite(value) else meta.tasks.get(int(value)) for value in values]
    return [value.strip() if isinstance(value, str) and _is_instruction(value) else "" for value in values]


def _is_instruction(text: str) -> bool:
    return bool(text.strip()) and text.strip().lower() not in _LABELS


def column_widths(schema: pa.Schema, features: Mapping[str, Mapping[str, Any]]) -> dict[str, int | None]:
    """Return the columns that hold numbers, with their width where the type or the metadata tell it."""
    widths: dict[str, int | None] = {}
    for part in schema:
        if is_number(part.type):
            widths[part.name] = 1
        elif pa.types.is_fixed_size_list(part.type) and is_number(part.type.value_type):
            widths[part.name] = part.type.list_size
        elif is_list(part.type) and is_number(part.type.value_type):
            shape = features.get(part.name, {}).get("shape")
            known = isinstance(shape, list) and len(shape) == 1 and type(shape[0]) is int and shape[0] > 0
            widths[part.name] = shape[0] if known and isinstance(shape, list) else None
    return widths


def default_layout(
    features: Mapping[str, Mapping[str, Any]],
    widths: Mapping[str, int | None],
    slices: Slices,
    chunks: Collection[str],
    cameras: Sequence[str],
    fps: float | None,
    warnings: list[str],
) -> Layout:
    """Return the layout that fits the names in use.

    Args:
        features: the feature entries of info.json.
        widths: the columns that hold numbers.
        slices: further array names, of modality.json.
        chunks: columns that hold several vectors per row.
        cameras: the cameras, in the metadata's order.
        fps: control rate in Hz.
        warnings: gets a sentence when there is no single action column, and when it holds chunks.
    """
    action = next((name for name in _ACTIONS if name in widths or name in chunks), None)
    if action is None:
        parts = sorted({name for name in (*widths, *slices) if name.startswith(("action.", "actions."))})
        if parts:
            warnings.append(
                "there is no single action column; say which parts make the action, for example"
                f" {word('action', _example(parts))} (there are: {', '.join(parts)})"
            )
        else:
            warnings.append(f"there is no action column (number columns: {', '.join(sorted(widths)) or 'none'})")
    elif action in chunks:
        warnings.append(f"column '{action}' holds action chunks, several vectors per row, which cannot be read")
    names = _flat_names(features.get(action or "", {}).get("names"))
    width = widths.get(action or "")
    return Layout(
        action=(action or "action",),
        state=next(((name,) for name in _STATES if name in widths), ()),
        cameras=_short_names(sorted(cameras, key=_rank)),
        fps=fps,
        action_names=names if len(names) == width else (),
    )


def _example(parts: Sequence[str]) -> list[str]:
    """Return OpenVLA-like parts when the dataset has them: end-effector deltas, then the gripper."""
    deltas = [part for part in parts if re.search(r"delta_(eef|ee|tcp)_(pos|rot|position|rotation)$", part)]
    gripper = [part for part in parts if "gripper" in part]
    closing = [part for part in gripper if re.search("close|open", part)] or gripper
    return [*deltas, *closing[:1]] if deltas else list(parts)


def _flat_names(names: object) -> tuple[str, ...]:
    """Return dimension names out of a list, a nested list or `{"motors": [...]}`."""
    if isinstance(names, dict) and len(names) == 1:
        names = next(iter(names.values()))
    if isinstance(names, list) and len(names) == 1 and isinstance(names[0], list):
        names = names[0]
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return tuple(names)
    return ()


def _short_names(cameras: Sequence[str]) -> dict[str, str]:
    """Return short name to key, in order; keys whose short names collide keep their full names."""
    short = [re.sub(r"\W+", "_", _PREFIX.sub("", key)).strip("_") or key for key in cameras]
    return {name if short.count(name) == 1 else key: key for name, key in zip(short, cameras, strict=True)}


def _rank(key: str) -> int:
    words = key.lower()
    if any(word in words for word in _WRIST):
        return 2
    return 0 if any(word in words for word in _MAIN) else 1
