"""HDF5 demonstrations: a file or a folder of files, in whichever dialect its content shows.

robomimic and LIBERO (`robomimic`), ALOHA (`aloha`), and any other layout through a mapping that the user gives
(`mapping`, where its keys are described).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vlaft.data.readers.hdf5.access import numeric_order, opened
from vlaft.data.readers.hdf5.aloha import looks_like_aloha, open_aloha
from vlaft.data.readers.hdf5.mapping import is_mapping, open_mapped, unmapped
from vlaft.data.readers.hdf5.robomimic import looks_like_robomimic, open_robomimic
from vlaft.data.readers.reader import Reader, is_hdf5, refuse_lfs_pointer
from vlaft.errors import DataError

_MAX_FILES = 100_000


def open_hdf5(path: Path, options: Mapping[str, object] | None = None) -> Reader:
    """Open HDF5 demonstrations.

    Args:
        path: a file, or a folder whose HDF5 files (at any depth) are all of one dialect.
        options: of the dialect, or a mapping; each dialect's module lists its own.

    Raises:
        ConfigError: unknown or wrong options, all together.
        DataError: nothing there, damaged, of an unknown layout, or without images.
    """
    options = dict(options or {})
    files = _files(path)
    if is_mapping(options):
        return open_mapped(path, files, options)
    dialects = {file: _dialect(file) for file in files}
    first = dialects[files[0]]
    other = next((file for file in files if dialects[file] != first), None)
    if other is not None:
        raise DataError(
            f"{path} mixes HDF5 files of different layouts: {files[0].relative_to(path)} is {first or 'unknown'},"
            f" {other.relative_to(path)} is {dialects[other] or 'unknown'}; give them one by one"
        )
    if first == "robomimic":
        return open_robomimic(path, files, options)
    if first == "aloha":
        return open_aloha(path, files, options)
    raise unmapped(files[0])


def _dialect(path: Path) -> str | None:
    with opened(path) as file:
        if looks_like_aloha(file, str(path)):
            return "aloha"
        return "robomimic" if looks_like_robomimic(file, str(path)) else None


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        if not path.is_file():
            raise DataError(f"{path} is not there")
        refuse_lfs_pointer(path)
        if not is_hdf5(path):
            raise DataError(f"{path} is no HDF5 file (or its beginning is damaged)")
        return [path]
    files: list[Path] = []
    for file in path.rglob("*"):
        if file.is_file() and not file.name.startswith("."):
            if file.suffix in (".hdf5", ".h5"):
                refuse_lfs_pointer(file)  # a recording that was not fetched should not go unnoticed
            if is_hdf5(file):
                files.append(file)
        if len(files) > _MAX_FILES:
            raise DataError(f"{path} holds more than {_MAX_FILES} HDF5 files; give a smaller folder")
    if not files:
        raise DataError(f"{path} holds no HDF5 files")
    return sorted(files, key=lambda file: numeric_order(file.relative_to(path).as_posix()))
