"""RLDS datasets (TFDS folders of TFRecord shards), read without TensorFlow.

One record is one episode. Reading an episode parses its record and checks that all per-step features agree on the
number of steps; images and arrays are decoded when they are asked for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlaft.data.codec import decode_image
from vlaft.data.episode import Episode, Image
from vlaft.data.layout import Layout
from vlaft.data.readers import EpisodeRef
from vlaft.data.readers.step_instructions import gather
from vlaft.data.readers.tf_example import Stored, parse_example
from vlaft.data.readers.tfds_decode import Value, count_rows, decode_field, is_stored
from vlaft.data.readers.tfds_features import Field, parse_features
from vlaft.data.readers.tfds_folder import open_tfds_folder
from vlaft.data.readers.tfrecord import index_records, read_record
from vlaft.errors import DataError

_STEPS = "steps/"
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


class RldsSource:
    """A TFDS folder of robot episodes; implements `vlaft.data.readers.Source`."""

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
        instruction, own, told = gather(_instructions(self.fields, example, length, where), f"episode '{ref.name}'")
        if told and told not in self.warnings:
            self.warnings.append(told)
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

    def read_full_episode(self, ref: EpisodeRef) -> dict[str, Value]:
        """Decode every stored field of one episode, by its key in the record (needs memory for all frames).

        Raises:
            DataError: as `read`, or a value is damaged.
        """
        example, where = self._example(ref)
        _count_steps(self.fields, example, where)
        return {field.path: decode_field(field, example, where) for field in self.fields if is_stored(field, example)}

    def _warn_of_absent(self, paths: Sequence[str], episode: str) -> None:
        """Warn once of every feature that features.json describes and a record lacks."""
        for path in paths:
            if path not in self._absent:
                self._absent.add(path)
                self.warnings.append(
                    f"features.json describes '{path}', but episode '{episode}' holds none of it (told for the first"
                    " such episode only)"
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
            found = f"{rows} steps" if rows >= 0 else "no whole number of steps"
            raise DataError(
                f"{where}: by the shape [{', '.join('?' if size is None else str(size) for size in field.shape)}] that"
                f" features.json gives '{field.path}', the record holds {found} of it where others have {length}"
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
