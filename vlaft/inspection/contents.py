"""What lies in a source that is to be inspected, also where it cannot be read as demonstrations."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

from vlaft.data.contents import Contents, Entry, alike, named_alike, of_episode
from vlaft.data.readers import EpisodeRef, Source
from vlaft.data.readers.sniff import is_hdf5
from vlaft.errors import DataError

_MAX_FILES = 20_000  # listed of a folder
_MAX_ENTRIES = 40  # names alike count as one


class NotInspected(DataError):
    """The source cannot be measured; `contents` says what lies in it, None where nothing could be read."""

    def __init__(self, sentence: str, contents: Contents | None) -> None:
        super().__init__(sentence)
        self.contents = contents


def contents_of_source(source: Source, ref: EpisodeRef) -> Contents | None:
    """Return what lies in the file of an episode, or in the episode where files are of a format with a reader."""
    from vlaft.data.readers.hdf5.episode import Hdf5Source

    try:
        if isinstance(source, Hdf5Source):
            return _of_hdf5(source.file_of(ref), len({other.location[0] for other in source.refs}))
        return of_episode(source.read(ref))
    except DataError:
        return None


def contents_of_path(path: Path) -> Contents | None:
    """Return what lies in a file or folder that no reader takes, or None where nothing is there that can be shown."""
    try:
        if path.is_file():
            return _of_hdf5(path, 1) if is_hdf5(path) else None
        if not path.is_dir():
            return None
        files = _files(path)
        recordings = [name for name in files if is_hdf5(path / name)]
        if recordings and len(recordings) * 2 > len(files):
            return _of_hdf5(path / recordings[0], len(recordings))
        return Contents(str(path), tuple(_listed(path, files)))
    except (DataError, OSError, ValueError):
        return None


def _of_hdf5(path: Path, count: int) -> Contents:
    from vlaft.data.readers.hdf5.access import opened
    from vlaft.data.readers.hdf5.tree import tree

    with opened(path) as file:
        return Contents(f"{path} (the first of {count} files)" if count > 1 else str(path), tree(file, str(path)))


def _files(root: Path) -> list[str]:
    found: list[str] = []
    for parent, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = Path(parent).relative_to(root).as_posix()
        found += [f"{relative}/{name}".removeprefix("./") for name in sorted(names) if not name.startswith(".")]
        if len(found) > _MAX_FILES:
            break
    return [name for name in found if (root / name).is_file()]


def _listed(root: Path, files: list[str]) -> list[Entry]:
    """List files, those named alike as one, and the columns of the first parquet file."""
    entries: list[Entry] = []
    columns: list[Entry] = []
    for same in islice(alike(files), _MAX_ENTRIES):
        size = sum((root / name).stat().st_size for name in same)
        entries.append(Entry(same[0], None, "file", "; ".join(filter(None, [_size(size), named_alike(same)]))))
        if same[0].endswith(".parquet") and not columns:
            columns = _columns(root, same[0])
            entries += columns
    return entries


def _columns(root: Path, name: str) -> list[Entry]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(root / name)
    except (pa.ArrowException, OSError, ValueError):
        return []
    return [Entry(f"{name}/{field.name.replace('/', ' ')}", None, str(field.type)[:60]) for field in schema]


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count:,} bytes"
