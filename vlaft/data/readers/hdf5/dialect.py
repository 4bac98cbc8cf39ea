"""What all HDF5 dialects share: the options that a user may give, and how an episode is put together.

A dialect finds an episode in an opened file (`Hdf5Reader.find`): its datasets, its cameras, its instruction.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import h5py
import numpy as np

from vlaft.data.episode import Episode, gather
from vlaft.data.layout import Layout
from vlaft.data.readers.hdf5.access import (
    MAX_STEPS,
    guarded,
    is_numeric,
    listing,
    nearest_attribute,
    need_dataset,
    opened,
    scalar,
)
from vlaft.data.readers.hdf5.episode import FrameFormat, Hdf5Frames, LazyArrays, check_frames, is_camera
from vlaft.data.readers.reader import EpisodeRef
from vlaft.errors import ConfigError, DataError, did_you_mean

# What recorders call the instruction where they write one beside the demonstration.
USUAL_ATTRIBUTES = ("instruction", "language_instruction", "lang", "language", "task_description")

InstructionKind = Literal["constant", "attribute", "dataset", "file_name"]
_KINDS: tuple[InstructionKind, ...] = ("constant", "attribute", "dataset", "file_name")


@dataclass(frozen=True)
class InstructionRule:
    """Where an episode's instruction comes from.

    Attributes:
        kind: a constant, an attribute (of the episode's group, else of the groups around it), a dataset (a text per
            step, else its first one), or a regular expression on the file's name (its first group if it has one;
            `_` becomes a blank).
        value: the text, name, path or expression.
    """

    kind: InstructionKind
    value: str

    def resolve(self, group: h5py.Group, file: Path, where: str, length: int) -> Sequence[str]:
        """Return the instruction of the episode in `group`, or one for each of its `length` steps.

        Raises:
            DataError: there is no such attribute or dataset, it is no text, or the expression doesn't match.
        """
        if self.kind == "constant":
            return [self.value]
        if self.kind == "file_name":
            match = re.search(self.value, file.name)
            if match is None:
                raise DataError(f"{where}: the instruction's expression '{self.value}' does not match the file's name")
            return [" ".join((match[1] if match.re.groups else match[0]).replace("_", " ").split())]
        read: list[object] = []
        if self.kind == "attribute":
            read = [nearest_attribute(group, self.value, where)]
        else:
            dataset = need_dataset(group, self.value, where)
            with guarded(f"{where}: '{self.value}'"):
                if dataset.shape == () or (dataset.shape and len(dataset) > 0):
                    per_step = dataset.shape[:1] == (length,) and dataset.size == length
                    values = np.reshape(dataset[()], -1) if per_step else [dataset[(0,) * min(dataset.ndim, 1)]]
                    read = [scalar(value) for value in values]
        texts = [text.strip() for text in read if isinstance(text, str)]
        if not texts or len(texts) < len(read):
            raise DataError(f"{where} has no text in the {self.kind} '{self.value}' that is to give the instruction")
        return texts


@dataclass(frozen=True)
class Options:
    """What the user says about files of any dialect.

    Attributes:
        rule: where the instructions come from; None leaves that to the dialect.
        shift: step t has the action of step t + shift, held at the ends.
        drop_last: whether observations of T + 1 rows, with one after the last action, lose that one.
    """

    rule: InstructionRule | None
    shift: int
    drop_last: bool


def read_options(
    options: Mapping[str, object], known: tuple[str, ...], what: str, problems: list[str], shift_when_true: int = 0
) -> Options:
    """Return what all dialects understand of the `known` options; wrong and unknown ones are added to `problems`.

    Args:
        options: as the user gave them.
        known: names of those that the dialect understands.
        what: the dialect, for messages.
        problems: gets a sentence for each.
        shift_when_true: by how many steps `shift_action=true` shifts.
    """
    listed = f" (known: {', '.join(known)})"
    problems += [
        f"unknown option '{key}' for {what}{did_you_mean(str(key), list(known)) or listed}"
        for key in options
        if key not in known
    ]
    rule = _instruction_rule(options.get("instruction"), problems)
    drop_last = options.get("drop_last_observation", False)
    if not isinstance(drop_last, bool):
        problems.append(f"'drop_last_observation' is {drop_last!r}; write true or false")
    shift = options.get("shift_action", 0) if "shift_action" in known else 0
    if isinstance(shift, bool):
        shift = shift_when_true if shift else 0
    if not isinstance(shift, int) or abs(shift) > 100:
        problems.append(f"'shift_action' is {shift!r}; write true, false or a number of steps")
        shift = 0
    return Options(rule, shift, drop_last is True)


def _instruction_rule(spec: object, problems: list[str]) -> InstructionRule | None:
    """Parse the option `instruction`: a text, or `{attribute | dataset | file_name | constant: ...}`."""
    if spec is None:
        return None
    if isinstance(spec, str):
        return InstructionRule("constant", spec)
    if isinstance(spec, Mapping) and len(spec) == 1:
        word, value = next(iter(spec.items()))
        kind = next((kind for kind in _KINDS if kind == word), None)
        if kind is None:
            problems.append(f"unknown key 'instruction.{word}'{did_you_mean(str(word), list(_KINDS))}")
        elif not isinstance(value, str):
            problems.append(f"'instruction.{word}' is {value!r}, not a text")
        else:
            try:
                re.compile(value if kind == "file_name" else "")
                return InstructionRule(kind, value)
            except re.error as error:
                problems.append(f"'instruction.file_name' is no regular expression ({error})")
        return None
    problems.append("'instruction' is a text, or one of attribute, dataset, file_name with a value")
    return None


def positive_number(value: object) -> float | None:
    """Return a usable rate, or None for anything else."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e6
    return float(value) if usable and isinstance(value, int | float) else None


