"""Convert demonstrations to tokenized action examples: two passes, parallel, resumable, never half done.

Everything is written to `<out>.partial` and that folder is renamed into place at the end. Run again after a kill,
the same request finds its finished shards there; another request starts over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vlaft.action.statistics import STATISTICS_FILE, read_statistics, write_statistics
from vlaft.checksums import content_checksum, sealed
from vlaft.data.codec import CODECS, ImageCodec
from vlaft.data.convert.plan import (
    OnError,
    ShardPlan,
    Skipped,
    Survey,
    SurveyedSource,
    SurveyRules,
    camera_column,
    plan_shards,
    survey,
)
from vlaft.data.convert.shards import ShardJob, ShardResult, convert_shards
from vlaft.data.convert.staging import (
    check_output,
    conversion_errors,
    finished_shards,
    known_damage,
    move_into_place,
    open_staging,
    remember_damage,
    remember_shard,
)
from vlaft.data.source import OpenedSource, Progress, SourceRequest, open_request, silent
from vlaft.data.store import (
    DATASET_FILE,
    FORMAT_VERSION,
    MAIN_CAMERA,
    SPLITS,
    STATISTICS_CHECKSUM,
    shard_entry,
)
from vlaft.errors import ConfigError, DataError
from vlaft.files import locked, write_json
from vlaft.machine import available_cpus
from vlaft.observation.images import ImagePipeline
from vlaft.observation.prompts import BaseFiles, load_base_files
from vlaft.version import __version__
from vlaft.weights.layout import resolve_checkpoint

__all__ = ["Conversion", "ConvertRequest", "Skipped", "SourceRequest", "convert"]


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


@dataclass(frozen=True)
class Conversion:
    """What was converted, or would be.

    Attributes:
        out: the folder.
        episodes: number of episodes per split.
        rows: number of examples per split.
        shards: number of files.
        reused: how many of them an earlier, interrupted run had finished.
        bytes: size of the shards; 0 for a dry run.
        sources: what was found in each source, and how it was read.
        statistics: dataset name to statistics.
        skipped: episodes that were left out.
        warnings: what was not believed or looks odd, a sentence each.
    """

    out: Path
    episodes: Mapping[str, int]
    rows: Mapping[str, int]
    shards: int
    reused: int
    bytes: int
    sources: tuple[Mapping[str, Any], ...]
    statistics: Mapping[str, Any]
    skipped: tuple[Skipped, ...]
    warnings: tuple[str, ...]


def convert(request: ConvertRequest, *, dry_run: bool = False, progress: Progress = silent) -> Conversion:
    """Convert the request's sources and return what came of it.

    Args:
        request: what to convert.
        dry_run: read all actions and plan, but decode no frame and write nothing.
        progress: called with the phase, how much of it is done, and its total.

    Raises:
        ConfigError: a setting is out of range.
        CheckpointError: the base cannot be read or does not fit.
        DataError: a source is damaged or unusable, or the disk is full.
        VlaftError: the output is in the way, or another process writes to it.
    """
    _check_settings(request)
    with ExitStack() as held:
        if not dry_run:
            held.enter_context(conversion_errors(request.out))
            held.enter_context(locked(request.out, shared=True))
        return _convert(request, dry_run, progress)


def _convert(request: ConvertRequest, dry_run: bool, progress: Progress) -> Conversion:
    before = check_output(request.out, [source.path for source in request.sources], request.overwrite)
    base = load_base_files(resolve_checkpoint(request.base, weights=False))
    pipeline = ImagePipeline.for_training(base.config, base.preprocessor)
    if request.image_size is not None:
        pipeline = replace(pipeline, size=request.image_size)
    opened = [open_request(source) for source in request.sources]
    plan = _plan(request, opened, base, {}, progress)
    if dry_run:
        return _conversion(request, opened, plan, [], reused=0)
    # what was fetched from the Hub lies on this disk now, and the workers shall not ask the Hub again
    requests = tuple(
        source.request if source.request.path.exists() else replace(source.request, path=source.reader.path)
        for source in opened
    )
    staging = open_staging(request.out, _fingerprint(request, opened, base, pipeline))
    known = known_damage(staging) if request.on_error == "skip" else {}
    if known:  # an earlier run of the same request found damaged frames
        plan = _plan(request, opened, base, known, progress)
    while True:
        results, reused = _write_shards(request, requests, plan, staging, base, pipeline, progress)
        damage = {(entry.source, entry.index): entry.why for result in results for entry in result.damaged}
        if not damage:
            break
        # The statistics counted these episodes, and every row is normalised by them: all is done again without.
        known = {**known, **damage}
        remember_damage(staging, known)
        plan = _plan(request, opened, base, known, progress)
    conversion = _conversion(request, opened, plan, results, reused)
    write_statistics(staging / STATISTICS_FILE, conversion.statistics)
    described = _describe(request, plan, base, pipeline, conversion, results)
    described[STATISTICS_CHECKSUM] = content_checksum(read_statistics(staging / STATISTICS_FILE))
    write_json(staging / DATASET_FILE, sealed(described), indent=1)
    move_into_place(staging, request.out, before)
    return conversion


@dataclass(frozen=True)
class _Plan:
    """What the first pass found, and the shards that the second is to write; `damaged` episodes are not in it."""

    survey: Survey
    shards: list[ShardPlan]
    damaged: int

    @property
    def key(self) -> str:
        """A hash of all that decides the content of the shards beyond the request."""
        parts = [[shard.file, [[e.source, e.ref.index] for e in shard.episodes]] for shard in self.shards]
        value = [parts, [source.statistics for source in self.survey.sources]]
        return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _plan(
    request: ConvertRequest,
    opened: Sequence[OpenedSource],
    base: BaseFiles,
    damage: Mapping[tuple[int, int], str],
    progress: Progress,
) -> _Plan:
    rules = SurveyRules(
        on_error=request.on_error,
        limit=request.limit,
        val_fraction=request.val_fraction,
        seed=request.seed,
        without=damage,
    )
    surveyed = survey(opened, base, rules, progress)
    if not any(episode.split == "train" for episode in surveyed.episodes):
        raise DataError("all episodes belong to the validation split of their source, none is left to train on")
    return _Plan(surveyed, plan_shards(surveyed.episodes, request.shard_rows), len(damage))


def _write_shards(
    request: ConvertRequest,
    requests: tuple[SourceRequest, ...],
    plan: _Plan,
    staging: Path,
    base: BaseFiles,
    pipeline: ImagePipeline,
    progress: Progress,
) -> tuple[list[ShardResult], int]:
    """Write what is missing of the planned shards; return all of them, and how many were there already."""
    key = plan.key
    results = finished_shards(staging, [shard.file for shard in plan.shards], key, request.on_error)
    reused = len(results)
    missing = [shard for shard in plan.shards if shard.file not in results]
    job = ShardJob(staging, requests, plan.survey, base.actions, pipeline, request.codec, request.on_error, request.out)
    total = sum(shard.rows for shard in plan.shards)
    done = sum(shard.rows for shard in plan.shards if shard.file in results)
    progress("writing examples", done, total)
    for result in convert_shards(job, missing, request.workers or available_cpus()):
        remember_shard(staging, key, result)
        results[result.shard.file] = result
        done += result.shard.rows
        progress("writing examples", done, total)
    return [results[shard.file] for shard in plan.shards], reused


def _check_settings(request: ConvertRequest) -> None:
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


def _fingerprint(
    request: ConvertRequest, opened: Sequence[OpenedSource], base: BaseFiles, pipeline: ImagePipeline
) -> str:
    """Return a hash of all that decides what is written: settings, base and the sources' files."""
    value = {
        "versions": [__version__, FORMAT_VERSION],
        "sources": [
            [str(source.reader.path.resolve()), source.name, source.request.weight, asdict(source.layout)]
            for source in opened
        ],
        "files": [_files_of(source.reader.path) for source in opened],
        "base": [base.tokenizer.fingerprint, asdict(base.actions), base.prompt_style],
        "image": [pipeline.to_json(), request.codec],
        "split": [request.val_fraction, request.seed, request.limit, request.shard_rows],
    }
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _files_of(path: Path) -> list[tuple[str, int, int]]:
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _conversion(
    request: ConvertRequest,
    opened: Sequence[OpenedSource],
    plan: _Plan,
    results: Sequence[ShardResult],
    reused: int,
) -> Conversion:
    warnings = [f"{source.name}: {warning}" for source in opened for warning in source.warnings]
    warnings += [f"{source.name}: {warning}" for source in plan.survey.sources for warning in source.warnings]
    if plan.damaged:
        warnings.append(
            f"{plan.damaged} episodes with damaged frames were left out; the statistics were computed anew without them"
        )
    planned = plan.survey.episodes
    episodes = {split: sum(episode.split == split for episode in planned) for split in SPLITS}
    if not episodes["val"]:
        warnings.append("no episode is held out for validation; training cannot tell its best checkpoint")
    return Conversion(
        out=request.out,
        episodes=episodes,
        rows={split: sum(episode.rows for episode in planned if episode.split == split) for split in SPLITS},
        shards=len(plan.shards),
        reused=reused,
        bytes=sum(result.shard.bytes for result in results),
        sources=tuple(describe_source(*pair) for pair in zip(opened, plan.survey.sources, strict=True)),
        statistics={source.name: source.statistics for source in plan.survey.sources},
        skipped=tuple(entry for source in plan.survey.sources for entry in source.skipped),
        warnings=tuple(warnings),
    )


