"""Convert demonstrations to tokenized action examples: planned, written and finished, at once or in parts.

Three steps: the plan reads all actions and decides which shard gets what (`plan.py`); shards are written, in any order
and by whoever takes their lock (`shards.py`); at the end episodes whose frames turned out damaged are taken out
(`mending.py`), the folder is described and gets its name. `convert` does all three; `make_plan`, `convert_part` and
`finish` do one each, wherever the files are seen. Everything is written to `<out>.partial`, where finished shards are
found again after a kill, and the folder is renamed into place at the end. What comes out depends on the request and
the demonstrations alone: not on the number of parts or processes, nor on what was killed.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vlaft.action.statistics import STATISTICS_FILE, read_statistics, write_statistics
from vlaft.checksums import content_checksum, sealed
from vlaft.data.convert.mending import MendJob, mend_shard, mended_shards
from vlaft.data.convert.plan import ShardPlan, Skipped
from vlaft.data.convert.plan_folder import PLAN_FILE, Plan, read_plan, write_plan
from vlaft.data.convert.planning import (
    ConvertRequest,
    Prepared,
    check_settings,
    open_planned,
    plan_conversion,
    plan_without,
    prepare,
    settings_of,
)
from vlaft.data.convert.processes import in_processes
from vlaft.data.convert.shards import ShardJob, convert_shard, shard_key, survey_digest
from vlaft.data.convert.staging import (
    STATE,
    ShardResult,
    check_output,
    conversion_errors,
    finished_shard,
    found_staging,
    move_into_place,
    note_parts,
    noted_parts,
    open_staging,
    remove_others,
    staging_folder,
    tidy,
)
from vlaft.data.source import OpenedSource, Progress, SourceRequest, silent
from vlaft.data.store import DATASET_FILE, FORMAT_VERSION, STATISTICS_CHECKSUM, shard_entry
from vlaft.errors import ConfigError, DataError
from vlaft.files import Listing, joined, locked, output_folder, write_json
from vlaft.machine import available_cpus

__all__ = [
    "Conversion",
    "ConvertRequest",
    "Part",
    "Skipped",
    "SourceRequest",
    "convert",
    "convert_part",
    "finish",
    "make_plan",
]

_CHECKS = 4  # files that are held against their checksums at a time
_TOLD = 20  # missing parts that are told one by one
_MENDED = "mended"  # folder of the shards without damaged episodes, within the state


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


@dataclass(frozen=True)
class Part:
    """One part of a conversion.

    Attributes:
        plan: the plan's folder.
        number: which part, from 1.
        count: of how many.
        shards: number of its files.
        reused: how many of them were there already.
        rows: number of its examples.
        bytes: size of its files.
        damaged: episodes whose frames turned out damaged and are left out.
    """

    plan: Path
    number: int
    count: int
    shards: int
    reused: int
    rows: int
    bytes: int
    damaged: int


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
    check_settings(request)
    with ExitStack() as held:
        if not dry_run:
            held.enter_context(conversion_errors(request.out))
            held.enter_context(locked(request.out, shared=True))
        before = check_output(request.out, [source.path for source in request.sources], request.overwrite)
        prepared = prepare(request)
        if dry_run:
            return _conversion(plan_conversion(prepared, None, progress), request.out, [], reused=0)
        fresh = not staging_folder(request.out).exists()
        staging = open_staging(request.out, prepared.fingerprint)
        folder = staging / STATE
        try:
            plan = _kept_plan(folder, prepared) or _new_plan(folder, prepared, progress)
        except BaseException:
            if fresh:
                shutil.rmtree(staging)
            raise
        plan = replace(plan, requests=prepared.local)
        workers = request.workers or available_cpus()
        results, reused = _write_shards(plan, staging, request.out, workers, progress)
        return _finish(plan, folder, staging, request.out, before, results, reused, prepared.opened, workers, progress)


def make_plan(request: ConvertRequest, folder: Path, *, progress: Progress = silent) -> Conversion:
    """Read all actions and write what `convert_part` and `finish` need to a folder; nothing where it is there already.

    Args:
        request: what to convert.
        folder: the plan's.
        progress: as `convert` takes it.

    Returns:
        What would be converted.

    Raises:
        VlaftError: as `convert`; or the folder holds another plan, or lies where files are read from or written to.
    """
    check_settings(request)
    with conversion_errors(request.out), locked(request.out, shared=True):
        sources = [source.path for source in request.sources]
        check_output(request.out, sources, request.overwrite)
        _check_apart(folder, [*sources, request.out, staging_folder(request.out)])
        prepared = prepare(request)
        if (folder / PLAN_FILE).is_file():
            plan = _kept_plan(folder, prepared)
            if plan is None:
                raise DataError(
                    f"{folder} holds the plan of another conversion, or of files that have changed since; name another"
                    " --plan, or remove it"
                )
            open_staging(request.out, plan.fingerprint)
            return _conversion(plan, request.out, [], reused=0)
        with output_folder(folder) as partial:
            plan = _new_plan(partial, prepared, progress)
            open_staging(request.out, plan.fingerprint)
        return _conversion(plan, request.out, [], reused=0)


def convert_part(
    folder: Path, number: int, count: int, *, workers: int | None = None, progress: Progress = silent
) -> Part:
    """Write every `count`-th shard of a plan, but for those that are there.

    Any parts of any counts may run at the same time, on any machines that see the plan, the sources and the output:
    each shard is written by one process at a time.

    Args:
        folder: the plan's.
        number: which part, from 1.
        count: of how many.
        workers: processes; None takes one per CPU.
        progress: as `convert` takes it.

    Raises:
        ConfigError: there is no such part.
        DataError: the plan is damaged or of another version, the sources are not those that it was made of, an episode
            is damaged and not to be skipped, or the disk is full.
        VlaftError: a command that is no part writes to the output.
    """
    _check_workers(workers)
    if not 1 <= number <= count:
        raise ConfigError(f"there is no part {number}/{count}; parts of {count} are 1/{count} to {count}/{count}")
    plan = read_plan(folder, (number, count))
    with conversion_errors(plan.out), joined(plan.out, first=True):
        staging = found_staging(plan.out, plan.fingerprint, folder)
        for _ in open_planned(plan, folder, sorted({e.source for shard in plan.shards for e in shard.episodes})):
            pass
        note_parts(staging, count)
        results, reused = _write_shards(plan, staging, plan.out, workers or available_cpus(), progress)
    return Part(
        plan=folder,
        number=number,
        count=count,
        shards=len(results),
        reused=reused,
        rows=sum(result.shard.rows for result in results.values()),
        bytes=sum(result.shard.bytes for result in results.values()),
        damaged=sum(len(result.damaged) for result in results.values()),
    )


def finish(
    folder: Path, *, overwrite: bool = False, workers: int | None = None, progress: Progress = silent
) -> Conversion:
    """Make the dataset of a plan whose parts are all there.

    Args:
        folder: the plan's.
        overwrite: replace a converted dataset that lies where it goes.
        workers: processes, where episodes with damaged frames have to be taken out; None takes one per CPU.
        progress: as `convert` takes it.

    Raises:
        DataError: parts are missing, or the plan is damaged or of another version.
        VlaftError: the output is in the way, or a part is still under way.
    """
    _check_workers(workers)
    plan = read_plan(folder)
    with conversion_errors(plan.out), locked(plan.out, shared=True):
        staging = found_staging(plan.out, plan.fingerprint, folder)
        before = check_output(plan.out, [request.path for request in plan.requests], overwrite)
        tidy(staging)
        results = _finished(plan, staging, progress)
        missing = [number for number, shard in enumerate(plan.shards) if shard.file not in results]
        if missing:
            raise DataError(_missing(folder, missing, plan.shard_count, noted_parts(staging)))
        return _finish(plan, folder, staging, plan.out, before, results, 0, None, workers or available_cpus(), progress)


def _kept_plan(folder: Path, prepared: Prepared) -> Plan | None:
    """Return the plan in a folder where it is the one that would be made, else None."""
    try:
        plan = read_plan(folder)
    except DataError:
        return None
    same = plan.fingerprint == prepared.fingerprint and plan.settings == settings_of(prepared.request)
    return plan if same else None


def _new_plan(folder: Path, prepared: Prepared, progress: Progress) -> Plan:
    (folder / PLAN_FILE).unlink(missing_ok=True)
    plan = plan_conversion(prepared, folder, progress)
    write_plan(folder, plan)
    return plan


def _check_workers(workers: int | None) -> None:
    if workers is not None and workers < 1:
        raise ConfigError(f"workers is {workers}; it has to be 1 or more")


def _check_apart(folder: Path, others: Sequence[Path]) -> None:
    place = folder.resolve()
    for other in others:
        if place == other.resolve() or other.resolve() in place.parents or place in other.resolve().parents:
            raise DataError(f"the plan {folder} and {other} lie within each other; name another folder")


def _missing(folder: Path, missing: Sequence[int], shards: int, count: int | None) -> str:
    """Say which parts are missing, by the count that the parts so far were of."""
    if count is None:
        return f"{folder}: no part was converted yet; run vlaft convert --plan {folder} --part 1/1, or several parts"
    parts = sorted({number % count + 1 for number in missing})
    named = ", ".join(f"{number}/{count}" for number in parts[:_TOLD])
    more = f" and {len(parts) - _TOLD} more" if len(parts) > _TOLD else ""
    verb = "is" if len(parts) == 1 else "are"
    return (
        f"{folder}: part {named}{more} {verb} missing ({len(missing)} of {shards} files); run it with vlaft convert"
        f" --plan {folder} --part {parts[0]}/{count}, then finish again"
        if len(parts) == 1
        else f"{folder}: the parts {named}{more} {verb} missing ({len(missing)} of {shards} files); run each with vlaft"
        f" convert --plan {folder} --part, then finish again"
    )


def _job(plan: Plan, folder: Path, out: Path) -> ShardJob:
    return ShardJob(
        folder=folder,
        requests=plan.requests,
        survey=plan.survey,
        actions=plan.actions,
        pipeline=plan.pipeline,
        codec=plan.dataset["image"]["codec"],
        on_error=plan.rules.on_error,
        out=out,
    )


def _finished(plan: Plan, folder: Path, progress: Progress) -> dict[str, ShardResult]:
    """Return the shards of a plan that are there and whole, by file."""
    digest = survey_digest(plan.survey)
    total = sum(shard.rows for shard in plan.shards)
    done, results = 0, {}

    def look(shard: ShardPlan) -> tuple[ShardPlan, ShardResult | None]:
        return shard, finished_shard(folder, shard.file, shard_key(digest, shard), plan.rules.on_error)

    with ThreadPoolExecutor(_CHECKS) as pool:
        for shard, result in pool.map(look, plan.shards):
            done += shard.rows
            progress("checking files", done, total)
            if result is not None:
                results[shard.file] = result
    return results


def _write_shards(
    plan: Plan, staging: Path, out: Path, workers: int, progress: Progress
) -> tuple[dict[str, ShardResult], int]:
    """Write what is missing of the planned shards; return all of them, and how many were there already."""
    results = _finished(plan, staging, silent)
    reused = len(results)
    missing = [shard for shard in plan.shards if shard.file not in results]
    total = sum(shard.rows for shard in plan.shards)
    done = sum(shard.rows for shard in plan.shards if shard.file in results)
    progress("writing examples", done, total)
    for result in in_processes(convert_shard, missing, _job(plan, staging, out), min(workers, len(missing))):
        results[result.shard.file] = result
        done += result.shard.rows
        progress("writing examples", done, total)
    return results, reused


def _finish(
    plan: Plan,
    folder: Path,
    staging: Path,
    out: Path,
    before: Listing,
    results: Mapping[str, ShardResult],
    reused: int,
    opened: Sequence[OpenedSource] | None,
    workers: int,
    progress: Progress,
) -> Conversion:
    """Describe the finished shards of a plan, without damaged episodes, and give the folder its name."""
    finished = staging
    if any(result.damaged for result in results.values()):
        finished = staging / STATE / _MENDED
        plan, results = _mend(plan, folder, staging, out, results, opened, workers, progress)
    remove_others(finished, results)
    in_order = [results[shard.file] for shard in plan.shards]
    conversion = _conversion(plan, out, in_order, reused)
    write_statistics(finished / STATISTICS_FILE, conversion.statistics)
    described = _describe(plan, conversion, in_order)
    described[STATISTICS_CHECKSUM] = content_checksum(read_statistics(finished / STATISTICS_FILE))
    write_json(finished / DATASET_FILE, sealed(described), indent=1)
    tidy(finished)
    move_into_place(finished, staging, out, before)
    return conversion


def _mend(
    plan: Plan,
    folder: Path,
    staging: Path,
    out: Path,
    results: Mapping[str, ShardResult],
    opened: Sequence[OpenedSource] | None,
    workers: int,
    progress: Progress,
) -> tuple[Plan, Mapping[str, ShardResult]]:
    """Return the plan without damaged episodes, and its shards, which lie in a folder of their own."""
    opened = list(open_planned(plan, folder, range(len(plan.requests)))) if opened is None else opened
    target = staging / STATE / _MENDED
    target.mkdir(exist_ok=True)
    tidy(target)
    damaged = [entry for result in results.values() for entry in result.damaged]
    known: dict[tuple[int, int], str] = {}
    while damaged:
        # A plan without some episodes may take others that did not fit them; these may be damaged in their turn.
        known |= {(entry.source, entry.index): plan.as_typed(entry.source, entry.why) for entry in damaged}
        mended = plan_without(plan, known, folder, opened, target)
        job = MendJob(**vars(_job(mended, target, out)), staged=staging, before=plan.survey)
        shards = mended_shards(mended.shards, plan.shards, results)
        total = sum(shard.rows for shard in mended.shards)
        done, found = 0, {}
        progress("leaving out damaged episodes", done, total)
        for result in in_processes(mend_shard, shards, job, min(workers, len(shards))):
            found[result.shard.file] = result
            done += result.shard.rows
            progress("leaving out damaged episodes", done, total)
        damaged = [entry for result in found.values() for entry in result.damaged]
    return mended, found


def _conversion(plan: Plan, out: Path, results: Sequence[ShardResult], reused: int) -> Conversion:
    warnings = list(plan.told)
    warnings += [f"{source.name}: {warning}" for source in plan.survey.sources for warning in source.warnings]
    if plan.damaged:
        warnings.append(
            f"{plan.damaged} episodes with damaged frames were left out; the statistics were computed anew without them"
        )
    if not plan.episodes["val"]:
        warnings.append("no episode is held out for validation; training cannot tell its best checkpoint")
    return Conversion(
        out=out,
        episodes=plan.episodes,
        rows=plan.rows,
        shards=plan.shard_count,
        reused=reused,
        bytes=sum(result.shard.bytes for result in results),
        sources=plan.sources,
        statistics={source.name: source.statistics for source in plan.survey.sources},
        skipped=tuple(entry for source in plan.survey.sources for entry in source.skipped),
        warnings=tuple(warnings),
    )


def _describe(plan: Plan, conversion: Conversion, results: Sequence[ShardResult]) -> dict[str, Any]:
    """Return `dataset.json`; it says nothing of time or machine, so that the same input gives the same file."""
    image = plan.dataset["image"]
    return {
        "format_version": FORMAT_VERSION,
        "sources": list(conversion.sources),
        "image": {"codec": image["codec"], "cameras": list(plan.survey.columns), "pipeline": image["pipeline"]},
        "prompt_style": plan.dataset["prompt_style"],
        "tokenizer": plan.dataset["tokenizer"],
        "split": plan.dataset["split"],
        "counts": {"episodes": dict(conversion.episodes), "rows": dict(conversion.rows)},
        "shards": [shard_entry(result.shard) for result in results],
        "skipped": [asdict(entry) for entry in conversion.skipped],
        "warnings": list(conversion.warnings),
    }
