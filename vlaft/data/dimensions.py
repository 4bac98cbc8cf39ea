"""Standardizing steps on the dimensions of the action: choose, scale, replace, append, make relative."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from vlaft.data.episode import Episode
from vlaft.data.layout import read_reference
from vlaft.errors import ConfigError, DataError, did_you_mean


def require_action(episode: Episode) -> NDArray[np.float32]:
    """Return the episode's action `[T, A]`.

    Raises:
        DataError: no layout was applied yet.
    """
    if episode.action is None:
        raise DataError(f"episode '{episode.name}' has no action yet; a layout has to name it")
    return episode.action


def require_state(episode: Episode) -> NDArray[np.float32]:
    """Return the episode's state `[T, S]`.

    Raises:
        DataError: the layout named no state.
    """
    if episode.state is None:
        raise DataError(f"episode '{episode.name}' has no state; name one in the layout's `state`")
    return episode.state


def resolve_dims(dims: Sequence[int | str], size: int, names: Sequence[str] = ()) -> list[int]:
    """Return `dims` (indices, negative ones from the end, or names) as indices from 0.

    Raises:
        DataError: an index beyond `size`, an unknown name, or the same dimension twice.
    """
    columns = []
    for dim in dims:
        if isinstance(dim, str):
            if dim not in names:
                hint = did_you_mean(dim, list(names))
                raise DataError(f"no dimension is called '{dim}'{hint} (known: {', '.join(names) or 'no names'})")
            columns.append(list(names).index(dim))
        elif -size <= dim < size:
            columns.append(dim % size)
        else:
            raise DataError(f"there is no dimension {dim}: there are {size}")
    if len(set(columns)) != len(columns):
        raise DataError(f"a dimension is named twice in {list(dims)}")
    return columns


def relabel_from_state(episode: Episode, *, dims: int = 6) -> Episode:
    """Replace the first `dims` action dimensions by `state[t + 1] - state[t]` and drop the last step.

    Units are the state's, per control step; the difference is plain subtraction (angles do not wrap), as
    OpenVLA's `relabel_bridge_actions` for BridgeData V2, whose recorded actions lag behind the motion.
    """
    action, state = require_action(episode), require_state(episode)
    if not 0 < dims <= min(action.shape[1], state.shape[1]):
        raise DataError(
            f"{dims} dimensions cannot be relabelled: {action.shape[1]} in action, {state.shape[1]} in state"
        )
    shorter = episode.select(np.arange(max(episode.length - 1, 0)))
    changed = require_action(shorter).copy()
    changed[:, :dims] = state[1:, :dims] - state[:-1, :dims]
    return replace(shorter, action=changed)


def select_action(episode: Episode, *, dims: list[int | str]) -> Episode:
    """Keep only the action dimensions `dims`, in this order; indices (negative from the end) or names."""
    action = require_action(episode)
    columns = resolve_dims(dims, action.shape[1], episode.action_names)
    if not columns:
        raise ConfigError("an action needs at least one dimension; list those to keep in `dims`")
    names = tuple(episode.action_names[column] for column in columns) if episode.action_names else ()
    return replace(episode, action=action[:, columns], action_names=names)


def scale_action(episode: Episode, *, factors: list[float]) -> Episode:
    """Multiply each action dimension by its factor, for unit conversion (0.001 from mm to m; 1 leaves it alone)."""
    action = require_action(episode)
    if len(factors) != action.shape[1]:
        raise DataError(f"{len(factors)} factors are given for {action.shape[1]} action dimensions; give one for each")
    if not np.isfinite(factors).all():
        raise ConfigError(f"the factors {factors} are not all finite")
    return replace(episode, action=(action * np.asarray(factors)).astype(np.float32))


def append_constant(
    episode: Episode,
    *,
    value: float = 0.0,
    count: int = 1,
    at: int | None = None,
    names: list[str] | None = None,
) -> Episode:
    """Insert `count` dimensions of a constant `value` before dimension `at`, or at the end.

    OpenVLA fills up actions of robots with fewer axes in this way (jaco_play's rotation, language_table).
    `names` are theirs; without, known names of the others are continued as `constant_3` and so on.
    """
    action = require_action(episode)
    size = action.shape[1]
    position = size if at is None else at
    if not 0 <= position <= size or not 1 <= count <= 1000:
        raise DataError(f"{count} dimensions cannot be inserted at {position} of an action of {size} dimensions")
    if names is not None and len(names) != count:
        raise ConfigError(f"{len(names)} names are given for {count} appended dimensions")
    constant = np.full((len(action), count), value, dtype=np.float32)
    all_names: tuple[str, ...] = ()
    if episode.action_names:
        new = names or [f"constant_{position + offset}" for offset in range(count)]
        all_names = (*episode.action_names[:position], *new, *episode.action_names[position:])
    joined = np.concatenate([action[:, :position], constant, action[:, position:]], axis=1)
    return replace(episode, action=joined, action_names=all_names)


def take_from(episode: Episode, *, dims: list[int | str], source: str) -> Episode:
    """Replace the action dimensions `dims` by the array that `source` names, at the same step.

    For datasets that record no gripper command, say, and where the gripper's state stands in.
    """
    action = require_action(episode).copy()
    columns = resolve_dims(dims, action.shape[1], episode.action_names)
    values = read_reference(episode, source)
    if values.shape[1] != len(columns):
        raise DataError(f"'{source}' has {values.shape[1]} columns for {len(columns)} action dimensions")
    if not np.isfinite(values).all():
        raise DataError(f"'{source}' holds values that are not finite in episode '{episode.name}'")
    action[:, columns] = values
    return replace(episode, action=action)
