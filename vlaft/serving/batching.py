"""Requests that come at the same time go through the model together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vlaft.serving.observation import Question
from vlaft.serving.settings import busy

Predict = Callable[[Sequence[Question]], Sequence[Any]]
_Waiting = tuple[Question, "asyncio.Future[Any]"]


class Batcher:
    """A queue before the model, and one thread that empties it batch by batch.

    While a batch is computed the next one gathers, so batches grow with the load by themselves; `max_wait` only
    lets requests that arrive at nearly the same moment meet when the model is idle. Whoever puts requests in
    bounds their number.
    """

    def __init__(self, predict: Predict, *, max_batch: int, max_wait: float) -> None:
        """Take `predict`, which gives one result per question of one `unnorm_key` and may run in any thread."""
        self._predict = predict
        self._max_batch = max_batch
        self._max_wait = max_wait
        self._queue: asyncio.Queue[_Waiting | None] = asyncio.Queue()
        self._unanswered: set[asyncio.Future[Any]] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vlaft-predict")
        self._worker: asyncio.Task[None] | None = None
        self._closing = False

    def start(self) -> None:
        """Begin to work, on the running event loop."""
        self._worker = asyncio.create_task(self._work())

    async def close(self) -> None:
        """Answer everything that is queued, then stop; what comes later is refused."""
        self._closing = True
        self._queue.put_nowait(None)
        if self._worker is not None:
            await self._worker
        self._thread.shutdown()

    def drop(self) -> None:
        """Refuse everything that is not answered yet, and what comes later; what is being computed is for nothing."""
        self._closing = True
        for future in list(self._unanswered):
            future.set_exception(busy("the server was stopped before the model answered"))

    def submit(self, question: Question) -> asyncio.Future[Any]:
        """Queue a question; cancelling the future takes it out again, unless it is being computed.

        Raises:
            Refused: the server is stopping.
        """
        if self._closing:
            raise busy("the server is stopping; ask again when it is back")
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._unanswered.add(future)
        future.add_done_callback(self._unanswered.discard)
        self._queue.put_nowait((question, future))
        return future

    async def _work(self) -> None:
        stopping = False
        while not stopping:
            gathered = [await self._queue.get()]
            if gathered[0] is not None and self._queue.qsize() < self._max_batch - 1 and not self._closing:
                await asyncio.sleep(self._max_wait)
            while len(gathered) < self._max_batch and not self._queue.empty():
                gathered.append(self._queue.get_nowait())
            stopping = None in gathered  # nothing comes behind it, see `submit`
            groups: dict[str, list[_Waiting]] = {}
            for waiting in gathered:
                if waiting is not None and not waiting[1].done():  # done: the client is gone
                    groups.setdefault(waiting[0].unnorm_key, []).append(waiting)
            for group in groups.values():
                await self._answer(group)

    async def _answer(self, group: list[_Waiting]) -> None:
        questions = [question for question, _ in group]
        loop = asyncio.get_running_loop()
        results = await loop.run_in_executor(self._thread, self._compute, questions)
        for (_, future), result in zip(group, results, strict=True):
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)

    def _compute(self, questions: list[Question]) -> Sequence[Any]:
        """Return a result or an exception for each; one that fails does not take its neighbours with it."""
        try:
            results = list(self._predict(questions))
            if len(results) != len(questions):
                raise RuntimeError(f"the model gave {len(results)} results for {len(questions)} questions")
            return results
        except Exception as error:
            if len(questions) == 1:
                return [error]
        return [self._compute([question])[0] for question in questions]
