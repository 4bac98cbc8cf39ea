"""From a request to a plan: the base, the sources and all their actions are read, and everything is decided."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vlaft.checksums import files_hash
from vlaft.data.codec import CODECS, ImageCodec
from vlaft.data.convert.plan import (
    OnError,
    PlannedEpisode,
    Prompts,
    Survey,
    SurveyedSource,
    SurveyRules,
    camera_column,
    plan_shards,
    survey,
)
from vlaft.data.convert.plan_folder import READINGS_FILE, Plan, check_readings
from vlaft.data.convert.reading import Readings, keeping, kept_readings, merge_told, read_actions
from vlaft.data.presets import known_datasets
from vlaft.data.source import OpenedSource, Progress, SourceRequest, first_of_splits, open_request, silent
from vlaft.data.store import FORMAT_VERSION, MAIN_CAMERA, SPLITS
from vlaft.errors import ConfigError, DataError
from vlaft.machine import available_cpus
from vlaft.observation.images import ImagePipeline
from vlaft.observation.prompts import BaseFiles, load_base_files
from vlaft.remote import url_of
from vlaft.version import __version__
from vlaft.weights.layout import resolve_checkpoint


@dataclass(frozen=True, kw_only=True)
class ConvertRequest:
    """What to convert, for which base, and how.

    Attributes:
        sources: one or more; each keeps statistics of its own.
        base: checkpoint folder or Hub id that the examples are tokenized for; its weights are not read.
        out: the folder to write.
        image_size: edge of the stored frames in pixels; None takes the base's.
        codec: how frames are stored.
        val_fraction: share of whole episodes held out where a source has no validation split of its own.
        seed: of that draw.
        on_error: what to do with an episode that is damaged.
        limit: only the first episodes of each split of each source.
        workers: processes; None takes one per CPU.
        overwrite: replace a converted dataset at `out`, once the new one is complete.
        shard_rows: examples after which a shard ends, at the next whole episode; None goes by their number.
    """

    sources: Sequence[SourceRequest]
    base: str
    out: Path
    image_size: int | None = None
    codec: ImageCodec = "jpeg"
    val_fraction: float = 0.1
    seed: int = 0
    on_error: OnError = "stop"
    limit: int | None = None
    workers: int | None = None
    overwrite: bool = False
    shard_rows: int | None = None


def check_settings(request: ConvertRequest) -> None:
    """Refuse settings that are out of range, all at once.

    Raises:
        ConfigError: as said.
    """
    problems = []
    if not request.sources:
        problems.append("there is no source to convert")
    if not 0 <= request.val_fraction < 1:
        problems.append(f"the validation fraction is {request.val_fraction}; it has to be from 0 to below 1")
    if request.image_size is not None and not 8 <= request.image_size <= 4096:
        problems.append(f"the image size is {request.image_size}; it has to be from 8 to 4096 pixels")
    if request.codec not in CODECS:
        problems.append(f"unknown image codec '{request.codec}'; known: {', '.join(CODECS)}")
    if request.on_error not in ("skip", "stop"):
        problems.append(f"on-error is '{request.on_error}'; it has to be skip or stop")
    for name, value in (("limit", request.limit), ("workers", request.workers), ("shard_rows", request.shard_rows)):
        if value is not None and value < 1:
            problems.append(f"{name} is {value}; it has to be 1 or more")
    if problems:
        raise ConfigError(problems)


@dataclass(frozen=True)
class Prepared:
    """A request whose base and sources are opened; `files` has a hash of each source's files, from before reading."""

    request: ConvertRequest
    base: BaseFiles
    pipeline: ImagePipeline
    opened: list[OpenedSource]
    files: tuple[str, ...]

    @property
    def local(self) -> tuple[SourceRequest, ...]:
        """What opens the sources in this working folder; what was fetched from the Hub is not asked for again."""
        return tuple(
            source.request
            if url_of(source.request.path) is None and source.request.path.exists()
            else replace(source.request, path=source.reader.path)
            for source in self.opened
        )

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides what is written: settings, base and the sources' files."""
        request, base = self.request, self.base
        value = {
            "versions": [__version__, FORMAT_VERSION],
            "sources": [
                [str(source.reader.path.resolve()), source.name, source.request.weight, asdict(source.layout)]
                for source in self.opened
            ],
            "files": self.files,
            "base": [base.tokenizer.fingerprint, asdict(base.actions), base.prompt_style],
            "image": [self.pipeline.to_json(), request.codec],
            "split": [request.val_fraction, request.seed, request.limit, request.shard_rows],
        }
        return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def prepare(request: ConvertRequest) -> Prepared:
    """Open base and sources.

    Raises:
        CheckpointError: the base cannot be read or does not fit.
        ConfigError: a preset or a field of a layout is wrong.
        DataError: a source cannot be opened.
    """
    base = load_base_files(resolve_checkpoint(request.base, weights=False))
    pipeline = ImagePipeline.for_training(base.config, base.preprocessor)
    if request.image_size is not None:
        pipeline = replace(pipeline, size=request.image_size)
    opened = [open_request(source) for source in request.sources]
    return Prepared(request, base, pipeline, opened, tuple(files_hash(source.reader.path) for source in opened))


