"""Where the files of a LeRobot dataset lie: what the templates say, doubted by what is there.

Templates met in the wild name the chunk `{episode_chunk}`, `{chunk_index}` or even `{episode_index}`, and folders
are called `videos` or `video`. So one walk over the folders lists what exists, and a template only decides where
it points at an existing file.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlaft.data.readers.reader import is_lfs_pointer, refuse_lfs_pointer
from vlaft.errors import DataError

_EPISODE_FILE = re.compile(r"^episode[_-](\d{1,9})\.(?:parquet|mp4)$")
_CHUNK_FILE = re.compile(r"^file[_-](\d{1,9})\.(?:parquet|mp4)$")
_CHUNK = re.compile(r"^chunk-(\d{1,9})$")
_FIELD = re.compile(r"\{(\w+)(?::0?(\d{1,2})d)?\}")
_MAX_POINTER_BYTES = 1024  # git-LFS pointers are about 130 bytes

Number = tuple[int, int]  # v2: (0, episode); v3: (chunk, file)
_MAX_BYTES = 2**29


@dataclass(frozen=True)
class Files:
    """What lies in the folder, by number and camera; paths are relative to `root`.

    Attributes:
        root: the dataset's folder.
        by_episode: one file per episode (v2.x), else many episodes per file (v3.0).
        data: parquet files.
        videos: video files by camera; of one number there may be several, in different folders.
        lfs_videos: number of video files that are git-LFS pointers (they are not in `videos`).
    """

    root: Path
    by_episode: bool
    data: dict[Number, str] = field(default_factory=dict)
    videos: dict[str, dict[Number, tuple[str, ...]]] = field(default_factory=dict)
    lfs_videos: int = 0


def list_files(root: Path) -> Files:
    """Walk over `data`, `videos` and `video`.

    Raises:
        DataError: there are no data files, two have the same number, or git-LFS never fetched them.
    """
    parquet = _walk(root, "data", ".parquet")
    if not (root / "data").is_dir():
        raise DataError(f"{root}: the folder 'data' is missing; a LeRobot dataset keeps its parquet files there")
    pointers = [path for path in parquet if _is_pointer(root / path)]
    videos = _walk(root, "videos", ".mp4") + _walk(root, "video", ".mp4")
    lfs_videos = [path for path in videos if _is_pointer(root / path)]
    if pointers or (videos and len(lfs_videos) == len(videos)):
        first = (pointers or lfs_videos)[0]
        raise DataError(
            f"{root}: {len(pointers) + len(lfs_videos)} of {len(parquet) + len(videos)} data and video files are"
            f" git-LFS pointers whose content was never downloaded (the first is {first}): run git lfs pull"
        )
    by_episode = not any(_CHUNK_FILE.match(posixpath.basename(path)) for path in parquet)
    files = Files(root, by_episode, lfs_videos=len(lfs_videos))
    for path in parquet:
        number = _number(path, by_episode)
        if number is not None and number in files.data:
            raise DataError(
                f"{root}: {files.data[number]} and {path} have the same number, so these are two recordings; give each"
                " a folder with its own meta, data and videos, or remove one file"
            )
        if number is not None:
            files.data[number] = path
    if not files.data:
        raise DataError(
            f"{root}: the folder 'data' holds no episode_*.parquet and no file-*.parquet; was the download complete?"
        )
    unfetched = set(lfs_videos)
    for path in videos:
        number = _number(path, by_episode)
        camera = "/".join(part for part in path.split("/")[1:-1] if not _CHUNK.match(part))
        if number is not None and camera and path not in unfetched:
            of_camera = files.videos.setdefault(camera, {})
            of_camera[number] = (*of_camera.get(number, ()), path)
    return files


def fill_template(template: object, fields: Mapping[str, int | str]) -> str | None:
    """Return the relative path that a template of info.json stands for; None when it cannot be understood.

    Only `{name}` and `{name:03d}` are known: `str.format` would let a dataset reach into objects.

    Raises:
        DataError: the path leaves the dataset's folder.

    >>> fill_template("data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    ...               {"episode_chunk": 0, "episode_index": 7})
    'data/chunk-000/episode_000007.parquet'
    """
    if not isinstance(template, str) or len(template) > 1000:
        return None
    if set(re.findall(r"\{(\w+)", template)) - set(fields):
        return None
    path = _FIELD.sub(lambda match: str(fields[match[1]]).zfill(int(match[2] or 0)), template)
    return None if "{" in path or "\0" in path else inside(path, f"meta/info.json: the template '{template}'")


def inside(path: str, what: str) -> str:
    """Return the relative path in its plain form; a DataError when it would leave the folder.

    Symbolic links are not followed for this: in the Hub's cache every file is a link to a store next door.
    """
    plain = posixpath.normpath(path.replace("\\", "/"))
    if posixpath.isabs(plain) or plain.split("/")[0] == ".." or re.match(r"^[A-Za-z]:", plain):
        raise DataError(f"{what} points outside of the dataset's folder; correct it")
    return plain


def choose_video(root: Path, videos: tuple[str, ...], data: str, templates: tuple[str | None, str | None]) -> str:
    """Return the video that belongs to an episode's rows: of the same chunk folder, where both lie in one.

    Args:
        root: the dataset's folder.
        videos: those of the episode's number (v2.x), or of the number that its metadata name (v3.0).
        data: the file of the rows; empty in v3.0, where the metadata name the video's own chunk.
        templates: where info.json says that data and video are, or None.

    Raises:
        DataError: several could be it, or the only one lies in another chunk than the rows.
    """
    said_data, said_video = templates
    chunk = _chunk_of(data)
    near = [path for path in videos if None in (chunk, _chunk_of(path)) or _chunk_of(path) == chunk]
    if len(near) == 1:
        return near[0]
    if said_video is not None and (said_video in near or (said_data == data and said_video in videos)):
        return said_video
    if near:
        raise DataError(
            f"{root}: {' and '.join(near)} are videos of the same camera and number; remove the one that does not"
            f" belong to {data or 'the rows'}"
        )
    raise DataError(
        f"{root}: the rows of an episode are {data}, its video is {' or '.join(videos)}, in another chunk; they may be"
        " of different recordings: put those that belong together into the same chunk"
    )


def _chunk_of(path: str) -> int | None:
    return next((int(match[1]) for part in path.split("/")[:-1] if (match := _CHUNK.match(part))), None)


def _walk(root: Path, folder: str, suffix: str) -> list[str]:
    paths = []
    for parent, folders, names in os.walk(root / folder):
        folders.sort()
        relative = Path(parent).relative_to(root).as_posix()
        paths += [f"{relative}/{name}" for name in sorted(names) if name.endswith(suffix) and name[0] != "."]
    return paths


def _number(path: str, by_episode: bool) -> Number | None:
    parts = path.split("/")
    match = (_EPISODE_FILE if by_episode else _CHUNK_FILE).match(parts[-1])
    if not match:
        return None
    return (0 if by_episode else _chunk_of(path) or 0, int(match[1]))


def _is_pointer(path: Path) -> bool:
    try:
        small = path.is_file() and path.stat().st_size <= _MAX_POINTER_BYTES
    except OSError:
        return False
    return small and is_lfs_pointer(path)


def read_json(path: Path) -> object:
    """Return the value in a JSON file.

    Raises:
        DataError: the file is empty, no JSON, or a git-LFS pointer.
    """
    return _parse(_read_text(path), str(path))


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file; lines that hold another value are passed over.

    Raises:
        DataError: a line is no JSON.
    """
    for number, line in enumerate(_read_text(path, may_be_empty=True).split("\n"), start=1):
        if line.strip():
            row = _parse(line, f"{path}, line {number}")
            if isinstance(row, dict):
                yield row


def as_int(value: object) -> int | None:
    """Return an index or count as int (whole floats too), or None for whatever is none or absurdly large."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**62 else None


def _read_text(path: Path, may_be_empty: bool = False) -> str:
    refuse_lfs_pointer(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(f"{path}: {path.stat().st_size} bytes of metadata are more than is read ({_MAX_BYTES})")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the file cannot be read as text ({error})") from error
    if not text.strip() and not may_be_empty:
        raise DataError(f"{path}: the file is empty; was the download complete?")
    return text


def _parse(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: this is no JSON ({' '.join(str(error).split())[:100]}); fetch the file again"
        ) from error
