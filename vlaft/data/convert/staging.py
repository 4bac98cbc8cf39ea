"""Where a conversion writes: beside its place, locked, and renamed into it when everything is there."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlaft.checksums import checksum, seal_holds, sealed
from vlaft.data.convert.shards import Damaged, ShardResult
from vlaft.data.store import DATASET_FILE, Shard
from vlaft.errors import DataError
from vlaft.files import Listing, publish, read_json, replaceable, write_json

STATE = ".conversion"  # folder inside the staging folder: the fingerprint and what is finished
_REQUEST = "request.json"  # in there: the fingerprint of what was asked for
_DAMAGE = "damaged.json"  # in there: episodes whose frames turned out damaged


def check_output(out: Path, sources: Sequence[Path], overwrite: bool) -> Listing:
    """Refuse an output that is in the way, and to replace anything but a converted dataset; return what may be."""
    for source in sources:
        place, target = source.resolve(), Path(os.path.realpath(out))
        if source.exists() and (place == target or place in target.parents or target in place.parents):
            raise DataError(f"the output {out} and the source {source} lie within each other; name another folder")
    before = replaceable(out, overwrite=overwrite)
    if before and not (out / DATASET_FILE).is_file():
        raise DataError(f"{out} holds something that is no converted dataset; it is not overwritten")
    return before


def open_staging(out: Path, fingerprint: str) -> Path:
    """Make or take over `<out>.partial`; the lock of `out` is held."""
    place = Path(os.path.realpath(out))
    staging = place.with_name(f"{place.name}.partial")
    staging.mkdir(exist_ok=True)
    state, mark = staging / STATE, staging / STATE / _REQUEST
    if _fingerprint_in(mark) != fingerprint:
        entries = sorted(staging.iterdir(), key=lambda entry: entry == state)  # what says that it is ours goes last
        if entries and not state.is_dir() and not (staging / DATASET_FILE).is_file():
            raise DataError(
                f"{staging} holds something that is no unfinished conversion; move it or name another --out"
            )
        for entry in entries:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        state.mkdir()
        write_json(mark, {"fingerprint": fingerprint})
    for leftover in staging.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    return staging


def remember_shard(staging: Path, plan: str, result: ShardResult) -> None:
    """Note that a shard of the plan is finished."""
    # not synced: what a power cut took away is found missing by its checksum
    content = sealed({"plan": plan, **asdict(result)})
    write_json(staging / STATE / f"{result.shard.file}.json", content, durable=False)


def finished_shards(staging: Path, files: Sequence[str], plan: str, on_error: str) -> dict[str, ShardResult]:
    """Return the shards that an earlier run finished by the same plan and that are whole; the others are removed.

    A run may stop at a damaged episode and go on with skipping it; the other way round, what was skipped is redone.
    """
    results = {}
    for file in files:
        value, path = _noted(staging / STATE / f"{file}.json"), staging / file
        if value is not None and path.is_file():
            shard = Shard(**value["shard"])
            usable = value["plan"] == plan and not (value["damaged"] and on_error == "stop")
            if usable and checksum(path) == shard.crc32c:
                results[file] = ShardResult(shard, tuple(Damaged(**entry) for entry in value["damaged"]))
    for path in staging.glob("*.parquet"):
        if path.name not in results:
            path.unlink()
    return results


def remember_damage(staging: Path, damage: Mapping[tuple[int, int], str]) -> None:
    """Note which episodes, by number of the source and `EpisodeRef.index`, have damaged frames, and why."""
    listed = [{"source": source, "index": index, "why": why} for (source, index), why in sorted(damage.items())]
    write_json(staging / STATE / _DAMAGE, sealed({"episodes": listed}))


def known_damage(staging: Path) -> dict[tuple[int, int], str]:
    """Return what `remember_damage` noted in an earlier run of the same request."""
    value = _noted(staging / STATE / _DAMAGE)
    entries = value["episodes"] if value is not None else []
    return {(entry["source"], entry["index"]): entry["why"] for entry in entries}


def _noted(path: Path) -> dict[str, Any] | None:
    """Return a note of an earlier run as it was written; where it is missing or damaged, its work is done again."""
    try:
        value = read_json(path)
    except DataError:
        return None
    return value if seal_holds(value) else None


def _fingerprint_in(mark: Path) -> object:
    try:
        return read_json(mark).get("fingerprint")
    except DataError:
        return None


@contextmanager
def conversion_errors(out: Path) -> Iterator[None]:
    """Turn what a disk answers (full, broken, read-only, not ours) into a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"the disk is full while writing {out}.partial; free some space and run the same command again,"
                " finished shards are kept"
            ) from error
        raise DataError(
            f"{error.filename or out}: {error.strerror or error}; run the same command again once the disk is well,"
            " finished shards are kept"
        ) from error


def move_into_place(staging: Path, out: Path, before: Listing) -> None:
    """Give the finished staging folder its name, in the place of what `check_output` found; the lock is held."""
    # what says which shards are finished stays as long as anything can go wrong
    publish(staging, out, before, last=lambda: shutil.rmtree(staging / STATE))
