"""Pictures of episodes: a moving one (GIF or MP4), and a contact sheet."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image as PillowImage
from PIL import ImageDraw, ImageFont

from vlaft.environments.episodes import EpisodeOutcome
from vlaft.errors import UsageError
from vlaft.observation.images import Image

_SIDE = 252  # pixels of a frame's longer side in a film, and half of that on a contact sheet
_CAPTION = 30  # pixels below a frame
_COLUMNS = 8  # frames of one episode on a contact sheet
_LONGEST = 150  # frames of a film; of longer episodes, every second or third frame is shown
_INK, _PAPER = (28, 39, 51), (255, 255, 255)
_OUTCOME = {True: ((26, 127, 75), "done"), False: ((180, 60, 40), "failed")}


def write_film(path: Path, episodes: Sequence[EpisodeOutcome], *, fps: int = 5, columns: int = 3) -> None:
    """Write a film in which episodes run side by side, each with its instruction and how it ended.

    Args:
        path: ends in `.gif` or `.mp4`.
        episodes: with frames.
        fps: frames per second.
        columns: episodes beside each other.

    Raises:
        UsageError: another ending.
    """
    if path.suffix not in (".gif", ".mp4"):
        raise UsageError(f"{path}: a film ends in .gif or .mp4")
    longest = max(len(episode.frames) for episode in episodes)
    every = -(-longest // _LONGEST)
    size = _size(episodes, _SIDE)
    columns = min(columns, len(episodes))
    # the last frame stays for a second
    indices = [*range(0, longest - 1, every), *[longest - 1] * (fps + 1)]
    shots = [_grid([_shot(episode, index, size) for episode in episodes], columns) for index in indices]
    if path.suffix == ".gif":
        # One palette for all, so that colours stay what they are from frame to frame; an octree keeps small bright
        # things, which a median cut gives up for shades of the background.
        some = PillowImage.fromarray(np.concatenate([shots[0], shots[len(shots) // 2], shots[-1]]))
        palette = some.quantize(255, method=PillowImage.Quantize.FASTOCTREE)
        pictures = [
            PillowImage.fromarray(shot).quantize(palette=palette, dither=PillowImage.Dither.NONE) for shot in shots
        ]
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=1000 // fps, loop=0, optimize=True)
    else:
        _write_mp4(path, shots, fps)


def write_contact_sheet(path: Path, episodes: Sequence[EpisodeOutcome]) -> None:
    """Write a PNG with a row per episode: up to eight frames from the first to the last, evenly spread."""
    size = _size(episodes, _SIDE // 2)
    rows = []
    for episode in episodes:
        chosen = np.linspace(0, len(episode.frames) - 1, min(_COLUMNS, len(episode.frames))).round().astype(int)
        frames = [_enlarged(episode.frames[index], size) for index in chosen]
        blank = np.full_like(frames[0], 255)
        frames += [blank] * (_COLUMNS - len(frames))
        strip = np.concatenate([part for frame in frames for part in (frame, _gap(frame))][:-1], axis=1)
        rows.append(np.concatenate([_caption(strip.shape[1], episode, ended=True), strip]))
    PillowImage.fromarray(np.concatenate(rows)).save(path)


def _shot(episode: EpisodeOutcome, index: int, size: tuple[int, int]) -> Image:
    frame = _enlarged(episode.frames[min(index, len(episode.frames) - 1)], size)
    return np.concatenate([frame, _caption(frame.shape[1], episode, ended=index >= len(episode.frames) - 1)])


def _size(episodes: Sequence[EpisodeOutcome], side: int) -> tuple[int, int]:
    """Return width and height of every frame: those of the first one, with `side` pixels along the longer."""
    height, width = episodes[0].frames[0].shape[:2]
    factor = side / max(height, width)
    return max(round(width * factor), 1), max(round(height * factor), 1)


def _enlarged(frame: Image, size: tuple[int, int]) -> Image:
    return np.asarray(PillowImage.fromarray(frame).resize(size, PillowImage.Resampling.BICUBIC))


def _caption(width: int, episode: EpisodeOutcome, *, ended: bool) -> Image:
    canvas = PillowImage.new("RGB", (width, _CAPTION), _PAPER)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    pen.text((4, 6), " ".join(episode.instruction.split()), _INK, font)
    if ended:
        colour, word = _OUTCOME[episode.success]
        left = width - 4 - pen.textlength(word, font)
        pen.rectangle((left - 6, 0, width, _CAPTION), _PAPER)
        pen.text((left, 6), word, colour, font)
    return np.asarray(canvas)


def _gap(frame: Image) -> Image:
    return np.full((frame.shape[0], 4, 3), 255, np.uint8)


def _grid(shots: Sequence[Image], columns: int) -> Image:
    blank = np.full_like(shots[0], 255)
    filled = [*shots, *[blank] * (-len(shots) % columns)]
    rows = []
    for start in range(0, len(filled), columns):
        parts = [part for shot in filled[start : start + columns] for part in (shot, _gap(shot))]
        rows.append(np.concatenate(parts[:-1], axis=1))
    return np.concatenate(rows)


def _write_mp4(path: Path, shots: Sequence[Image], fps: int) -> None:
    import av

    height, width = (size - size % 2 for size in shots[0].shape[:2])  # H.264 wants even sizes
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "20"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for shot in shots:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(shot[:height, :width]), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