def refuse(problems: list[str]) -> None:
    """Raise all problems together.

    Raises:
        ConfigError: there is at least one.
    """
    if problems:
        raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True)
class StoredEpisode:
    """What a dialect finds of one episode in its opened file.

    Attributes:
        where: file and episode, for messages.
        group: the episode's, where attributes and datasets of the user's rules are looked for.
        length: its number of steps T.
        datasets: by the names that its arrays and cameras get.
        cameras: the names among them that are cameras, main camera first, and how each is stored.
        texts: its instruction, or that of each step, where the user gives no rule.
        fps: as in `Episode`.
    """

    where: str
    group: h5py.Group
    length: int
    datasets: Mapping[str, h5py.Dataset]
    cameras: Mapping[str, FrameFormat]
    texts: Sequence[str] = ()
    fps: float | None = None


@dataclass(kw_only=True)
class Hdf5Reader:
    """Episodes of HDF5 files of one dialect; see `vlaft.data.readers.reader.Reader`.

    Attributes:
        refs: the episodes, numbers in their names in numeric order.
        observed: arrays below this prefix have to have a row for each step; others without are left out.
    """

    path: Path
    format: str
    layout: Layout
    warnings: list[str]
    refs: list[EpisodeRef]
    options: Options
    name: str = field(init=False)
    observed: ClassVar[str]

    def __post_init__(self) -> None:
        """Name the dataset: by its file without the extension, or its folder."""
        self.name = self.path.resolve().name if self.path.is_dir() else self.path.stem

    def episodes(self) -> Sequence[EpisodeRef]:
        """List the episodes, numbers in their names in numeric order."""
        return self.refs

    def file_of(self, ref: EpisodeRef) -> Path:
        """Return the file in which the episode lies; its `location` begins with what `name_in` gave."""
        return self.path / str(ref.location[0]) if ref.location[0] else self.path

    def find(self, file: h5py.File, ref: EpisodeRef) -> StoredEpisode:
        """Find an episode in its opened file."""
        raise NotImplementedError

    def read(self, ref: EpisodeRef) -> Episode:
        """Read one episode; its arrays and frames stay in the file until they are asked for.

        Raises:
            DataError: it is damaged, an observation has another number of rows than the actions, or a camera is none.
        """
        path = self.file_of(ref)
        with opened(path) as file:
            stored = self.find(file, ref)
            where, length, rule = stored.where, stored.length, self.options.rule
            texts = stored.texts if rule is None else rule.resolve(stored.group, path, where, length)
            cameras = {name: self._frames(path, stored, name, format) for name, format in stored.cameras.items()}
            paths: dict[str, str] = {}
            for name, dataset in stored.datasets.items():
                if name in cameras or not is_numeric(dataset) or is_camera(dataset):
                    continue
                if name.startswith(self.observed):
                    self._check_rows(stored, name)
                if len(dataset) in (length, length + self.options.drop_last):
                    paths[name] = str(dataset.name)
        commands = [name for name in paths if name.startswith(("action", "base_action"))]
        shifts = dict.fromkeys(commands, self.options.shift) if self.options.shift else {}
        instruction, own = gather(texts, where, self.warnings)
        return Episode(
            index=ref.index,
            name=ref.name,
            length=length,
            instruction=instruction,
            instructions=own,
            arrays=LazyArrays(path, paths, where, length, shifts),
            cameras=cameras,
            split=ref.split,
            fps=stored.fps,
        )

    def _frames(self, file: Path, stored: StoredEpisode, name: str, format: FrameFormat) -> Hdf5Frames:
        known = stored.datasets
        if name not in known:
            raise DataError(
                f"{stored.where} has no camera '{name}'{did_you_mean(name, list(known))}"
                f" (it has: {listing(sorted(known))})"
            )
        check_frames(known[name], format, stored.where)
        self._check_rows(stored, name)
        return Hdf5Frames(file, str(known[name].name), stored.length, stored.where, format)

    def _check_rows(self, stored: StoredEpisode, name: str) -> None:
        rows, length = len(stored.datasets[name]), stored.length
        if rows not in (length, length + self.options.drop_last):
            last = "; if the last one was observed after the last action, type drop_last_observation=true"
            raise DataError(
                f"{stored.where}: '{name}' has {rows} rows, but there are {length} actions"
                f"{last if rows == length + 1 else ''}"
            )


def name_in(root: Path, file: Path) -> str:
    """Return the file's name below `root`, empty where it is `root` itself."""
    return "" if file == root else file.relative_to(root).as_posix()


def folder_split(relative: str) -> str | None:
    """Return the split that a file's first folder names, as ACT's and many other recorders lay them out.

    >>> folder_split("train/episode_0.hdf5"), folder_split("val/a/b.h5"), folder_split("demo.hdf5")
    ('train', 'valid', None)
    """
    folder = relative.split("/")[0] if "/" in relative else ""
    return {"train": "train", "val": "valid", "valid": "valid", "validation": "valid"}.get(folder)


def count_steps(actions: h5py.Dataset, name: str, where: str, dimensions: tuple[int, ...] = (2,)) -> int:
    """Return T, the rows of the actions.

    Args:
        actions: their dataset.
        name: what it is called, for messages.
        where: file and episode, for messages.
        dimensions: how many it may have; empty for any number.

    Raises:
        DataError: it holds no numbers `[T, A]`.
    """
    wrong = dimensions and actions.ndim not in dimensions
    if not is_numeric(actions) or wrong or len(actions) > MAX_STEPS:
        raise DataError(f"{where}: '{name}' has shape {actions.shape} and type {actions.dtype}, not [T, A] numbers")
    return len(actions)
