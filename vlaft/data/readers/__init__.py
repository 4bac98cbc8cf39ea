"""Readers: one module per format, each turning a source on disk into episodes, lazily.

`open_source` looks at what lies on disk, never at the file's extension, and picks the reader.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Protocol

from vlaft.data.episode import Episode
from vlaft.data.layout import Layout
from vlaft.errors import ConfigError, DataError

_UNDERSTOOD = (
    "understood are: RLDS (a folder with dataset_info.json and features.json), LeRobot (a folder with meta/info.json),"
    " HDF5 files of robomimic, LIBERO or ALOHA, or with a mapping, and LeRobot ids on the Hub (user/dataset)"
)
_MAX_LOOKED_AT = 1000  # files opened, or folders looked into, to find out what a folder holds
_MAX_LEVELS = 3  # below a folder, where datasets are looked for
_NAMED = 5  # of those found, in a sentence
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?<!\.hdf5)(?<!\.h5)$")


@dataclass(frozen=True)
class EpisodeRef:
    """Where one episode lies; small and picklable, so that worker processes can read it themselves.

    Attributes:
        index: position in the source, from 0, over all splits.
        name: as in `Episode.name`.
        split: the source's own split, or None.
        location: what the reader needs to find it (file, offset, key ...).
    """

    index: int
    name: str
    split: str | None
    location: tuple[str | int, ...]


class Source(Protocol):
    """An opened source of episodes. Opening reads metadata only."""

    path: Path
    name: str  # the dataset's name: default statistics key
    format: str  # "rlds", "robomimic", "libero", "aloha", "hdf5", "lerobot-v2.1" ...
    layout: Layout  # the reader's own default
    warnings: list[str]  # metadata that was not believed, each one sentence

    def episodes(self) -> Sequence[EpisodeRef]:
        """List the episodes, in the source's order (numeric where names are numbered)."""

    def read(self, ref: EpisodeRef) -> Episode:
        """Read one episode; frames stay undecoded.

        Raises:
            DataError: the episode is damaged; the sentence names file and episode.
        """


def open_source(path: Path, options: dict[str, object] | None = None) -> Source:
    """Open whatever lies at `path`.

    Args:
        path: a file or a folder, or the id of a LeRobot dataset on the Hub (`user/dataset`).
        options: what only one reader understands, from a preset or from the command line.

    Raises:
        ConfigError: options that the reader does not know.
        DataError: nothing there, or nothing that a reader knows.
    """
    from vlaft.data.readers.sniff import describe_file, first_bytes, is_hdf5, refuse_lfs_pointer

    path = Path(path)
    if not _exists(path):
        return _open_from_hub(path, options or {})
    if path.is_dir():
        return _open_folder(path, options or {})
    first_bytes(path)
    refuse_lfs_pointer(path)
    if is_hdf5(path):
        return _open_hdf5(path, options or {})
    raise DataError(f"'{path}' is {describe_file(path)}; {_UNDERSTOOD}")


def _open_folder(path: Path, options: dict[str, object]) -> Source:
    from vlaft.data.readers.rlds.source import is_tfds_folder
    from vlaft.data.readers.sniff import is_hdf5, refuse_lfs_pointer

    try:
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"folder '{path}' cannot be read: {error.strerror}") from error
    if not entries:
        raise DataError(f"folder '{path}' is empty; {_UNDERSTOOD}")
    if (path / "meta").is_dir():
        from vlaft.data.readers.lerobot.source import LeRobotSource, looks_like_lerobot

        if looks_like_lerobot(path):  # also where info.json is what is missing, so that the reader says so
            return LeRobotSource(path, options)
    _refuse_version_1(path)
    if (path / "dataset.json").is_file():
        raise DataError(f"'{path}' is already converted (it has a dataset.json): train on it with --data {path}")
    if is_tfds_folder(path):
        from vlaft.data.readers.rlds.source import RldsSource

        if options:
            raise ConfigError(f"an RLDS dataset takes no reader options (given: {', '.join(sorted(options))})")
        return RldsSource(path)
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

    found: list[str] = []
    for looked_at, (parent, folders, _) in enumerate(os.walk(path)):
        folder = Path(parent)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if len(folder.relative_to(path).parts) >= _MAX_LEVELS or looked_at > _MAX_LOOKED_AT:
            folders.clear()
        if folder != path and (looks_like_lerobot(folder) or is_tfds_folder(folder) or _is_version_1(folder)):
            found.append(str(folder))
            folders.clear()
    if found:
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        raise DataError(
            f"folder '{path}' is no dataset itself; give one of those below it: {', '.join(found[:_NAMED])}{more}"
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


def _open_hdf5(path: Path, options: dict[str, object]) -> Source:
    from vlaft.data.readers.hdf5.source import open_hdf5

    return open_hdf5(path, options)


def _open_from_hub(path: Path, options: dict[str, object]) -> Source:
    text = path.as_posix()
    # A local folder of that name in front makes it a mistyped path: nothing is asked of the Hub then.
    if not _HUB_ID.match(text) or Path(text.partition("/")[0]).exists():
        raise DataError(f"'{path}' does not exist")
    from vlaft.data.readers.lerobot.source import LeRobotSource, download

    folder = download(text)
    _refuse_version_1(folder)
    return LeRobotSource(folder, options)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError) as error:
        raise DataError(f"'{str(path)[:200]}' cannot be looked up: {error}") from error
