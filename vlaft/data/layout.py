"""Which arrays of a source are the action, the state, the cameras and the instruction.

A reader brings a default layout; a preset (`recipes/datasets/*.yaml`) and the words on the command line
replace single fields of it. An array is named by its path in the source, with an optional slice of its last
axis: `action`, `observation/state[0:6]`, `action/world_vector`, `state[-2:]`, `gripper[0]`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from vlaft.data.episode import Episode
from vlaft.errors import DataError, did_you_mean

StepSpec = str | Mapping[str, object]  # "drop_first", or {"resample": {"fps": 5}}


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
        action_names: one name per action dimension, or empty.
        action_mask: True where q01/q99 normalisation applies, one per dimension; empty means all.
        options: what only one reader understands (for example a generic HDF5 mapping).
    """

    action: tuple[str, ...] = ("action",)
    state: tuple[str, ...] = ()
    cameras: Mapping[str, str] = field(default_factory=dict)
    instruction: str | None = None
    fps: float | None = None
    steps: tuple[StepSpec, ...] = ()
    action_names: tuple[str, ...] = ()
    action_mask: tuple[bool, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)


_REFERENCE = re.compile(r"^(?P<path>[^\[\]]+?)(?:\[(?P<slice>-?\d*(?::-?\d*)?)\])?$")


def read_reference(episode: Episode, reference: str) -> NDArray[np.float32]:
    """Return the array that `reference` names, as float32 `[T, N]` (a scalar per step becomes N = 1).

    Raises:
        DataError: no such array, an empty slice, a wrong number of rows, or values that are not numbers.
    """
    match = _REFERENCE.match(reference)
    if match is None:
        raise DataError(f"'{reference}' is no array reference: write path, path[a:b] or path[i]")
    path, part = match["path"], match["slice"]
    if path not in episode.arrays:
        known = sorted(episode.arrays)
        raise DataError(
            f"episode '{episode.name}' has no array '{path}'{did_you_mean(path, known)}"
            f" (it has: {', '.join(known) or 'none'})"
        )
    values = np.asarray(episode.arrays[path])
    if values.dtype.kind not in "biuf":
        raise DataError(f"episode '{episode.name}': array '{path}' holds {values.dtype}, not numbers")
    if len(values) != episode.length:
        raise DataError(
            f"episode '{episode.name}': array '{path}' has {len(values)} rows where {episode.length} steps are expected"
        )
    values = values.reshape(len(values), -1).astype(np.float32)
    if part:
        if ":" in part:
            start, stop = (int(bound) if bound else None for bound in part.split(":"))
            values = values[:, start:stop]
        else:
            column = int(part)
            if not -values.shape[1] <= column < values.shape[1]:
                raise DataError(f"'{reference}': the array has only {values.shape[1]} columns")
            values = values[:, [column]]
        if values.shape[1] == 0:
            raise DataError(f"'{reference}' selects nothing of the array's columns")
    return values


def apply_layout(episode: Episode, layout: Layout) -> Episode:
    """Return the episode with `action`, `state`, cameras, instruction and rate as `layout` says.

    Raises:
        DataError: an array or camera is missing (the sentence lists what there is), or a value is not finite.
    """
    action = np.concatenate([read_reference(episode, reference) for reference in layout.action], axis=1)
    state = None
    if layout.state:
        state = np.concatenate([read_reference(episode, reference) for reference in layout.state], axis=1)
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
        state=state,
        cameras=cameras,
        instruction=episode.instruction if layout.instruction is None else layout.instruction,
        fps=episode.fps if layout.fps is None else layout.fps,
    )
