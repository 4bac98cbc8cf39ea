"""What the `meta` folder of a LeRobot dataset (v2.0, v2.1, v3.0) says, checked against what lies on disk.

Metadata are often wrong (templates, camera lists, counts, splits); data decide, and a sentence in `warnings`
says what was believed instead. Binary columns and pickles are never loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlaft.data.readers.lerobot.files import (
    Files,
    Number,
    as_int,
    choose_video,
    fill_template,
    list_files,
    read_json,
    read_json_lines,
)
from vlaft.data.readers.lerobot.rows import read_records
from vlaft.data.readers.lerobot.video import Place
from vlaft.errors import DataError


@dataclass(frozen=True)
class Span:
    """Where one episode lies in a video: path relative to the root; seconds, None when the file is the episode.

    `place` is its place among the episodes that share the video.
    """

    path: str
    start: float | None = None
    stop: float | None = None
    place: Place | None = None


@dataclass(frozen=True, kw_only=True)
class EpisodeMeta:
    """One episode as the metadata describe it; `number` is LeRobot's episode_index."""

    number: int
    data: str
    tasks: tuple[str, ...] = ()
    length: int | None = None
    videos: Mapping[str, Span] = field(default_factory=dict)
    split: str | None = None


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """The checked metadata of a dataset; `cameras` are those with a video for every episode."""

    root: Path
    version: str
    fps: float | None
    features: Mapping[str, Mapping[str, Any]]
    tasks: Mapping[int, str]
    episodes: tuple[EpisodeMeta, ...]
    cameras: tuple[str, ...]
    modality: Mapping[str, Any]
    warnings: tuple[str, ...]


def read_metadata(root: Path) -> Metadata:
    """Read and check the metadata of the dataset in `root`.

    Raises:
        DataError: this is no LeRobot dataset, or it lacks what cannot be done without.
    """
    warnings: list[str] = []
    info = _read_info(root)
    files = list_files(root)
    features = {str(key): value for key, value in info["features"].items() if isinstance(value, dict)}
    version = _version(info, files, root, warnings)
    fps = _fps(info, warnings)
    tasks = _read_tasks(root, warnings)
    if files.by_episode:
        episodes = _episodes_v2(root, info, files, warnings)
    else:
        episodes = _episodes_v3(root, info, files, warnings)
    total = info.get("total_episodes")
    if total is not None and total != len(episodes):
        warnings.append(
            f"info.json says {str(total)[:20]} episodes where {len(episodes)} exist; those that exist are read"
        )
    videos, episodes = _doubt_cameras(features, files, episodes, warnings)
    modality_path = root / "meta" / "modality.json"
    modality: object = {}
    if modality_path.is_file():
        try:
            modality = read_json(modality_path)
        except DataError as error:
            warnings.append(f"{error}; it was left out")
    return Metadata(
        root=root,
        version=version,
        fps=fps,
        features=features,
        tasks=tasks,
        episodes=tuple(_apply_splits(info, episodes, warnings)),
        cameras=videos,
        modality=modality if isinstance(modality, dict) else {},
        warnings=tuple(warnings),
    )


def is_depth(feature: Mapping[str, Any]) -> bool:
    """Whether a camera's feature entry marks it as a depth map, in any of the places that writers use."""
    places = [feature, feature.get("info"), feature.get("video_info")]
    return any(
        place.get(key) is True
        for place in places
        if isinstance(place, dict)
        for key in ("is_depth_map", "video.is_depth_map")
    )


def _read_info(root: Path) -> dict[str, Any]:
    path = root / "meta" / "info.json"
    if not path.is_file():
        raise DataError(f"{root}: there is no meta/info.json, so this is no LeRobot dataset")
    info = read_json(path)
    if not isinstance(info, dict) or not isinstance(info.get("features"), dict) or not info["features"]:
        keys = ", ".join(sorted(map(str, info))[:12]) if isinstance(info, dict) else type(info).__name__
        raise DataError(f"{path}: this is not LeRobot's info.json, it has no 'features' (it has: {keys or 'nothing'})")
    return info


