"""The folder beside an output, `<out>.partial`, in which finished pieces lie until all are there.

Killed and started again, the same command goes on where it was; asked for something else, it begins anew.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlaft.errors import DataError
from vlaft.files import disk_errors, read_json, replaceable, write_json
from vlaft.version import __version__

_REQUEST = "request.json"


@contextmanager
def unfinished(out: Path, asked: Mapping[str, Any], *, overwrite: bool) -> Iterator[Path]:
    """Give the folder of pieces: an earlier call's where that was asked for the same; the lock of `out` is held.

    Args:
        out: what is made of the pieces.
        asked: on what the pieces depend, JSON-able; its first key says what kind of work it is.
        overwrite: `out` may be replaced.

    Raises:
        DataError: something else lies there.
        VlaftError: the output is in the way, or the disk is full.
    """
    replaceable(out, overwrite=overwrite)
    place = Path(os.path.realpath(out))
    folder = place.with_name(f"{place.name}.partial")
    request = {"vlaft": __version__, **asked}  # another version may have done it otherwise
    with disk_errors(out, "; give the same command again to go on, what is finished is kept"):
        if folder.is_dir():
            said = read_json(folder / _REQUEST) if (folder / _REQUEST).is_file() else {}
            work = next(iter(asked))
            if work not in said and any(not path.name.startswith(".") for path in folder.iterdir()):
                raise DataError(
                    f"{folder} holds something that is no unfinished {_WORK[work]}; move it, or name another --out"
                )
            if said != request:
                discard(folder, out)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / _REQUEST, request)
        try:
            yield folder
        finally:
            if folder.is_dir() and all(path.name == _REQUEST for path in folder.iterdir()):  # nothing to go on from
                discard(folder, out)


def discard(folder: Path, out: Path) -> None:
    """Remove the folder of pieces, whole or not at all: what is half removed has a name that is removed in any case."""
    hidden = folder.with_name(f".{Path(os.path.realpath(out)).name}.partial")
    folder.rename(hidden)
    shutil.rmtree(hidden)


_WORK = {"record": "recording", "regenerate": "replay"}