def settings_of(request: ConvertRequest) -> dict[str, Any]:
    """Return a request as plain values: all that has to be the same for a plan to be the one asked for."""
    value = {
        "base": request.base,
        "image_size": request.image_size,
        "codec": request.codec,
        "val_fraction": request.val_fraction,
        "seed": request.seed,
        "on_error": request.on_error,
        "limit": request.limit,
        "shard_rows": request.shard_rows,
        "sources": [{**asdict(source), "path": str(source.path)} for source in request.sources],
    }
    return dict(json.loads(json.dumps(value, default=str)))


def plan_conversion(prepared: Prepared, folder: Path | None, progress: Progress) -> Plan:
    """Read all actions and decide everything.

    Args:
        prepared: the request.
        folder: where to keep what was read, or None.
        progress: told of the episodes that are read.

    Raises:
        DataError: a source is damaged or unusable.
    """
    request, opened, base = prepared.request, prepared.opened, prepared.base
    listed = [first_of_splits(source.reader.episodes(), request.limit) for source in opened]
    told = [list(source.reader.warnings) for source in opened]
    prompts = Prompts.of(base)
    read = read_actions(
        opened, listed, prepared.local, out=request.out, workers=request.workers or available_cpus()
    )  # fmt: skip
    rules = SurveyRules(
        on_error=request.on_error, limit=request.limit, val_fraction=request.val_fraction, seed=request.seed
    )

    with ExitStack() as held:
        keep = None if folder is None else held.enter_context(keeping(folder / READINGS_FILE))

        def readings() -> Readings:
            for number, ref, reading in read:
                merge_told(told[number], reading.told)
                if keep is not None:
                    keep(number, ref, reading)
                    for text in reading.texts:
                        with suppress(DataError):  # told where the episode is taken
                            prompts.ids(text)
                yield number, ref, reading

        surveyed, episodes = survey(opened, listed, readings(), prompts, rules, progress, folder)
    tokenizer = base.tokenizer
    dataset = {
        "image": {"codec": request.codec, "pipeline": prepared.pipeline.to_json()},
        "prompt_style": base.prompt_style,
        "tokenizer": {
            "base": request.base,
            "fingerprint": tokenizer.fingerprint,
            "action_vocab_size": base.actions.vocab_size,
            "n_action_bins": base.actions.n_bins,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            "pad_id": tokenizer.pad_id,
            "blank_id": tokenizer.blank_id,
        },
        "split": {"val_fraction": request.val_fraction, "seed": request.seed, "limit": request.limit},
    }
    return Plan(
        out=Path(os.path.realpath(request.out)),
        fingerprint=prepared.fingerprint,
        settings=settings_of(request),
        requests=tuple(
            asked.request if url_of(asked.request.path) else _anywhere(local)
            for asked, local in zip(prepared.opened, prepared.local, strict=True)
        ),
        files=prepared.files,
        rules=rules,
        shard_rows=request.shard_rows,
        prompts=prompts.known,
        longest=prompts.longest,
        dataset=dataset,
        told=tuple(
            f"{source.name}: {sentence}"
            for source, said in zip(opened, told, strict=True)
            for sentence in source.warnings_with(said)
        ),
        **_decided(opened, surveyed, episodes, request.shard_rows),
    )


