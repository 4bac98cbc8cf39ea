"""Options that HDF5 dialects share: checking their names, and rules for the instruction and the control rate."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from vlaft.data.readers.hdf5.access import guarded, nearest_attribute, need_dataset, scalar
from vlaft.data.readers.hdf5.episode import FrameFormat, detect_encoding
from vlaft.errors import ConfigError, DataError, did_you_mean

InstructionKind = Literal["constant", "attribute", "dataset", "file_name"]
_KINDS: tuple[InstructionKind, ...] = ("constant", "attribute", "dataset", "file_name")

# What recorders call the instruction where they write one beside the demonstration.
USUAL_ATTRIBUTES = ("instruction", "language_instruction", "lang", "language", "task_description")


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
        found: list[object] = []
        if self.kind == "attribute":
            found = [nearest_attribute(group, self.value, where)]
        else:
            dataset = need_dataset(group, self.value, where)
            with guarded(f"{where}: '{self.value}'"):
                if dataset.shape == () or (dataset.shape and len(dataset) > 0):
                    per_step = dataset.shape[:1] == (length,) and dataset.size == length
                    values = np.reshape(dataset[()], -1) if per_step else [dataset[(0,) * min(dataset.ndim, 1)]]
                    found = [scalar(value) for value in values]
        texts = [text.strip() for text in found if isinstance(text, str)]
        if not texts or len(texts) < len(found):
            raise DataError(f"{where} has no text in the {self.kind} '{self.value}' that is to give the instruction")
        return texts


def instruction_rule(spec: object, problems: list[str]) -> InstructionRule | None:
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


def refuse_unknown(options: Mapping[str, object], known: tuple[str, ...], what: str) -> list[str]:
    """Return a problem for each option that is not known, with the nearest one that is."""
    listed = f" (known: {', '.join(known)})"
    return [
        f"unknown option '{key}' for {what}{did_you_mean(str(key), list(known)) or listed}"
        for key in options
        if key not in known
    ]


def shift_of(options: Mapping[str, object], when_true: int, problems: list[str]) -> int:
    """Return the option `shift_action`: k gives step t the action of step t + k, held at the ends."""
    value = options.get("shift_action", 0)
    if isinstance(value, bool):
        return when_true if value else 0
    if not isinstance(value, int) or abs(value) > 100:
        problems.append(f"'shift_action' is {value!r}; write true, false or a number of steps")
        return 0
    return value


def drop_last_of(options: Mapping[str, object], problems: list[str]) -> bool:
    """Return the option `drop_last_observation`: cut the one that recorders take after the last action."""
    value = options.get("drop_last_observation", False)
    if not isinstance(value, bool):
        problems.append(f"'drop_last_observation' is {value!r}; write true or false")
    return value is True


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


_CHOICES: dict[str, tuple[object, ...]] = {
    "layout": ("HWC", "CHW"),
    "encoding": ("raw", "jpeg"),
    "range": ("uint8", "float01"),
    "rotate": (0, 90, 180, 270),
    "swap_rb": (False, True),
}


@dataclass(frozen=True, kw_only=True)
class CameraRule:
    """One camera of a mapping; None means: as the dataset's shape and type suggest."""

    path: str
    layout: Any = None
    encoding: Any = None
    range: Any = None
    rotate: Any = 0
    swap_rb: bool = False

    def format_of(self, dataset: h5py.Dataset) -> FrameFormat:
        """Return how the frames of `dataset` are stored."""
        shape: tuple[int, ...] = dataset.shape or ()
        first = len(shape) == 4 and shape[1] in (1, 3, 4) and shape[3] not in (1, 3, 4)
        floats = dataset.dtype.kind == "f"
        return FrameFormat(
            encoding=self.encoding or detect_encoding(dataset),
            layout=self.layout or ("CHW" if first else "HWC"),
            range=self.range or ("float01" if floats else "uint8"),
            rotate=self.rotate,
            swap_rb=self.swap_rb,
        )


def camera_rules(value: object, problems: list[str]) -> dict[str, CameraRule]:
    """Parse `cameras`: our name to a path, or to a path with how its frames are stored; by our name, in order."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not value:
        problems.append(f"'cameras' is {value!r}; write {{name: {{path: ...}}}}")
        return {}
    rules: dict[str, CameraRule] = {}
    for name, entry in value.items():
        place = f"cameras.{name}"
        fields = {"path": entry} if isinstance(entry, str) else entry
        if not isinstance(fields, Mapping):
            problems.append(f"'{place}' is {entry!r}; write {{path: ...}}")
            continue
        known = ["path", *_CHOICES]
        count = len(problems)
        for key, choice in fields.items():
            if key not in known:
                hint = did_you_mean(str(key), known) or f" (known: {', '.join(known)})"
                problems.append(f"unknown key '{place}.{key}'{hint}")
            elif key != "path" and not any(choice == c and type(choice) is type(c) for c in _CHOICES[key]):
                listed = ", ".join(str(c).lower() if isinstance(c, bool) else str(c) for c in _CHOICES[key])
                problems.append(f"'{place}.{key}' is {choice!r}; it is one of {listed}")
        path = fields.get("path")
        if not isinstance(path, str) or not path.strip("/"):
            problems.append(f"'{place}.path' is missing: the dataset that holds its frames")
        elif any(rule.path == path.strip("/") for rule in rules.values()):
            problems.append(f"'{place}.path' names '{path}', which another camera has already")
        elif len(problems) == count:
            rules[str(name)] = CameraRule(**{**fields, "path": path.strip("/")})
    return rules