def _describe(
    request: ConvertRequest,
    plan: _Plan,
    base: BaseFiles,
    pipeline: ImagePipeline,
    conversion: Conversion,
    results: Sequence[ShardResult],
) -> dict[str, Any]:
    """Return `dataset.json`; it says nothing of time or machine, so that the same input gives the same file."""
    tokenizer = base.tokenizer
    return {
        "format_version": FORMAT_VERSION,
        "sources": list(conversion.sources),
        "image": {"codec": request.codec, "cameras": list(plan.survey.columns), "pipeline": pipeline.to_json()},
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
        "counts": {"episodes": dict(conversion.episodes), "rows": dict(conversion.rows)},
        "shards": [shard_entry(result.shard) for result in results],
        "skipped": [asdict(entry) for entry in conversion.skipped],
        "warnings": list(conversion.warnings),
    }


def describe_source(source: OpenedSource, surveyed: SurveyedSource) -> dict[str, Any]:
    """Return how a source was read and what was found in it, as plain values."""
    columns = [MAIN_CAMERA, *(camera_column(name) for name in surveyed.cameras[1:])]
    action = surveyed.statistics["action"]
    return {
        "name": source.name,
        "path": str(source.request.path),
        "format": source.reader.format,
        "preset": source.request.preset,
        "weight": source.request.weight,
        "episodes": len(surveyed.episodes),
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
