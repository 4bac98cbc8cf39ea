"""Which arrays of a source look like the action, by their names: for proposals only, nothing is read by it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping

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
