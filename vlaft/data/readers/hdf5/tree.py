"""What lies in an HDF5 file, shown whatever its layout: what is damaged or leads elsewhere is shown as that."""

from __future__ import annotations

from collections.abc import Iterator

import h5py

from vlaft.data.contents import Entry, alike, named_alike
from vlaft.data.readers.hdf5.access import attribute, child_names, find, guarded
from vlaft.errors import DataError

_MAX_DEPTH = 12
_MAX_ENTRIES = 200
_MAX_TEXT = 60  # letters of an attribute's value
_FEW = 8  # arrays named alike that are still shown one by one


def tree(file: h5py.File, where: str) -> tuple[Entry, ...]:
    """Return groups, arrays and attributes; of groups and arrays named alike the first stands for all."""
    entries: list[Entry] = []
    for entry in _below(file["/"], "", where, 0):
        entries.append(entry)
        if len(entries) >= _MAX_ENTRIES:
            entries.append(Entry("", None, "group", f"more than {_MAX_ENTRIES} entries; the rest is not shown"))
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
            yield Entry(path, None, "group", named_alike(rest))
            if depth < _MAX_DEPTH:
                yield from _below(node, f"{path}/", where, depth + 1)
            return
        if isinstance(node, h5py.Dataset):
            few = len(same) <= _FEW
            yield Entry(path, node.shape, _type(node), "" if few else named_alike(rest))
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
