"""Ctrl-C and SIGTERM as a request to stop after the step under way."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


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
