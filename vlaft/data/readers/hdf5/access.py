"""Reading an HDF5 file that somebody else wrote, without trusting it.

An HDF5 file can point at other files (external links, external storage, virtual datasets), can link to itself
in circles, and can claim shapes that no disk holds. Everything here stays inside the file (virtual datasets: inside
its folder), bounds what it allocates, and turns whatever the HDF5 library raises into a `DataError`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from vlaft.data.codec import largest_unfolded
from vlaft.data.sentences import alike
from vlaft.errors import DataError, did_you_mean

MAX_ARRAY_BYTES = 2**30  # one array of one episode, frames excepted: a million steps of 100 float64 are less
MAX_ROW_BYTES = 2**28  # one frame
MAX_STEPS = 1_000_000  # five and a half hours at 50 Hz
_MAX_NAMES = 100_000
_MAX_DEPTH = 8
_MAX_ATTRIBUTE_BYTES = 2**24

# h5py hands on the library's errors under whichever Python kind looked closest.
_LIBRARY_ERRORS = (OSError, LookupError, RuntimeError, ValueError, TypeError, ArithmeticError, MemoryError, SystemError)


@contextmanager
def guarded(where: str) -> Iterator[None]:
    """Turn whatever the HDF5 library raises inside into a `DataError` that begins with `where`."""
    try:
        yield
    except _LIBRARY_ERRORS as error:
        reason = " ".join(str(error).split()).encode("ascii", "backslashreplace").decode()
        if "truncated file" in reason:
            raise DataError(f"{where} is truncated; copy or download it again ({reason[:160]})") from error
        raise DataError(f"{where} can't be read; the file may be damaged ({reason[:160]})") from error


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """Open the file for reading, and close it again.

    Raises:
        DataError: it is absent, truncated or no HDF5 file.
    """
    if not path.is_file():
        raise DataError(f"{path} is not there")
    with guarded(str(path)):
        file = h5py.File(path, "r")
    try:
        yield file
    finally:
        file.close()


def child_names(group: h5py.Group, where: str) -> list[str]:
    """Return the names in `group`, numbers in them in numeric order (demo_2 before demo_10)."""
    with guarded(f"{where}: group '{group.name}'"):
        if len(group) > _MAX_NAMES:
            raise DataError(f"{where}: group '{group.name}' claims {len(group)} members, more than {_MAX_NAMES}")
        names = list(group)
    for name in names:
        if not isinstance(name, str) or not name.isprintable():  # h5py gives bytes for what is no UTF-8
            raise DataError(f"{where}: group '{group.name}' has a member whose name is damaged ({name!a})")
    return sorted(names, key=numeric_order)


def numeric_order(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key under which numbers inside names are compared as numbers.

    >>> sorted(["demo_10", "demo_2", "demo_b"], key=numeric_order)
    ['demo_2', 'demo_10', 'demo_b']
    """
    parts = re.split(r"(\d+)", name)
    # digits by count, then as text: no conversion of a name of a million digits to an integer
    numbers = [(0, len(p.lstrip("0")), p.lstrip("0")) if i % 2 else (1, 0, p) for i, p in enumerate(parts)]
    return (*numbers, (2, len(name), name))


def find(group: h5py.Group, path: str, where: str) -> h5py.Group | h5py.Dataset | None:
    """Return what lies at `path` below `group`, or None.

    Raises:
        DataError: a link leaves the file or runs in a circle, or a dataset's values lie elsewhere.
    """
    return _walk(group, path, where, 0, 0)


def need_dataset(group: h5py.Group, path: str, where: str) -> h5py.Dataset:
    """Return the dataset at `path`, or say what there is instead.

    Raises:
        DataError: none there, or as for `find`.
    """
    node = find(group, path, where)
    if not isinstance(node, h5py.Dataset):
        known = sorted(datasets(group, where))
        raise DataError(f"{where} has no dataset '{path}'{did_you_mean(path, known)} (it has: {listing(known)})")
    return node


