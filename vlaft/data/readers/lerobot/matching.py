"""Which frame of a video belongs to which row, by the rows' numbers and the times of both."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vlaft.errors import DataError

# A row may lie this many frame durations away from its frame: half a duration is what LeRobot's issue #3177
# shows to be needed, and a recorder that lost its last frame is one duration away at the last row.
_TOLERATED_FRAMES = 1.5
# Where the counts differ by no more than this share (or by one), there is a frame per row: recorders write a few
# frames before the first row or after the last one. Durations that differ by more then belong to another clock.
_ALIKE = 0.02


def match_rows(
    times: NDArray[np.float64], frames: NDArray[np.float64], start: float = 0.0
) -> tuple[NDArray[np.int64], str]:
    """Return the number of each row's frame `[n]`, never falling, and a sentence when the counts differ.

    Equal counts need no times. Otherwise `m - n` frames are too many (or too few), so row i can only have one of
    the frames i to i + (m - n): no row moves by more than the counts differ. Among those, the nearest in time is
    taken, but where the row's own number is within half a frame, or where the times are of another clock than the
    frames' and the counts nearly agree, row i has frame i.

    Args:
        times: of the rows in seconds, `[n]`, rising; from the episode's start, from the first frame, or from anywhere.
        frames: times of the frames in seconds, `[m]`, increasing; m > 0.
        start: time of the episode's start among the frames'.

    Raises:
        DataError: rows have no frame near them in time, and the counts differ by too much to do without times.
    """
    rows = np.arange(len(times))
    surplus = len(frames) - len(times)
    if surplus == 0:
        return rows, ""
    by_number = np.minimum(rows, len(frames) - 1)
    counts = f"{len(frames)} frames for {len(times)} rows"
    row_step, frame_step = _step(times), _step(frames)
    alike = abs(surplus) <= max(1, _ALIKE * len(times)) and surplus >= -1
    if alike and _other_clock(times, frames):
        return by_number, _by_number(counts, row_step, frame_step, surplus)
    lowest, highest = np.maximum(rows + min(surplus, 0), 0), np.minimum(rows + max(surplus, 0), len(frames) - 1)
    tolerated = _TOLERATED_FRAMES * (max(row_step, frame_step) or 1.0)
    best: tuple[NDArray[np.int64], NDArray[np.float64]] | None = None
    for origin in (start, float(frames[0] - times[0])):
        nearest = _nearest(times + origin, frames, by_number).clip(lowest, highest)
        error = np.abs(frames[nearest] - times - origin)
        # the time as written wins unless the other reading is clearly nearer (GR00T rows start at 0.05 s)
        if best is None or error.max() < best[1].max() - tolerated / 6:
            best = nearest, error
    assert best is not None
    chosen, error = best
    lost = np.flatnonzero(~(error <= tolerated))
    if not len(lost):
        moved = int(np.abs(chosen - rows).max())
        far = f" and up to {moved} frames from their numbers" if moved else ""
        told = f"the video has {counts}; frames were matched by time, at most {error.max():.3g} s away{far}"
        return np.maximum.accumulate(chosen), told
    if alike:
        return by_number, _by_number(counts, row_step, frame_step, surplus)
    raise DataError(
        f"the video has {counts}, and {len(lost)} steps from step {lost[0]} on have no frame within {tolerated:.3g} s;"
        " fetch the file again or drop the episode"
    )


def _nearest(
    times: NDArray[np.float64], frames: NDArray[np.float64], by_number: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the number of the frame nearest to each time `[n]`; all `by_number` when that is within half a frame."""
    if (np.abs(frames[by_number] - times) <= 0.501 * _step(frames)).all():
        return by_number
    after = np.searchsorted(frames, times).clip(0, len(frames) - 1)
    before = np.maximum(after - 1, 0)
    return np.where(np.abs(frames[before] - times) <= np.abs(frames[after] - times), before, after)


def _other_clock(times: NDArray[np.float64], frames: NDArray[np.float64]) -> bool:
    """Tell whether both the usual and the mean distance of the rows' times are unlike those of the frames'.

    Jitter changes the one, a lost row or frame the other.
    """
    if len(times) < 2 or len(frames) < 2:
        return False
    usual = _step(times), _step(frames)
    mean = (times[-1] - times[0]) / (len(times) - 1), (frames[-1] - frames[0]) / (len(frames) - 1)
    return not any(abs(rows - video) <= _ALIKE * video for rows, video in (usual, mean))


def _step(times: NDArray[np.float64]) -> float:
    """Return the usual distance of two times in seconds; 0 where there is none."""
    return float(np.median(np.diff(times))) if len(times) > 1 else 0.0


def _by_number(counts: str, row_step: float, frame_step: float, surplus: int) -> str:
    off = f"{abs(surplus)} frame" + ("s" if abs(surplus) > 1 else "")
    return (
        f"the video has {counts}, and the rows' timestamps ({row_step:.3g} s apart) do not fit its frames"
        f" ({frame_step:.3g} s apart); frames were matched by the rows' numbers, at most {off} off"
    )
