"""Which arrays of a source are the action, the state, the cameras and the instruction.

A reader brings a default layout; a preset (`recipes/datasets/*.yaml`) and the words on the command line
replace single fields of it. An array is named by its path in the source, with an optional slice of its columns:
`action`, `observation/state[0:6]`, `action/world_vector`, `state[-2:]`, `gripper[0]`. An array of more than two
dimensions counts its columns in row-major order: of `[T, 10, 3]`, `[0:3]` is the first row of three.

Where nobody says which arrays are the action, their names may: `likely_action` proposes, and nothing is read by it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlaft.data.episode import Episode
from vlaft.errors import DataError, did_you_mean

StepSpec = str | Mapping[str, object]  # "drop_first", or {"resample": {"fps": 5}}

_REFERENCE = re.compile(
    r"(?P<path>[^\[\]]+)(?:\[(?:(?P<column>-?\d{1,9})|(?P<start>-?\d{1,9})?(?P<colon>:)(?P<stop>-?\d{1,9})?)\])?"
)
ADDED_STEPS = "steps+"  # the key that adds standardizing steps instead of replacing them
_MAPPED = ("action", "state", "cameras", "instruction", "fps")  # what an HDF5 mapping says beside `episodes`
# names that tell of an action, and those beside them
_SAYING = {"act", "action", "cmd", "command", "control", "ctrl", "delta", "target"}
_BESIDE = re.compile(
    r"time|stamp|index|done|terminat|truncat|reward|discount|valid|mask|_id$|(^|[/._])(is|next|obs)", re.I
)
_ALONE = re.compile(r"(?:.*[/.])?actions?([/_]?\{i\})?", re.I)
_TRIPLE = (  # OpenVLA's order, the most telling names first
    (r"action.*(world_vector|delta_(eef|ee|tcp)_pos)", r"action.*(pos|xyz|translation)"),
    (r"action.*(rotation_delta|delta_(eef|ee|tcp)_rot)", r"action.*(rot|euler|axis_angle)"),
    (r"action.*grip.*(clos|open)", r"action.*grip"),
)
_HAND = re.compile(r"grip|hand", re.I)
_ROTATION = re.compile(r"rot|euler|quat|axis|orient|rpy", re.I)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the arrays of a source become an action, a state and cameras.

    Attributes:
        action: array references, joined along the last axis in this order: `[T, A]`.
        state: likewise for the proprioceptive state; empty when there is none.
        cameras: our camera name to the source's camera name; the first is the main camera.
        instruction: a constant instruction for every episode, or None to take the source's.
        fps: control rate in Hz, or None to take the source's.
        steps: standardizing steps by name, with their arguments, in order.
        action_names: one name per dimension of the joined `action`, or empty. Steps that add, drop or turn
            dimensions change the names with them: the final ones are `Episode.action_names`.
        state_names: one name per dimension of the joined `state`, or empty; `dataset.json` keeps them.
        action_mask: True where q01/q99 normalisation applies, one per dimension of the standardized action;
            empty means all.
        options: what only one reader understands (for example a generic HDF5 mapping).
    """

    action: tuple[str, ...] = ("action",)
    state: tuple[str, ...] = ()
    cameras: Mapping[str, str] = field(default_factory=dict)
    instruction: str | None = None
    fps: float | None = None
    steps: tuple[StepSpec, ...] = ()
    action_names: tuple[str, ...] = ()
    state_names: tuple[str, ...] = ()
    action_mask: tuple[bool, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)


def read_reference(episode: Episode, reference: str) -> NDArray[np.float32]:
    """Return the array that `reference` names, as float32 `[T, N]` (a scalar per step becomes N = 1).

    Raises:
        DataError: no such array, an empty slice, a wrong number of rows, or values that are not numbers.
    """
    with np.errstate(over="ignore"):  # too large for float32 becomes inf, which is then refused as not finite
        return read_columns(episode, reference).astype(np.float32)


