"""Arrays and frames of one episode in an HDF5 file, read only when they are asked for.

Nothing here keeps a file open between reads, so that episodes can be pickled and used in worker processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from numpy.typing import NDArray

from vlaft.data.codec import MAX_PIXELS, decode_image, largest_unfolded
from vlaft.data.readers.hdf5.access import (
    MAX_ROW_BYTES,
    MAX_STEPS,
    guarded,
    is_numeric,
    need_dataset,
    opened,
    read_array,
)
from vlaft.errors import DataError
from vlaft.observation.images import Image

# The view that shows the whole scene comes first: it becomes the main camera, the only one that OpenVLA sees.
_MAIN_WORDS = ("agentview", "cam_high", "primary", "front", "top", "main", "base", "third", "static", "head", "ext")
_WRIST_WORDS = ("wrist", "eye_in_hand", "hand", "gripper")
_BLOCK_BYTES = 2**26  # of a chunk
_READ_BYTES = 2**20  # of small chunks read at once


@dataclass(frozen=True)
class LazyArrays(Mapping[str, NDArray[np.generic]]):
    """Datasets of one episode, each read whole on access.

    Attributes:
        file: the HDF5 file.
        paths: our name of an array to its path in the file.
        where: file and episode, for messages.
        length: rows that are kept; a row more is an observation after the last action.
        shifts: by array, how many steps it is moved: row t holds what the file has at t + shift, held at the ends.
    """

    file: Path
    paths: Mapping[str, str]
    where: str
    length: int
    shifts: Mapping[str, int] = field(default_factory=dict)

    def __getitem__(self, name: str) -> NDArray[np.generic]:
        path = self.paths[name]
        with opened(self.file) as file:
            values = read_array(need_dataset(file, path, self.where), self.where)[: self.length]
        shift = self.shifts.get(name, 0)
        return values[np.clip(np.arange(len(values)) + shift, 0, len(values) - 1)] if shift else values

    def __contains__(self, name: object) -> bool:
        return name in self.paths  # Mapping's own would read the array

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class FrameFormat:
    """How the frames of one camera are stored.

    Attributes:
        encoding: `"raw"` pixels or `"jpeg"` (any encoded image: JPEG, PNG ...).
        layout: `"HWC"` or `"CHW"`, for raw pixels.
        range: `"uint8"` 0..255, or `"float01"` 0..1, for raw pixels.
        rotate: counter-clockwise turn in degrees that makes the stored frame upright.
        swap_rb: True where red and blue are exchanged.
    """

    encoding: Literal["raw", "jpeg"] = "raw"
    layout: Literal["HWC", "CHW"] = "HWC"
    range: Literal["uint8", "float01"] = "uint8"
    rotate: Literal[0, 90, 180, 270] = 0
    swap_rb: bool = False


@dataclass(frozen=True)
class Hdf5Frames:
    """The frames of one camera over one episode: rows of one dataset, decoded on demand."""

    file: Path
    dataset: str
    length: int
    where: str
    format: FrameFormat = FrameFormat()

    def __len__(self) -> int:
        return self.length

    def read(self, indices: Sequence[int]) -> Iterator[Image]:
        """Yield the frames of `indices`, each uint8 `[height, width, 3]` RGB; every chunk is read once."""
        with opened(self.file) as file:
            dataset = need_dataset(file, self.dataset, self.where)
            check_frames(dataset, self.format, self.where)
            chunk = _rows_per_chunk(dataset)
            together = chunk * max(1, _READ_BYTES // max(chunk * _row_bytes(dataset), 1))
            start, block = 0, None
            for position, index in enumerate(indices):
                step = f"{self.where}, camera '{self.dataset}', step {index}"
                if not 0 <= index < len(dataset):
                    raise DataError(f"{step}: there are only {len(dataset)} frames")
                if block is None or not start <= index < start + len(block):
                    start = index - index % chunk
                    wanted = (i for i in indices[position : position + together] if index <= i < start + together)
                    stop = start + chunk * ((max(wanted) - start) // chunk + 1)
                    block = _read_block(dataset, start, stop, chunk, step)
                    if len(block) < min(stop, len(dataset)) - start:
                        together = chunk  # a later chunk is damaged: go on one by one, to name its step
                yield _to_image(block[index - start], self.format, step)


def _read_block(dataset: h5py.Dataset, start: int, stop: int, chunk: int, where: str) -> NDArray[np.generic]:
    """Return rows `start` to `stop`, or only the first chunk of them where a later one is damaged."""
    if stop - start > chunk:
        try:
            with guarded(where):
                return np.asarray(dataset[start:stop])
        except DataError:
            stop = start + chunk
    with guarded(where):
        return np.asarray(dataset[start:stop])


def detect_encoding(dataset: h5py.Dataset) -> Literal["raw", "jpeg"]:
    """Return `"jpeg"` for rows of bytes: variable-length uint8, zero-padded uint8 `[T, P]`, or byte strings."""
    return "raw" if dataset.dtype.kind in "biuf" and dataset.ndim != 2 else "jpeg"


def frame_format(dataset: h5py.Dataset, said: Mapping[str, Any]) -> FrameFormat:
    """Return how the frames are stored: as is `said`, by the names of `FrameFormat`, else as shape and type suggest."""
    shape: tuple[int, ...] = dataset.shape or ()
    channels_first = len(shape) == 4 and shape[1] in (1, 3, 4) and shape[3] not in (1, 3, 4)
    likely = {
        "encoding": detect_encoding(dataset),
        "layout": "CHW" if channels_first else "HWC",
        "range": "float01" if dataset.dtype.kind == "f" else "uint8",
    }
    return FrameFormat(**{**likely, **said})


def is_camera(dataset: h5py.Dataset) -> bool:
    """Tell whether the dataset looks like raw colour frames: uint8 `[T, H, W, 3 or 4]`."""
    shape = dataset.shape
    return shape is not None and is_numeric(dataset) and dataset.dtype == np.uint8 and shape[3:] in ((3,), (4,))


def check_frames(dataset: h5py.Dataset, format: FrameFormat, where: str) -> None:
    """Refuse a dataset that can't be frames in this format.

    Raises:
        DataError: its shape or type says otherwise; the sentence says what was expected.
    """
    with guarded(f"{where}: camera '{dataset.name}'"):
        shape, dtype = dataset.shape, dataset.dtype
        described = f"{where}: camera '{dataset.name}' of shape {shape} and type {dtype}"
        if not shape or shape[0] > MAX_STEPS:
            raise DataError(f"{described} is no sequence of frames")
        if format.encoding == "jpeg":
            inner = h5py.check_vlen_dtype(dtype)
            padded = dtype.kind in "ui" and dtype.itemsize == 1 and len(shape) == 2
            texts = dtype.kind in "SV" and dtype.names is None and len(shape) == 1
            bytes_each = inner is not None and np.dtype(inner).kind in "ui" and np.dtype(inner).itemsize == 1
            if not (padded or texts or (bytes_each and len(shape) == 1)):
                raise DataError(
                    f"{described} holds no encoded images (expected: variable-length uint8 [T], or uint8 [T, bytes])"
                )
        else:
            kinds = "u" if format.range == "uint8" and dtype.kind == "u" else "f"
            channels = len(shape) == 4 and shape[3 if format.layout == "HWC" else 1]
            if dtype.kind not in kinds or (dtype.kind == "u" and dtype.itemsize != 1) or channels not in (1, 3, 4):
                wanted = "[T, height, width, 3]" if format.layout == "HWC" else "[T, 3, height, width]"
                raise DataError(f"{described} holds no raw frames (expected: {format.range} {wanted})")
            if not 0 < np.prod(shape[1:], dtype=object) <= 4 * MAX_PIXELS:
                raise DataError(f"{described} has frames of a size that can't be right")
        if not dtype.hasobject:
            row = int(np.prod(shape[1:], dtype=object)) * dtype.itemsize
            most = 4 * min(MAX_ROW_BYTES, largest_unfolded(dataset.id.get_storage_size()))
            if row > MAX_ROW_BYTES or _chunk_bytes(dataset) > most:
                raise DataError(
                    f"{described} is stored in pieces too large to be right ({_chunk_bytes(dataset)} bytes)"
                )


def main_first(cameras: Sequence[str]) -> list[str]:
    """Sort camera names: scene cameras first, then unknown ones, wrist cameras last."""

    def rank(name: str) -> tuple[int, str]:
        short = name.rsplit("/", 1)[-1].lower()
        if any(word in short for word in _WRIST_WORDS):
            return len(_MAIN_WORDS) + 1, name
        return next((i for i, word in enumerate(_MAIN_WORDS) if word in short), len(_MAIN_WORDS)), name

    return sorted(cameras, key=rank)


def short_names(cameras: Sequence[str]) -> dict[str, str]:
    """Name cameras by the last part of their path, without `_image` or `_rgb` where that stays unique."""
    shorts = [path.rsplit("/", 1)[-1].removesuffix("_image").removesuffix("_rgb") for path in cameras]
    if len(set(shorts)) < len(shorts):
        shorts = [path.replace("/", "_") for path in cameras]
    return dict(zip(shorts, cameras, strict=True))


def _chunk_bytes(dataset: h5py.Dataset) -> int:
    return int(np.prod(dataset.chunks, dtype=object)) * dataset.dtype.itemsize if dataset.chunks else 0


def _row_bytes(dataset: h5py.Dataset) -> int:
    return int(np.prod(dataset.shape[1:], dtype=object)) * dataset.dtype.itemsize


def _rows_per_chunk(dataset: h5py.Dataset) -> int:
    """A chunk's rows, so that none is decompressed twice, unless they would not fit."""
    return max(1, min(dataset.chunks[0] if dataset.chunks else 1, _BLOCK_BYTES // max(_row_bytes(dataset), 1)))


def _to_image(row: object, format: FrameFormat, where: str) -> Image:
    if format.encoding == "jpeg":
        data = row if isinstance(row, bytes) else np.asarray(row).tobytes()
        image = decode_image(data, where, swap_rb=format.swap_rb)
    else:
        image = _to_pixels(np.asarray(row), format, where)
        if format.swap_rb:
            image = image[..., ::-1]
    return np.ascontiguousarray(np.rot90(image, k=format.rotate // 90))


def _to_pixels(pixels: NDArray[np.generic], format: FrameFormat, where: str) -> Image:
    if pixels.dtype.kind == "f":
        values = pixels.astype(np.float32)
        top = 1.0 if format.range == "float01" else 255.0
        # resampling overshoots a little; anything beyond that is another convention
        if not np.isfinite(values).all() or values.min() < -0.05 * top or values.max() > 1.05 * top:
            raise DataError(
                f"{where}: the frame has values from {values.min():.4g} to {values.max():.4g} where {format.range}"
                f" means 0 to {top:.0f}; give the camera another range (uint8 or float01)"
            )
        pixels = np.rint(np.clip(values * (255.0 / top), 0, 255)).astype(np.uint8)
    image = pixels.astype(np.uint8, copy=False)
    if format.layout == "CHW":
        image = image.transpose(1, 2, 0)
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image[:, :, :3]
