"""The `cameras` option of an HDF5 mapping: how the frames of each camera are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import h5py

from vlaft.data.readers.hdf5_episode import FrameFormat, detect_encoding
from vlaft.errors import did_you_mean

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
