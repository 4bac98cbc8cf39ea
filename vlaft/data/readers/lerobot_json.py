"""JSON files of a dataset that a stranger wrote: only a `DataError` comes out of reading them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlaft.data.readers.sniff import refuse_lfs_pointer
from vlaft.errors import DataError

_MAX_BYTES = 2**29


def read_json(path: Path) -> object:
    """Return the value in a JSON file.

    Raises:
        DataError: the file is empty, no JSON, or a git-LFS pointer.
    """
    return _parse(_read_text(path), str(path))


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file; lines that hold another value are passed over.

    Raises:
        DataError: a line is no JSON.
    """
    for number, line in enumerate(_read_text(path, may_be_empty=True).split("\n"), start=1):
        if line.strip():
            row = _parse(line, f"{path}, line {number}")
            if isinstance(row, dict):
                yield row


def as_int(value: object) -> int | None:
    """Return an index or count as int (whole floats too), or None for whatever is none or absurdly large."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**62 else None


def _read_text(path: Path, may_be_empty: bool = False) -> str:
    refuse_lfs_pointer(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(f"{path}: {path.stat().st_size} bytes of metadata are more than is read ({_MAX_BYTES})")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the file cannot be read as text ({error})") from error
    if not text.strip() and not may_be_empty:
        raise DataError(f"{path}: the file is empty; was the download complete?")
    return text


def _parse(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: this is no JSON ({' '.join(str(error).split())[:100]}); fetch the file again"
        ) from error
