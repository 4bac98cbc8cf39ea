"""Standardizing steps on rotations, and absolute poses into deltas.

Conventions, all in radians: Euler angles are roll, pitch, yaw about the fixed axes x, y, z in this order ('xyz'
extrinsic in scipy's words, R = Rz Ry Rx); an axis-angle is the unit axis times the angle; a quaternion is x, y, z, w
(`order: wxyz` for sources that put w first), of any length but zero.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vlaft.data.episode import Episode
from vlaft.data.standardize.actions import require_action, require_state, resolve_dims
from vlaft.errors import ConfigError, DataError

if TYPE_CHECKING:
    from scipy.spatial.transform import Rotation

Values = NDArray[np.float64]  # [T, 3] or [T, 4]
_MOST_RADIANS = 4 * np.pi  # unwrapped angles pass one turn; degrees soon pass two
NAMES = {"euler": ("roll", "pitch", "yaw"), "axis_angle": ("axis_x", "axis_y", "axis_z")}


def to_rotation(values: Values, representation: str) -> Rotation:
    """Return `[T, 3]` Euler angles or axis-angles, or `[T, 4]` quaternions (xyzw or wxyz), as T rotations.

    Raises:
        ConfigError: an unknown representation.
        DataError: a quaternion of zeros, or angles that are far too large for radians.
    """
    if representation in NAMES and len(values):
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
    return _convert(episode, dims or [3, 4, 5], 3, "axis_angle", "euler")


def euler_to_axis_angle(episode: Episode, *, dims: list[int | str] | None = None) -> Episode:
    """Turn three action dimensions (default 3, 4, 5) from roll, pitch, yaw into axis-angle."""
    return _convert(episode, dims or [3, 4, 5], 3, "euler", "axis_angle")


def quaternion_to_euler(episode: Episode, *, dims: list[int | str] | None = None, order: str = "xyzw") -> Episode:
    """Turn four action dimensions (default 3, 4, 5, 6) from a quaternion into roll, pitch, yaw; the fourth goes."""
    return _convert(episode, dims or [3, 4, 5, 6], 4, order, "euler")


def quaternion_to_axis_angle(episode: Episode, *, dims: list[int | str] | None = None, order: str = "xyzw") -> Episode:
    """Turn four action dimensions (default 3, 4, 5, 6) from a quaternion into axis-angle; the fourth goes."""
    return _convert(episode, dims or [3, 4, 5, 6], 4, order, "axis_angle")


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
    if rotation not in NAMES:
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


def _convert(episode: Episode, dims: list[int | str], size: int, old: str, new: str) -> Episode:
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
        for column, name in zip(columns, NAMES[new], strict=False):
            names[column] = name
    if size == 4:
        changed = np.delete(changed, columns[3], axis=1)
        if names:
            del names[columns[3]]
    return replace(episode, action=changed, action_names=tuple(names))
