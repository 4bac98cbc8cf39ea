"""Films and contact sheets, read back."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from vlaft.environments.episodes import EpisodeOutcome
from vlaft.environments.film import write_contact_sheet, write_film
from vlaft.errors import UsageError

CAPTION = 30


def episode(frames: int, *, success: bool = True, shape: tuple[int, int] = (84, 84), seed: int = 0) -> EpisodeOutcome:
    generator = np.random.default_rng(seed)
    images = [np.tile(generator.integers(0, 200, 3, np.uint8), (*shape, 1)) for _ in range(frames)]
    return EpisodeOutcome(seed, "pick up\nthe red disc", success=success, steps=frames - 1, frames=images)


def durations(path: Path) -> list[int]:
    with Image.open(path) as film:
        found = []
        for index in range(film.n_frames):
            film.seek(index)
            found.append(film.info["duration"])
        return found


def test_gif(tmp_path: Path) -> None:
    path = tmp_path / "film.gif"
    write_film(path, [episode(4), episode(7, success=False, seed=1), episode(2, seed=2), episode(3, seed=3)])
    with Image.open(path) as film:
        assert film.size == (3 * 252 + 2 * 4, 2 * (252 + CAPTION)) and film.info["loop"] == 0
    # seven pictures; the last one stays for a second more, however many copies of it are stored
    assert durations(path)[:6] == [200] * 6 and sum(durations(path)) == 7 * 200 + 1000


def test_what_a_gif_shows(tmp_path: Path) -> None:
    red, blue = (np.full((10, 20, 3), colour, np.uint8) for colour in ((220, 30, 30), (30, 30, 220)))
    path = tmp_path / "film.gif"
    write_film(path, [EpisodeOutcome(0, "x", success=True, steps=1, frames=[red, blue])])
    with Image.open(path) as film:
        assert film.size == (252, 126 + CAPTION) and film.n_frames == 2  # no empty places beside a single episode
        first = np.asarray(film.convert("RGB")).astype(int)
        film.seek(1)
        last = np.asarray(film.convert("RGB")).astype(int)
    assert abs(first[60, 100] - (220, 30, 30)).max() < 6 and abs(last[60, 100] - (30, 30, 220)).max() < 6
    right = np.s_[126:, 200:]  # where the outcome is written
    assert first[right].min() > 200 and last[right].min() < 150


def test_long_episodes_are_thinned(tmp_path: Path) -> None:
    frames = [np.full((4, 4, 3), index % 256, np.uint8) for index in range(400)]
    path = tmp_path / "film.gif"
    write_film(path, [EpisodeOutcome(0, "wait", steps=399, frames=frames)])
    assert len(durations(path)) <= 150
    with Image.open(path) as film:
        film.seek(film.n_frames - 1)
        assert film.convert("RGB").getpixel((50, 50)) == pytest.approx((399 % 256,) * 3, abs=3)


def test_mp4(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    write_film(path, [episode(4, shape=(50, 84)), episode(6, shape=(50, 84), seed=1)], fps=10, columns=2)
    with av.open(str(path)) as film:
        pictures = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
        rate = film.streams.video[0].average_rate
    assert len(pictures) == 6 + 10 and rate == 10
    assert pictures[0].shape == (150 + CAPTION, 2 * 252 + 4, 3)
    assert abs(pictures[0][-5:].astype(int) - 255).max() < 20  # paper below


def test_contact_sheet(tmp_path: Path) -> None:
    path = tmp_path / "sheet.png"
    write_contact_sheet(path, [episode(20), episode(3, success=False), episode(1)])
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape == (3 * (126 + CAPTION), 8 * 126 + 7 * 4, 3)
    rows = [pixels[index * (126 + CAPTION) + CAPTION :][:126] for index in range(3)]
    for row, shown in zip(rows, (8, 3, 1), strict=True):
        cells = [row[:, start : start + 126] for start in range(0, row.shape[1], 130)]
        assert [bool((cell != 255).any()) for cell in cells] == [True] * shown + [False] * (8 - shown)


def test_frames_of_different_sizes_get_the_first_ones(tmp_path: Path) -> None:
    episodes = [episode(2, shape=(100, 140)), episode(2, shape=(64, 64)), episode(2, shape=(1, 900))]
    write_contact_sheet(tmp_path / "sheet.png", episodes)
    write_film(tmp_path / "film.gif", episodes)
    with Image.open(tmp_path / "film.gif") as film:
        assert film.size == (3 * 252 + 2 * 4, 180 + CAPTION)


def test_other_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a film ends in \.gif or \.mp4"):
        write_film(tmp_path / "film.webm", [episode(2)])
