"""What may end a run: Ctrl-C and SIGTERM, as a request to stop after the step under way, and memory that is full."""

from __future__ import annotations

import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType

import torch

from vlaft.errors import VlaftError
from vlaft.recipe.settings import RecipeConfig
from vlaft.training.events import PeakMemory


class StopSignals:
    """Ctrl-C and SIGTERM while a run is made ready and while it trains.

    As long as there is nothing to save, either raises KeyboardInterrupt; after `defer`, the first one sets `received`
    and a second one acts as usual.
    """

    def __init__(self) -> None:
        self.received = False
        self._deferred = False
        self._previous: dict[int, object] = {}

    def defer(self) -> None:
        """From now on let the step under way finish."""
        self._deferred = True

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python refuses handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True  # before the exception, which code in between may lose
        if not self._deferred:
            raise KeyboardInterrupt
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()


_STATUS = Path("/proc/self/status")
_EVERY = 0.02  # seconds between two looks


class MemoryWatch:
    """Follows the memory that a run takes, from `with` to its end.

    On a GPU PyTorch keeps the peak. On a CPU the kernel keeps that of all resident pages together, most of which may be
    pages of the base's files that it takes back at will. So a thread looks at the two kinds apart (`RssAnon`, `RssFile`
    of `/proc/self/status`) every 20 ms; what lives shorter than that may be missed. Where there is no such file
    (macOS), all resident pages count as the process's own.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._before = self._own = self._mapped = 0

    def __enter__(self) -> MemoryWatch:
        if self._device.type != "cuda" and resident() is not None:
            self._look()
            self._before = self._own
            self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(_EVERY):
            self._look()

    def _look(self) -> None:
        own, mapped = resident() or (0, 0)
        self._own, self._mapped = max(self._own, own), max(self._mapped, mapped)

    def peak(self) -> PeakMemory:
        """Return the peak so far."""
        if self._device.type == "cuda":
            return PeakMemory(torch.cuda.max_memory_allocated(self._device), "torch.cuda.max_memory_allocated")
        if self._thread is None:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            peak = peak if sys.platform == "darwin" else peak * 1024
            return PeakMemory(peak, "resident memory of the process")
        self._look()
        return PeakMemory(self._own, "anonymous memory of the process (RssAnon)", self._before, self._mapped)


def resident() -> tuple[int, int] | None:
    """Return this process's resident bytes: anonymous ones, and pages of mapped files; None where Linux is not."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    sizes = {words[0]: 1024 * int(words[1]) for line in lines if (words := line.split())[:1] and "Rss" in words[0]}
    return (sizes["RssAnon:"], sizes["RssFile:"]) if "RssAnon:" in sizes and "RssFile:" in sizes else None


@contextmanager
def out_of_memory_told(recipe: RecipeConfig, doing: str) -> Iterator[None]:
    """Turn PyTorch's running out of memory into a sentence that says what of this recipe to change.

    Raises:
        VlaftError: the memory was not enough for what was being done.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise VlaftError(f"the GPU's memory is not enough for {doing}: {_advice(recipe)}") from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise VlaftError(f"the main memory is not enough for {doing}: {_advice(recipe)}") from error


def _advice(recipe: RecipeConfig) -> str:
    train = recipe.train
    steps = []
    if train.batch_size != 1:
        half = "train.batch_size=1" if train.batch_size == "auto" else f"train.batch_size={train.batch_size // 2}"
        steps.append(f"{half} with train.accumulation={2 * train.accumulation}")
    if train.gradient_checkpointing != "all":
        steps.append("train.gradient_checkpointing=all")
    if recipe.adapt.quantize == "none":
        steps.append("--recipe qlora32")
    listed = ", or ".join(steps) or "a larger GPU or a smaller base"
    return f"take {listed}; `vlaft report` says what fits"
