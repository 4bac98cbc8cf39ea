"""The frames of one episode inside a video file, decoded in order.

A video is opened twice: once to list the presentation times of its packets (nothing is decoded, so a wrong
length is known before any work), once to decode from the episode's first key frame onwards. Nothing ever
seeks per frame: in long-GOP h264 that is fifty times slower than decoding in order.

Which frames are the episode's is told by the times of the video's own frames, where it shares the video with others
(LeRobot v3.0, `Place`): start times are often wrong, summed in floating point (LeRobot's issue #3177), from one step
too few, for another rate, or never written. The lengths tell them right wherever the video has as many frames as the
episodes have steps. Which of them belongs to which row, rows' numbers and the times of both tell (`match_rows`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlaft.data.codec import MAX_PIXELS
from vlaft.errors import DataError
from vlaft.observation.images import Image

# A row may lie this many frame durations away from its frame: half a duration is what LeRobot's issue #3177
# shows to be needed, and a recorder that lost its last frame is one duration away at the last row.
_TOLERATED_FRAMES = 1.5
# Where the counts differ by no more than this share (or by one), there is a frame per row: recorders write a few
# frames before the first row or after the last one. Durations that differ by more then belong to another clock.
_ALIKE = 0.02


@dataclass(frozen=True)
class VideoFrames:
    """The frames of one episode, one per row; frame i belongs to row i where the counts agree, else by `match_rows`.

    Attributes:
        path: the video; any container and codec that FFmpeg reads.
        where: names episode and camera in messages.
        times: time of each row in seconds from the episode's start, `[T]` float64.
        fps: rate that the metadata claim, or None.
        start: where the episode starts in the video, in seconds; None when the video holds this episode alone.
        stop: where it ends (exclusive; the time of its last frame is taken for that too), or None for
            `start + T / fps`.
        place: its place among the episodes that share the video, where that is known: start and stop are then
            doubted by the video's own times.
        warnings: gets a sentence when start and stop were not believed, or the numbers of frames and rows differ.
    """

    path: Path
    where: str
    times: NDArray[np.float64]
    fps: float | None = None
    start: float | None = None
    stop: float | None = None
    place: Place | None = None
    warnings: list[str] = field(default_factory=list, compare=False, repr=False)

    def __len__(self) -> int:
        """Return T, after checking that every row has a frame.

        Raises:
            DataError: the video is damaged, or frames are missing.
        """
        return len(self._alignment[0])

    def read(self, indices: Sequence[int]) -> Iterator[Image]:
        """Yield the frames of `indices` (increasing), each uint8 `[height, width, 3]` RGB."""
        row_pts, seek = self._alignment
        wanted = [(int(index), int(row_pts[index])) for index in indices]
        if not wanted:
            return
        with _open_video(self.path, self.where) as (container, stream):
            if seek is not None:
                container.seek(seek, stream=stream, backward=True)
            position = 0
            for pts, picture in _decode(container, stream, self.path, self.where, {pts for _, pts in wanted}):
                while position < len(wanted) and wanted[position][1] == pts:
                    yield picture
                    position += 1
                if position == len(wanted):
                    return
                if wanted[position][1] <= pts:
                    break  # the decoder left out a damaged frame, or frames were asked for in falling order
        raise DataError(
            f"{self.path}: {self.where}, step {wanted[position][0]}: the frame cannot be decoded (damaged video);"
            " fetch the file again or drop the episode"
        )

    @cached_property
    def _alignment(self) -> tuple[NDArray[np.int64], int | None]:
        """Presentation time of each row's frame in stream ticks `[T]`, and the tick to seek to (None: no seek)."""
        with _open_video(self.path, self.where) as (container, stream):
            tick = float(stream.time_base)
            if self.start is None:
                pts, seek = _demux(container, stream, None, None), None
            else:
                first, last = self._window(int(stream.frames), float(stream.average_rate or 0))
                pts, seek = _demux_window(container, stream, max(round(first / tick), 0), round(last / tick))
        if len(pts) == 0:
            raise DataError(f"{self.path}: {self.where}: the video has no frames here; fetch the file again")
        try:
            chosen, told = match_rows(self.times, (pts * tick).astype(np.float64), self.start or 0.0)
        except DataError as error:
            raise DataError(f"{self.path}: {self.where}: {error}") from error
        if told:
            self.warnings.append(f"{self.where}: {told}")
        return pts[chosen], seek

    def _window(self, frames: int, rate: float) -> tuple[float, float]:
        """Return the times in the video between which the episode's frames are shown, in seconds.

        Args:
            frames: number of frames in the whole video, as its header says.
            rate: frames per second, as its header says; 0 where it doesn't.

        Raises:
            DataError: the episodes that share this video cannot be told apart.
        """
        assert self.start is not None
        rates = [rate for rate in (self.fps, rate) if rate] or [1.0]
        stop = self.start + len(self.times) / rates[0] if self.stop is None else self.stop
        steps = [(stop - self.start) * rate - len(self.times) for rate in rates]
        if not any(abs(more) < 0.5 for more in steps):
            # a stop one step short is the time of the last frame, which belongs to the episode
            stop += next((1 / rate for rate, more in zip(rates, steps, strict=True) if abs(more + 1) < 0.5), 0.0)
        if self.place is None:
            margin = 0.5 / max(rates)
            return self.start - margin, stop - margin
        where = f"{self.path}: {self.where}"
        first, last, told = self.place.window(stop, frames, rate, lambda: _list_times(self.path), where)
        if told:
            self.warnings.append(f"{self.path}: {told}")
        return first, last


