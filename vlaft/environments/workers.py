"""Processes of our own that call functions for us, and never outlive us.

    worker = Worker()
    worker.ask(function, argument)
    worker.answer()

A worker is a fresh interpreter that is told what to call through a pipe; what it holds lives in the modules that it
imports. It is not forked, since the process that asks holds threads and perhaps a GPU. When that process ends in
whatever way, also by SIGKILL, the system kills the worker (Linux), or the pipe's end tells it (elsewhere).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

from vlaft import errors
from vlaft.errors import VlaftError

_PATIENCE = 5.0  # seconds that workers get to close what they hold
_DIE_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG


class WorkerDied(Exception):
    """A worker ended without an answer; the text says how."""


class Defect(RuntimeError):
    """Something that is not a `VlaftError` was raised in a worker; the text is its traceback."""


class Worker:
    """One process; it is closed by `close_workers`."""

    def __init__(self) -> None:
        ours, theirs = Pipe()
        source = f"from vlaft.environments.workers import serve; serve({theirs.fileno()}, {os.getpid()})"
        # A session of its own, since Ctrl-C in a terminal is for the process that asks. What is printed goes to stderr.
        # Modules are looked for where this process looks, and nowhere else: not in the working folder first (-P).
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", source],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=2,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        theirs.close()
        self._connection = ours

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def ask(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Let the worker call a function of a module; `answer` gives what comes of it.

        Raises:
            WorkerDied: it is no more.
        """
        self._send((function, arguments))

    def answer(self) -> Any:
        """Wait for what the function returns.

        Raises:
            VlaftError: the function raised one.
            Defect: it raised something else.
            WorkerDied: the process ended.
        """
        try:
            kind, value, shown = self._connection.recv()
        except (EOFError, ConnectionError):
            raise self._death() from None
        if kind == "done":
            return value
        if kind == "defect":
            raise Defect(shown)
        error = getattr(errors, kind, VlaftError)
        raise (VlaftError if error is errors.MissingExtra else error)(value) from Defect(shown)

    def _send(self, message: Any) -> None:
        try:
            self._connection.send(message)
        except ConnectionError:
            raise self._death() from None

    def _death(self) -> WorkerDied:
        try:
            code = self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return WorkerDied("its pipe was closed")
        return WorkerDied(signal.Signals(-code).name if code < 0 else f"it exited with code {code}")


def answered(workers: Sequence[Worker]) -> list[Worker]:
    """Wait until at least one of several workers has an answer, or is no more; return all such."""
    ready = wait([worker._connection for worker in workers])
    return [worker for worker in workers if worker._connection in ready]


def close_workers(workers: Sequence[Worker]) -> None:
    """Let workers end, and kill those that take long."""
    for worker in workers:
        worker._connection.close()
    until = time.monotonic() + _PATIENCE
    for worker in workers:
        try:
            worker._process.wait(max(until - time.monotonic(), 0.01))
        except subprocess.TimeoutExpired:
            worker._process.kill()
            worker._process.wait()


def at_end(function: Callable[[], Any]) -> None:
    """Let a worker call something before it ends: earlier than `atexit`, when libraries have closed already."""
    _at_end.append(function)


def serve(descriptor: int, parent: int) -> None:
    """Be a worker: call what is asked for until the pipe ends."""
    _die_with(parent)
    connection = Connection(descriptor)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            connection.send(_called(connection))
    for function in _at_end:
        function()


_at_end: list[Callable[[], Any]] = []


def _called(connection: Connection) -> tuple[str, Any, str]:
    """Return what a call gave: its kind, its value, and for `--debug` where it went wrong."""
    try:
        function, arguments = connection.recv()
        return "done", function(*arguments), ""
    except (EOFError, ConnectionError):
        raise
    except VlaftError as error:
        return type(error).__name__, str(error), traceback.format_exc()
    except Exception:
        return "defect", None, traceback.format_exc()


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before we could say so
        os._exit(1)