def plan_without(
    plan: Plan, damage: Mapping[tuple[int, int], str], folder: Path, opened: Sequence[OpenedSource], scratch: Path
) -> Plan:
    """Return a plan as it would be had these episodes been found damaged when it was made.

    Args:
        plan: which counted them.
        damage: number of the source and `EpisodeRef.index` to what is wrong.
        folder: in which its readings are kept.
        opened: the sources; no episode is read of them.
        scratch: where files may be made meanwhile.

    Raises:
        DataError: nothing usable is left, or what was kept is damaged.
    """
    listed = [first_of_splits(source.reader.episodes(), plan.rules.limit) for source in opened]
    readings = kept_readings(check_readings(folder))
    rules = replace(plan.rules, without=damage)
    prompts = Prompts(dict(plan.prompts), plan.longest)
    surveyed, episodes = survey(opened, listed, readings, prompts, rules, silent, scratch)
    said = [
        replace(source, warnings=tuple(plan.as_typed(number, sentence) for sentence in source.warnings))
        for number, source in enumerate(surveyed.sources)
    ]
    decided = _decided(opened, replace(surveyed, sources=tuple(said)), episodes, plan.shard_rows)
    decided["sources"] = tuple(
        {**source, "path": before["path"], "preset": before["preset"]}
        for source, before in zip(decided["sources"], plan.sources, strict=True)
    )
    return replace(plan, damaged=len(damage), **decided)


def open_planned(plan: Plan, folder: Path, numbers: Iterable[int]) -> Iterator[OpenedSource]:
    """Open sources of a plan.

    Raises:
        DataError: one has other files, or is read otherwise, than when the plan was made.
        ConfigError: a preset is not there any more.
    """
    for number in numbers:
        source = open_request(plan.requests[number])
        if files_hash(source.reader.path) != plan.files[number]:
            raise DataError(
                f"{source.request.path}: its files are not those that {folder} was made of (names, sizes or times"
                " differ); let this machine see the same files, or make the plan again"
            )
        if json.loads(json.dumps(asdict(source.layout), default=str)) != plan.sources[number]["layout"]:
            raise DataError(
                f"{source.request.path}: its preset has changed since {folder} was made; make the plan again"
            )
        yield source


def _anywhere(request: SourceRequest) -> SourceRequest:
    """Return a request that opens the same source and preset from any working folder."""
    preset = request.preset
    if preset is not None and preset not in known_datasets() and Path(preset).is_file():
        preset = str(Path(preset).absolute())
    return replace(request, path=request.path.absolute(), preset=preset)


def _decided(
    opened: Sequence[OpenedSource], surveyed: Survey, episodes: list[PlannedEpisode], shard_rows: int | None
) -> dict[str, Any]:
    """Return the fields of a plan that depend on which episodes are in it."""
    if not any(episode.split == "train" for episode in episodes):
        raise DataError("all episodes belong to the validation split of their source, none is left to train on")
    shards = tuple(plan_shards(episodes, shard_rows))
    return {
        "sources": tuple(describe_source(*pair) for pair in zip(opened, surveyed.sources, strict=True)),
        "survey": surveyed,
        "shards": shards,
        "shard_count": len(shards),
        "episodes": {split: sum(episode.split == split for episode in episodes) for split in SPLITS},
        "rows": {split: sum(episode.rows for episode in episodes if episode.split == split) for split in SPLITS},
    }


def describe_source(source: OpenedSource, surveyed: SurveyedSource) -> dict[str, Any]:
    """Return how a source was read and what was found in it, as plain values."""
    columns = [MAIN_CAMERA, *(camera_column(name) for name in surveyed.cameras[1:])]
    action = surveyed.statistics["action"]
    return {
        "name": source.name,
        "path": url_of(source.request.path) or str(source.request.path),
        "format": source.reader.format,
        "preset": source.request.preset,
        "weight": source.request.weight,
        "episodes": surveyed.statistics["num_trajectories"],
        "steps": surveyed.statistics["num_transitions"],
        "fps": surveyed.fps,
        "instructions": list(surveyed.instructions),
        "cameras": dict(zip(columns, surveyed.cameras, strict=True)),
        "action": {
            "dimensions": len(action["mean"]),
            "names": list(surveyed.action_names),
            "mask": action["mask"],
        },
        "layout": asdict(source.layout),
    }