def _list_times(path: Path) -> NDArray[np.float64]:
    """Return the times in seconds at which a video shows its frames, `[F]` increasing."""
    state = path.stat()
    return _list_times_once(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=64)  # the episodes of a shared video all ask for the same
def _list_times_once(path: Path, size: int, modified_ns: int) -> NDArray[np.float64]:
    with _open_video(path, "which several episodes share") as (container, stream):
        return np.asarray(_demux(container, stream, None, None) * float(stream.time_base), np.float64)


@contextmanager
def _open_video(path: Path, where: str) -> Iterator[tuple[Any, Any]]:
    """Open a video and turn FFmpeg's errors, at whatever moment they come, into ours."""
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"{path}: {where}: the file has no video stream")
            stream = container.streams.video[0]
            context = stream.codec_context
            if context is None:
                raise DataError(f"{path}: {where}: no decoder for this video's codec is installed")
            if stream.time_base is None or not 0 < context.width * context.height <= MAX_PIXELS:
                raise DataError(f"{path}: {where}: the video's header is damaged; fetch the file again")
            if str(context.pix_fmt).startswith(("gray1", "gray9")):
                raise DataError(
                    f"{path}: {where}: the video is {context.pix_fmt}, a depth camera; choose cameras in colour"
                )
            yield container, stream
    except FileNotFoundError as error:
        raise DataError(f"{path}: {where}: the video does not exist") from error
    except (av.FFmpegError, OSError, ValueError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(
            f"{path}: {where}: the video cannot be read ({' '.join(str(reason).split())[:120]}); fetch the file again"
        ) from error


def _demux(container: Any, stream: Any, first: int | None, last: int | None) -> NDArray[np.int64]:
    """Return the sorted presentation times of the packets between `first` and `last` (exclusive)."""
    times = []
    for packet in container.demux(stream):
        if packet.pts is None or packet.is_discard:
            continue  # the flushing packet at the end, and what an edit list cuts away
        if last is not None and packet.dts is not None and packet.dts >= last:
            break
        if (first is None or packet.pts >= first) and (last is None or packet.pts < last):
            times.append(packet.pts)
    return np.array(sorted(times), dtype=np.int64)


def _demux_window(container: Any, stream: Any, first: int, last: int) -> tuple[NDArray[np.int64], int]:
    """Return the presentation times within a window, and where to seek to so that all of them can be decoded.

    A seek goes by decoding time, so with reordered frames it may land on a key frame that is shown after the
    window's first frame; reading then starts at the head of the file.
    """
    container.seek(first, stream=stream, backward=True)
    landed = next((packet.pts for packet in container.demux(stream) if packet.pts is not None), None)
    seek = first if landed is not None and landed <= first + 1 else 0
    container.seek(seek, stream=stream, backward=True)
    return _demux(container, stream, first, last), seek


def _decode(container: Any, stream: Any, path: Path, where: str, wanted: set[int]) -> Iterator[tuple[int, Image]]:
    """Yield presentation time and pixels of every decoded frame; only those `wanted` are converted to RGB."""
    from av.video.reformatter import VideoReformatter

    reformatter = VideoReformatter()  # shared, so that the colour conversion is set up once and not per frame
    empty: Image = np.zeros((0, 0, 3), np.uint8)
    for frame in container.decode(stream):
        if frame.pts is None:
            continue
        if frame.pts not in wanted:
            yield frame.pts, empty
            continue
        if frame.is_corrupt or frame.width * frame.height > MAX_PIXELS:
            raise DataError(
                f"{path}: {where}: the frame at {float(frame.pts * stream.time_base):.3f} s is damaged;"
                " fetch the file again or drop the episode"
            )
        pixels = reformatter.reformat(frame, format="rgb24").to_ndarray()
        yield frame.pts, np.asarray(pixels, np.uint8)


@dataclass(frozen=True)
class Place:
    """One episode among all that the metadata know of in a video.

    Attributes:
        starts: where each of them starts in seconds, never falling.
        stops: where each ends; None where the metadata do not say.
        lengths: their numbers of steps; 0 where the metadata do not say.
        number: which one this is.
    """

    starts: tuple[float, ...]
    stops: tuple[float | None, ...]
    lengths: tuple[int, ...]
    number: int

    def window(
        self, stop: float, frames: int, rate: float, list_times: Callable[[], NDArray[np.float64]], where: str
    ) -> tuple[float, float, str]:
        """Return the times between which this episode's frames are shown, and a sentence if starts were not believed.

        Args:
            stop: where the metadata have it end.
            frames: number of frames in the whole video, as its header says.
            rate: frames per second, as its header says; 0 where it doesn't.
            list_times: returns the times of all its frames; only called when the header does not settle the matter.
            where: names video and episode in messages.

        Raises:
            DataError: the episodes overlap, and nothing tells where each of them lies.
        """
        before = [0, *accumulate(self.lengths)]
        known = 0 not in self.lengths
        starts = np.array(self.starts)
        if known and rate and frames == before[-1] and (np.abs(starts * rate - before[:-1]) <= 0.5).all():
            start = self.starts[self.number]
            return start - 0.5 / rate, start + (self.lengths[self.number] - 0.5) / rate, ""
        times = list_times()
        half = 0.5 * float(np.median(np.diff(times))) if len(times) > 1 else 0.0
        if known and len(times) == before[-1]:
            drifted = (np.abs(starts - times[before[:-1]]) > half).any()
            told = "start times drifted from the episodes' lengths; the lengths were believed" if drifted else ""
            ends = np.append(times, times[-1] + 1.0)  # anything behind the last frame
            return float(times[before[self.number]]), float(ends[before[self.number + 1]]), told
        self._refuse_doubtful(times, half, where)
        following = self.starts[self.number + 1 :][:1]
        return self.starts[self.number] - half, min((stop, *following)) - half, ""

    def _refuse_doubtful(self, times: NDArray[np.float64], half: float, where: str) -> None:
        """Refuse start times that are nearer to each other than the episodes are long, or may have been summed so.

        Overlapping ones are right all the same where every episode has frames and the last one ends with the video:
        then single videos that lack frames were joined, one after the other. Where stops are one step short, the next
        start may have been counted from there; one episode that begins or ends where it should tells that it wasn't.
        """
        starts, lengths = np.array(self.starts), np.maximum(self.lengths, 1)
        frames_per_step = min(1.0, len(times) / lengths.sum())
        gaps = np.diff(starts) - lengths[:-1] * 2 * half * frames_per_step
        overlapping = np.flatnonzero(gaps < -half * frames_per_step)
        counts = np.diff(np.append(np.searchsorted(times, starts - half), len(times)))
        ends_with_video = lengths[-1] - counts[-1]
        what = f"{where}: {len(starts)} episodes share the video's {len(times)} frames, and "
        remedy = "; correct from_timestamp in meta/episodes, or fetch the whole dataset again"
        if len(overlapping) and not ((counts > 0).all() and 0 <= ends_with_video <= 1):
            first = overlapping[0]
            raise DataError(
                f"{what}by their start times they overlap: one of {lengths[first]} steps starts at"
                f" {starts[first]:.3f} s, the next at {starts[first + 1]:.3f} s; which frames belong to which cannot be"
                f" told{remedy}"
            )
        stop, start = self.stops[self.number], self.starts[self.number]
        short = stop is not None and abs(stop - start - (lengths[self.number] - 1) * 2 * half) < half
        if short and start > half and ends_with_video != 0 and not (np.abs(gaps) < half).any():
            raise DataError(
                f"{what}they are listed as ending one step early, at their last frame; whether the start times were"
                f" counted from there, and are early too, cannot be told{remedy}"
            )


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
