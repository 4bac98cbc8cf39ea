"""First pass of a conversion: actions only. What is in the sources, their statistics, and which shard gets what.

It takes what `reading.py` read of each episode, from the sources or from the file that keeps it, and nothing else: a
conversion that learns of damaged frames decides anew, without them, what it would have decided had it known.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from vlaft.action.statistics import DatasetStatistics, statistics_of_rows
from vlaft.data.convert.reading import Reading, Readings, Sums
from vlaft.data.convert.spool import Spool, spooled
from vlaft.data.readers.reader import EpisodeRef
from vlaft.data.source import OpenedSource, Progress
from vlaft.data.standardize.evidence import check_gripper
from vlaft.data.store import MAIN_CAMERA
from vlaft.documents import shown
from vlaft.errors import DataError
from vlaft.observation.prompts import BaseFiles

OnError = Literal["skip", "stop"]

_VALIDATION_NAMES = {"val", "valid", "validation", "test", "eval"}


@dataclass(frozen=True)
class PlannedEpisode:
    """One episode to convert.

    Attributes:
        source: number of its source in the request.
        ref: where it lies.
        index: its number over all episodes of all sources.
        split: `"train"` or `"val"`.
        rows: number of examples.
        sums: of its actions and state, see `Reading.sums`: by them it is seen that they are still the same.
    """

    source: int
    ref: EpisodeRef
    index: int
    split: str
    rows: int
    sums: Sums


@dataclass(frozen=True)
class Skipped:
    """One episode that was left out, and why."""

    dataset: str
    episode: str
    why: str


@dataclass(frozen=True)
class SurveyedSource:
    """What the first pass found in one source.

    `warnings` are what the actions of all episodes together show, each a sentence.
    """

    name: str
    statistics: DatasetStatistics
    cameras: tuple[str, ...]
    instructions: tuple[str, ...]
    action_names: tuple[str, ...]
    fps: float | None
    skipped: tuple[Skipped, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Survey:
    """What the first pass found: per source, and the prompt ids of every instruction."""

    sources: tuple[SurveyedSource, ...]
    prompts: Mapping[str, list[int]]

    @property
    def columns(self) -> tuple[str, ...]:
        """The image columns over all sources, the main camera's first."""
        others = sorted({camera_column(name) for source in self.sources for name in source.cameras[1:]})
        return (MAIN_CAMERA, *others)


@dataclass(frozen=True, kw_only=True)
class SurveyRules:
    """What decides which episodes are taken, and for which split.

    Attributes:
        on_error: what to do with an episode that is damaged.
        limit: only the first episodes of each split of each source.
        val_fraction: share of whole episodes held out where a source has no validation split of its own.
        seed: of that draw.
        without: episodes known to have damaged frames, as (number of the source, `EpisodeRef.index`), and why.
    """

    on_error: OnError
    limit: int | None
    val_fraction: float
    seed: int
    without: Mapping[tuple[int, int], str] = field(default_factory=dict)


class Prompts:
    """The prompt ids of instructions, each encoded once.

    Attributes:
        known: instruction to ids.
        longest: positions that the model has for prompt and action together.
    """

    def __init__(self, known: dict[str, list[int]], longest: int, base: BaseFiles | None = None) -> None:
        """Take what is known; what is not is encoded for `base`."""
        self.known = known
        self.longest = longest
        self._base = base

    @classmethod
    def of(cls, base: BaseFiles) -> Prompts:
        """Return the prompts of a base, of which none is known yet."""
        return cls({}, int(base.config.get("llm_max_length", 2048)), base)

    def ids(self, instruction: str) -> list[int]:
        """Return the ids of an instruction.

        Raises:
            DataError: the instruction is no text in UTF-8, or is new and there is no base to encode it for.
        """
        if instruction not in self.known:
            if self._base is None:
                raise DataError(f"the instruction {shown(instruction)} is not in the plan; make the plan again")
            self.known[instruction] = self._base.prompt_token_ids(instruction)
        return self.known[instruction]

    def checked(self, reading: Reading, name: str, accepted: Mapping[str, list[int]]) -> dict[str, list[int]]:
        """Return the ids of an episode's instructions that are not accepted yet.

        Raises:
            DataError: one is no text, or too long beside the action.
        """
        assert reading.action is not None
        found = {text: self.ids(text) for text in reading.texts if text not in accepted}
        for ids in found.values():
            if len(ids) + reading.action.shape[1] + 1 > self.longest:
                raise DataError(
                    f"episode '{name}': its instruction has {len(ids)} tokens, the model takes {self.longest}"
                )
        return found


