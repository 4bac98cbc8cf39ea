"""Second pass of a conversion: frames to rows to shards, in this process or in workers that open the source anew."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from typing import Any

from vlaft.action.tokens import ActionTokenizer, normalize
from vlaft.data.codec import ImageCodec, encode_image
from vlaft.data.convert.plan import OnError, PlannedEpisode, ShardPlan, Survey, camera_column
from vlaft.data.source import OpenedSource, SourceRequest, open_request
from vlaft.data.store import MAIN_CAMERA, Shard, example_schema, write_shard
from vlaft.errors import DataError, VlaftError
from vlaft.files import joined
from vlaft.observation.images import ImagePipeline


@dataclass(frozen=True)
class ShardJob:
    """All that a worker needs, small and picklable: it opens the sources itself.

    Attributes:
        folder: where the shards are written.
        out: the output, whose lock is held.
    """

    folder: Path
    requests: tuple[SourceRequest, ...]
    survey: Survey
    actions: ActionTokenizer
    pipeline: ImagePipeline
    codec: ImageCodec
    on_error: OnError
    out: Path


@dataclass(frozen=True)
class Damaged:
    """An episode whose frames turned out damaged: number of its source, `EpisodeRef.index`, and why."""

    source: int
    index: int
    why: str


@dataclass(frozen=True)
class ShardResult:
    """A finished shard and the episodes that are missing in it."""

    shard: Shard
    damaged: tuple[Damaged, ...]


def convert_shards(job: ShardJob, plans: Sequence[ShardPlan], workers: int) -> Iterator[ShardResult]:
    """Write shards and yield each as it is finished, in any order.

    Raises:
        DataError: an episode is damaged and `on_error` is `"stop"`, the disk is full, or a worker died.
    """
    if workers <= 1 or len(plans) <= 1:
        converter = _Converter(job)
        for plan in plans:
            yield converter.convert(plan)
        return
    context = multiprocessing.get_context("spawn")
    count = min(workers, len(plans))
    alive, keep_alive = context.Pipe(duplex=False)  # when our end is closed, the workers leave at once
    with (
        alive,
        keep_alive,
        ProcessPoolExecutor(count, mp_context=context, initializer=_start_worker, initargs=(job, alive)) as pool,
    ):
        waiting: set[Future[ShardResult | str]] = set()
        try:
            # Ctrl-C in a terminal goes to every process. The workers leave it to this one: they are started with it
            # blocked, before they could say so themselves. Here it is delivered as soon as they are.
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            try:
                waiting = {pool.submit(_convert_in_worker, plan) for plan in plans}
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            while waiting:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    result = future.result()
                    if isinstance(result, str):
                        raise DataError(result)
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


class _Converter:
    """Turns planned episodes into shards; holds the opened sources."""

    def __init__(self, job: ShardJob) -> None:
        self.job = job
        self.schema = example_schema(job.survey.columns)
        self.opened: dict[int, OpenedSource] = {}

    def convert(self, plan: ShardPlan) -> ShardResult:
        damaged: list[Damaged] = []

        def episodes() -> Iterator[list[dict[str, Any]]]:
            for planned in plan.episodes:
                try:
                    yield self._rows(planned)
                except DataError as error:
                    if self.job.on_error == "stop":
                        raise
                    damaged.append(Damaged(planned.source, planned.ref.index, str(error)))

        shard = write_shard(self.job.folder / plan.file, plan.split, self.schema, episodes())
        return ShardResult(shard, tuple(damaged))

    def _rows(self, planned: PlannedEpisode) -> list[dict[str, Any]]:
        if planned.source not in self.opened:
            self.opened[planned.source] = open_request(self.job.requests[planned.source])
        surveyed = self.job.survey.sources[planned.source]
        episode = self.opened[planned.source].read(planned.ref)
        texts = episode.step_instructions
        if episode.length != planned.rows or not self.job.survey.prompts.keys() >= set(texts):
            raise DataError(f"episode '{episode.name}' changed while it was converted; run the command again")
        assert episode.action is not None
        normalized = normalize(episode.action, surveyed.statistics["action"])
        tokens = self.job.actions.encode(normalized)
        images: dict[str, list[bytes]] = {}
        for name, frames in episode.cameras.items():
            column = MAIN_CAMERA if name == surveyed.cameras[0] else camera_column(name)
            images[column] = [
                encode_image(self.job.pipeline.prepare(frame), self.job.codec)
                for frame in frames.read(range(planned.rows))
            ]
            if len(images[column]) != planned.rows:
                raise DataError(
                    f"episode '{episode.name}': camera '{name}' gave {len(images[column])} frames"
                    f" for {planned.rows} steps"
                )
        return [
            {
                "episode_index": planned.index,
                "frame_index": step,
                "dataset": surveyed.name,
                "source": planned.ref.name,
                "instruction": texts[step],
                **{column: {"bytes": encoded[step], "path": None} for column, encoded in images.items()},
                "state": None if episode.state is None else episode.state[step],
                "action": episode.action[step],
                "normalized_action": normalized[step],
                "prompt_token_ids": self.job.survey.prompts[texts[step]],
                "action_token_ids": tokens[step],
            }
            for step in range(planned.rows)
        ]


_converter: _Converter | None = None  # a worker's own, set as it starts
_held = ExitStack()  # a worker's part in the lock: a conversion that begins after a kill does not meet its last writes


def _start_worker(job: ShardJob, alive: Connection) -> None:
    global _converter
    _held.enter_context(joined(job.out))
    threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()
    _converter = _Converter(job)


def _end_with_parent(alive: Connection) -> None:
    """Leave when the parent is gone or gives up: a killed conversion must not leave workers that write on."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for_any([parent.sentinel, alive])
        os._exit(1)


def _convert_in_worker(plan: ShardPlan) -> ShardResult | str:
    assert _converter is not None
    try:
        return _converter.convert(plan)
    except VlaftError as error:  # as text: not every exception survives the way to another process
        return str(error)