def read_columns(episode: Episode, reference: str) -> NDArray[np.generic]:
    """Return the array that `reference` names, in the type in which it is stored, as `[T, N]`.

    Raises:
        DataError: as `read_reference`.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise DataError(f"'{reference}' is no array reference: write path, path[a:b] or path[i]")
    path = match["path"]
    if path not in episode.arrays:
        known = sorted(episode.arrays)
        raise DataError(
            f"episode '{episode.name}' has no array '{path}'{did_you_mean(path, known)}"
            f" (it has: {', '.join(known) or 'none'})"
        )
    values = np.atleast_1d(np.asarray(episode.arrays[path]))
    if values.dtype.kind not in "biuf":
        raise DataError(f"episode '{episode.name}': array '{path}' holds {values.dtype}, not numbers")
    if len(values) != episode.length:
        raise DataError(
            f"episode '{episode.name}': array '{path}' has {len(values)} rows where {episode.length} steps are expected"
        )
    values = values.reshape(len(values), math.prod(values.shape[1:]))
    if match["colon"]:
        start, stop = (None if match[name] is None else int(match[name]) for name in ("start", "stop"))
        values = values[:, start:stop]
    elif match["column"] is not None:
        column = int(match["column"])
        if not -values.shape[1] <= column < values.shape[1]:
            raise DataError(
                f"episode '{episode.name}': '{reference}' asks for a column where there are only {values.shape[1]}"
            )
        values = values[:, [column]]
    if values.shape[1] == 0:
        raise DataError(f"episode '{episode.name}': '{reference}' selects nothing of the array's columns")
    return values


def apply_layout(episode: Episode, layout: Layout) -> Episode:
    """Return the episode with `action`, `state`, cameras, instruction and rate as `layout` says.

    Raises:
        DataError: an array or camera is missing (the sentence lists what there is), or a value is not finite.
    """
    if not layout.action:
        there_are = ", ".join(sorted(episode.arrays)) or "none"
        raise DataError(f"which arrays are the action is not known; name them in `action` (there are: {there_are})")
    action = np.concatenate([read_reference(episode, reference) for reference in layout.action], axis=1)
    state = None
    if layout.state:
        state = np.concatenate([read_reference(episode, reference) for reference in layout.state], axis=1)
    width = 0 if state is None else state.shape[1]
    if layout.state_names and len(layout.state_names) != width:
        raise DataError(
            f"episode '{episode.name}': {len(layout.state_names)} state_names are given for the {width} dimensions of"
            " its state"
        )
    if layout.action_names and len(layout.action_names) != action.shape[1]:
        raise DataError(
            f"episode '{episode.name}': {len(layout.action_names)} action_names are given for the {action.shape[1]}"
            f" dimensions of {' + '.join(layout.action)}; give one for each, or none"
        )
    bad = np.flatnonzero(~np.isfinite(action).all(axis=1))
    if len(bad):
        raise DataError(
            f"episode '{episode.name}', step {bad[0]}: the action is not finite ({len(bad)} such steps);"
            " repair or drop the episode"
        )
    cameras = {}
    for name, source in (layout.cameras or {name: name for name in episode.cameras}).items():
        if source not in episode.cameras:
            known = sorted(episode.cameras)
            raise DataError(
                f"episode '{episode.name}' has no camera '{source}'{did_you_mean(source, known)}"
                f" (it has: {', '.join(known) or 'none'})"
            )
        frames = episode.cameras[source]
        if len(frames) != episode.length:
            raise DataError(
                f"episode '{episode.name}': camera '{source}' has {len(frames)} frames for {episode.length} steps"
            )
        cameras[name] = frames
    return replace(
        episode,
        action=action,
        action_names=tuple(layout.action_names),
        state=state,
        cameras=cameras,
        instruction=episode.instruction if layout.instruction is None else layout.instruction,
        instructions=episode.instructions if layout.instruction is None else (),
        fps=episode.fps if layout.fps is None else layout.fps,
    )


_KNOWN = [*(field.name for field in fields(Layout)), ADDED_STEPS, "datasets"]


def separate_options(settings: Mapping[str, Any], mapped: bool = False) -> dict[str, Any]:
    """Return the settings with what only a reader understands under `options`; the reader refuses what it does not.

    Those are keys that no layout has (but not a layout's key mistyped), rules instead of texts, and the whole mapping
    of an HDF5 file of unknown layout, which is told by its key `episodes`.

    Args:
        settings: keys of a layout and of a reader, side by side, as a preset's YAML or words give them.
        mapped: whether a mapping is there already, to which these settings are added.

    >>> separate_options({"fps": 5, "shift_action": 1})
    {'fps': 5, 'options': {'shift_action': 1}}
    >>> separate_options({"fps": {"attribute": "hz"}})
    {'options': {'fps': {'attribute': 'hz'}}}
    """
    maps_episodes = "episodes" in settings
    options: dict[str, Any] = {}
    for key, value in settings.items():
        nested = value.values() if key == "cameras" and isinstance(value, dict) else [value]
        rule = key in ("cameras", "instruction", "fps") and any(isinstance(inner, dict) for inner in nested)
        foreign = key not in _KNOWN and not get_close_matches(str(key), _KNOWN, n=1, cutoff=0.8)
        if foreign or rule or (maps_episodes and key in _MAPPED) or (mapped and key == "cameras"):
            options[key] = value
    rest = {key: value for key, value in settings.items() if key not in options}
    given = rest.get("options", {})
    if options and isinstance(given, dict):
        rest["options"] = {**options, **given}
    return rest


def merge_options(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Lay options over others, mappings key by key.

    A camera that is only a path takes further keys: `{"front": "a"}` and `{"front": {"rotate": 90}}` give both.

    >>> merge_options({"cameras": {"front": "a"}}, {"cameras": {"front": {"rotate": 90}}, "fps": 5})
    {'cameras': {'front': {'path': 'a', 'rotate': 90}}, 'fps': 5}
    """
    merged = dict(first)
    for key, value in second.items():
        old = merged.get(key)
        if key == "cameras" and isinstance(old, Mapping) and isinstance(value, Mapping):
            cameras = dict(old)
            for name, camera in value.items():
                fields_before, fields_after = _as_fields(cameras.get(name)), _as_fields(camera)
                both = fields_before is not None and fields_after is not None
                cameras[name] = {**fields_before, **fields_after} if both else camera  # type: ignore[dict-item]
            value = cameras
        merged[key] = value
    return merged


def _as_fields(camera: object) -> dict[str, Any] | None:
    if isinstance(camera, str):
        return {"path": camera}
    return dict(camera) if isinstance(camera, Mapping) else None


def likely_action(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return the arrays that together look like the action, or nothing where no name says so.

    Args:
        shapes: shape `[T, ...]` of every array of numbers of one episode, by its name.

    >>> likely_action({"cmd/ee_delta": (26, 6), "cmd/gripper": (26,), "proprio": (26, 7), "cmd/time": (26,)})
    ['cmd/ee_delta', 'cmd/gripper']
    >>> likely_action({"action": (26, 7), "action_raw": (26, 7)})
    ['action']
    """
    usable = {name: shape for name, shape in shapes.items() if 1 <= len(shape) <= 2 and not _BESIDE.search(name)}
    alone = sorted((name for name in usable if _ALONE.fullmatch(name)), key=_depth)
    if alone:  # `arm/action` beside `hand/action` are two parts of one
        return [name for name in alone if _depth(name) == _depth(alone[0])]
    triple = [next((n for pattern in patterns for n in usable if re.search(pattern, n)), None) for patterns in _TRIPLE]
    if None not in triple:
        return [name for name in triple if name is not None]
    named = [
        name for name in usable if _SAYING & {part.removesuffix("s") for part in re.split(r"[/._\d]", name.lower())}
    ]
    if not named:
        return []
    [(rows, _)] = Counter(usable[name][0] for name in named).most_common(1)
    arm = [name for name in named if usable[name][0] == rows and not _HAND.search(name)]
    hand = [name for name in named if usable[name][0] == rows and _HAND.search(name)]
    # of several ways to say one motion, those that OpenVLA takes: changes, of the hand's pose rather than of joints
    arm = [name for name in arm if re.search(r"delta|rel(?![a-z])|vel", name, re.I)] or arm
    arm = [name for name in arm if not re.search(r"joint|qpos|qvel", name, re.I)] or arm
    hand = [name for name in hand if re.search(r"clos|open", name, re.I)] or hand
    hand = [name for name in hand if not re.search(r"vel", name, re.I)] or hand
    if not hand and sum(math.prod(usable[name][1:]) for name in arm) == 6:  # an arm's pose alone: its gripper is near
        near = [name for name in usable if _HAND.search(name) and usable[name][0] == rows]
        hand = [name for name in near if _depth(name) == _depth(arm[0])][:1]
    return [*sorted(arm, key=lambda name: bool(_ROTATION.search(name))), *hand]


def _depth(name: str) -> int:
    return len(re.split(r"[/.]", name))
