"""How things come to lie on a disk, whole.

* Documents: one way to read JSON and YAML, one to write JSON.
* Outputs appear whole or not at all: they are written beside their place, under a lock, and renamed into it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vlaft.documents import NotYaml, parse_yaml
from vlaft.errors import ConfigError, DataError, InUse, VlaftError

_LARGEST_JSON = 256 * 2**20  # bytes; what is larger is no document, and would be held in memory several times over
LARGEST_YAML = 2**18  # bytes; recipes have some thirty lines, mixes some hundred
_URL = re.compile(r"[a-z][a-z0-9+.-]+:/{1,2}[^/]")
_HOLDER = re.compile(r"(\d+) ([\w.-]+)")
Listing = Mapping[str, tuple[int, ...]]  # path within a folder to what changes when it is written


def read_json(path: Path, error: type[VlaftError] = DataError) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        path: the file.
        error: what to raise: `CheckpointError` for a file of a checkpoint or a run.

    Raises:
        VlaftError: of the kind asked for, when the file is missing, cannot be read, or holds no JSON object.
    """
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise error(f"{path} is too large for what it should be ({path.stat().st_size} bytes)")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as reason:
        raise error(f"{path} cannot be read as JSON ({' '.join(str(reason).split())[:100]})") from None
    if not isinstance(value, dict):
        raise error(f"{path} must hold a JSON object")
    return value


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """Return the mapping in a YAML file that somebody wrote by hand, as plain dicts, lists and scalars.

    Args:
        path: the file.
        what: what it is, for the sentences: "a recipe".

    Raises:
        ConfigError: it is missing, too large, not UTF-8 or not YAML, has aliases, or holds no mapping.
    """
    try:
        with path.open("rb") as stream:
            raw = stream.read(LARGEST_YAML + 1)
        if len(raw) > LARGEST_YAML:
            raise ConfigError(f"{path}: larger than {LARGEST_YAML // 1024} KiB, so not {what}")
        content = parse_yaml(raw.decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text") from error
    except NotYaml as error:
        where = f", line {error.line}" if error.line else ""
        raise ConfigError(f"{path}{where}: not valid YAML ({error})") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: {what} is a mapping of keys to values")
    return {str(key): value for key, value in content.items()}


def write_json(path: Path, value: Any, *, indent: int = 2, durable: bool = True) -> None:
    """Write JSON aside and rename it into place.

    Args:
        path: the file.
        value: what it shall hold.
        indent: blanks per level.
        durable: wait until it is on the disk.

    Raises:
        VlaftError: a number is not finite; JSON has no way to say so.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        raise VlaftError(f"{path}: a number that is not finite would have to be written, which JSON cannot") from error
    try:
        aside.write_text(text, encoding="utf-8")
        if durable:
            sync(aside)
        aside.replace(path)
        if durable:
            sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def output_folder(out: Path, bytes_needed: int = 0, *, overwrite: bool = False) -> Iterator[Path]:
    """Lock `out` and give a folder beside it to write into, which becomes `out` when the block ends well.

    When the block fails or is interrupted, `out` is as it was and nothing is left beside it.

    Args:
        out: the folder to make; where it is a link, what that leads to.
        bytes_needed: how much will be written, where that is known.
        overwrite: replace what is there now, at the end. What comes to lie there meanwhile is never replaced.

    Raises:
        VlaftError: another process writes there, `out` is in use, less than `bytes_needed` is free, or the disk is full
            or not writable.
    """
    with locked(out), staged(out, bytes_needed, overwrite=overwrite) as partial:
        yield partial


@contextmanager
def output_file(file: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Lock `file` and give a file beside it to write to, which becomes `file` when the block ends well.

    Raises:
        VlaftError: another process writes there, something is there without `overwrite`, or the disk is full or not
            writable.
    """
    with locked(file) as place:
        partial = _beside(place, "partial")
        with disk_errors(file):
            yield partial
            sync(partial)
            if not overwrite and place.exists():
                raise VlaftError(f"{file} exists already; name another file")
            partial.replace(place)


@contextmanager
def output_files(folder: Path, replaced: re.Pattern[str]) -> Iterator[Path]:
    """Lock `folder` and give a folder beside it, whose files move into `folder` when the block ends well.

    Args:
        folder: may hold other things, which stay; it is made where it is missing.
        replaced: names of the files that are gone from `folder` in the end, unless they are among the new ones.

    Raises:
        VlaftError: another process writes there, or the disk is full or not writable.
    """
    with locked(folder) as place, disk_errors(folder):
        partial = _beside(place, "partial")
        partial.mkdir()
        yield partial
        new = sorted(partial.iterdir())
        for path in new:
            sync(path)
        with uninterrupted():
            with suppress(OSError):  # where nothing is there yet, all at once: no kill comes in between
                partial.replace(place)
                return
            place.mkdir(exist_ok=True)
            for path in new:
                path.replace(place / path.name)
            names = {path.name for path in new}
            for path in list(place.iterdir()):
                if replaced.fullmatch(path.name) and path.name not in names:
                    path.unlink()


@contextmanager
def locked(out: Path, *, shared: bool = False) -> Iterator[Path]:
    """Keep other processes from writing to `out`; put right what a kill has left there, before and after.

    Args:
        out: the file or folder to be written.
        shared: let processes that do the same work in on the lock, with `joined`; it is held until the last of them
            has ended, so that none that outlives this one meets its successor.

    Yields:
        The absolute path without links.

    Raises:
        VlaftError: another process holds the lock, or no file can be made there.
    """
    place = _place(out)
    with ExitStack() as held:
        with uninterrupted(), disk_errors(out):
            place.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _take_lock(out, place, fcntl.LOCK_EX)
            held.callback(_give_back, descriptor, place)
            os.ftruncate(descriptor, 0)
            _sign(descriptor)
            if shared:
                _flock(out, descriptor, fcntl.LOCK_SH)
            _put_right(place)
        yield place


@contextmanager
def joined(out: Path, *, first: bool = False) -> Iterator[None]:
    """Hold the lock of `out` together with the process of the same work that took it as `shared`.

    On a machine that does not see the lock there is none to hold: nothing is written from there.

    Args:
        out: the file or folder to be written.
        first: take it also where nobody holds it: there are only processes of equal rank.

    Raises:
        VlaftError: a process of other work holds it.
    """
    place = _place(out)
    if not first and not _beside(place, "lock").exists():
        yield
        return
    with ExitStack() as held:
        with uninterrupted(), disk_errors(out):
            descriptor = _take_lock(out, place, fcntl.LOCK_SH)
            held.callback(_release_lock, descriptor, place)
            _sign(descriptor)
        yield


@contextmanager
def staged(out: Path, bytes_needed: int = 0, *, overwrite: bool = False) -> Iterator[Path]:
    """As `output_folder`, for one who holds the lock of `out`."""
    place = _place(out)
    before = replaceable(out, overwrite=overwrite)
    partial = _beside(place, "partial")
    with disk_errors(out):
        free = shutil.disk_usage(place.parent).free
        if free < bytes_needed:
            raise VlaftError(f"{out}: {bytes_needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free")
        partial.mkdir()
        yield partial
        publish(partial, out, before)


def replaceable(out: Path, *, overwrite: bool) -> Listing:
    """Return what is at `out` and may be replaced, for `publish`.

    Raises:
        VlaftError: `out` holds something and `overwrite` is not given, or it cannot be made or renamed.
    """
    place = _place(out)
    with disk_errors(out):
        if place.exists() and not place.is_dir():
            raise VlaftError(f"{out} is a file; the output has to be a folder")
        if place.exists() and (place.is_mount() or Path.cwd().is_relative_to(place)):
            what = "is where a disk is mounted" if place.is_mount() else "is the folder that this command runs in"
            raise VlaftError(f"{out} {what}, which cannot be replaced; name a folder in it, such as {out / 'new'}")
        if _vacant(place):
            return {}
        if not overwrite:
            raise VlaftError(f"{out} is not empty; name another folder with --out, or give --overwrite")
        return _listing(place)


def publish(folder: Path, out: Path, before: Listing, *, last: Callable[[], None] = lambda: None) -> None:
    """Give a finished folder the name `out`; the lock of `out` is held.

    Args:
        folder: beside `out`.
        out: the name.
        before: what may be replaced, from `replaceable`.
        last: called when nothing is left to do but the renaming.

    Raises:
        VlaftError: something else has come to lie at `out`; it stays.
        OSError: the disk is full or not writable; what was at `out` is moved back when the lock is given back.
    """
    place = _place(out)
    kept = VlaftError(f"{out}: something was put there meanwhile, so it was left as it is; name another folder")
    for path in (*folder.rglob("*"), folder):
        sync(path)
    old = _beside(place, "old")
    if not _vacant(place):
        if not _within(_listing(place), before):
            raise kept
        place.rename(old)
        if not _within(_listing(old), before):  # nobody finds it by its name any more: this look is the last one
            raise kept
    last()
    try:
        folder.rename(place)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise kept from error
        raise
    with suppress(OSError):  # the folder above may be one that we may not read
        sync(place.parent)
    with suppress(OSError):
        _discard_old(place)


def restored(folder: Path) -> Path:
    """Return `folder`, after moving it back where a killed `--overwrite` has left it beside its place."""
    with suppress(OSError, VlaftError):  # who cannot write here, or has to wait, finds what there is
        if _vacant(_place(folder)) and _beside(_place(folder), "old").is_dir():
            with locked(folder):
                pass
    return folder


def check_apart(out: Path, sources: Iterable[Path]) -> None:
    """Refuse to replace a folder that holds what is to be read.

    Raises:
        ConfigError: as said.
    """
    place = _place(out)
    for source in sources:
        if Path(os.path.realpath(source)).is_relative_to(place):
            raise ConfigError(f"{source} lies in {out}, which --overwrite would delete; give another --out")


@contextmanager
def disk_errors(out: Path, advice: str = "") -> Iterator[None]:
    """Turn what a disk answers (full, broken, read-only, not ours) into a sentence that ends with `advice`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise VlaftError(f"{out}: cannot be written ({reason}){advice}") from error


def free_bytes(out: Path) -> int:
    """Return the free bytes where a folder, which need not exist yet, would be made."""
    place = next(path for path in (out, *out.absolute().parents) if path.is_dir())
    return shutil.disk_usage(place).free


def _place(out: Path) -> Path:
    if _URL.match(str(out)):
        raise VlaftError(f"{out} is a URL, and this is written to a folder; copy the folder there when it is whole")
    with disk_errors(out):  # the working folder may be gone
        place = Path(os.path.realpath(out))
        above = next(path for path in (*place.parents, place) if os.path.lexists(path))
        circle = place.is_symlink() or above.is_symlink()
    if not place.name:
        raise VlaftError(f"{out} is the root of all folders; name a folder in it")
    if circle:
        raise VlaftError(f"{out} leads through links in a circle; name another folder")
    if not above.is_dir():
        raise VlaftError(f"{out} cannot be written, since {above} is a file; name another place")
    return place


def _beside(place: Path, what: str) -> Path:
    return place.with_name(f".{place.name}.{what}")


def _vacant(place: Path) -> bool:
    return not os.path.lexists(place) or (place.is_dir() and not any(place.iterdir()))


def _listing(folder: Path) -> Listing:
    listing = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        folders = path.is_dir() and not path.is_symlink()
        changes = (status.st_ino,) if folders else (status.st_ino, status.st_size, status.st_mtime_ns)
        listing[str(path.relative_to(folder))] = changes
    return listing


def _within(now: Listing, before: Listing) -> bool:
    return now.items() <= before.items()


def _put_right(place: Path) -> None:
    """Remove or move back what a kill has left beside an output; the lock is held."""
    _remove(_beside(place, "partial"))
    if _beside(place, "old").is_dir():
        if _vacant(place):
            _beside(place, "old").rename(place)
        else:
            _discard_old(place)


def _discard_old(place: Path) -> None:
    if _beside(place, "old").is_dir():
        # renamed first, so that a kill in mid-deletion leaves nothing that could be moved back
        _beside(place, "old").rename(_beside(place, "partial"))
        _remove(_beside(place, "partial"))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _give_back(descriptor: int, place: Path) -> None:
    with uninterrupted():
        with suppress(OSError):
            _put_right(place)
        _release_lock(descriptor, place)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C and SIGTERM, where they have a handler, until the few steps here are done."""
    received: list[int] = []
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # elsewhere Python refuses handlers, and calls none
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        before = {number: handler for number, handler in before.items() if callable(handler)}
    for number in before:
        signal.signal(number, lambda received_now, frame: received.append(received_now))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if received:
            before[received[0]](received[0], None)


def _take_lock(out: Path, place: Path, kind: int) -> int:
    while True:
        descriptor = os.open(_beside(place, "lock"), os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
        try:
            _flock(out, descriptor, kind)
            if _is_lock(descriptor, place):
                return descriptor
        except BaseException:
            _release_lock(descriptor, place)
            raise
        os.close(descriptor)  # its holder has removed it since it was opened


def _flock(out: Path, descriptor: int, kind: int) -> None:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InUse(
            f"{out}: {_holder(descriptor)} is writing there; wait until it has ended, or name another --out"
        ) from None


def _is_lock(descriptor: int, place: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), _beside(place, "lock").stat())
    return False


def _release_lock(descriptor: int, place: Path) -> None:
    try:
        with suppress(OSError):  # others hold it still, and the last one removes it
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_lock(descriptor, place):
                _beside(place, "lock").unlink()
    finally:
        os.close(descriptor)


def _sign(descriptor: int) -> None:
    os.write(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode())


def _holder(descriptor: int) -> str:
    for line in os.pread(descriptor, 4096, 0).decode(errors="replace").splitlines():
        if (match := _HOLDER.fullmatch(line)) and alive(int(match[1]), match[2]):
            return f"process {match[1]} on {match[2]}"
    return "another process"


def alive(process: int, host: str) -> bool:
    """Say whether a process is there; of another host it cannot be told, and is taken to be."""
    if host == socket.gethostname():
        with suppress(PermissionError):
            try:
                os.kill(process, 0)
            except (ProcessLookupError, OverflowError):
                return False
    return True
