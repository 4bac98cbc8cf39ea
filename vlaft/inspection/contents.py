"""What lies in a source, whether it can be read as demonstrations or not: names, shapes and types, as a tree."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import h5py
import numpy as np

from vlaft.data.episode import Episode
from vlaft.data.readers.hdf5.access import attribute, child_names, find, guarded, opened
from vlaft.data.readers.hdf5.dialect import Hdf5Reader
from vlaft.data.readers.reader import EpisodeRef, Reader, is_hdf5
from vlaft.data.sentences import alike
from vlaft.errors import DataError

_MAX_FILES = 20_000  # listed of a folder
_MAX_ENTRIES = 40  # names alike count as one
_MAX_DEPTH = 12  # of an HDF5 file, and ...
_MAX_NODES = 200  # ... of what is shown of it
_MAX_TEXT = 60  # letters of an attribute's value
_FEW = 8  # arrays named alike that are still shown one by one


@dataclass(frozen=True)
class Entry:
    """One group, array, camera, file or attribute.

    Attributes:
        path: where it lies, parts divided by `/`; empty for the whole file.
        shape: of an array; None for whatever is none.
        kind: an array's type, `"group"`, `"attribute"` or `"file"`.
        note: what else there is to say: an attribute's value, how many more are named alike.
    """

    path: str
    shape: tuple[int, ...] | None
    kind: str
    note: str = ""


@dataclass(frozen=True)
class Contents:
    """What lies in one file or episode (`of`), in its own order."""

    of: str
    entries: tuple[Entry, ...]


class NotInspected(DataError):
    """The source cannot be measured; `contents` says what lies in it, None where nothing could be read."""

    def __init__(self, sentence: str, contents: Contents | None) -> None:
        super().__init__(sentence)
        self.contents = contents


def contents_of_source(reader: Reader, ref: EpisodeRef) -> Contents | None:
    """Return what lies in the file of an episode, or in the episode where files are of a format with a reader."""
    try:
        if isinstance(reader, Hdf5Reader):
            return _of_hdf5(reader.file_of(ref), len({other.location[0] for other in reader.refs}))
        return _of_episode(reader.read(ref))
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


def _of_episode(episode: Episode) -> Contents:
    """Return the arrays and cameras of an episode; frames of which none can be decoded have no size."""
    entries = [_array(episode, name) for name in episode.arrays]
    for name, frames in episode.cameras.items():
        shape: tuple[int, ...] = (episode.length,)
        note = "camera"
        try:
            shape = (len(frames), *next(iter(frames.read([0]))).shape)
        except DataError:  # why is told of the episode, not of the tree
            note = "camera, damaged"
        entries.append(Entry(name, shape, "uint8", note))
    return Contents(f"episode {episode.name}", tuple(entries))


def _array(episode: Episode, name: str) -> Entry:
    try:
        values = np.asarray(episode.arrays[name])
    except DataError as error:
        return Entry(name, None, "damaged", str(error))
    return Entry(name, values.shape, "text" if values.dtype.kind in "OSU" else str(values.dtype))


def _of_hdf5(path: Path, count: int) -> Contents:
    with opened(path) as file:
        return Contents(f"{path} (the first of {count} files)" if count > 1 else str(path), _tree(file, str(path)))


def _tree(file: h5py.File, where: str) -> tuple[Entry, ...]:
    """Return groups, arrays and attributes; of groups and arrays named alike the first stands for all."""
    entries: list[Entry] = []
    for entry in _below(file["/"], "", where, 0):
        entries.append(entry)
        if len(entries) >= _MAX_NODES:
            entries.append(Entry("", None, "group", f"more than {_MAX_NODES} entries; the rest is not shown"))
            break
    return tuple(entries)


def _below(group: h5py.Group, prefix: str, where: str, depth: int) -> Iterator[Entry]:
    try:
        for name in _attribute_names(group, where):
            value = attribute(group, name, where)
            if value is not None:
                text = f"{value:g}" if isinstance(value, float) else " ".join(value.split())
                yield Entry(f"{prefix}@{name}", None, "attribute", text[:_MAX_TEXT] + "..." * (len(text) > _MAX_TEXT))
        names = child_names(group, where)
    except DataError as error:
        yield Entry(prefix.rstrip("/"), None, "damaged", str(error))
        return
    for same in alike(names):
        yield from _shown(group, same, prefix, where, depth)


def _shown(group: h5py.Group, same: list[str], prefix: str, where: str, depth: int) -> Iterator[Entry]:
    """Yield the first of the members named alike, with all below it; or each where they are a few arrays."""
    for position, name in enumerate(same):
        path = prefix + name
        try:
            node = find(group, name, where)
        except DataError as error:
            yield Entry(path, None, "damaged", str(error))
            continue
        rest = same[position:]
        if isinstance(node, h5py.Group):
            yield Entry(path, None, "group", _named_alike(rest))
            if depth < _MAX_DEPTH:
                yield from _below(node, f"{path}/", where, depth + 1)
            return
        if isinstance(node, h5py.Dataset):
            few = len(same) <= _FEW
            yield Entry(path, node.shape, _type(node), "" if few else _named_alike(rest))
            if not few:
                return
        else:
            yield Entry(path, None, "damaged", "a link that leads nowhere")


def _type(dataset: h5py.Dataset) -> str:
    if dataset.dtype.kind == "S":
        return f"up to {dataset.dtype.itemsize} bytes"
    if h5py.check_string_dtype(dataset.dtype) is not None:
        return "text"
    inner = h5py.check_vlen_dtype(dataset.dtype)
    if inner is not None:
        return f"{inner} of any length"
    return str(dataset.dtype) if dataset.dtype.names is None else f"fields {', '.join(dataset.dtype.names[:8])}"


def _attribute_names(group: h5py.Group, where: str) -> list[str]:
    with guarded(f"{where}: attributes of '{group.name}'"):
        return [name for name in group.attrs if isinstance(name, str) and name.isprintable()][:20]


def _files(root: Path) -> list[str]:
    files: list[str] = []
    for parent, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = Path(parent).relative_to(root).as_posix()
        files += [f"{relative}/{name}".removeprefix("./") for name in sorted(names) if not name.startswith(".")]
        if len(files) > _MAX_FILES:
            break
    return [name for name in files if (root / name).is_file()]


def _listed(root: Path, files: list[str]) -> list[Entry]:
    """List files, those named alike as one, and the columns of the first parquet file."""
    entries: list[Entry] = []
    columns: list[Entry] = []
    for same in islice(alike(files), _MAX_ENTRIES):
        size = sum((root / name).stat().st_size for name in same)
        entries.append(Entry(same[0], None, "file", "; ".join(filter(None, [_size(size), _named_alike(same)]))))
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


def _named_alike(names: Sequence[str]) -> str:
    """Say that the first of `names` stands for all."""
    return f"one of {len(names):,} named alike, to {names[-1].rpartition('/')[2]}" if len(names) > 1 else ""