def survey(
    opened: Sequence[OpenedSource],
    listed: Sequence[Sequence[EpisodeRef]],
    readings: Readings,
    prompts: Prompts,
    rules: SurveyRules,
    progress: Progress,
    folder: Path | None = None,
) -> tuple[Survey, list[PlannedEpisode]]:
    """Take what was read of all episodes, compute the statistics over both splits, and split by whole episodes.

    Of each episode a few numbers are held in memory; actions and states go through files.

    Args:
        opened: the sources.
        listed: the episodes of each.
        readings: of all of them, in order.
        prompts: encodes instructions.
        rules: which episodes are taken, and for which split.
        progress: told of the episodes that are read.
        folder: where these files are made; None: where temporary files go.

    Returns:
        What was found, and the episodes of all sources to convert, in order.

    Raises:
        DataError: an episode is damaged (unless it is to be skipped), a source has nothing usable, its
            demonstrations contradict the rule for the gripper, or the sources do not fit together.
    """
    total = sum(len(refs) for refs in listed)
    surveyed: list[SurveyedSource] = []
    episodes: list[PlannedEpisode] = []
    accepted: dict[str, list[int]] = {}
    done, first_index = 0, 0
    for number, (source, refs) in enumerate(zip(opened, listed, strict=True)):
        if not refs:
            raise DataError(f"{source.request.path} has no episodes")

        def count(read: int, before: int = done) -> None:
            progress("reading actions", before + read, total)

        with spooled(folder, np.float32, np.float32, np.float64) as spools:
            found, planned = _survey_source(
                number, source, refs, readings, first_index, prompts, accepted, rules, count, spools
            )
        surveyed.append(found)
        episodes += planned
        done += len(refs)
        first_index += max(ref.index for ref in refs) + 1
    progress("reading actions", total, total)
    _check_together(surveyed)
    return Survey(tuple(surveyed), accepted), episodes


def _survey_source(
    number: int,
    source: OpenedSource,
    refs: Sequence[EpisodeRef],
    readings: Readings,
    first_index: int,
    prompts: Prompts,
    accepted: dict[str, list[int]],
    rules: SurveyRules,
    count: Callable[[int], None],
    spools: Sequence[Spool],
) -> tuple[SurveyedSource, list[PlannedEpisode]]:
    """Take what was read of one source; the prompts of new instructions are added to `accepted`."""
    actions, states, openings = spools
    kept: list[EpisodeRef] = []
    sums: list[Sums] = []
    skipped: list[Skipped] = []
    cameras: dict[str, None] = {}
    instructions: dict[str, None] = {}
    names: tuple[str, ...] = ()
    fps: float | None = None
    count(0)
    for done, (_, ref, reading) in enumerate(islice(readings, len(refs)), start=1):
        count(min(done, len(refs) - 1))
        if (number, ref.index) in rules.without:
            skipped.append(Skipped(source.name, ref.name, rules.without[number, ref.index]))
            continue
        try:
            if reading.action is None:
                raise DataError(reading.damage)
            _check_fits(ref.name, reading, actions.width, states.width, cameras)
            accepted.update(prompts.checked(reading, ref.name, accepted))
        except DataError as error:
            if reading.silent and not kept:
                _refuse_silent_source(source, refs)
            if rules.on_error == "stop":
                raise
            skipped.append(Skipped(source.name, ref.name, str(error)))
            continue
        kept.append(ref)
        sums.append(reading.sums)
        actions.add(reading.action)
        openings.add(reading.opening)
        if reading.state is not None:
            states.add(reading.state)
        cameras.update(dict.fromkeys(reading.cameras))
        instructions.update(dict.fromkeys(reading.texts))
        names = names or reading.action_names
        fps = reading.fps if fps is None else fps
    if not kept:
        why = f"; the first: {skipped[0].why}" if skipped else ""
        raise DataError(f"{source.request.path} has no usable episode{why}")
    gripper = check_gripper(source, [action for action in actions if action is not None], names, list(openings))
    if gripper.question:
        raise DataError(gripper.question)
    splits = split_episodes(kept, source.name, rules.val_fraction, rules.seed)
    planned = [
        PlannedEpisode(number, ref, first_index + ref.index, split, rows, summed)
        for ref, split, rows, summed in zip(kept, splits, actions.lengths, sums, strict=True)
    ]
    found = SurveyedSource(
        name=source.name,
        statistics=statistics_of_rows(
            actions.rows, len(kept), source.layout.action_mask, states.rows if len(states) else None
        ),
        cameras=tuple(cameras),
        instructions=tuple(instructions),
        action_names=names,
        fps=fps,
        skipped=tuple(skipped),
        warnings=gripper.warnings,
    )
    return found, planned


def _refuse_silent_source(source: OpenedSource, refs: Sequence[EpisodeRef]) -> None:
    """Say once for the whole source, instead of episode by episode, that an instruction has to be given.

    Raises:
        DataError: no episode that can be read has one.
    """
    for ref in refs:
        try:
            if source.reader.read(ref).instruction.strip():
                return
        except DataError:
            continue
    raise DataError(
        f"{source.request.path}: none of the {len(refs)} episodes says what the robot does; add it to the command as a"
        " word, such as instruction='open the drawer'"
    )


