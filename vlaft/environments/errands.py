"""Work that is handed out one piece at a time, in this process or in several, each of which may die.

Which piece is next is asked when somebody is free, so that it may depend on how the pieces before it went.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from vlaft.environments.seats import ATTEMPTS
from vlaft.environments.workers import Worker, WorkerDied, answered, close_workers
from vlaft.errors import VlaftError


@dataclass
class Errand:
    """A piece of work.

    Attributes:
        name: for sentences.
        key: of whoever hands it out.
        function: of a module, so that a process finds it.
        arguments: its arguments.
        attempts: at it, this one too.
    """

    name: str
    key: Any
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    attempts: int = field(default=1)


def run_errands(
    following: Callable[[], Errand | None], count: int, *, processes: bool, told: Callable[[str], None]
) -> Iterator[tuple[Any, Any]]:
    """Do work as it is handed out; give each piece's key and what came of it, as soon as it is done.

    Args:
        following: hands out the next piece, or None while there is none.
        count: how many at a time.
        processes: each in a process of its own, else one after the other in this one.
        told: told in a sentence of a process that died; its piece is begun again in a new one.

    Raises:
        VlaftError: a piece raised one, or its processes died too often.
    """
    if processes:
        yield from _in_processes(following, count, told)
        return
    while (errand := following()) is not None:
        yield errand.key, errand.function(*errand.arguments)


def _in_processes(
    following: Callable[[], Errand | None], count: int, told: Callable[[str], None]
) -> Iterator[tuple[Any, Any]]:
    idle: list[Worker] = []
    busy: dict[Worker, Errand] = {}
    waiting: list[Errand] = []  # whose worker died
    try:
        while True:
            while len(busy) < count and (errand := waiting.pop() if waiting else following()) is not None:
                worker = idle.pop() if idle else Worker()
                busy[worker] = errand
                worker.ask(errand.function, *errand.arguments)
            if not busy:
                return
            for worker in answered(list(busy)):
                errand = busy[worker]
                try:
                    result = worker.answer()
                except WorkerDied as death:
                    close_workers([worker])
                    del busy[worker]
                    errand.attempts += 1
                    where = f"{errand.name}: the process died ({death})"
                    if errand.attempts > ATTEMPTS:
                        raise VlaftError(
                            f"{where} {ATTEMPTS} times, perhaps for want of memory; give the same command again with"
                            " fewer --workers, what is finished is kept"
                        ) from death
                    told(f"{where}; its episode is begun again")
                    waiting.append(errand)
                    continue
                del busy[worker]
                idle.append(worker)
                yield errand.key, result
    finally:
        close_workers([*idle, *busy])
