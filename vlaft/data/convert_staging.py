"""Where a conversion writes: beside its place, locked, and renamed into it when everything is there."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from vlaft.data.convert_shards import Damaged, ShardResult
from vlaft.data.store import DATASET_FILE, Shard, read_json, sync_file, sync_folder, write_json
from vlaft.errors import DataError
from vlaft.files import checksum

STATE = ".conversion"  # folder inside the staging folder: the fingerprint and what is finished
_DAMAGE = "damaged.json"  # in there: episodes whose frames turned out damaged


def check_output(out: Path, sources: Sequence[Path], overwrite: bool) -> None:
    """Refuse an output that is in the way, and to replace anything but a converted dataset."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; the output has to be a folder")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise DataError(f"{out} is not empty; name another folder, or give --overwrite")
        if not (out / DATASET_FILE).is_file():
            raise DataError(f"{out} holds something that is no converted dataset; it is not overwritten")
    for source in sources:
        place, target = source.resolve(), out.resolve()
        if source.exists() and (place == target or place in target.parents or target in place.parents):
            raise DataError(f"the output {out} and the source {source} lie within each other; name another folder")


def beside(out: Path, suffix: str = "") -> Path:
    """Return the absolute path of a folder beside the output (which may have been given as `.`)."""
    absolute = out.resolve()
    return absolute.with_name(absolute.name + suffix)


@contextmanager
def open_staging(out: Path, fingerprint: str) -> Iterator[Path]:
    """Make or take over `<out>.partial`, locked against a second conversion into the same place."""
    staging = beside(out, ".partial")
    staging.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(staging, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(
                f"another conversion is writing to {out} right now; wait for it or name another folder"
            ) from error
        mark = staging / STATE / "request.json"
        if _fingerprint_in(mark) != fingerprint:
            for entry in staging.iterdir():
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            mark.parent.mkdir()
            write_json(mark, {"fingerprint": fingerprint})
        for leftover in staging.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        yield staging
    finally:
        os.close(descriptor)  # releases the lock


def remember_shard(staging: Path, plan: str, result: ShardResult) -> None:
    """Note that a shard of the plan is finished."""
    # not synced: what a power cut took away is found missing by its checksum
    write_json(staging / STATE / f"{result.shard.file}.json", {"plan": plan, **asdict(result)}, sync=False)


def finished_shards(staging: Path, files: Sequence[str], plan: str, on_error: str) -> dict[str, ShardResult]:
    """Return the shards that an earlier run finished by the same plan and that are whole; the others are removed.

    A run may stop at a damaged episode and go on with skipping it; the other way round, what was skipped is redone.
    """
    results = {}
    for file in files:
        record, path = staging / STATE / f"{file}.json", staging / file
        if record.is_file() and path.is_file():
            value = read_json(record)
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
    write_json(staging / STATE / _DAMAGE, {"episodes": listed})


def known_damage(staging: Path) -> dict[tuple[int, int], str]:
    """Return what `remember_damage` noted in an earlier run of the same request."""
    path = staging / STATE / _DAMAGE
    entries = read_json(path)["episodes"] if path.is_file() else []
    return {(entry["source"], entry["index"]): entry["why"] for entry in entries}


def _fingerprint_in(mark: Path) -> object:
    try:
        return read_json(mark).get("fingerprint")
    except DataError:
        return None


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turn what a disk answers (full, read-only, not ours) into a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"the disk is full while writing {out}.partial; free some space and run the same command again,"
                " finished shards are kept"
            ) from error
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            raise DataError(f"{out} cannot be written ({error.strerror}); name another folder") from error
        raise


def move_into_place(staging: Path, out: Path) -> None:
    """Give the finished staging folder its name, in the place of what lay there."""
    shutil.rmtree(staging / STATE)
    for file in staging.iterdir():
        sync_file(file)
    sync_folder(staging)
    place = beside(out)
    old = beside(out, f".{os.getpid()}.old")
    if place.is_dir():
        place.rename(old)
    staging.rename(place)
    sync_folder(place.parent)
    shutil.rmtree(old, ignore_errors=True)
