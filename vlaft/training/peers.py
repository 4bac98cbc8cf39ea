"""Which of a run's processes is gone, when the others can no longer reach it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vlaft.errors import VlaftError
from vlaft.files import alive

_HOST = 64  # bytes of a machine's name that are exchanged
_PATIENCE = 2.0  # seconds in which the kernel ends a process whose connections are closed already
# what gloo, NCCL and the store say of a connection that ended, or of one that says nothing
_LOST = ("closed by peer", "reset by peer", "broken pipe", "connection", "socket", "remote", "timed out", "timeout")

# Takes some numbers of this process; returns those of all, by rank.
Gather = Callable[[list[int]], list[list[int]]]


class Peers:
    """The processes of a run: where each runs, and whether it still does."""

    def __init__(self, gather: Gather, folder: Path) -> None:
        """Exchange names; all processes at once.

        Args:
            gather: exchanges numbers.
            folder: the run's, for the sentence.
        """
        self.folder = folder
        self._host = socket.gethostname()
        name = self._host.encode()[:_HOST].ljust(_HOST, b"\0")
        told = gather([os.getpid(), *name])
        self.places = [(values[0], bytes(values[1:]).rstrip(b"\0").decode(errors="replace")) for values in told]

    def gone(self) -> list[int]:
        """Return the ranks of those on this machine that have ended; waits a moment for one to end."""
        until = time.monotonic() + _PATIENCE
        while True:
            found = [
                rank
                for rank, (process, host) in enumerate(self.places)
                if host == self._host and process != os.getpid() and _ended(process)
            ]
            if found or time.monotonic() > until:
                return found
            time.sleep(0.05)

    def sentence(self) -> str:
        """Return what to say of a process that cannot be reached."""
        count, gone = len(self.places), self.gone()
        if gone:
            process, host = self.places[gone[0]]
            who = f"process {gone[0]} of {count} (number {process} on {host}) has ended, so the others cannot go on"
        else:
            others = sorted({host for _, host in self.places} - {self._host})
            where = f"on {', '.join(others)} " if others else ""
            who = f"a process {where}no longer answers, and those on {self._host} are all there"
        return f"{self.folder}: {who}; what was saved last is whole: start all again with --resume"


@contextmanager
def lost_told(peers: Callable[[], Peers | None]) -> Iterator[None]:
    """Turn what is said of a connection that ended into a sentence that says whose.

    Args:
        peers: gives the processes, or None while they have not met.

    Raises:
        VlaftError: another process has ended, or does not answer in the time that collectives have.
    """
    try:
        yield
    except RuntimeError as error:
        known = peers()
        if known is None or not any(word in str(error).lower() for word in _LOST):
            raise
        raise VlaftError(known.sentence()) from error


def _ended(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return not alive(process, socket.gethostname())  # where there is no /proc, it may well be there
    return state in "ZX"  # ended, and not waited for yet
