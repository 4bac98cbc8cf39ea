"""The frames of one episode inside a video file, decoded in order.

A video is opened twice: once to list the presentation times of its packets (nothing is decoded, so a wrong
length is known before any work), once to decode from the episode's first key frame onwards. Nothing ever
seeks per frame: in long-GOP h264 that is fifty times slower than decoding in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlaft.data.codec import MAX_PIXELS
from vlaft.data.readers.lerobot.matching import match_rows
from vlaft.data.readers.lerobot.sharing import Place
from vlaft.errors import DataError
from vlaft.observation.images import Image


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
