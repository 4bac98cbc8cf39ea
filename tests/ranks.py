"""Several processes that train as one, without a launcher: forks of this process, which has imported everything."""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, or the negative signal; and what it said."""

    code: int
    said: str


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start(count: int, work: Callable[[int], None], folder: Path, *, per_node: int | None = None) -> list[int]:
    """Fork processes that find each other as torchrun's do, each calling `work` with its rank; return their ids.

    Args:
        count: of processes.
        work: an exception of it is exit code 1.
        folder: what each says goes into `rank-N.txt` there.
        per_node: as many count as on one machine; None: all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port, here, pids = free_port(), per_node or count, []
    sys.stdout.flush()
    for rank in range(count):
        if child := os.fork():
            pids.append(child)
            continue
        code = 1
        try:
            file = (folder / f"rank-{rank}.txt").open("w", buffering=1)
            sys.stdout = sys.stderr = file  # of Python, which a test's capture has replaced
            for stream in (1, 2):  # and of libraries
                os.dup2(file.fileno(), stream)
            ranks = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank % here, "LOCAL_WORLD_SIZE": here}
            os.environ |= {name: str(value) for name, value in ranks.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            from accelerate.state import AcceleratorState, GradientState, PartialState

            for state in (AcceleratorState, GradientState, PartialState):  # what this process was before the fork
                state._reset_state()
            work(rank)
            code = 0
        except BaseException as error:
            traceback.print_exc()
            code = getattr(error, "exit_code", 1)
        finally:
            with suppress(Exception):
                sys.stdout.flush()
            os._exit(code)
    return pids


def end(pids: Sequence[int], folder: Path, seconds: float = 180) -> list[Ended]:
    """Wait for processes of `start`; those that are left after `seconds` are killed and count as ended by that."""
    until, codes = time.monotonic() + seconds, {}
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (status := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(status[1])
        if time.monotonic() > until:
            for pid in set(pids) - codes.keys():
                os.kill(pid, 9)
        time.sleep(0.01)
    return [Ended(codes[pid], (folder / f"rank-{rank}.txt").read_text()) for rank, pid in enumerate(pids)]


def together(count: int, work: Callable[[int], None], folder: Path, *, per_node: int | None = None) -> list[str]:
    """Let `work` be done by so many processes, and return what each said; all have to end well."""
    ended = end(start(count, work, folder, per_node=per_node), folder)
    for rank, one in enumerate(ended):
        assert one.code == 0, f"process {rank}: {one.code}\n{one.said[-4000:]}"
    return [one.said for one in ended]
