"""Faults at a chosen filesystem event of a process, so that every moment can be tried, and tried again.

Python tells of an event before it happens (`sys.addaudithook`): a file opened for writing, a folder made, something
renamed or removed, a lock taken. Of an open there are two moments: before it, and with the file made but empty. What C
and Rust code opens by itself is not told of; the events around it are.

    python tests/faults.py ROOT FAULT AT -- convert demos.hdf5 --out data     # the words of `vlaft`

runs the command and lets the fault happen at event number AT (from 1) below the folder ROOT; where there are fewer, the
command ends as usual. FAULT is `kill`, `term`, `int`, `eio` or `enospc`; the two errors stay from that event on.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}
ERRORS = {"eio": errno.EIO, "enospc": errno.ENOSPC}
_FREES = ("os.remove", "os.rmdir")  # a full disk lets these be
_PATHS = {"os.mkdir": 2, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.link": 2, "os.symlink": 2, "os.truncate": 0}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def install(root: Path, fault: str, at: int, seen: Callable[[str, str], None] = lambda event, path: None) -> None:
    """Let a fault happen in this process at an event below `root`; this cannot be taken back.

    Args:
        root: events elsewhere are not counted.
        fault: see above.
        at: number of the event, from 1.
        seen: told of each event that counts.
    """
    top, count, process = os.path.realpath(root), 0, os.getpid()

    def moment(event: str, path: str, prepare: Callable[[], None] = lambda: None) -> None:
        nonlocal count
        count += 1
        seen(event, path)
        if fault in SIGNALS and count == at:
            prepare()
            os.kill(os.getpid(), SIGNALS[fault])
        if fault in ERRORS and count >= at and not (fault == "enospc" and event in _FREES):
            raise OSError(ERRORS[fault], os.strerror(ERRORS[fault]), path)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if os.getpid() != process or (event not in _PATHS and event not in ("open", "fcntl.flock")):
            return
        if event == "open" and (not isinstance(arguments[2], int) or not arguments[2] & _WRITES):
            return
        path = _path(event, arguments)
        if path is None or not (path + "/").startswith(top + "/"):
            return
        moment(event, path)
        if event == "open":
            moment("opened", path, lambda: os.close(os.open(path, arguments[2] & ~os.O_EXCL, 0o666)))

    sys.addaudithook(hook)


def _path(event: str, arguments: tuple[Any, ...]) -> str | None:
    name, folder = arguments[0], arguments[_PATHS[event]] if _PATHS.get(event) else -1
    if hasattr(name, "fileno"):
        name = name.fileno()
    if isinstance(name, int):
        folder, name = name, ""
    if name is None:
        return None
    above = Path.cwd() if folder == -1 else Path(f"/proc/self/fd/{folder}").readlink()
    return os.path.normpath(above / os.fsdecode(name))


def at_each_moment(root: Path, fault: str, work: Callable[[], None], look: Callable[[int, int], None]) -> int:
    """Do `work` in a fork, once for each moment of it with the fault there; return how many there were.

    Args:
        root: see `install`.
        fault: see above.
        work: what is disturbed; an exception of it is exit code 1.
        look: called after each with the moment and how the fork ended: its exit code, or the negative signal. It leaves
            all as it was before.
    """
    at = 0
    while True:
        at += 1
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                heed_signals()
                install(root, fault, at, lambda event, path: os.write(writer, b"."))  # noqa: B023 (used at once)
                work()
                code = 0
            finally:
                os._exit(code)
        os.close(writer)
        _, status = os.waitpid(child, 0)
        with os.fdopen(reader, "rb") as file:
            moments = len(file.read())
        if moments < at:
            assert os.waitstatus_to_exitcode(status) == 0  # undisturbed
            return at - 1
        look(at, os.waitstatus_to_exitcode(status))


def command(root: Path, fault: str, at: int, words: Sequence[str]) -> list[str]:
    """Return a command that runs `vlaft words` with a fault."""
    return [sys.executable, __file__, str(root), fault, str(at), "--", *words]


def run(root: Path, fault: str, at: int, words: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `vlaft words` with a fault, and wait for its end."""
    words = command(root, fault, at, words)
    return subprocess.run(words, capture_output=True, text=True, timeout=300, preexec_fn=heed_signals, **options)


def heed_signals() -> None:
    """Undo, in a child, what a shell does to jobs in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def tell(config: Any, line: str) -> None:
    """Print a line of counts while pytest captures what tests print; `config` is pytest's."""
    capture = config.pluginmanager.get_plugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n{line}", flush=True)


def main(arguments: Sequence[str]) -> int:
    """Run the command line with a fault."""
    root, fault, at, _, *words = arguments
    from vlaft.__main__ import main as vlaft

    install(Path(root), fault, int(at))
    sys.argv = ["vlaft", *words]
    return vlaft()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
