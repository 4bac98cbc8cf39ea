"""A TFDS dataset folder: which version, which splits, which shards; nothing of it is read here but two JSON files."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vlaft.data.readers.sniff import refuse_lfs_pointer
from vlaft.errors import DataError

_MARKS = ("dataset_info.json", "features.json")
_VERSION = re.compile(r"^(\d{1,9})\.(\d{1,9})\.(\d{1,9})$")
_DEFAULT_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
_SHARD_NAME = re.compile(r"^.+-(?P<split>[^-]+)\.tfrecord-(?P<index>\d{5})-of-(?P<count>\d{5})$")
_MAX_JSON_BYTES = 1 << 26


@dataclass(frozen=True)
class Shard:
    """One file of a split: its name inside the version folder, and how many records it should hold (None: unknown)."""

    split: str
    name: str
    records: int | None


@dataclass(frozen=True)
class TfdsFolder:
    """What the two JSON files say.

    Attributes:
        path: the version folder.
        name: the dataset's name.
        shards: every shard, split by split.
        features: the tree of features.json.
        warnings: what was not believed, or chosen between several.
    """

    path: Path
    name: str
    shards: tuple[Shard, ...]
    features: object
    warnings: tuple[str, ...]


def is_tfds_folder(path: Path) -> bool:
    """Whether `path` is a version folder, or a dataset or configuration folder above one."""
    return any(_is_version(folder) for folder in (path, *_folders(path))) or any(
        _is_version(below) for folder in _folders(path) for below in _folders(folder)
    )


def open_tfds_folder(path: Path) -> TfdsFolder:
    """Read the metadata of the dataset at `path`: a version folder, or a folder above, whose newest version is taken.

    Raises:
        DataError: metadata are missing or damaged, a shard is missing, or the file format is not tfrecord.
    """
    warnings: list[str] = []
    folder = _version_folder(path, warnings)
    features_path = folder / "features.json"
    if not features_path.is_file():
        raise DataError(f"'{folder}' has no features.json, without which its records cannot be understood")
    features = read_json(features_path)
    info_path = folder / "dataset_info.json"
    info: dict[str, object] = {}
    if info_path.is_file():
        content = read_json(info_path)
        if not isinstance(content, dict):
            raise DataError(f"'{info_path}' is no JSON object")
        info = content
    else:
        warnings.append(f"'{folder}' has no dataset_info.json: the shards were found by their names")
    file_format = info.get("fileFormat") or "tfrecord"
    if file_format != "tfrecord":
        raise DataError(f"'{info_path}' says fileFormat {file_format!r}: only tfrecord is read")
    name = info.get("name")
    if not isinstance(name, str) or not name:
        name = folder.parent.name if _VERSION.match(folder.name) else folder.name
    shards = _announced_shards(info, info_path, name, warnings) if "splits" in info else None
    if shards is None:
        shards = _found_shards(folder)
    for shard in shards:
        if not (folder / shard.name).is_file():
            raise DataError(f"'{folder}' lacks the shard '{shard.name}' of split '{shard.split}': download it again")
        refuse_lfs_pointer(folder / shard.name)
    if not shards:
        raise DataError(f"'{folder}' holds no TFRecord shards")
    return TfdsFolder(folder, name, tuple(shards), features, tuple(warnings))


def read_json(path: Path) -> object:
    """Return the parsed file.

    Raises:
        DataError: it cannot be read, is a git-LFS pointer, or is no JSON.
    """
    refuse_lfs_pointer(path)
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise DataError(f"'{path}' is larger than {_MAX_JSON_BYTES} bytes: this is no metadata file")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"'{path}' is no valid JSON ({' '.join(str(error).split())[:100]})") from error


def _is_version(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in _MARKS)


def _folders(path: Path) -> list[Path]:
    """The folders in `path`; none where it may not be read, which for us is no dataset."""
    try:
        return sorted(entry for entry in path.iterdir() if entry.is_dir())
    except OSError:
        return []


def _version_folder(path: Path, warnings: list[str]) -> Path:
    if _is_version(path):
        return path
    versions = [folder for folder in _folders(path) if _is_version(folder)]
    if not versions:  # TFDS puts configurations between the dataset and its versions
        above = [folder for folder in _folders(path) if any(_is_version(below) for below in _folders(folder))]
        if len(above) != 1:
            names = ", ".join(folder.name for folder in above[:10])
            raise DataError(f"'{path}' holds several datasets ({names}): give one" if above else _no_dataset(path))
        return _version_folder(above[0], warnings)
    if len(versions) == 1:
        return versions[0]
    numbered = [
        (tuple(map(int, match.groups())), folder) for folder in versions if (match := _VERSION.match(folder.name))
    ]
    if not numbered:
        raise DataError(f"'{path}' holds several datasets ({', '.join(f.name for f in versions[:10])}): give one")
    newest = max(numbered)[1]
    warnings.append(f"'{path}' holds {len(versions)} versions, of which {newest.name} is read")
    return newest


def _no_dataset(path: Path) -> str:
    return f"'{path}' holds neither dataset_info.json nor features.json, so it is no RLDS dataset"


def _announced_shards(info: dict[str, object], info_path: Path, name: str, warnings: list[str]) -> list[Shard] | None:
    """The shards that dataset_info.json announces, or None when only the files can tell."""
    splits = info["splits"]
    if not isinstance(splits, list):
        raise DataError(f"'{info_path}': 'splits' is no list")
    shards: list[Shard] = []
    for split in splits:
        label = split.get("name") if isinstance(split, dict) else None
        if not isinstance(split, dict) or not isinstance(label, str) or not label:
            raise DataError(f"'{info_path}': a split has no name")
        lengths = split.get("shardLengths")
        if lengths is None:
            warnings.append(f"'{info_path}' gives no shardLengths for '{label}': the shards were found by their names")
            return None
        template = split.get("filepathTemplate") or _DEFAULT_TEMPLATE
        if not isinstance(lengths, list) or not isinstance(template, str):
            raise DataError(f"'{info_path}': shardLengths or filepathTemplate of split '{label}' is malformed")
        count = len(lengths)
        names = [_shard_name(template, name, label, index, count, info_path) for index in range(count)]
        if "filepathTemplate" not in split and not any((info_path.parent / shard).is_file() for shard in names):
            warnings.append(f"'{info_path}' gives no filepathTemplate: the shards were found by their names")
            return None
        for shard, length in zip(names, lengths, strict=True):
            shards.append(Shard(label, shard, _count(length, label, info_path)))
    return shards


def _count(value: object, split: str, info_path: Path) -> int:
    """TFDS writes the number of records as a string."""
    try:
        count = int(value)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError):
        count = -1
    if count < 0:
        raise DataError(
            f"'{info_path}': shardLengths of split '{split}' holds {str(value)[:40]!r}, no number of records"
        )
    return count  # type: ignore[no-any-return]


def _shard_name(template: str, dataset: str, split: str, index: int, count: int, info_path: Path) -> str:
    known = {
        "DATASET": dataset,
        "SPLIT": split,
        "FILEFORMAT": "tfrecord",
        "SHARD_X_OF_Y": f"{index:05d}-of-{count:05d}",
        "SHARD_INDEX": f"{index:05d}",
        "NUM_SHARDS": f"{count:05d}",
    }

    def value(match: re.Match[str]) -> str:
        if match[1] not in known:
            raise DataError(f"'{info_path}': filepathTemplate has the unknown variable '{match[0][:40]}'")
        return known[match[1]]

    name = re.sub(r"\{([^{}]*)\}", value, template)
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or len(name) > 512:
        raise DataError(f"'{info_path}': filepathTemplate leads out of the dataset's folder ({name[:80]!r})")
    return name


def _found_shards(folder: Path) -> list[Shard]:
    """The shards by their names, for metadata that do not list them; none of a set may be missing."""
    sets: dict[tuple[str, int], dict[int, str]] = {}
    for entry in sorted(folder.iterdir()):
        if match := _SHARD_NAME.match(entry.name):
            sets.setdefault((match["split"], int(match["count"])), {})[int(match["index"])] = entry.name
    for (split, count), names in sets.items():
        missing = next((index for index in range(count) if index not in names), None)
        if missing is not None or len(names) != count:
            raise DataError(f"'{folder}' lacks shard {missing} of {count} of split '{split}': download it again")
    return [Shard(split, names[index], None) for (split, _), names in sets.items() for index in sorted(names)]
