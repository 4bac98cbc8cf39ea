"""A few frames of each camera: whether they are black, of one colour, or always the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlaft.data.episode import Frames, Image
from vlaft.errors import DataError

FRAMES_PER_EPISODE = 8
THUMBNAIL_HEIGHT = 96  # pixels

_DARK = 8.0  # mean level of 0..255 below which a frame counts as black; a lens cap in a dim room stays below
_FLAT = 1.0  # standard deviation in levels below which a frame is of one colour
_STILL = 0.25  # mean difference in levels; a still scene through a lossy codec differs by more than a frozen one


@dataclass(frozen=True)
class CameraFacts:
    """What a few frames of one camera show, over one episode.

    Attributes:
        steps: which frames were looked at.
        black: how many of them are black.
        flat: how many are of one colour, black ones included.
        frozen: whether all of them are the same picture.
        thumbnails: small copies of them, where asked for.
        error: why a frame could not be decoded, or an empty text.
    """

    steps: tuple[int, ...] = ()
    black: int = 0
    flat: int = 0
    frozen: bool = False
    thumbnails: tuple[Image, ...] = ()
    error: str = ""


def look_at(frames: Frames, *, thumbnails: bool = False) -> CameraFacts:
    """Decode up to `FRAMES_PER_EPISODE` frames, from the first to the last at even distances, and measure them."""
    try:
        count = len(frames)
    except DataError as error:  # a video that is no video, or has too few frames
        return CameraFacts(error=str(error))
    if count == 0:
        return CameraFacts()
    steps = np.unique(np.linspace(0, count - 1, min(count, FRAMES_PER_EPISODE)).round().astype(int)).tolist()
    black = flat = 0
    differs = False
    first: Image | None = None
    kept: list[Image] = []
    try:
        for image in frames.read(steps):
            black += bool(image.mean() < _DARK)
            flat += bool(image.std(axis=(0, 1)).max() < _FLAT)
            if first is None:
                first = image
            elif not differs:
                differs = float(np.abs(image.astype(np.int16) - first).mean()) > _STILL
            if thumbnails:
                kept.append(thumbnail(image))
    except DataError as error:
        return CameraFacts(steps=tuple(steps), thumbnails=tuple(kept), error=str(error))
    return CameraFacts(tuple(steps), black, flat, len(steps) > 1 and not differs, tuple(kept))


def thumbnail(image: Image) -> Image:
    """Return the image shrunk to `THUMBNAIL_HEIGHT` at most (uint8 `[H', W', 3]`), the aspect ratio kept."""
    from PIL import Image as PillowImage

    height, width = image.shape[:2]
    if height <= THUMBNAIL_HEIGHT:
        return image
    size = (max(1, round(width * THUMBNAIL_HEIGHT / height)), THUMBNAIL_HEIGHT)
    return np.asarray(PillowImage.fromarray(np.ascontiguousarray(image)).resize(size, PillowImage.Resampling.BOX))


def evenly(count: int, most: int) -> Sequence[int]:
    """Return at most `most` of the numbers 0 to `count` - 1, at even distances.

    >>> list(evenly(3, 5)), list(evenly(9, 3))
    ([0, 1, 2], [0, 4, 8])
    """
    if count <= most:
        return range(count)
    return [int(position) for position in np.linspace(0, count - 1, most).round()]
