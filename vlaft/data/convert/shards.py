"""Second pass of a conversion: frames to rows to shards, one at a time in whichever process has its lock."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlaft.action.tokens import ActionTokenizer, normalize
from vlaft.data.codec import ImageCodec, encode_image
from vlaft.data.convert.plan import OnError, PlannedEpisode, ShardPlan, Survey, camera_column
from vlaft.data.convert.reading import Reading
from vlaft.data.convert.staging import Damaged, ShardResult, finished_shard, remember_shard
from vlaft.data.source import OpenedSource, SourceRequest, open_request
from vlaft.data.store import MAIN_CAMERA, example_schema, write_shard
from vlaft.errors import DataError, InUse, SourceChanged
from vlaft.files import locked
from vlaft.observation.images import ImagePipeline

_LOOK_AGAIN = 0.2  # seconds, while another process is at a shard


@dataclass(frozen=True)
class ShardJob:
    """All that a process needs to write shards, small and picklable: it opens the sources itself.

    Attributes:
        folder: where the shards are written.
        requests: what opens the sources here.
        survey: what the first pass found.
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

    def begin(self) -> Converter:
        """Return what shards are written with."""
        return Converter(self)


def survey_digest(survey: Survey) -> str:
    """Return a hash of what every row depends on beyond its episode: statistics, and which camera is which column."""
    value = [[source.statistics, source.cameras] for source in survey.sources]
    return hashlib.sha256(json.dumps([value, survey.columns]).encode()).hexdigest()


def shard_key(digest: str, plan: ShardPlan) -> str:
    """Return a hash of all that decides the content of a shard beyond the request; see `survey_digest`."""
    value = [digest, plan.file, [[episode.source, episode.ref.index] for episode in plan.episodes]]
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def convert_shard(converter: Converter, plan: ShardPlan) -> ShardResult:
    """Write a shard unless it is there, with its lock held; where another process is at it, wait for that.

    Raises:
        DataError: an episode is damaged and `on_error` is `"stop"`.
        OSError: the disk is full or not well.
    """
    return with_lock(converter, plan, converter.rows)


def with_lock(
    converter: Converter, plan: ShardPlan, rows: Callable[[PlannedEpisode], list[dict[str, Any]]]
) -> ShardResult:
    """As `convert_shard`, with rows that are made otherwise."""
    job = converter.job
    key = shard_key(converter.digest, plan)
    while True:
        try:
            with locked(job.folder / plan.file):
                result = finished_shard(job.folder, plan.file, key, job.on_error)
                if result is None:
                    result = converter.convert(plan, rows)
                    remember_shard(job.folder, key, result)
                return result
        except InUse:
            time.sleep(_LOOK_AGAIN)


class Converter:
    """Turns planned episodes into shards; holds the opened sources."""

    def __init__(self, job: ShardJob) -> None:
        self.job = job
        self.digest = survey_digest(job.survey)
        self.schema = example_schema(job.survey.columns)
        self.opened: dict[int, OpenedSource] = {}

    def convert(self, plan: ShardPlan, rows: Callable[[PlannedEpisode], list[dict[str, Any]]]) -> ShardResult:
        """Write a shard from the rows of its episodes; those without any because of damage are left out and told."""
        damaged: list[Damaged] = []

        def episodes() -> Iterator[list[dict[str, Any]]]:
            for planned in plan.episodes:
                try:
                    yield rows(planned)
                except DataError as error:
                    if self.job.on_error == "stop":
                        raise
                    damaged.append(Damaged(planned.source, planned.ref.index, str(error)))

        shard = write_shard(self.job.folder / plan.file, plan.split, self.schema, episodes())
        return ShardResult(shard, tuple(damaged))

    def rows(self, planned: PlannedEpisode) -> list[dict[str, Any]]:
        """Return an episode's rows from its source.

        Raises:
            DataError: its frames are damaged.
            SourceChanged: it has other steps, numbers or texts than when it was planned.
        """
        if planned.source not in self.opened:
            self.opened[planned.source] = open_request(self.job.requests[planned.source])
        surveyed = self.job.survey.sources[planned.source]
        episode = self.opened[planned.source].read(planned.ref)
        texts = episode.step_instructions
        same = episode.length == planned.rows and self.job.survey.prompts.keys() >= set(texts)
        if not same or not Reading(action=episode.action, state=episode.state).agrees(planned.sums):
            raise SourceChanged(
                f"{surveyed.name}: episode '{episode.name}' changed after its actions were read; run the command again"
                " once nothing writes to it"
            )
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
