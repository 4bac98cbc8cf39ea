"""Shards anew where episodes turned out damaged, from the shards that are there: no frame is decoded again.

Statistics are of all episodes that are converted, and every row is normalised by them; the draw of held-out episodes
and where a shard ends depend on what is converted, too. An episode whose frames are damaged is found in the second
pass, when shards are there that counted it. So the first pass is decided again without it, from what was kept of the
actions, and the shards of that plan are put together from rows that lie in the old ones: encoded frames, texts and
actions are taken over, actions are normalised and tokenized anew. What comes out is what a conversion gives that knew
of the damage from the start, whoever wrote the old shards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlaft.action.tokens import normalize
from vlaft.data.convert.plan import PlannedEpisode, ShardPlan, Survey, camera_column
from vlaft.data.convert.shards import Converter, ShardJob, with_lock
from vlaft.data.convert.staging import ShardResult
from vlaft.data.store import MAIN_CAMERA, ROW_GROUP
from vlaft.errors import DataError


@dataclass(frozen=True)
class Place:
    """Where the rows of an episode lie: a shard's file, and the first of them."""

    file: str
    row: int


@dataclass(frozen=True)
class MendedShard:
    """A shard to be written, and where each of its episodes lies; None where no shard has it."""

    plan: ShardPlan
    places: tuple[Place | None, ...]


@dataclass(frozen=True)
class MendJob(ShardJob):
    """As `ShardJob`, to write into another folder.

    Attributes:
        staged: the folder of the old shards.
        before: the survey that they were written by.
    """

    staged: Path
    before: Survey

    def begin(self) -> Mender:
        """Return what shards are mended with."""
        return Mender(self)


def mended_shards(
    plans: Sequence[ShardPlan], before: Sequence[ShardPlan], results: Mapping[str, ShardResult]
) -> list[MendedShard]:
    """Return the shards of a plan with the places of their episodes in the shards of the plan before."""
    places: dict[int, Place] = {}
    for old in before:
        damaged = {(entry.source, entry.index) for entry in results[old.file].damaged}
        row = 0
        for episode in old.episodes:
            if (episode.source, episode.ref.index) not in damaged:
                places[episode.index] = Place(old.file, row)
                row += episode.rows
    return [MendedShard(plan, tuple(places.get(episode.index) for episode in plan.episodes)) for plan in plans]


def mend_shard(mender: Mender, shard: MendedShard) -> ShardResult:
    """Write a shard unless it is there; see `convert_shard`."""
    places = {episode.index: place for episode, place in zip(shard.plan.episodes, shard.places, strict=True)}
    return with_lock(mender, shard.plan, lambda episode: mender.mended(episode, places[episode.index]))


class Mender(Converter):
    """Takes rows over from old shards."""

    def __init__(self, job: MendJob) -> None:
        super().__init__(job)
        self.staged = job.staged
        self.before = job.before
        self.file: tuple[str, pq.ParquetFile] | None = None

    def mended(self, planned: PlannedEpisode, place: Place | None) -> list[dict[str, Any]]:
        """Return an episode's rows as this survey has them.

        Raises:
            DataError: an old shard is damaged; where no shard has the episode, as `rows`.
        """
        if place is None:
            return self.rows(planned)
        surveyed = self.job.survey.sources[planned.source]
        old, new = (_columns(survey, planned.source) for survey in (self.before, self.job.survey))
        rows = self._staged_rows(place, planned.rows)
        normalized = normalize(np.asarray([row["action"] for row in rows], np.float32), surveyed.statistics["action"])
        tokens = self.job.actions.encode(normalized)
        texts = [name for name in self.schema.names if name not in self.job.survey.columns]
        return [
            {
                **{name: row[name] for name in texts},
                **{new[camera]: row[old[camera]] for camera in new if camera in old},
                "normalized_action": normalized[step],
                "action_token_ids": tokens[step],
            }
            for step, row in enumerate(rows)
        ]

    def _staged_rows(self, place: Place, count: int) -> list[dict[str, Any]]:
        if self.file is None or self.file[0] != place.file:
            self.file = (place.file, pq.ParquetFile(self.staged / place.file, memory_map=True))
        first, last = place.row // ROW_GROUP, (place.row + count - 1) // ROW_GROUP
        try:
            table = self.file[1].read_row_groups(list(range(first, last + 1)))
        except (OSError, IndexError, pa.ArrowException) as error:
            raise DataError(f"{self.staged / place.file} cannot be read ({error}); run the command again") from error
        return table.slice(place.row - first * ROW_GROUP, count).to_pylist()


def _columns(survey: Survey, source: int) -> dict[str, str]:
    """Return the columns of a source's cameras."""
    main, *others = survey.sources[source].cameras
    return {main: MAIN_CAMERA, **{name: camera_column(name) for name in others}}
