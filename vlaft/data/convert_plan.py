"""First pass of a conversion: actions only. What is in the sources, their statistics, and which shard gets what."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vlaft.data.episode import Episode
from vlaft.data.layout import Layout, apply_layout
from vlaft.data.presets import layout_fields, load_preset, preset_of_dataset
from vlaft.data.prompts import BaseFiles
from vlaft.data.readers import EpisodeRef, Source, open_source
from vlaft.data.standardize import parse_steps, standardize
from vlaft.data.statistics import DatasetStatistics, compute_statistics
from vlaft.data.store import MAIN_CAMERA
from vlaft.errors import ConfigError, DataError

OnError = Literal["skip", "stop"]
Progress = Callable[[str, int, int], None]  # phase, done, total

_VALIDATION_NAMES = {"val", "valid", "validation", "test", "eval"}


@dataclass(frozen=True, kw_only=True)
class SourceRequest:
    """One source to convert.

    Attributes:
        path: file, folder or Hub id, as `open_source` takes it.
        preset: name or file of a dataset preset, or None for the reader's own layout.
        layout: single fields of the layout that win over preset and reader, as a preset's YAML would set them
            (`{"instruction": "open the drawer"}`).
        name: the dataset's name and its key in the statistics; None takes the source's own.
        weight: how often training samples it: times its number of steps, as in OpenVLA's mixtures.
    """

    path: Path
    preset: str | None = None
    layout: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class OpenedSource:
    """A source with the layout that applies to it."""

    request: SourceRequest
    source: Source
    layout: Layout

    @property
    def name(self) -> str:
        """The dataset's name and its key in the statistics."""
        return self.request.name or self.source.name

    @property
    def warnings(self) -> list[str]:
        """What the reader did not believe, and whether a preset was overlooked; each a sentence."""
        known = None if self.request.preset else preset_of_dataset(self.source.name)
        hint = [f"a preset is made for this dataset: give --preset {known} unless its actions are as you want them"]
        return [*self.source.warnings, *(hint if known else [])]

    def read(self, ref: EpisodeRef) -> Episode:
        """Return a standardized episode; its frames are not decoded yet.

        Raises:
            DataError: it is damaged, or lacks what the layout or training needs.
        """
        episode = standardize(apply_layout(self.source.read(ref), self.layout), self.layout.steps)
        if episode.action is None or not len(episode.action):
            raise DataError(f"episode '{episode.name}' of {self.request.path} has no steps")
        for what, values in (("action", episode.action), ("state", episode.state)):
            if values is not None and not np.isfinite(values).all():
                step = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
                raise DataError(
                    f"episode '{episode.name}' of {self.request.path}, step {step}: the {what} is not finite;"
                    " repair or drop the episode"
                )
        if not episode.instruction.strip():
            raise DataError(
                f"episode '{episode.name}' of {self.request.path} has no instruction;"
                " give one with instruction='what the robot does'"
            )
        if not episode.cameras:
            raise DataError(f"episode '{episode.name}' of {self.request.path} has no camera; examples need images")
        return episode


def open_request(request: SourceRequest) -> OpenedSource:
    """Open a source and settle its layout: the reader's, then the preset's, then the request's own fields.

    Raises:
        DataError: the source cannot be opened.
        ConfigError: the preset or a field of the layout is wrong.
    """
    settings = layout_fields(request.layout, "settings")
    if not request.weight > 0 or not np.isfinite(request.weight):
        raise ConfigError(f"the weight of {request.path} is {request.weight}; it has to be a positive number")
    preset = Layout() if request.preset is None else load_preset(request.preset)
    options = {**preset.options, **settings.get("options", {})}
    source = open_source(request.path, options)
    layout = source.layout if request.preset is None else load_preset(request.preset, source.layout)
    if "action" in settings:  # names and mask describe the action that they came with
        settings = {"action_names": (), "action_mask": (), **settings}
    layout = replace(layout, **settings)
    parse_steps(layout.steps)
    return OpenedSource(request, source, layout)


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
    """What the first pass found in one source."""

    name: str
    episodes: tuple[PlannedEpisode, ...]
    statistics: DatasetStatistics
    cameras: tuple[str, ...]
    fps: float | None
    skipped: tuple[Skipped, ...]


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


def survey(
    opened: Sequence[OpenedSource],
    base: BaseFiles,
    *,
    on_error: OnError,
    limit: int | None,
    val_fraction: float,
    seed: int,
    progress: Progress,
) -> Survey:
    """Read all actions, compute the statistics over both splits, and split by whole episodes.

    Raises:
        DataError: an episode is damaged (unless it is to be skipped), a source has nothing usable, or the sources
            do not fit together.
    """
    listed = [_limited(source.source.episodes(), limit) for source in opened]
    total = sum(len(refs) for refs in listed)
    found: list[SurveyedSource] = []
    prompts: dict[str, list[int]] = {}
    done, first_index = 0, 0
    for number, (source, refs) in enumerate(zip(opened, listed, strict=True)):
        actions: list[NDArray[np.float32]] = []
        states: list[NDArray[np.float32]] = []
        kept: list[EpisodeRef] = []
        skipped: list[Skipped] = []
        cameras: dict[str, None] = {}
        fps: float | None = None
        for ref in refs:
            progress("reading actions", done, total)
            done += 1
            try:
                episode = source.read(ref)
                assert episode.action is not None
                _check_fits(episode, actions, states, cameras)
                if episode.instruction not in prompts:
                    prompts[episode.instruction] = _prompt(base, episode)
            except DataError as error:
                if on_error == "stop":
                    raise
                skipped.append(Skipped(source.name, ref.name, str(error)))
                continue
            kept.append(ref)
            actions.append(episode.action)
            if episode.state is not None:
                states.append(episode.state)
            cameras.update(dict.fromkeys(episode.cameras))
            fps = episode.fps if fps is None else fps
        if not kept:
            why = f"; the first: {skipped[0].why}" if skipped else ""
            raise DataError(f"{source.request.path} has no usable episode{why}")
        splits = split_episodes(kept, source.name, val_fraction, seed)
        planned = tuple(
            PlannedEpisode(number, ref, first_index + ref.index, split, len(action))
            for ref, split, action in zip(kept, splits, actions, strict=True)
        )
        statistics = compute_statistics(actions, states or None, source.layout.action_mask)
        found.append(SurveyedSource(source.name, planned, statistics, tuple(cameras), fps, tuple(skipped)))
        first_index += max(ref.index for ref in refs) + 1
    progress("reading actions", total, total)
    _check_together(found)
    return Survey(tuple(found), prompts)


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


def plan_shards(episodes: Sequence[PlannedEpisode], shard_rows: int) -> list[ShardPlan]:
    """Return the shards: whole episodes in order, a new one where the last has `shard_rows` examples or more."""
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


def _limited(refs: Sequence[EpisodeRef], limit: int | None) -> list[EpisodeRef]:
    """Return the first `limit` episodes of every split of a source."""
    counts: dict[str | None, int] = {}
    kept = []
    for ref in refs:
        counts[ref.split] = counts.get(ref.split, 0) + 1
        if limit is None or counts[ref.split] <= limit:
            kept.append(ref)
    return kept


def _prompt(base: BaseFiles, episode: Episode) -> list[int]:
    assert episode.action is not None
    ids = base.prompt_token_ids(episode.instruction)
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
