"""Cameras of a LeRobot dataset that are pictures instead of videos: columns of encoded images, or loose files."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa

from vlaft.data.readers.lerobot_files import inside
from vlaft.data.readers.lerobot_meta import Metadata, is_depth
from vlaft.errors import DataError

_FRAME = re.compile(r"^frame[_-](\d{1,9})\.(?:png|jpe?g)$", re.IGNORECASE)


def find_pictures(meta: Metadata, schema: pa.Schema, warnings: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the cameras that are columns, and those that are loose files.

    A struct of `bytes` and `path` is a picture whatever the metadata say; plain bytes are one only where the
    metadata say `image`, since other binary columns hold pickles.
    """
    columns, loose = [], []
    said = {key for key, feature in meta.features.items() if feature.get("dtype") == "image"}
    for part in schema:
        names = {child.name for child in part.type} if pa.types.is_struct(part.type) else set()
        binary = pa.types.is_binary(part.type) or pa.types.is_large_binary(part.type)
        if {"bytes", "path"} <= names or (binary and part.name in said):
            columns.append(part.name)
    for key in sorted(said - set(columns)):
        count = sum(_folder(meta.root, key, episode.number) is not None for episode in meta.episodes)
        if count == len(meta.episodes):
            loose.append(key)
        else:
            warnings.append(f"camera '{key}' has pictures for only {count} of {len(meta.episodes)} episodes; left out")
    for key in [key for key in (*columns, *loose) if is_depth(meta.features.get(key, {}))]:
        warnings.append(f"camera '{key}' holds depth maps; left out")
        columns, loose = [name for name in columns if name != key], [name for name in loose if name != key]
    return tuple(columns), tuple(loose)


def list_pictures(root: Path, key: str, number: int) -> tuple[Path, ...]:
    """Return the loose pictures of one episode by frame number.

    Raises:
        DataError: there are none.
    """
    folder = _folder(root, key, number)
    files = [(int(match[1]), path) for path in folder.iterdir() if (match := _FRAME.match(path.name))] if folder else []
    if not files:
        raise DataError(f"{root}: camera '{key}' has no pictures of episode {number}; was the download complete?")
    return tuple(path for _, path in sorted(files))


def _folder(root: Path, key: str, number: int) -> Path | None:
    for name in (f"episode_{number:06d}", f"episode-{number:06d}"):
        folder = root / inside(f"images/{key}/{name}", f"meta/info.json: the camera '{key[:80]}'")
        if "\0" not in key and len(key) < 200 and folder.is_dir():
            return folder
    return None
