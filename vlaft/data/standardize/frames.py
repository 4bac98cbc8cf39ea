"""Standardizing steps on the frames: rotate, flip, swap colours. Frames stay undecoded until they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from vlaft.data.episode import Episode, MappedFrames
from vlaft.errors import ConfigError, DataError, did_you_mean
from vlaft.observation.images import Image


def rotate(episode: Episode, *, degrees: int = 180, cameras: list[str] | None = None) -> Episode:
    """Rotate every frame counter-clockwise by a multiple of 90 degrees.

    180 is what OpenVLA does with LIBERO's frames, in its dataset and in its evaluation alike.

    Args:
        episode: the episode.
        degrees: multiple of 90; negative is clockwise.
        cameras: our camera names, or None for all.
    """
    if degrees % 90:
        raise ConfigError(f"frames rotate by multiples of 90 degrees, not by {degrees}")
    return _map_frames(episode, cameras, partial(_rotated, quarter_turns=degrees // 90 % 4))


def flip_rows(episode: Episode, *, cameras: list[str] | None = None) -> Episode:
    """Put the bottom row on top (a mirror, not a rotation), for renderers that write OpenGL's order."""
    return _map_frames(episode, cameras, _flipped)


def swap_red_blue(episode: Episode, *, cameras: list[str] | None = None) -> Episode:
    """Exchange red and blue, for frames that were written as BGR and read as RGB."""
    return _map_frames(episode, cameras, _swapped)


def _rotated(image: Image, quarter_turns: int) -> Image:
    return np.ascontiguousarray(np.rot90(image, quarter_turns))


def _flipped(image: Image) -> Image:
    return np.ascontiguousarray(image[::-1])


def _swapped(image: Image) -> Image:
    return np.ascontiguousarray(image[..., ::-1])


def _map_frames(episode: Episode, cameras: list[str] | None, function: Callable[[Image], Image]) -> Episode:
    known = list(episode.cameras)
    for name in cameras or ():
        if name not in episode.cameras:
            raise DataError(
                f"episode '{episode.name}' has no camera '{name}'{did_you_mean(name, known)}"
                f" (it has: {', '.join(known) or 'none'})"
            )
    chosen = known if cameras is None else cameras
    mapped = {name: MappedFrames(f, function) if name in chosen else f for name, f in episode.cameras.items()}
    return replace(episode, cameras=mapped)