def split_episodes(refs: Sequence[EpisodeRef], name: str, val_fraction: float, seed: int) -> list[str]:
    """Return `"train"` or `"val"` for every episode.

    A source with a validation split of its own keeps it (val, valid, validation, test or eval; all else trains).
    Otherwise `val_fraction` of the episodes, at least one of two or more, are drawn by a hash of seed, dataset and
    episode: the same ones on every machine, whatever else is converted.
    """
    if any(ref.split in _VALIDATION_NAMES for ref in refs):
        return ["val" if ref.split in _VALIDATION_NAMES else "train" for ref in refs]
    count = min(max(1, round(val_fraction * len(refs))), len(refs) - 1) if val_fraction > 0 else 0

    def rank(ref: EpisodeRef) -> bytes:
        return hashlib.sha256(f"{seed}/{name}/{ref.index}".encode()).digest()

    drawn = {ref.index for ref in sorted(refs, key=rank)[:count]}
    return ["val" if ref.index in drawn else "train" for ref in refs]


@dataclass(frozen=True)
class ShardPlan:
    """Which episodes one shard holds."""

    file: str
    split: str
    episodes: tuple[PlannedEpisode, ...]

    @property
    def rows(self) -> int:
        """Number of examples, when no episode turns out damaged."""
        return sum(episode.rows for episode in self.episodes)


def plan_shards(episodes: Sequence[PlannedEpisode], shard_rows: int | None = None) -> list[ShardPlan]:
    """Return the shards: whole episodes in order, a new one where the last has `shard_rows` examples or more.

    Without `shard_rows` there are about 64 shards of 100 to 4,000 rows: small ones keep all CPUs busy and lose little
    to a kill. Only the data decide, not the machine, so that the same demonstrations always give the same files.
    """
    if shard_rows is None:
        shard_rows = min(max(sum(episode.rows for episode in episodes) // 64, 100), 4000)
    plans = []
    for split in ("train", "val"):
        groups: list[list[PlannedEpisode]] = []
        rows = shard_rows
        for episode in (episode for episode in episodes if episode.split == split):
            if rows >= shard_rows:
                groups.append([])
                rows = 0
            groups[-1].append(episode)
            rows += episode.rows
        for number, group in enumerate(groups):
            plans.append(ShardPlan(f"{split}-{number:05d}-of-{len(groups):05d}.parquet", split, tuple(group)))
    return plans


def camera_column(name: str) -> str:
    """Return the column of a further camera: `image_<name>`, without what column names cannot hold.

    >>> camera_column("wrist"), camera_column("observation.images.left"), camera_column("image_1")
    ('image_wrist', 'image_observation_images_left', 'image_1')
    """
    plain = re.sub(r"[^A-Za-z0-9_]+", "_", name)
    return plain if plain.startswith(f"{MAIN_CAMERA}_") else f"{MAIN_CAMERA}_{plain}"


def _check_fits(
    name: str, reading: Reading, actions: int | None, states: int | None, cameras: Mapping[str, None]
) -> None:
    """Refuse an episode that does not fit those before it, whose dimensions are given, where there are any."""
    assert reading.action is not None
    if actions is not None and actions != reading.action.shape[1]:
        raise DataError(
            f"episode '{name}': the action has {reading.action.shape[1]} dimensions where the episodes before"
            f" have {actions}"
        )
    if actions is not None and (reading.state is None) != (states is None):
        had = "a" if states is None else "no"
        raise DataError(f"episode '{name}': unlike the episodes before, it has {had} state")
    if states is not None and reading.state is not None and states != reading.state.shape[1]:
        raise DataError(
            f"episode '{name}': the state has {reading.state.shape[1]} dimensions where the episodes before"
            f" have {states}"
        )
    if cameras and next(iter(cameras)) not in reading.cameras:
        raise DataError(f"episode '{name}' lacks the main camera '{next(iter(cameras))}' of the episodes before")


def _check_together(sources: Sequence[SurveyedSource]) -> None:
    names = [source.name for source in sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(
            f"two sources are called '{twice[0]}'; give one of them another name, statistics are kept by name"
        )
    widths = {source.name: len(source.statistics["action"]["mean"]) for source in sources}
    if len(set(widths.values())) > 1:
        listed = ", ".join(f"{name} has {width}" for name, width in widths.items())
        raise DataError(f"the sources' actions differ in their dimensions ({listed}); convert them separately")
    for source in sources:
        columns = [camera_column(name) for name in source.cameras]
        if len(set(columns)) < len(columns):
            raise DataError(
                f"two cameras of '{source.name}' would share a column ({', '.join(sorted(columns))}); rename one"
            )
