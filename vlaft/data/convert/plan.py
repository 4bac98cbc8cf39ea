"""First pass of a conversion: actions only. What is in the sources, their statistics, and which shard gets what."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vlaft.action.statistics import DatasetStatistics, compute_statistics
from vlaft.data.episode import Episode
from vlaft.data.readers.reader import EpisodeRef
from vlaft.data.source import MissingInstruction, OpenedSource, Progress, first_of_splits
from vlaft.data.standardize.evidence import Opening, check_gripper, finger_opening
from vlaft.data.store import MAIN_CAMERA
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
    """

    source: int
    ref: EpisodeRef
    index: int
    split: str
    rows: int


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
    episodes: tuple[PlannedEpisode, ...]
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

    @property
    def episodes(self) -> list[PlannedEpisode]:
        """The episodes of all sources, in order."""
        return [episode for source in self.sources for episode in source.episodes]


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


def survey(opened: Sequence[OpenedSource], base: BaseFiles, rules: SurveyRules, progress: Progress) -> Survey:
    """Read all actions, compute the statistics over both splits, and split by whole episodes.

    Raises:
        DataError: an episode is damaged (unless it is to be skipped), a source has nothing usable, its
            demonstrations contradict the rule for the gripper, or the sources do not fit together.
    """
    listed = [first_of_splits(source.reader.episodes(), rules.limit) for source in opened]
    total = sum(len(refs) for refs in listed)
    surveyed: list[SurveyedSource] = []
    prompts: dict[str, list[int]] = {}
    done, first_index = 0, 0
    for number, (source, refs) in enumerate(zip(opened, listed, strict=True)):
        if not refs:
            raise DataError(f"{source.request.path} has no episodes")

        def count(read: int, before: int = done) -> None:
            progress("reading actions", before + read, total)

        surveyed.append(_survey_source(number, source, refs, first_index, base, prompts, rules, count))
        done += len(refs)
        first_index += max(ref.index for ref in refs) + 1
    progress("reading actions", total, total)
    _check_together(surveyed)
    return Survey(tuple(surveyed), prompts)


def _survey_source(
    number: int,
    source: OpenedSource,
    refs: Sequence[EpisodeRef],
    first_index: int,
    base: BaseFiles,
    prompts: dict[str, list[int]],
    rules: SurveyRules,
    count: Callable[[int], None],
) -> SurveyedSource:
    """Read the actions of one source; the prompts of new instructions are added to `prompts`."""
    actions: list[NDArray[np.float32]] = []
    states: list[NDArray[np.float32]] = []
    openings: list[Opening | None] = []
    kept: list[EpisodeRef] = []
    skipped: list[Skipped] = []
    cameras: dict[str, None] = {}
    instructions: dict[str, None] = {}
    names: tuple[str, ...] = ()
    fps: float | None = None
    for done, ref in enumerate(refs):
        count(done)
        if (number, ref.index) in rules.without:
            skipped.append(Skipped(source.name, ref.name, rules.without[number, ref.index]))
            continue
        try:
            episode = source.read(ref)
            assert episode.action is not None
            _check_fits(episode, actions, states, cameras)
            texts = dict.fromkeys(episode.step_instructions)
            prompts.update({text: _prompt(base, episode, text) for text in texts if text not in prompts})
            opening = finger_opening(episode)
        except DataError as error:
            if isinstance(error, MissingInstruction) and not kept:
                _refuse_silent_source(source, refs)
            if rules.on_error == "stop":
                raise
            skipped.append(Skipped(source.name, ref.name, str(error)))
            continue
        kept.append(ref)
        actions.append(episode.action)
        openings.append(opening)
        if episode.state is not None:
            states.append(episode.state)
        cameras.update(dict.fromkeys(episode.cameras))
        instructions.update(texts)
        names = names or episode.action_names
        fps = episode.fps if fps is None else fps
    if not kept:
        why = f"; the first: {skipped[0].why}" if skipped else ""
        raise DataError(f"{source.request.path} has no usable episode{why}")
    gripper = check_gripper(source, actions, names, openings)
    if gripper.question:
        raise DataError(gripper.question)
    splits = split_episodes(kept, source.name, rules.val_fraction, rules.seed)
    return SurveyedSource(
        name=source.name,
        episodes=tuple(
            PlannedEpisode(number, ref, first_index + ref.index, split, len(action))
            for ref, split, action in zip(kept, splits, actions, strict=True)
        ),
        statistics=compute_statistics(actions, source.layout.action_mask, states),
        cameras=tuple(cameras),
        instructions=tuple(instructions),
        action_names=names,
        fps=fps,
        skipped=tuple(skipped),
        warnings=gripper.warnings,
    )


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


def _prompt(base: BaseFiles, episode: Episode, instruction: str) -> list[int]:
    assert episode.action is not None
    ids = base.prompt_token_ids(instruction)
    longest = int(base.config.get("llm_max_length", 2048))
    if len(ids) + episode.action.shape[1] + 1 > longest:
        raise DataError(f"episode '{episode.name}': its instruction has {len(ids)} tokens, the model takes {longest}")
    return ids


def _check_fits(
    episode: Episode,
    actions: Sequence[NDArray[np.float32]],
    states: Sequence[NDArray[np.float32]],
    cameras: Mapping[str, None],
) -> None:
    """Refuse an episode that does not fit those before it."""
    assert episode.action is not None
    if actions and actions[0].shape[1] != episode.action.shape[1]:
        raise DataError(
            f"episode '{episode.name}': the action has {episode.action.shape[1]} dimensions where the episodes before"
            f" have {actions[0].shape[1]}"
        )
    if actions and (episode.state is None) != (not states):
        raise DataError(f"episode '{episode.name}': unlike the episodes before, it has {'no' if states else 'a'} state")
    if states and episode.state is not None and states[0].shape[1] != episode.state.shape[1]:
        raise DataError(
            f"episode '{episode.name}': the state has {episode.state.shape[1]} dimensions where the episodes before"
            f" have {states[0].shape[1]}"
        )
    if cameras and next(iter(cameras)) not in episode.cameras:
        raise DataError(
            f"episode '{episode.name}' lacks the main camera '{next(iter(cameras))}' of the episodes before"
        )


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