def _version(info: Mapping[str, Any], files: Files, root: Path, warnings: list[str]) -> str:
    """Return "v2.0", "v2.1" or "v3.0"; how the files lie decides between 2 and 3."""
    said = info.get("codebase_version")
    if files.by_episode:
        lie_as = "v2.1" if (root / "meta" / "episodes_stats.jsonl").is_file() else "v2.0"
        if said in ("v2.0", "v2.1"):
            return str(said)
    else:
        lie_as = "v3.0"
        if isinstance(said, str) and said.startswith("v3."):
            return said[:8]
    warnings.append(
        f"info.json says codebase_version {str(said)[:20]!r}, the files lie as in {lie_as}; read as {lie_as}"
    )
    return lie_as


def _fps(info: Mapping[str, Any], warnings: list[str]) -> float | None:
    fps = info.get("fps")
    if isinstance(fps, int | float) and not isinstance(fps, bool) and 0 < fps <= 10_000 and math.isfinite(fps):
        return float(fps)
    warnings.append(f"info.json gives no usable fps ({str(fps)[:20]}); the control rate is unknown, give it as fps=...")
    return None


def _read_tasks(root: Path, warnings: list[str]) -> dict[int, str]:
    """Return the tasks table by task_index; the text is in a column `task` or in the pandas index."""
    lines, table = root / "meta" / "tasks.jsonl", root / "meta" / "tasks.parquet"
    rows: Iterator[dict[str, Any]] = iter(())
    if table.is_file():
        rows = iter(read_records(table))
    elif lines.is_file():
        rows = read_json_lines(lines)
    else:
        warnings.append("meta has no tasks table; instructions come from the episodes list")
    tasks: dict[int, str] = {}
    for row in rows:
        index = as_int(row.get("task_index"))
        texts = [row.get(key) for key in ("task", "__index_level_0__", "index")] + list(row.values())
        text = next((text for text in texts if isinstance(text, str)), None)
        if index is not None and text is not None and tasks.setdefault(index, text) != text:
            raise DataError(
                f"{table if table.is_file() else lines}: task_index {index} stands for '{tasks[index][:80]}' and for"
                f" '{text[:80]}', so the rows do not tell which; correct the table, or take apart what was merged"
            )
    return tasks


def _episodes_v2(root: Path, info: Mapping[str, Any], files: Files, warnings: list[str]) -> list[EpisodeMeta]:
    listed: dict[int, dict[str, Any]] = {}
    path = root / "meta" / "episodes.jsonl"
    if path.is_file():
        for row in read_json_lines(path):
            number = as_int(row.get("episode_index"))
            if number is not None:
                listed[number] = row
    present = sorted(number for _, number in files.data)
    absent, unlisted = sorted(set(listed) - set(present)), sorted(set(present) - set(listed))
    if absent:
        warnings.append(
            f"{len(absent)} episodes of episodes.jsonl have no parquet file (the first is {absent[0]}); left out"
        )
    if unlisted:
        warnings.append(
            f"{len(unlisted)} episodes are not in episodes.jsonl (the first is {unlisted[0]}); read all the same"
        )
    size = as_int(info.get("chunks_size")) or 1000
    episodes = []
    for number in present:
        chunk = number // max(size, 1)
        fields: dict[str, int | str] = {"episode_chunk": chunk, "chunk_index": chunk, "episode_index": number}
        data = files.data[0, number]
        said = _said(info.get("data_path"), fields, data, warnings)
        videos = {}
        for camera, paths in files.videos.items():
            if (0, number) in paths:
                named = {**fields, "video_key": camera}
                videos[camera] = Span(_find_video(info, files, paths[0, number], (data, said), named, warnings))
        row = listed.get(number, {})
        episodes.append(_episode(number, row, data, videos))
    return episodes


