"""Where an episode lies in a video that it shares with others (LeRobot v3.0), by the times of the video's own frames.

Start times are often wrong: summed in floating point (LeRobot's issue #3177), from one step too few, for another
rate, or never written. The lengths tell them right wherever the video has as many frames as the episodes have steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from vlaft.errors import DataError


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