def need_group(group: h5py.Group, path: str, where: str) -> h5py.Group:
    """Return the group at `path`.

    Raises:
        DataError: none there, or as for `find`.
    """
    node = find(group, path, where)
    if not isinstance(node, h5py.Group):
        raise DataError(f"{where} has no group '{path}' (it has: {listing(child_names(group, where))})")
    return node


def datasets(
    group: h5py.Group, where: str, skip: tuple[str, ...] = (), of_alike: int | None = None
) -> dict[str, h5py.Dataset]:
    """Return every dataset below `group` by its path relative to it.

    Args:
        group: where to begin.
        where: for messages.
        skip: members that are left out.
        of_alike: of members whose names differ only in numbers, how many are looked at; None for all.
    """
    by_path: dict[str, h5py.Dataset] = {}
    seen = 0
    todo = [("", group, 0)]
    while todo:
        prefix, parent, depth = todo.pop(0)
        names = child_names(parent, where)
        if of_alike is not None:
            names = [name for same in alike(names) for name in same[:of_alike]]
        for name in names:
            if not prefix and name in skip:
                continue
            seen += 1
            if seen > _MAX_NAMES or depth > _MAX_DEPTH:
                raise DataError(f"{where}: groups lie too deep or too many below '{group.name}' (a circle of links?)")
            node = find(parent, name, where)
            if isinstance(node, h5py.Dataset):
                by_path[prefix + name] = node
            elif node is not None:
                todo.append((f"{prefix}{name}/", node, depth + 1))
    return by_path


def is_numeric(dataset: h5py.Dataset) -> bool:
    """Tell whether the values are numbers or truth values, at least one axis of them."""
    return dataset.dtype.kind in "biuf" and dataset.shape is not None and dataset.ndim >= 1


def read_array(dataset: h5py.Dataset, where: str) -> NDArray[np.generic]:
    """Return the whole array.

    Raises:
        DataError: not numbers, damaged, or larger than anything a demonstration holds.
    """
    with guarded(f"{where}: '{dataset.name}'"):
        if not is_numeric(dataset):
            raise DataError(f"{where}: '{dataset.name}' holds {dataset.dtype}, not an array of numbers")
        check_size(dataset, where, MAX_ARRAY_BYTES)
        return np.asarray(dataset[()])


def check_size(dataset: h5py.Dataset, where: str, limit: int) -> None:
    """Refuse shapes that would fill the memory.

    Raises:
        DataError: more than `limit` bytes, or far more than the bytes stored could decompress to.
    """
    claimed = int(np.prod(dataset.shape, dtype=object)) * dataset.dtype.itemsize
    chunk = int(np.prod(dataset.chunks, dtype=object)) * dataset.dtype.itemsize if dataset.chunks else 0
    if max(claimed, chunk) > limit:
        raise DataError(
            f"{where}: '{dataset.name}' claims {max(claimed, chunk)} bytes ({dataset.shape}), too many to be right"
        )
    stored = 0 if dataset.is_virtual else dataset.id.get_storage_size()
    # deflate can't exceed about 1000 to 1: the rest would be fill values, that is nothing
    if claimed > 2**24 and not dataset.is_virtual and stored * 4096 < claimed:
        raise DataError(
            f"{where}: '{dataset.name}' claims shape {dataset.shape} but stores only"
            f" {dataset.id.get_storage_size()} bytes; the file is damaged or was not written to its end"
        )
    if not dataset.is_virtual and max(claimed, chunk) > largest_unfolded(stored):
        raise DataError(
            f"{where}: the {stored} bytes of '{dataset.name}' claim to unpack to {max(claimed, chunk)}, too many to be"
            " right; write the file anew"
        )


