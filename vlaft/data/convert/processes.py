"""Work of a conversion in several processes: each opens the sources anew, and none outlives the one that started it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from typing import Any, Protocol, TypeVar

from vlaft.errors import DataError, VlaftError
from vlaft.files import joined, uninterrupted

_AHEAD = 4  # items per process that are handed out at once: enough to keep it busy, few enough to be held
T = TypeVar("T")
R = TypeVar("R")


class Job(Protocol):
    """What every process gets as it starts; picklable."""

    @property
    def out(self) -> Path:
        """The output, whose lock is held."""

    def begin(self) -> Any:
        """Return what the work is done with; called once in each process."""


def in_processes(
    work: Callable[[Any, T], R], items: Iterable[T], job: Job, count: int, *, ordered: bool = False
) -> Iterator[R]:
    """Yield `work(job.begin(), item)` for each item, in any order or in theirs.

    Few items are under way at a time, so that neither they nor their results pile up.

    Args:
        work: a function of a module.
        items: what to do; picklable, as are the results.
        job: as said; with one process, `begin` is called in this one.
        count: number of processes.
        ordered: yield in the order of the items.

    Raises:
        DataError: a `VlaftError` of `work`, or a process was killed.
        Exception: whatever else `work` raises.
    """
    if count <= 1:
        state = job.begin()
        for item in items:
            yield work(state, item)
        return
    context = multiprocessing.get_context("spawn")
    alive, keep_alive = context.Pipe(duplex=False)  # when our end is closed, the workers leave at once
    left = iter(items)
    with (
        alive,
        keep_alive,
        ProcessPoolExecutor(count, mp_context=context, initializer=_start, initargs=(job, alive)) as pool,
    ):
        under_way: deque[Future[Any]] = deque()
        try:
            _hand_out(pool, work, islice(left, count * _AHEAD), under_way)
            while under_way:
                if not ordered:
                    wait(under_way, return_when=FIRST_COMPLETED)
                future = under_way[0] if ordered else next(future for future in under_way if future.done())
                result = future.result()
                under_way.remove(future)
                if isinstance(result, _Failure):
                    raise DataError(result.sentence)
                _hand_out(pool, work, islice(left, 1), under_way)
                yield result
        except BaseException as error:
            keep_alive.close()  # nobody needs what the workers are still at
            if isinstance(error, BrokenProcessPool):
                raise DataError(
                    "a conversion process was killed, perhaps for want of memory; run the same command again with fewer"
                    " workers, finished shards are kept"
                ) from error
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _hand_out(
    pool: ProcessPoolExecutor, work: Callable[[Any, T], R], items: Iterable[T], under_way: deque[Future[Any]]
) -> None:
    # Ctrl-C in a terminal goes to every process. The workers leave it to this one: they are started with it blocked,
    # before they could say so themselves. Another thread of this one may still receive it, and Python then acts on it
    # here: not before they have all that they begin with.
    with uninterrupted():
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            under_way.extend(pool.submit(_work, work, item) for item in items)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


class _Failure:
    """A known error as text: not every exception survives the way to another process."""

    def __init__(self, sentence: str) -> None:
        self.sentence = sentence


_state: Any = None  # a worker's own, set as it starts
_held = ExitStack()  # a worker's part in the lock: a conversion that begins after a kill does not meet its last writes


def _start(job: Job, alive: Connection) -> None:
    global _state
    _held.enter_context(joined(job.out))
    threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()
    _state = job.begin()


def _end_with_parent(alive: Connection) -> None:
    """Leave when the parent is gone or gives up: a killed conversion must not leave workers that write on."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for_any([parent.sentinel, alive])
        os._exit(1)


def _work(work: Callable[[Any, T], R], item: T) -> R | _Failure:
    try:
        return work(_state, item)
    except VlaftError as error:
        return _Failure(str(error))
