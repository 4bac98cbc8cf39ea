"""Cameras that are pictures: encoded ones in a parquet column, or loose files, one per frame."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vlaft.data.codec import decode_image
from vlaft.data.readers.lerobot.files import inside
from vlaft.data.readers.lerobot.meta import Metadata, is_depth
from vlaft.data.readers.lerobot.rows import open_parquet
from vlaft.errors import DataError
from vlaft.observation.images import Image

_MAX_IMAGE_FILE = 2**28  # bytes
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


@dataclass(frozen=True)
class ImageColumnFrames:
    """Encoded pictures in a parquet column (struct of bytes and path, or plain bytes).

    Attributes:
        path: the parquet file.
        column: the column's name.
        positions: rows of the episode in the file, `[T]` increasing.
        root: the dataset's folder, for pictures that the column only names.
        where: names episode and camera in messages.
    """

    path: Path
    column: str
    positions: NDArray[np.int64]
    root: Path
    where: str

    def __len__(self) -> int:
        return len(self.positions)

    def read(self, indices: Sequence[int]) -> Iterator[Image]:
        """Yield the frames of `indices` (increasing); batches of rows keep memory small."""
        wanted = [(int(index), int(self.positions[index])) for index in indices]
        done, offset = 0, 0
        with open_parquet(self.path, self.where) as file:
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if done < len(wanted) and wanted[done][1] < offset + rows:
                    start = offset
                    for batch in file.iter_batches(
                        batch_size=64, row_groups=[group], columns=[self.column], use_threads=False
                    ):
                        column = batch.column(batch.schema.get_field_index(self.column))
                        while done < len(wanted) and start <= wanted[done][1] < start + len(batch):
                            index, position = wanted[done]
                            where = f"{self.path}: {self.where}, step {index}"
                            yield decode_image(self._bytes(column[position - start].as_py(), where), where)
                            done += 1
                        start += len(batch)
                        if done == len(wanted):
                            return
                offset += rows

    def _bytes(self, value: object, where: str) -> bytes:
        data = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(data, bytes):
            return data
        named = value.get("path") if isinstance(value, dict) else None
        if not isinstance(named, str) or not named:
            raise DataError(f"{where}: the row has no picture")
        return read_picture(self.root / inside(named, f"{where}: the picture's path '{named[:200]}'"), where)


@dataclass(frozen=True)
class PictureFiles:
    """Loose pictures, one file per frame, in order."""

    paths: tuple[Path, ...]
    where: str

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: Sequence[int]) -> Iterator[Image]:
        """Yield the frames of `indices`."""
        for index in indices:
            where = f"{self.paths[index]}: {self.where}, step {index}"
            yield decode_image(read_picture(self.paths[index], where), where)


def read_picture(path: Path, where: str) -> bytes:
    """Return the bytes of a picture file; a DataError when it is missing or absurdly large."""
    try:
        if path.stat().st_size > _MAX_IMAGE_FILE:
            raise DataError(f"{where}: the picture file is larger than is read ({_MAX_IMAGE_FILE} bytes)")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{where}: the picture file cannot be read ({error.strerror})") from error
