from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vlaft.data.readers.lerobot.matching import match_rows
from vlaft.errors import DataError


def grid(count: int, rate: float, start: float = 0.0) -> NDArray[np.float64]:
    return start + np.arange(count) / rate


@pytest.mark.parametrize("rate", [16.0, 18.0, 19.5, 21.0, 22.0, 25.0])
@pytest.mark.parametrize("start", [0.0, 1.7e9])
@pytest.mark.parametrize("frames", [220, 219])
def test_times_of_another_clock_move_no_row(rate: float, start: float, frames: int) -> None:
    found, told = match_rows(grid(frames - 1, rate, start), grid(frames, 20))
    np.testing.assert_array_equal(found, np.arange(frames - 1))
    assert f"{frames} frames for {frames - 1} rows" in told and "by the rows' numbers" in told
    found, _ = match_rows(grid(frames, rate, start), grid(frames - 1, 20))
    np.testing.assert_array_equal(found, [*range(frames - 1), frames - 2])


def test_half_a_frame_moves_no_row() -> None:
    for start in (-0.025, 0.024, 0.025):
        np.testing.assert_array_equal(match_rows(grid(50, 20, start), grid(51, 20))[0], np.arange(50))


def test_a_lost_row_and_a_late_start_are_seen_in_the_times() -> None:
    times = np.delete(grid(50, 20), 17)
    np.testing.assert_array_equal(match_rows(times, grid(50, 20))[0], np.delete(np.arange(50), 17))
    np.testing.assert_array_equal(match_rows(grid(50, 20, 0.05), grid(51, 20))[0], np.arange(1, 51))


def test_jitter_is_no_other_clock() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        times = grid(50, 20, 0.05) + rng.normal(0, 0.005, 50)
        np.testing.assert_array_equal(match_rows(times, grid(51, 20))[0], np.arange(1, 51))


def test_a_video_of_another_rate_is_matched_by_time() -> None:
    np.testing.assert_array_equal(match_rows(grid(50, 10), grid(100, 20))[0], np.arange(0, 100, 2))
    found, told = match_rows(grid(180, 18), grid(200, 20))
    np.testing.assert_array_equal(found, np.rint(np.arange(180) * 20 / 18))
    assert "by time, at most 0.0222 s away" in told and "up to 20 frames from their numbers" in told


def test_what_cannot_be_told_is_refused() -> None:
    for rows, frames in ((180, 170), (180, 190), (180, 100), (100, 180)):
        with pytest.raises(DataError, match=f"{frames} frames for {rows} rows"):
            match_rows(grid(rows, 22), grid(frames, 20))


@settings(max_examples=500, deadline=None)
@given(
    rows=st.integers(1, 300),
    surplus=st.integers(-6, 6) | st.integers(-300, 300),
    row_rate=st.floats(1, 120),
    rate_ratio=st.just(1.0) | st.floats(0.5, 2) | st.sampled_from([0.5, 2.0, 0.9, 1.1, 1 / 3]),
    offset=st.just(0.0) | st.floats(-2, 2) | st.floats(0, 2e9),
    jitter=st.just(0.0) | st.floats(0, 1.5),
    dropped=st.floats(0, 0.3),
    seed=st.integers(0, 2**31),
)
def test_no_row_moves_by_more_than_the_counts_differ(
    rows: int,
    surplus: int,
    row_rate: float,
    rate_ratio: float,
    offset: float,
    jitter: float,
    dropped: float,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    count = max(rows + surplus, 1)
    times = np.sort(grid(rows, row_rate) + jitter / row_rate * rng.random(rows)) + offset
    # frames lost at random places, while time passes
    numbers = np.flatnonzero(rng.random(3 * count + 20) >= dropped)[:count]
    frames = numbers / (row_rate * rate_ratio)
    count = len(frames)
    try:
        found, _ = match_rows(times, frames)
    except DataError as error:
        assert abs(count - rows) > 1, error  # one more or less never costs an episode
        return
    assert found.shape == (rows,)
    assert found.min() >= 0 and found.max() < count
    assert (np.diff(found) >= 0).all()
    assert np.abs(found - np.arange(rows)).max() <= abs(count - rows)
