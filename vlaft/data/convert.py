"""Convert demonstrations to tokenized action examples: two passes, parallel, resumable, never half done.

Everything is written to `<out>.partial` and that folder is renamed into place at the end. Run again after a kill,
the same request finds its finished shards there; another request starts over.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vlaft import __version__
from vlaft.data.codec import CODECS, ImageCodec
from vlaft.data.convert_plan import (
    OnError,
    OpenedSource,
    Progress,
    ShardPlan,
    Skipped,
    SourceRequest,
    Survey,
    camera_column,
    open_request,
    plan_shards,
    survey,
)
from vlaft.data.convert_shards import ShardJob, ShardResult, convert_shards
from vlaft.data.convert_staging import STATE, check_output, disk_errors, move_into_place, open_staging
from vlaft.data.images import ImagePipeline
from vlaft.data.prompts import BaseFiles, load_base_files
from vlaft.data.statistics import write_statistics
from vlaft.data.store import (
    DATASET_FILE,
    FORMAT_VERSION,
    MAIN_CAMERA,
    SPLITS,
    STATISTICS_FILE,
    Shard,
    checksum,
    read_json,
    shard_entry,
    write_json,
)
from vlaft.errors import ConfigError, DataError

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
        shard_rows: examples after which a shard ends, at the next whole episode.
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
    shard_rows: int = 1000


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
    statistics: Mapping[str, Any]
    skipped: tuple[Skipped, ...]
    warnings: tuple[str, ...]


def _silent(phase: str, done: int, total: int) -> None:
    """Report nothing."""


def convert(request: ConvertRequest, *, dry_run: bool = False, progress: Progress = _silent) -> Conversion:
    """Convert the request's sources and return what came of it.

    Args:
        request: what to convert.
        dry_run: read all actions and plan, but decode no frame and write nothing.
        progress: called with the phase, how much of it is done, and its total.

    Raises:
        ConfigError: a setting is out of range.
        CheckpointError: the base cannot be read or does not fit.
        DataError: a source is damaged or unusable, the output is in the way or in use, or the disk is full.
    """
    _check_settings(request)
    check_output(request.out, [source.path for source in request.sources], request.overwrite)
    base = load_base_files(request.base)
    pipeline = ImagePipeline.for_training(base.config, base.preprocessor)
    if request.image_size is not None:
        pipeline = replace(pipeline, size=request.image_size)
    opened = [open_request(source) for source in request.sources]
    found = survey(
        opened,
        base,
        on_error=request.on_error,
        limit=request.limit,
        val_fraction=request.val_fraction,
        seed=request.seed,
        progress=progress,
    )
    plans = plan_shards([episode for source in found.sources for episode in source.episodes], request.shard_rows)
    if dry_run:
        return _conversion(request, opened, found, plans, [], reused=0)
    with disk_errors(request.out), open_staging(request.out, _fingerprint(request, opened, base, pipeline)) as staging:
        results = _finished(staging, plans, request.on_error)
        reused = len(results)
        missing = [plan for plan in plans if plan.file not in results]
        job = ShardJob(staging, tuple(request.sources), found, base.actions, pipeline, request.codec, request.on_error)
        total, done = sum(plan.rows for plan in plans), sum(result.shard.rows for result in results.values())
        progress("writing examples", done, total)
        for result in convert_shards(job, missing, request.workers or os.cpu_count() or 1):
            write_json(staging / STATE / f"{result.shard.file}.json", asdict(result))
            results[result.shard.file] = result
            done += result.shard.rows
            progress("writing examples", done, total)
        ordered = [results[plan.file] for plan in plans]
        conversion = _conversion(request, opened, found, plans, ordered, reused)
        if not conversion.rows["train"]:
            raise DataError("every training episode turned out damaged; nothing was converted")
        write_statistics(staging / STATISTICS_FILE, conversion.statistics)
        write_json(staging / DATASET_FILE, _describe(request, opened, found, base, pipeline, conversion, ordered))
        # something may have come to lie there in the meantime
        check_output(request.out, [source.path for source in request.sources], request.overwrite)
        move_into_place(staging, request.out)
    return conversion


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
            [str(source.source.path.resolve()), source.name, source.request.weight, asdict(source.layout)]
            for source in opened
        ],
        "files": [_files_of(source.source.path) for source in opened],
        "base": [base.tokenizer.fingerprint, asdict(base.actions), base.prompt_style],
        "image": [pipeline.to_json(), request.codec],
        "split": [request.val_fraction, request.seed, request.limit, request.shard_rows],
    }
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _files_of(path: Path) -> list[tuple[str, int, int]]:
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _finished(staging: Path, plans: Sequence[ShardPlan], on_error: OnError) -> dict[str, ShardResult]:
    """Return the shards that an earlier run of the same request finished and that are whole.

    A run may stop at a damaged episode and go on with skipping it; the other way round, what was skipped is redone.
    """
    results = {}
    for plan in plans:
        record, path = staging / STATE / f"{plan.file}.json", staging / plan.file
        if record.is_file() and path.is_file():
            value = read_json(record)
            shard = Shard(**value["shard"])
            if checksum(path) == shard.crc32c and not (value["skipped"] and on_error == "stop"):
                results[plan.file] = ShardResult(shard, tuple(Skipped(**entry) for entry in value["skipped"]))
    return results


def _conversion(
    request: ConvertRequest,
    opened: Sequence[OpenedSource],
    found: Survey,
    plans: Sequence[ShardPlan],
    results: Sequence[ShardResult],
    reused: int,
) -> Conversion:
    damaged = [entry for result in results for entry in result.skipped]
    warnings = [f"{source.name}: {warning}" for source in opened for warning in source.warnings]
    if damaged:
        warnings.append(
            f"{len(damaged)} episodes with damaged frames were left out; their actions are counted in the statistics"
        )
    gone = {(entry.dataset, entry.episode) for entry in damaged}
    episodes = {
        split: sum(
            (found.sources[episode.source].name, episode.ref.name) not in gone
            for plan in plans
            if plan.split == split
            for episode in plan.episodes
        )
        for split in SPLITS
    }
    if not episodes["val"]:
        warnings.append("no episode is held out for validation; training cannot tell its best checkpoint")
    if results:
        rows = {split: sum(result.shard.rows for result in results if result.shard.split == split) for split in SPLITS}
    else:
        rows = {split: sum(plan.rows for plan in plans if plan.split == split) for split in SPLITS}
    return Conversion(
        out=request.out,
        episodes=episodes,
        rows=rows,
        shards=len(plans),
        reused=reused,
        bytes=sum(result.shard.bytes for result in results),
        statistics={source.name: source.statistics for source in found.sources},
        skipped=(*(entry for source in found.sources for entry in source.skipped), *damaged),
        warnings=tuple(warnings),
    )


def _describe(
    request: ConvertRequest,
    opened: Sequence[OpenedSource],
    found: Survey,
    base: BaseFiles,
    pipeline: ImagePipeline,
    conversion: Conversion,
    results: Sequence[ShardResult],
) -> dict[str, Any]:
    """Return `dataset.json`; it says nothing of time or machine, so that the same input gives the same file."""
    sources = []
    for source, surveyed in zip(opened, found.sources, strict=True):
        columns = [MAIN_CAMERA, *(camera_column(name) for name in surveyed.cameras[1:])]
        action = surveyed.statistics["action"]
        sources.append(
            {
                "name": source.name,
                "path": str(source.request.path),
                "format": source.source.format,
                "preset": source.request.preset,
                "weight": source.request.weight,
                "fps": surveyed.fps,
                "cameras": dict(zip(columns, surveyed.cameras, strict=True)),
                "action": {
                    "dimensions": len(action["mean"]),
                    "names": list(source.layout.action_names),
                    "mask": action["mask"],
                },
                "layout": asdict(source.layout),
            }
        )
    tokenizer = base.tokenizer
    return {
        "format_version": FORMAT_VERSION,
        "sources": sources,
        "image": {"codec": request.codec, "cameras": list(found.columns), "pipeline": pipeline.to_json()},
        "prompt_style": base.prompt_style,
        "tokenizer": {
            "base": base.base,
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