def _episodes_v3(root: Path, info: Mapping[str, Any], files: Files, warnings: list[str]) -> list[EpisodeMeta]:
    folder = root / "meta" / "episodes"
    tables = sorted(folder.rglob("*.parquet")) if folder.is_dir() else []
    rows: dict[int, dict[str, Any]] = {}
    listed_in: dict[int, Path] = {}
    for table in tables:
        wanted = ("episode_index", "tasks", "length", "data/", "videos/")
        for row in read_records(table, wanted):
            number = as_int(row.get("episode_index"))
            if number is None or number < 0:
                continue
            if number in rows:
                raise DataError(
                    f"{listed_in[number]} and {table} both list episode {number}, so these are two recordings; give"
                    " each a folder with its own meta, data and videos, or remove one table"
                )
            rows[number], listed_in[number] = row, table
    if not rows:
        raise DataError(f"{folder}: no episode is listed here; was the download complete?")
    episodes = []
    for number, row in sorted(rows.items()):
        place = _place(row, "data/")
        fields: dict[str, int | str] = {"chunk_index": place[0], "file_index": place[1], "episode_index": number}
        data = files.data.get(place, "")
        if data:
            _said(info.get("data_path"), fields, data, warnings)
        videos = {}
        for camera, paths in files.videos.items():
            place = _place(row, f"videos/{camera}/")
            start = row.get(f"videos/{camera}/from_timestamp")
            if place in paths and isinstance(start, int | float) and math.isfinite(start) and start >= 0:
                named = {**fields, "chunk_index": place[0], "file_index": place[1], "video_key": camera}
                path = _find_video(info, files, paths[place], ("", None), named, warnings)
                stop = row.get(f"videos/{camera}/to_timestamp")
                good = isinstance(stop, int | float) and start < stop < math.inf
                videos[camera] = Span(path, float(start), float(stop) if good and stop is not None else None)
        episodes.append(_episode(number, row, data, videos))
    episodes = _with_places(episodes)  # those without data too: their frames lie between those of the others
    lost = [episode.number for episode in episodes if not episode.data]
    if lost:
        warnings.append(f"{len(lost)} episodes of meta/episodes have no data file (the first is {lost[0]}); left out")
    if len(lost) == len(episodes):
        raise DataError(
            f"{root}: none of the {len(rows)} listed episodes has its data file; was the download complete?"
        )
    return [episode for episode in episodes if episode.data]


def _episode(number: int, row: Mapping[str, Any], data: str, videos: Mapping[str, Span]) -> EpisodeMeta:
    tasks, length = _texts(row.get("tasks")), as_int(row.get("length"))
    return EpisodeMeta(number=number, data=data, tasks=tasks, length=length, videos=videos)


def _place(row: Mapping[str, Any], prefix: str) -> Number:
    chunk, file = as_int(row.get(f"{prefix}chunk_index")), as_int(row.get(f"{prefix}file_index"))
    return (-1, -1) if chunk is None or file is None else (chunk, file)


def _said(template: object, fields: Mapping[str, int | str], actual: str, warnings: list[str]) -> str | None:
    """Return the path that a template of info.json gives; a warning says if it is not the actual one."""
    path = fill_template(template, fields)
    said = f"the path template '{str(template)[:120]}' of info.json does not fit; files were searched by number instead"
    if path != actual and said not in warnings:
        warnings.append(said)
    return path


def _find_video(
    info: Mapping[str, Any],
    files: Files,
    videos: tuple[str, ...],
    rows: tuple[str, str | None],
    fields: Mapping[str, int | str],
    warnings: list[str],
) -> str:
    """Return one of `videos`, which all have an episode's number; `rows` is the file of its rows, found and said."""
    template = info.get("video_path")
    chosen = choose_video(files.root, videos, rows[0], (rows[1], fill_template(template, fields)))
    _said(template, fields, chosen, warnings)
    return chosen


