"""Open whatever lies at a path: what lies on disk picks the reader, never the name's extension."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from vlaft.data.readers.reader import Reader, first_bytes, is_hdf5, refuse_lfs_pointer
from vlaft.errors import ConfigError, DataError
from vlaft.remote import fetched

_UNDERSTOOD = (
    "understood are: RLDS (a folder with dataset_info.json and features.json), LeRobot (a folder with meta/info.json),"
    " HDF5 files of robomimic, LIBERO or ALOHA, or with a mapping, and LeRobot ids on the Hub (user/dataset)"
)
_MAX_LOOKED_AT = 1000  # files opened, or folders looked into, to find out what a folder holds
_MAX_LEVELS = 3  # below a folder, where datasets are looked for
_NAMED = 5  # of the datasets there, in a sentence
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?<!\.hdf5)(?<!\.h5)$")
_KNOWN = {
    b"PAR1": "a single parquet file",
    b"PK\x03\x04": "a zip archive (unpack it first)",
    b"\x1f\x8b": "a gzip archive (unpack it first)",
    b"\x93NUMPY": "a numpy array",
}


def open_reader(path: Path, options: dict[str, object] | None = None) -> Reader:
    """Open whatever lies at `path`.

    Args:
        path: a file or a folder, a URL of one, or the id of a LeRobot dataset on the Hub (`user/dataset`).
        options: what only one reader understands, from a preset or from the command line.

    Raises:
        ConfigError: options that the reader does not know.
        DataError: nothing there, or nothing that a reader knows.
    """
    path = fetched(path)
    if not _exists(path):
        return _open_from_hub(path, options or {})
    if path.is_dir():
        return _open_folder(path, options or {})
    first_bytes(path)
    refuse_lfs_pointer(path)
    if is_hdf5(path):
        return _open_hdf5(path, options or {})
    raise DataError(f"'{path}' is {_describe_file(path)}; {_UNDERSTOOD}")


def _open_folder(path: Path, options: dict[str, object]) -> Reader:
    from vlaft.data.readers.rlds.source import is_tfds_folder

    try:
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"folder '{path}' cannot be read: {error.strerror}") from error
    if not entries:
        raise DataError(f"folder '{path}' is empty; {_UNDERSTOOD}")
    if (path / "meta").is_dir():
        from vlaft.data.readers.lerobot.source import LeRobotReader, looks_like_lerobot

        if looks_like_lerobot(path):  # also where info.json is what is missing, so that the reader says so
            return LeRobotReader(path, options)
    _refuse_version_1(path)
    if (path / "dataset.json").is_file():
        raise DataError(f"'{path}' is already converted (it has a dataset.json): train on it with --data {path}")
    if is_tfds_folder(path):
        from vlaft.data.readers.rlds.source import RldsReader

        if options:
            raise ConfigError(f"an RLDS dataset takes no reader options (given: {', '.join(sorted(options))})")
        return RldsReader(path)
    files = [entry for entry in entries if entry.is_file()]
    if not any(is_hdf5(file) for file in files):
        _point_below(path)
    # Below as well: LIBERO's suites are folders of files, and recorders make one per day.
    if any(is_hdf5(file) for file in chain(files, _files_below(path))):
        return _open_hdf5(path, options)
    for file in files:
        refuse_lfs_pointer(file)
    names = ", ".join(entry.name for entry in entries[:5]) + (", ..." if len(entries) > 5 else "")
    raise DataError(f"folder '{path}' holds no demonstrations that vlaft knows (found: {names}); {_UNDERSTOOD}")


def _files_below(path: Path) -> Iterator[Path]:
    """Yield the first files below a folder, at any depth."""
    files = (Path(parent, name) for parent, _, names in os.walk(path) for name in sorted(names) if name[0] != ".")
    return islice((file for file in files if file.is_file()), _MAX_LOOKED_AT)


def _point_below(path: Path) -> None:
    """Refuse a folder above datasets of its own kind each, and say where these are.

    Raises:
        DataError: there are LeRobot or RLDS datasets in the folders below.
    """
    from vlaft.data.readers.lerobot.source import looks_like_lerobot
    from vlaft.data.readers.rlds.source import is_tfds_folder

    datasets: list[str] = []
    for looked_at, (parent, folders, _) in enumerate(os.walk(path)):
        folder = Path(parent)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if len(folder.relative_to(path).parts) >= _MAX_LEVELS or looked_at > _MAX_LOOKED_AT:
            folders.clear()
        if folder != path and (looks_like_lerobot(folder) or is_tfds_folder(folder) or _is_version_1(folder)):
            datasets.append(str(folder))
            folders.clear()
    if datasets:
        more = f" and {len(datasets) - _NAMED} more" if len(datasets) > _NAMED else ""
        raise DataError(
            f"folder '{path}' is no dataset itself; give one of those below it: {', '.join(datasets[:_NAMED])}{more}"
        )


def _is_version_1(path: Path) -> bool:
    return (path / "meta_data" / "info.json").is_file()


def _refuse_version_1(path: Path) -> None:
    if _is_version_1(path):
        raise DataError(
            f"'{path}' is a LeRobot dataset of version 1 (it has a folder meta_data), which is not read: bring it to"
            " version 2 with LeRobot's own script, python -m lerobot.datasets.v2.convert_dataset_v1_to_v2 (in lerobot"
            " 0.3.3 and before), and give what it writes"
        )


def _open_hdf5(path: Path, options: dict[str, object]) -> Reader:
    from vlaft.data.readers.hdf5.source import open_hdf5

    return open_hdf5(path, options)


def _open_from_hub(path: Path, options: dict[str, object]) -> Reader:
    text = path.as_posix()
    # A local folder of that name in front makes it a mistyped path: nothing is asked of the Hub then.
    if not _HUB_ID.match(text) or Path(text.partition("/")[0]).exists():
        raise DataError(f"'{path}' does not exist")
    from vlaft.data.readers.lerobot.source import LeRobotReader, download

    folder = download(text)
    _refuse_version_1(folder)
    return LeRobotReader(folder, options)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError) as error:
        raise DataError(f"'{str(path)[:200]}' cannot be looked up: {error}") from error


def _describe_file(path: Path) -> str:
    """Say in a few words what an unknown file seems to be."""
    from vlaft.data.readers.rlds.records import starts_with_record

    head = first_bytes(path)
    if not head:
        return "an empty file"
    if starts_with_record(head):
        return "a single TFRecord shard (give the folder that holds dataset_info.json)"
    return next((words for magic, words in _KNOWN.items() if head.startswith(magic)), "a file of an unknown kind")
