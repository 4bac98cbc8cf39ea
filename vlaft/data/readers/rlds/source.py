"""RLDS datasets (TFDS folders of TFRecord shards), read without TensorFlow.

One record is one episode. Reading an episode parses its record and checks that all per-step features agree on the
number of steps; images and arrays are decoded when they are asked for.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from vlaft.data.codec import decode_image
from vlaft.data.episode import Episode, gather
from vlaft.data.layout import Layout
from vlaft.data.readers.reader import EpisodeRef, refuse_lfs_pointer
from vlaft.data.readers.rlds.fields import Field, count_rows, decode_field, is_stored, parse_features
from vlaft.data.readers.rlds.records import Stored, index_records, parse_example, read_record
from vlaft.data.sentences import FIRST_SUCH_EPISODE
from vlaft.errors import DataError
from vlaft.observation.images import Image

_STEPS = "steps/"
_LONGEST_NAME = 255  # bytes of a file's name, on every common file system
_STATES = ("observation/state", "observation/proprio", "state", "proprio")
# Names of the third-person camera in the Open X-Embodiment datasets, the most telling first.
_MAIN_CAMERAS = (
    "primary",
    "image_primary",
    "image",
    "image_0",
    "rgb_static",
    "agentview_image",
    "agentview_rgb",
    "front",
    "front_image",
    "front_rgb",
    "exterior_image_1_left",
    "image_side_1",
    "rgb",
    "top_image",
    "static_image",
)
_EMPTY_EDGE = 224  # of a black frame whose size features.json leaves open
_INSTRUCTION = re.compile(
    r"^(steps/|steps/observation/|episode_metadata/|)"
    r"(language_instruction(_\d+)?|natural_language_instruction|instruction|language|language_text|task)$"
)
_MARKS = ("dataset_info.json", "features.json")
_VERSION = re.compile(r"^(\d{1,9})\.(\d{1,9})\.(\d{1,9})$")
_DEFAULT_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
_SHARD_NAME = re.compile(r"^.+-(?P<split>[^-]+)\.tfrecord-(?P<index>\d{5})-of-(?P<count>\d{5})$")
_MAX_JSON_BYTES = 1 << 26


class RldsReader:
    """A TFDS folder of robot episodes; implements `vlaft.data.readers.reader.Reader`."""

    format = "rlds"

    def __init__(self, path: Path) -> None:
        """Open the folder of one version, or of a dataset, whose newest version is taken.

        Raises:
            DataError: metadata or shards are missing or damaged, or the features are not those of episodes.
        """
        folder = open_tfds_folder(path)
        where = f"'{folder.path / 'features.json'}'"
        fields, skipped = parse_features(folder.features, where)
        if not any(field.path.startswith(_STEPS) and field.levels for field in fields):
            known = ", ".join(field.path for field in fields[:10])
            raise DataError(f"{where} describes no 'steps', so this is no RLDS dataset (it has: {known})")
        self.path = folder.path
        self.name = folder.name
        self.warnings: list[str] = [*folder.warnings, *skipped]
        self.fields = tuple(fields)
        self.layout = _default_layout(fields)
        self._shards = folder.shards
        self._absent: set[str] = set()
        self._empty: set[tuple[str, str]] = set()

    def episodes(self) -> Sequence[EpisodeRef]:
        """List the episodes in the order of the records, split by split.

        Raises:
            DataError: a shard is damaged, or holds fewer records than dataset_info.json announces.
        """
        return self._episodes

    @cached_property
    def _episodes(self) -> tuple[EpisodeRef, ...]:
        refs: list[EpisodeRef] = []
        in_split: Counter[str] = Counter()
        for shard in self._shards:
            offsets = index_records(self.path / shard.name)
            if shard.records is not None and len(offsets) < shard.records:
                raise DataError(
                    f"shard '{self.path / shard.name}' is cut off: it holds {len(offsets)} records where"
                    f" dataset_info.json says {shard.records}; download or copy the file again"
                )
            if shard.records is not None and len(offsets) > shard.records:
                self.warnings.append(
                    f"shard '{shard.name}' holds {len(offsets)} records where dataset_info.json says {shard.records}"
                )
            for number, offset in enumerate(offsets):
                name = f"{shard.split}[{in_split[shard.split]}]"
                refs.append(EpisodeRef(len(refs), name, shard.split, (shard.split, shard.name, number, offset)))
                in_split[shard.split] += 1
        return tuple(refs)

    def read(self, ref: EpisodeRef) -> Episode:
        """Read one episode; frames and arrays stay undecoded until asked for.

        Raises:
            DataError: the record is damaged, or its features disagree on the number of steps.
        """
        example, where = self._example(ref)
        length = _count_steps(self.fields, example, where)
        fields = [field for field in self.fields if field.path.startswith(_STEPS)]
        stored = [field for field in fields if is_stored(field, example)]
        self._warn_of_absent([field.path for field in fields if field not in stored], ref.name)
        cameras = {_short(field): self._frames(field, example, where, ref.name) for field in stored if field.is_camera}
        texts = _instructions(self.fields, example, length, where)
        instruction, own = gather(texts, f"episode '{ref.name}'", self.warnings)
        return Episode(
            index=ref.index,
            name=ref.name,
            length=length,
            instruction=instruction,
            instructions=own,
            arrays=_StepArrays({_short(field): field for field in stored if field.is_array}, example, where),
            cameras=cameras,
            split=ref.split,
        )

    def _warn_of_absent(self, paths: Sequence[str], episode: str) -> None:
        """Warn once of every feature that features.json describes and a record lacks."""
        for path in paths:
            if path not in self._absent:
                self._absent.add(path)
                self.warnings.append(
                    f"features.json describes '{path}', but episode '{episode}' holds none of it {FIRST_SUCH_EPISODE}"
                )

    def _frames(self, field: Field, example: Mapping[str, Stored], where: str, episode: str) -> EncodedFrames:
        images = _images(field, example, where)
        empty = sum(not image for image in images)
        if empty and (episode, field.path) not in self._empty:
            self._empty.add((episode, field.path))
            self.warnings.append(
                f"episode '{episode}': {empty} of {len(images)} frames of camera '{_short(field)}' are empty; they"
                " count as black, as OpenVLA's pipeline shows them"
            )
        height, width = field.shape[0] or _EMPTY_EDGE, field.shape[1] or _EMPTY_EDGE
        return EncodedFrames(images, f"{where}, camera '{_short(field)}'", (height, width))

    def _example(self, ref: EpisodeRef) -> tuple[dict[str, Stored], str]:
        _, shard, number, offset = ref.location
        where = f"shard '{shard}', record {number} (episode '{ref.name}')"
        payload = read_record(self.path / str(shard), int(number), int(offset))
        return parse_example(payload, where), where


@dataclass(frozen=True)
class EncodedFrames:
    """Frames as encoded images in memory; implements `vlaft.data.episode.Frames`.

    Attributes:
        images: an encoded image per step; an empty one stands for a black frame, as in OpenVLA's pipeline.
        where: names file, episode and camera in messages.
        empty_size: height and width of those.
    """

    images: Sequence[bytes]
    where: str
    empty_size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Sequence[int]) -> Iterator[Image]:
        """Decode the frames of `indices` as TensorFlow would, one at a time."""
        for index in indices:
            if self.images[index]:
                yield decode_image(self.images[index], f"{self.where}, step {index}")
            else:
                yield np.zeros((*self.empty_size, 3), np.uint8)


@dataclass(frozen=True)
class _StepArrays(Mapping[str, NDArray[np.generic]]):
    """The numeric per-step features, decoded on access."""

    fields: Mapping[str, Field]
    example: Mapping[str, Stored]
    where: str

    def __getitem__(self, name: str) -> NDArray[np.generic]:
        value = decode_field(self.fields[name], self.example, self.where)
        assert isinstance(value, np.ndarray)
        return value

    def __contains__(self, name: object) -> bool:
        return name in self.fields

    def __iter__(self) -> Iterator[str]:
        return iter(self.fields)

    def __len__(self) -> int:
        return len(self.fields)


def _short(field: Field) -> str:
    return field.path.removeprefix(_STEPS)


def _images(field: Field, example: Mapping[str, Stored], where: str) -> list[bytes]:
    stored = example.get(field.path)
    if not isinstance(stored, list):
        raise DataError(f"{where}: '{field.path}' holds numbers where encoded images are expected")
    return stored


def _count_steps(fields: Sequence[Field], example: Mapping[str, Stored], where: str) -> int:
    """Return T, on which all per-step features have to agree."""
    counts = {
        field: rows
        for field in fields
        if field.path.startswith(_STEPS) and is_stored(field, example)
        if (rows := count_rows(field, example)) is not None
    }
    # What most features say names the odd one out, when features.json gives one of them a wrong shape.
    votes = Counter(rows for rows in counts.values() if rows >= 0)
    length = votes.most_common(1)[0][0] if votes else 0
    for field, rows in counts.items():
        if rows != length:
            counted = f"{rows} steps" if rows >= 0 else "no whole number of steps"
            raise DataError(
                f"{where}: by the shape [{', '.join('?' if size is None else str(size) for size in field.shape)}] that"
                f" features.json gives '{field.path}', the record holds {counted} of it where others have {length}"
            )
    if length == 0:
        raise DataError(f"{where} has no steps")
    return length


def _instructions(fields: Sequence[Field], example: Mapping[str, Stored], length: int, where: str) -> Sequence[str]:
    """The text of each step, or one for all: of the first feature that has any, the most usual name first."""
    candidates = [field for field in fields if _INSTRUCTION.match(field.path) and is_stored(field, example)]
    for field in sorted(candidates, key=_instruction_rank):
        if field.kind == "text" and len(field.levels) <= 1:
            values = decode_field(field, example, where)
            texts = [
                text if isinstance(text, str) else "" for text in (values if isinstance(values, list) else [values])
            ]
        elif field.is_array and len(field.shape) == 1 and np.dtype(field.dtype).kind in "iu":
            codes = decode_field(field, example, where)
            assert isinstance(codes, np.ndarray)
            same = not len(codes) or (codes == codes[0]).all()
            texts = [_text_of_codes(row) for row in (codes[:1] if same else codes)]
        else:
            continue
        if any(text.strip() for text in texts):
            per_step = field.path.startswith(_STEPS) and len(texts) == length
            return texts if per_step else [next(text for text in texts if text.strip())]
    return []


def _instruction_rank(field: Field) -> tuple[int, int, str]:
    name = field.path.rpartition("/")[2]
    order = ("language_instruction", "natural_language_instruction")
    rank = order.index(name) if name in order else 2 if name.startswith("language_instruction") else 3
    return (rank, not field.path.startswith(_STEPS), field.path)


def _text_of_codes(codes: NDArray[np.generic]) -> str:
    """Texts stored as one UTF-8 code per element, padded with zeros (Language-Table)."""
    values = codes.astype(np.int64)
    if ((values < 0) | (values > 255)).any():
        return ""
    return values.astype(np.uint8).tobytes().rstrip(b"\0").decode("utf-8", errors="replace").strip()


def _default_layout(fields: Sequence[Field]) -> Layout:
    arrays = {_short(field) for field in fields if field.path.startswith(_STEPS) and field.is_array}
    cameras = sorted(
        (_short(field) for field in fields if field.is_camera),
        key=lambda path: (_camera_rank(path), path),
    )
    leaves = Counter(path.rpartition("/")[2] for path in cameras)
    return Layout(
        action=("action",) if "action" in arrays else (),
        state=next(((name,) for name in _STATES if name in arrays), ()),
        cameras={
            leaf if leaves[leaf := path.rpartition("/")[2]] == 1 else path.replace("/", "_"): path for path in cameras
        },
    )


def _camera_rank(path: str) -> int:
    name = path.rpartition("/")[2]
    if name in _MAIN_CAMERAS:
        return _MAIN_CAMERAS.index(name)
    on_the_arm = any(word in name for word in ("wrist", "hand", "gripper"))
    return len(_MAIN_CAMERAS) + on_the_arm


@dataclass(frozen=True)
class TfdsShard:
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
    shards: tuple[TfdsShard, ...]
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


def _announced_shards(
    info: dict[str, object], info_path: Path, name: str, warnings: list[str]
) -> list[TfdsShard] | None:
    """The shards that dataset_info.json announces, or None when only the files can tell."""
    splits = info["splits"]
    if not isinstance(splits, list):
        raise DataError(f"'{info_path}': 'splits' is no list")
    shards: list[TfdsShard] = []
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
            shards.append(TfdsShard(label, shard, _count(length, label, info_path)))
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
    if max((len(part.encode(errors="replace")) for part in path.parts), default=0) > _LONGEST_NAME:
        raise DataError(f"'{info_path}': the shards' names are too long to be files ({name[:80]!r} ...)")
    return name


def _found_shards(folder: Path) -> list[TfdsShard]:
    """The shards by their names, for metadata that do not list them; none of a set may be missing."""
    sets: dict[tuple[str, int], dict[int, str]] = {}
    for entry in sorted(folder.iterdir()):
        if match := _SHARD_NAME.match(entry.name):
            sets.setdefault((match["split"], int(match["count"])), {})[int(match["index"])] = entry.name
    for (split, count), names in sets.items():
        missing = next((index for index in range(count) if index not in names), None)
        if missing is not None or len(names) != count:
            raise DataError(f"'{folder}' lacks shard {missing} of {count} of split '{split}': download it again")
    return [TfdsShard(split, names[index], None) for (split, _), names in sets.items() for index in sorted(names)]
