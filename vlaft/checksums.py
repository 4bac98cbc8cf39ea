"""How it is seen that files and documents are still as they were written.

Sums are CRC-32C (Castagnoli), which x86 and ARM compute in hardware: a gigabyte takes about as long as reading it from
memory (`benchmarks/checksums.py`), and every flip of up to 32 neighbouring bits is found. Binary files are summed as
they lie. JSON documents are summed by their content and carry the sum themselves, under `crc32c`: whoever changes one
on purpose deletes that line. A large file is read once: its sum is kept in the user's cache beside a stamp (size,
times, inode), and the file is read again when the stamp is another.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from vlaft.errors import DataError
from vlaft.files import read_json

SEAL = "crc32c"  # key of a document's own checksum
UNSEALED = f'if the change is meant, delete the line "{SEAL}" in it'
_CHUNK = 2**20
_WORTH_REMEMBERING = 64 * 2**20  # bytes; less is read in a hundredth of a second
_SETTLED = 2 * 10**9  # ns; a file changed later than that before it was read may change again within one tick


def checksum(path: Path) -> str:
    """Return the CRC-32C of a file, eight hexadecimal digits."""
    import google_crc32c

    value = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_CHUNK):
            value = google_crc32c.extend(value, block)
    return f"{value:08x}"


def holds(path: Path, recorded: str | int, *, fresh: bool = False) -> bool:
    """Say whether a file is the one whose sum was recorded.

    Args:
        path: the file.
        recorded: what `checksum` returned; a number is a CRC-32 as zlib computes it, from earlier versions.
        fresh: read the file even where its stamp says that nothing changed.
    """
    if isinstance(recorded, int):
        return _crc32(path) == recorded
    return remembered(path, checksum, fresh=fresh) == recorded


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_CHUNK):
            value = zlib.crc32(block, value)
    return value


def remembered(path: Path, compute: Callable[[Path], Any], *, fresh: bool = False) -> Any:
    """Return `compute(path)`, without reading a large file again that is as it was when it was last read.

    Args:
        path: the file.
        compute: gives a JSON-able value that depends on the file's content alone; kept under its name.
        fresh: compute it in any case.
    """
    before = stamp(path)
    if before[0] < _WORTH_REMEMBERING:
        return compute(path)
    name = hashlib.sha256(f"{compute.__name__} {path.resolve()}".encode()).hexdigest()[:32]
    note = cache_folder("checksums") / f"{name}.json"
    if not fresh:
        try:
            content = read_json(note)
            if seal_holds(content) and content["stamp"] == before:
                return content["value"]
        except (DataError, KeyError, ValueError, RecursionError):
            pass
    value = compute(path)
    if stamp(path) == before and time.time_ns() - before[2] > _SETTLED:
        _keep(note, sealed({"stamp": before, "value": value}))
    return value


def stamp(path: Path) -> list[int]:
    """Return size, time of the last change of content and of anything, and inode; the second cannot be set back."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def identity(status: os.stat_result) -> list[int]:
    """Return by what a file is told from another one of its name: size, time of the last change, inode."""
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def files_hash(path: Path, files: Iterable[Path] | None = None) -> str:
    """Return a hash of the names, sizes and times of a file or of a folder's files.

    Args:
        path: the file or folder.
        files: the files in it that count; None takes all, those below links to folders too.
    """
    if files is None:
        files = _files_below(path) if path.is_dir() else [path]
    listed = hashlib.sha256()
    for file in sorted(files):
        status = file.stat()
        listed.update(os.fsencode(file.relative_to(path)) + f"\0{status.st_size} {status.st_mtime_ns}\n".encode())
    return listed.hexdigest()


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield all files as readers find them, each folder once: a link may lead into a circle."""
    seen: set[tuple[int, int]] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        status = Path(parent).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        yield from (file for name in names if (file := Path(parent, name)).is_file())


def cache_folder(kind: str) -> Path:
    """Return the folder of a cache: `$XDG_CACHE_HOME/vlaft/KIND`, by default below `~/.cache`; it may not be there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlaft" / kind


def _keep(note: Path, content: Mapping[str, Any]) -> None:
    partial = note.with_name(f".{note.name}.{os.getpid()}.partial")
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.replace(note)
    except OSError:
        pass  # no cache to write to: the file is read again next time
    finally:
        with suppress(OSError):
            partial.unlink()


def content_checksum(content: Any) -> str:
    """Return the CRC-32C of a JSON value, however it is laid out in a file.

    >>> content_checksum({"a": 1, "b": [2.0]}) == content_checksum({"b": [2.0], "a": 1})
    True
    """
    import google_crc32c

    plain = json.loads(json.dumps(content))  # keys as they come back: numbers have become texts, tuples lists
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return f"{google_crc32c.value(text.encode()):08x}"


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document with its own checksum as its last key."""
    plain = unsealed(content)
    return plain | {SEAL: content_checksum(plain)}


def unsealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document without its checksum."""
    return {key: value for key, value in content.items() if key != SEAL}


def seal_holds(content: Mapping[str, Any]) -> bool | None:
    """Say whether a document is as it was sealed; None where it carries no checksum.

    >>> seal_holds(sealed({"a": 1})), seal_holds(sealed({"a": 1}) | {"a": 2}), seal_holds({"a": 1})
    (True, False, None)
    """
    return content[SEAL] == content_checksum(unsealed(content)) if SEAL in content else None
