"""Standardizing steps on the action: choose, scale, append dimensions, grippers, rotations, absolute poses to deltas.

Conventions of rotations, all in radians: Euler angles are roll, pitch, yaw about the fixed axes x, y, z in this order
('xyz' extrinsic in scipy's words, R = Rz Ry Rx); an axis-angle is the unit axis times the angle; a quaternion is x, y,
z, w (`order: wxyz` for sources that put w first), of any length but zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vlaft.data.episode import Episode
from vlaft.data.layout import read_reference
from vlaft.errors import ConfigError, DataError, did_you_mean

if TYPE_CHECKING:
    from scipy.spatial.transform import Rotation

Commands = NDArray[np.float32]  # [T]
Values = NDArray[np.float64]  # [T, 3] or [T, 4]
_MOST_RADIANS = 4 * np.pi  # unwrapped angles pass one turn; degrees soon pass two
ROTATION_NAMES = {"euler": ("roll", "pitch", "yaw"), "axis_angle": ("axis_x", "axis_y", "axis_z")}


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


def binarize(commands: Commands, open_above: float = 0.95, closed_below: float = 0.05) -> Commands:
    """Turn continuous opening (1 = open) into 0 or 1: a value in between takes the one that is reached *next*.

    A trailing run of values in between reaches none of them: it keeps the raw last value, as OpenVLA's
    `binarize_gripper_actions` does.

    Args:
        commands: `[T]`, 0 (closed) to 1 (open).
        open_above: values above are open.
        closed_below: values below are closed.
    """
    result = np.empty_like(commands)
    reached = commands[-1] if len(commands) else np.float32(0)
    for step in range(len(commands) - 1, -1, -1):
        if commands[step] > open_above:
            reached = np.float32(1)
        elif commands[step] < closed_below:
            reached = np.float32(0)
        result[step] = reached
    return result


def relative_to_absolute(commands: Commands, threshold: float = 0.1) -> Commands:
    """Turn relative commands (positive closes, negative opens) into the state they lead to: 1 open, 0 closed.

    Before the first command the gripper is taken to be in the opposite state (a gripper that is told to close
    was open); without any command it is open. As OpenVLA's `rel2abs_gripper_actions`.

    Args:
        commands: `[T]`, any unit.
        threshold: commands of at most this size are no command.
    """
    given = np.where(commands < -threshold, 1, np.where(commands > threshold, 0, -1))
    steps = np.flatnonzero(given >= 0)
    if len(steps) == 0:
        return np.ones_like(commands)
    last = np.searchsorted(steps, np.arange(len(commands)), side="right") - 1
    return np.where(last >= 0, given[steps[last]], 1 - given[steps[0]]).astype(np.float32)


def rescale(commands: Commands, from_range: tuple[float, float], to_range: tuple[float, float]) -> Commands:
    """Map the ends of `from_range` linearly to the ends of `to_range`; values outside stay outside.

    Raises:
        ConfigError: `from_range` has no width.
    """
    (low, high), (new_low, new_high) = from_range, to_range
    if low == high:
        raise ConfigError(f"a gripper range from {low} to {high} has no width; give its two different ends")
    scaled = (commands.astype(np.float64) - low) / (high - low) * (new_high - new_low) + new_low
    return scaled.astype(np.float32)


def clip_gripper(episode: Episode, *, low: float = 0.0, high: float = 1.0, dim: int = -1) -> Episode:
    """Clip the gripper to `[low, high]`.

    Where a source says -1 = open, +1 = closed (robosuite, LIBERO), this and `invert_gripper` give 1 = open.
    """
    if low > high:
        raise ConfigError(f"the lower bound {low} is above the upper bound {high}")
    return _change_gripper(episode, dim, lambda commands: np.clip(commands, np.float32(low), np.float32(high)))


def invert_gripper(episode: Episode, *, dim: int = -1) -> Episode:
    """Replace the gripper g by 1 - g: from 1 = closed to 1 = open, or back."""
    return _change_gripper(episode, dim, lambda commands: np.float32(1) - commands)


def scale_gripper(
    episode: Episode, *, from_range: list[float] | None = None, to_range: list[float] | None = None, dim: int = -1
) -> Episode:
    """Map the gripper linearly from `from_range` (default [-1, 1]) to `to_range` (default [0, 1]).

    A range may run downwards: from [1, -1] to [0, 1] turns -1 = open, +1 = closed into 1 = open, 0 = closed.
    For an opening in metres give its two ends: from [0, 0.08].
    """
    old, new = _two_ends(from_range or [-1.0, 1.0]), _two_ends(to_range or [0.0, 1.0])
    return _change_gripper(episode, dim, lambda commands: rescale(commands, old, new))


def binarize_gripper(
    episode: Episode, *, open_above: float = 0.95, closed_below: float = 0.05, dim: int = -1
) -> Episode:
    """Make the gripper (0 closed to 1 open) binary by looking ahead; see `binarize`."""
    return _change_gripper(episode, dim, lambda commands: binarize(commands, open_above, closed_below))


def relative_gripper_to_absolute(episode: Episode, *, threshold: float = 0.1, dim: int = -1) -> Episode:
    """Turn relative gripper commands (+ closes, - opens) into 1 = open, 0 = closed; see `relative_to_absolute`."""
    return _change_gripper(episode, dim, lambda commands: relative_to_absolute(commands, threshold))


def _two_ends(ends: list[float]) -> tuple[float, float]:
    if len(ends) != 2:
        raise ConfigError(f"a gripper range has two ends, not {len(ends)}")
    return float(ends[0]), float(ends[1])


def _change_gripper(episode: Episode, dim: int, function: Callable[[Commands], Commands]) -> Episode:
    action = require_action(episode).copy()
    (column,) = resolve_dims([dim], action.shape[1])
    action[:, column] = function(action[:, column].copy())
    return replace(episode, action=action)


def to_rotation(values: Values, representation: str) -> Rotation:
    """Return `[T, 3]` Euler angles or axis-angles, or `[T, 4]` quaternions (xyzw or wxyz), as T rotations.

    Raises:
        ConfigError: an unknown representation.
        DataError: a quaternion of zeros, or angles that are far too large for radians.
    """
    if representation in ROTATION_NAMES and len(values):
        largest = np.unravel_index(np.abs(values).argmax(), values.shape)
        if abs(values[largest]) > _MOST_RADIANS:
            raise DataError(
                f"step {largest[0]}: an angle of {values[largest]:.4g} radians is more than two turns, so these are"
                " probably degrees: put scale_action in front, with 0.0174533 for these dimensions"
            )
    from scipy.spatial.transform import Rotation  # loaded late: it takes longer than all else that vlaft.data imports

    if representation == "euler":
        return Rotation.from_euler("xyz", values)
    if representation == "axis_angle":
        return Rotation.from_rotvec(values)
    if representation in ("xyzw", "wxyz"):
        zero = np.flatnonzero(~np.any(values, axis=1))
        if len(zero):
            raise DataError(f"step {zero[0]}: a quaternion of zeros is no rotation")
        return Rotation.from_quat(values, scalar_first=representation == "wxyz")
    raise ConfigError(f"unknown rotation '{representation}'; write euler, axis_angle, xyzw or wxyz")


def from_rotation(rotation: Rotation, representation: str) -> Values:
    """Return T rotations as `[T, 3]` Euler angles or axis-angles.

    Raises:
        ConfigError: an unknown representation.
    """
    if representation == "axis_angle":
        return rotation.as_rotvec()
    if representation == "euler":
        import warnings

        with warnings.catch_warnings():  # at a pitch of 90 degrees roll and yaw turn alike: scipy sets yaw to 0
            warnings.simplefilter("ignore", UserWarning)
            return rotation.as_euler("xyz")
    raise ConfigError(f"unknown rotation '{representation}'; write euler or axis_angle")


def axis_angle_to_euler(episode: Episode, *, dims: list[int | str] | None = None) -> Episode:
    """Turn three action dimensions (default 3, 4, 5) from axis-angle into roll, pitch, yaw."""
    return _convert_rotation(episode, dims or [3, 4, 5], 3, "axis_angle", "euler")


def euler_to_axis_angle(episode: Episode, *, dims: list[int | str] | None = None) -> Episode:
    """Turn three action dimensions (default 3, 4, 5) from roll, pitch, yaw into axis-angle."""
    return _convert_rotation(episode, dims or [3, 4, 5], 3, "euler", "axis_angle")


def quaternion_to_euler(episode: Episode, *, dims: list[int | str] | None = None, order: str = "xyzw") -> Episode:
    """Turn four action dimensions (default 3, 4, 5, 6) from a quaternion into roll, pitch, yaw; the fourth goes."""
    return _convert_rotation(episode, dims or [3, 4, 5, 6], 4, order, "euler")


def quaternion_to_axis_angle(episode: Episode, *, dims: list[int | str] | None = None, order: str = "xyzw") -> Episode:
    """Turn four action dimensions (default 3, 4, 5, 6) from a quaternion into axis-angle; the fourth goes."""
    return _convert_rotation(episode, dims or [3, 4, 5, 6], 4, order, "axis_angle")


def delta_from_absolute(
    episode: Episode,
    *,
    against: str,
    dims: list[int | str] | None = None,
    rotation_dims: list[int | str] | None = None,
    rotation: str = "euler",
) -> Episode:
    """Turn absolute poses in the action into deltas per control step, in the fixed frame.

    `dims` are subtracted; `rotation_dims` become the rotation that leads from the earlier to the later one
    (R_later R_earlier^-1), so that angles neither wrap nor mix. All other dimensions stay.

    Args:
        episode: the episode.
        against: what the delta is taken against: `state` (action[t] - state[t], for commanded targets whose state
            has the same dimensions at the same places), `previous` (action[t] - action[t - 1], for commanded
            targets; the first step is dropped), or `next` (action[t + 1] - action[t], for recorded poses; the
            last step is dropped).
        dims: dimensions to subtract, default 0, 1, 2 (a position in metres).
        rotation_dims: three dimensions of one rotation, default 3, 4, 5; `[]` for none.
        rotation: `euler` or `axis_angle`; the delta has the same representation.
    """
    action = require_action(episode)
    size, names = action.shape[1], episode.action_names
    columns = resolve_dims([0, 1, 2] if dims is None else dims, size, names)
    turned = resolve_dims([3, 4, 5] if rotation_dims is None else rotation_dims, size, names)
    if len(turned) not in (0, 3) or set(turned) & set(columns):
        raise DataError("rotation_dims are the three dimensions of one rotation, none of them also in dims")
    if rotation not in ROTATION_NAMES:
        raise ConfigError(f"unknown rotation '{rotation}'; write euler or axis_angle")
    steps = np.arange(episode.length)
    if against == "state":
        earlier, later, kept = require_state(episode), action, steps
        if max(columns + turned, default=0) >= earlier.shape[1]:
            raise DataError(f"the state has only {earlier.shape[1]} dimensions to take the action's deltas against")
    elif against in ("previous", "next"):
        earlier, later = action[:-1], action[1:]
        kept = steps[1:] if against == "previous" else steps[:-1]
    else:
        raise ConfigError(f"unknown reference '{against}' for deltas; write state, previous or next")
    result = episode.select(kept)
    changed = require_action(result).copy()
    changed[:, columns] = later[:, columns] - earlier[:, columns]
    if turned and len(changed):
        before = to_rotation(earlier[:, turned].astype(np.float64), rotation)
        after = to_rotation(later[:, turned].astype(np.float64), rotation)
        changed[:, turned] = from_rotation(after * before.inv(), rotation)
    return replace(result, action=changed)


def _convert_rotation(episode: Episode, dims: list[int | str], size: int, old: str, new: str) -> Episode:
    action = require_action(episode)
    columns = resolve_dims(dims, action.shape[1], episode.action_names)
    if len(columns) != size:
        raise ConfigError(f"this rotation has {size} dimensions, not {len(columns)}")
    if size == 4 and old not in ("xyzw", "wxyz"):
        raise ConfigError(f"unknown order '{old}' of a quaternion; write xyzw or wxyz")
    changed = action.copy()
    if len(action):
        values = action[:, columns].astype(np.float64)
        changed[:, columns[:3]] = from_rotation(to_rotation(values, old), new)
    names = list(episode.action_names)
    if names:
        for column, name in zip(columns, ROTATION_NAMES[new], strict=False):
            names[column] = name
    if size == 4:
        changed = np.delete(changed, columns[3], axis=1)
        if names:
            del names[columns[3]]
    return replace(episode, action=changed, action_names=tuple(names))