def attribute(node: h5py.Group | h5py.Dataset | None, name: str, where: str) -> str | float | None:
    """Return a scalar attribute (text, number or truth value), or None where it is absent or something else."""
    if node is None:
        return None
    with guarded(f"{where}: attribute '{name}' of '{node.name}'"):
        if name not in node.attrs:
            return None
        handle = node.attrs.get_id(name)
        if handle.shape is None or int(np.prod(handle.shape, dtype=object)) != 1:
            return None
        if handle.get_storage_size() > _MAX_ATTRIBUTE_BYTES:
            raise DataError(f"{where}: attribute '{name}' of '{node.name}' is too large to be right")
        return scalar(node.attrs[name])


def nearest_attribute(group: h5py.Group, name: str, where: str) -> str | float | None:
    """Return the attribute of the group, else of the nearest group around it that has one, up to the file's root."""
    for _ in range(_MAX_DEPTH):
        value = attribute(group, name, where)
        if value is not None or group.name == "/":
            return value
        with guarded(where):
            group = group.parent
    return None


def scalar(value: object) -> str | float | None:
    """Return one text or number of whatever kind h5py gives, or None."""
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.reshape(-1)[0]
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, bool | int | float | np.bool_ | np.integer | np.floating):
        return float(value)
    return None


def json_attribute(node: h5py.Group, name: str, where: str) -> dict[str, object]:
    """Return an attribute that holds a JSON object, or an empty dict where it doesn't."""
    text = attribute(node, name, where)
    if not isinstance(text, str):
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def listing(names: list[str], limit: int = 12) -> str:
    """Join names for a message, with how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "nothing") + more


def _walk(start: h5py.Group, path: str, where: str, links: int, depth: int) -> h5py.Group | h5py.Dataset | None:
    node: h5py.Group | h5py.Dataset = start
    for name in path.split("/"):
        if not name or name == ".":
            continue
        if not isinstance(node, h5py.Group):
            return None
        place = f"{where}: '{node.name.rstrip('/')}/{name}'"
        with guarded(place):
            link = node.get(name, getlink=True)
            if link is None:
                return None
            if isinstance(link, h5py.ExternalLink):
                raise DataError(
                    f"{place} is a link to another file ({link.filename!a}); links are followed only inside"
                )
            if isinstance(link, h5py.SoftLink):
                if links >= 2 * _MAX_DEPTH:
                    raise DataError(f"{place} is a soft link that runs in a circle")
                target = link.path
                origin = node.file["/"] if target.startswith("/") else node
                linked = _walk(origin, target, where, links + 1, depth)
                if linked is None:
                    return None
                node = linked
            else:
                node = node[name]
            if isinstance(node, h5py.Dataset):
                _ = node.dtype, node.shape  # raises here, where it is caught, if numpy has no word for the type
                _check_stored_here(node, place, depth)
            elif not isinstance(node, h5py.Group):
                return None
    return node


def _check_stored_here(dataset: h5py.Dataset, place: str, depth: int) -> None:
    """Refuse values that lie in other files, but for virtual datasets whose sources lie in the file's own folder."""
    if dataset.external:
        raise DataError(
            f"{place} keeps its values in another file ({dataset.external[0][0]!a}); copy them into this one"
        )
    if not dataset.is_virtual:
        return
    own = Path(dataset.file.filename).resolve()
    for name in sorted({(source.file_name, source.dset_name) for source in dataset.virtual_sources()}):
        path = own if name[0] == "." else (own.parent / name[0]).resolve()
        if depth >= 4 or not path.is_relative_to(own.parent) or "%" in name[0]:
            raise DataError(f"{place} is a virtual dataset that reads outside of its folder ({name[0]!a})")
        if not path.is_file():  # the library would quietly give zeros
            raise DataError(f"{place} is a virtual dataset whose source {name[0]!a} is absent; copy it beside the file")
        with opened(path) as file:
            if not isinstance(_walk(file, name[1], str(path), 0, depth + 1), h5py.Dataset):
                raise DataError(f"{place} is a virtual dataset whose source '{name[1]}' is not in {path}")