def _with_places(episodes: list[EpisodeMeta]) -> list[EpisodeMeta]:
    """Tell each episode which others share its videos."""
    by_file: dict[tuple[str, str], list[tuple[float, int]]] = {}
    for position, episode in enumerate(episodes):
        for camera, span in episode.videos.items():
            by_file.setdefault((camera, span.path), []).append((span.start or 0.0, position))
    placed = [dict(episode.videos) for episode in episodes]
    for (camera, _), members in by_file.items():
        members.sort()
        place = Place(
            starts=tuple(start for start, _ in members),
            stops=tuple(episodes[position].videos[camera].stop for _, position in members),
            lengths=tuple(_plausible(episodes[position].length) for _, position in members),
            number=0,
        )
        for number, (_, position) in enumerate(members):
            placed[position][camera] = replace(placed[position][camera], place=replace(place, number=number))
    return [replace(episode, videos=videos) for episode, videos in zip(episodes, placed, strict=True)]


def _plausible(length: int | None) -> int:
    return length if length is not None and 0 < length < 2**31 else 0


def _doubt_cameras(
    features: Mapping[str, Mapping[str, Any]], files: Files, episodes: list[EpisodeMeta], warnings: list[str]
) -> tuple[tuple[str, ...], list[EpisodeMeta]]:
    """Return the cameras that have a video for every episode, and the episodes to read."""
    listed = [key for key, feature in features.items() if feature.get("dtype") == "video"]
    counts = {camera: sum(camera in episode.videos for episode in episodes) for camera in [*listed, *files.videos]}
    cameras, partial = [], []
    for camera, count in counts.items():
        if is_depth(features.get(camera, {})):
            warnings.append(f"camera '{camera}' is a depth video; left out")
        elif count == 0:
            fetch = " (git-LFS did not fetch it)" if files.lfs_videos else ""
            warnings.append(f"camera '{camera}' has no video for any episode{fetch}; left out")
        elif count < len(episodes):
            partial.append(camera)
        else:
            cameras.append(camera)
            if camera not in listed:
                warnings.append(f"camera '{camera}' is not in info.json but has a video for every episode; read")
    if partial and not cameras and not any(feature.get("dtype") == "image" for feature in features.values()):
        # the only cameras there are: better fewer episodes than no picture
        best = max(partial, key=lambda camera: counts[camera])
        kept = [episode for episode in episodes if best in episode.videos]
        counts = {camera: sum(camera in episode.videos for episode in kept) for camera in partial}
        cameras = [camera for camera in partial if counts[camera] == len(kept)]
        partial = [camera for camera in partial if camera not in cameras]
        names = " and ".join(f"'{camera}'" for camera in cameras)
        warnings.append(
            f"only {len(kept)} of {len(episodes)} episodes have a video of camera {names}, and no camera"
            " is complete; the other episodes are left out"
        )
        episodes = kept
    for camera in partial:
        warnings.append(
            f"camera '{camera}' has a video for only {counts[camera]} of {len(episodes)} episodes; left out"
        )
    return tuple(cameras), episodes


def _apply_splits(info: Mapping[str, Any], episodes: list[EpisodeMeta], warnings: list[str]) -> list[EpisodeMeta]:
    """Give each episode its split; a single split says nothing, so it counts as none."""
    splits = info.get("splits")
    if not isinstance(splits, dict) or len(splits) < 2:
        return episodes
    ranges = {}
    for name, text in splits.items():
        first, _, last = str(text).partition(":")
        if not (first.isdecimal() and last.isdecimal() and len(first) < 10 and len(last) < 10):
            warnings.append(f"info.json: split '{str(name)[:40]}' is no range of episodes; splits were left out")
            return episodes
        ranges[str(name)] = range(int(first), int(last))
    return [
        replace(episode, split=next((name for name, part in ranges.items() if episode.number in part), None))
        for episode in episodes
    ]


def _texts(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    return tuple(text for text in value if isinstance(text, str)) if isinstance(value, list) else ()
