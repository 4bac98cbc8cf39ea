"""Where a conversion writes: beside its place, locked, and renamed into it when everything is there."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from vlaft.checksums import checksum, seal_holds, sealed
from vlaft.data.store import DATASET_FILE, Shard
from vlaft.documents import WrongValue, read_as
from vlaft.errors import DataError
from vlaft.files import Listing, publish, read_json, replaceable, write_json

STATE = ".conversion"  # folder inside the staging folder: the fingerprint, what is finished, maybe the plan
_REQUEST = "request.json"  # in there: the fingerprint of what was asked for
_PARTS = "parts-of-"  # in there: files of this name and a number, once a part of so many was begun


@dataclass(frozen=True)
class Damaged:
    """An episode whose frames turned out damaged: number of its source, `EpisodeRef.index`, and why."""

    source: int
    index: int
    why: str


@dataclass(frozen=True)
class ShardResult:
    """A finished shard and the episodes that are missing in it."""

    shard: Shard
    damaged: tuple[Damaged, ...]


@dataclass(frozen=True)
class _Record:
    """What is noted of a finished shard."""

    plan: str
    shard: Shard
    damaged: tuple[Damaged, ...]


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


def staging_folder(out: Path) -> Path:
    """Return where the conversion to `out` is made."""
    place = Path(os.path.realpath(out))
    return place.with_name(f"{place.name}.partial")


def open_staging(out: Path, fingerprint: str) -> Path:
    """Make or take over `<out>.partial`; the lock of `out` is held, by nobody else."""
    staging = staging_folder(out)
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
    tidy(staging)
    return staging


def found_staging(out: Path, fingerprint: str, plan: Path) -> Path:
    """Return `<out>.partial` as the plan has made it.

    Raises:
        DataError: it is not there, or belongs to another conversion.
    """
    staging = staging_folder(out)
    if _fingerprint_in(staging / STATE / _REQUEST) != fingerprint:
        if staging.exists():
            raise DataError(f"{staging} belongs to another conversion than {plan}; remove {plan} and make it again")
        raise DataError(f"{staging} is not there: {plan} was finished, else remove it and make the plan again")
    return staging


def tidy(folder: Path) -> None:
    """Remove what killed processes have left between the shards; the lock of the output is held, by nobody else."""
    for leftover in (*folder.glob(".*.tmp"), *folder.glob(".*.lock")):
        leftover.unlink(missing_ok=True)


def remember_shard(folder: Path, key: str, result: ShardResult) -> None:
    """Note that a shard with this `shard_key` is finished."""
    # not synced: what a power cut took away is found missing by its checksum
    (folder / STATE).mkdir(exist_ok=True)
    content = sealed({"plan": key, **asdict(result)})
    write_json(folder / STATE / f"{result.shard.file}.json", content, durable=False)


def finished_shard(folder: Path, file: str, key: str, on_error: str) -> ShardResult | None:
    """Return a shard that is finished with this `shard_key` and whole, or None.

    A run may stop at a damaged episode and go on with skipping it; the other way round, what was skipped is redone.
    """
    record, path = folder / STATE / f"{file}.json", folder / file
    if not record.is_file() or not path.is_file():
        return None
    with suppress(DataError, WrongValue):  # damaged, as by a power cut: its work is done again
        content = read_json(record)
        found = read_as(_Record, content)
        usable = (
            seal_holds(content)
            and found.plan == key
            and found.shard.file == file
            and not (found.damaged and on_error == "stop")
        )
        if usable and checksum(path) == found.shard.crc32c:
            return ShardResult(found.shard, found.damaged)
    return None


def remove_others(folder: Path, files: Collection[str]) -> None:
    """Remove shards that are not among `files`, left by another plan of the same request."""
    for path in folder.glob("*.parquet"):
        if path.name not in files:
            path.unlink()


def note_parts(staging: Path, count: int) -> None:
    """Note that a part of `count` was begun, so that missing ones can be called by their numbers."""
    (staging / STATE / f"{_PARTS}{count}").touch()


def noted_parts(staging: Path) -> int | None:
    """Return of how many parts one was begun, the most where they differ, or None."""
    counts = [path.name.removeprefix(_PARTS) for path in (staging / STATE).glob(f"{_PARTS}*")]
    return max((int(count) for count in counts if count.isdecimal()), default=None)


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


def move_into_place(folder: Path, staging: Path, out: Path, before: Listing) -> None:
    """Give a finished folder, the staging folder or one within, its name; the lock is held.

    It takes the place of what `check_output` found.
    """
    remove_state = folder / STATE
    # what says which shards are finished stays as long as anything can go wrong
    publish(folder, out, before, last=lambda: shutil.rmtree(remove_state))
    if folder != staging:
        shutil.rmtree(staging, ignore_errors=True)
