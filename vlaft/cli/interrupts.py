"""Ctrl-C and SIGTERM end every command alike: what it was writing is cleared away, and it exits with 130."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP = (signal.SIGINT, signal.SIGTERM)
_received = False


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt in the main thread at either signal, and remember that it came."""
    global _received
    _received = False
    handled, told = _handle(_interrupt), sys.unraisablehook
    sys.unraisablehook = lambda lost: None if _received and lost.exc_type is KeyboardInterrupt else told(lost)
    try:
        yield
    finally:
        sys.unraisablehook = told
        for number, handler in handled.items():
            signal.signal(number, handler)
        _received = False


def was_interrupted() -> bool:
    """Say whether a signal came: code between here and there may have made something else of KeyboardInterrupt."""
    return _received


def check() -> None:
    """Raise the interrupt that came and got lost: destructors and weak references drop what is raised in them."""
    if _received:
        raise KeyboardInterrupt


def leave_at_once() -> None:
    """Until the command line is there, which takes a second of imports, end at either signal without a traceback."""
    _handle(_leave)


def ignore() -> None:
    """After the work is done, let nothing change how it ended."""
    for number in _handle(_leave):
        signal.signal(number, signal.SIG_IGN)


def _handle(handler: signal._HANDLER) -> dict[int, signal._HANDLER]:
    """Set a handler and return those before; a signal that is ignored, as in a shell's background job, stays so."""
    if threading.current_thread() is not threading.main_thread():  # elsewhere Python refuses handlers
        return {}
    before = {number: signal.getsignal(number) for number in STOP}
    return {number: signal.signal(number, handler) for number in STOP if before[number] != signal.SIG_IGN}


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _received
    _received = True
    raise KeyboardInterrupt


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"error: interrupted\n")
    os._exit(130)
