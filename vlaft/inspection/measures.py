"""Numbers about actions: statistics, histograms, clipping, idle steps, copies, odd lengths, absolute or delta."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vlaft.data.layout import StepSpec
from vlaft.data.standardize.actions import relative_to_absolute
from vlaft.data.standardize.evidence import FEWEST_EPISODES, MOST_EPISODES, Opening, gripper_step, opens_with_high

HISTOGRAM_BINS = 40
_ABSOLUTE = 0.9  # correlation of an action dimension with the state above which it repeats the state
# likewise with the state's change, for deltas; of the sample sets' end-effector deltas half or more of the dimensions
# reach 0.75 (rotations often don't: their state is no vector of angles), and of joint targets none more than 0.63
_DELTA = 0.7
_IDLE = 0.01  # share of a usual large motion (99 % quantile) below which a step does not move
_ZERO = 1e-5  # likewise, below which it is a zero with rounding errors: BridgeData has 5e-7 where 0 is meant

Actions = NDArray[np.floating]  # [T, A] or [N, A]
Kind = Literal["binary", "nearly binary", "continuous", "relative", "constant"]


def statistics(values: Actions) -> dict[str, list[float]]:
    """Return mean, std (ddof 0), min, max, q01 and q99 (linear interpolation) per column, in float64.

    Rows that are not finite are left out; without any row left every number is NaN.
    """
    rows = np.asarray(values, dtype=np.float64)
    rows = rows[np.isfinite(rows).all(axis=1)]
    if len(rows) == 0:
        return dict.fromkeys(("mean", "std", "min", "max", "q01", "q99"), [float("nan")] * values.shape[1])
    return {
        "mean": rows.mean(axis=0).tolist(),
        "std": rows.std(axis=0).tolist(),
        "min": rows.min(axis=0).tolist(),
        "max": rows.max(axis=0).tolist(),
        "q01": np.quantile(rows, 0.01, axis=0).tolist(),
        "q99": np.quantile(rows, 0.99, axis=0).tolist(),
    }


@dataclass(frozen=True)
class Histogram:
    """Counts `[HISTOGRAM_BINS]` between `edges` `[HISTOGRAM_BINS + 1]`."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


def histograms(values: Actions) -> list[Histogram]:
    """Return one histogram per column, from its least to its greatest finite value."""
    drawn = []
    for column in np.asarray(values, dtype=np.float64).T:
        finite = column[np.isfinite(column)]
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
        if high - low < 1e-12 * max(1.0, abs(high)):  # one value: give it a bin of its own
            low, high = low - 0.5, high + 0.5
        counts, edges = np.histogram(finite, bins=HISTOGRAM_BINS, range=(low, high))
        drawn.append(Histogram(tuple(edges.tolist()), tuple(counts.tolist())))
    return drawn


def clipped_shares(values: Actions, mask: Sequence[bool] = ()) -> list[float]:
    """Return per column the share of values outside of [q01, q99], which training clips; 0 where `mask` is False."""
    rows = np.asarray(values, dtype=np.float64)
    if len(rows) == 0:
        return [0.0] * values.shape[1]
    low, high = np.quantile(rows, [0.01, 0.99], axis=0)
    shares = ((rows < low) | (rows > high)).mean(axis=0)
    return [float(share) if not mask or mask[column] else 0.0 for column, share in enumerate(shares)]


@dataclass(frozen=True)
class Motion:
    """How much the arm moves in each step, per episode.

    Attributes:
        norms: per episode `[T]`: the Euclidean norm over all dimensions but the gripper's, in the action's own units;
            of the change since the step before where the action is absolute.
        idle_below: the norm below which a step counts as idle, to one digit.
        idle: per episode `[T]`: True where neither the arm moves nor the gripper's command changes.
        zero_below: the norm below which a motion is zero but for rounding.
    """

    norms: tuple[NDArray[np.float64], ...]
    idle_below: float
    idle: tuple[NDArray[np.bool_], ...]
    zero_below: float

    @property
    def idle_share(self) -> float:
        """Share of idle steps over all episodes."""
        total = sum(len(flags) for flags in self.idle)
        return float(sum(int(flags.sum()) for flags in self.idle)) / total if total else 0.0


def motion(actions: Sequence[Actions], grippers: Collection[int], absolute: bool) -> Motion:
    """Measure the motion of every step; `grippers` are the columns that do not count."""
    norms = []
    for action in actions:
        arm = np.delete(np.asarray(action, dtype=np.float64), sorted(grippers), axis=1)
        if absolute and len(arm):
            arm = np.diff(arm, axis=0, prepend=arm[:1])
        norms.append(np.linalg.norm(arm, axis=1))
    joined = np.concatenate(norms) if norms else np.zeros(0)
    large = float(np.quantile(joined, 0.99)) if len(joined) else 0.0
    below = float(f"{_IDLE * large:.0e}")
    idle = []
    for action, norm in zip(actions, norms, strict=True):
        held = np.asarray(action)[:, sorted(grippers)]
        changes = np.zeros(len(norm), dtype=bool)
        changes[1:] = (held[1:] != held[:-1]).any(axis=1)
        idle.append((norm < below) & ~changes)
    return Motion(tuple(norms), below, tuple(idle), _ZERO * large)


def duplicates(actions: Sequence[Actions]) -> list[list[int]]:
    """Return groups of episodes whose actions are the same to the last bit; numbers in increasing order."""
    groups: defaultdict[tuple[int, ...] | bytes, list[int]] = defaultdict(list)
    for number, action in enumerate(actions):
        content = np.ascontiguousarray(action)
        groups[hashlib.sha256(repr(content.shape).encode() + content.tobytes()).digest()].append(number)
    return [group for group in groups.values() if len(group) > 1]


def odd_lengths(lengths: Sequence[int]) -> list[int]:
    """Return the episodes that are much longer or shorter than the median (of five or more).

    Beyond six standard deviations, as estimated from the median absolute deviation, and by half again at least.
    """
    values = np.asarray(lengths, dtype=np.float64)
    if len(values) < 5:
        return []
    median = float(np.median(values))
    spread = 1.4826 * float(np.median(np.abs(values - median)))
    ratio = np.maximum(values, median) / np.maximum(np.minimum(values, median), 1.0)
    return [int(number) for number in np.flatnonzero((np.abs(values - median) > 6 * spread) & (ratio > 1.5))]


def looks_absolute(
    actions: Sequence[Actions], states: Sequence[NDArray[np.floating] | None], grippers: Collection[int]
) -> bool | None:
    """Tell whether the arm's actions are absolute targets (True) or deltas (False); None where the data leave it open.

    A target follows the state itself, the right way round (a controller that turns back what is turned goes against
    it), a delta the change of the state: at least half of the moving dimensions have to correlate with a column of the
    state by more than 0.9, and more than with the change of any; or with the change of one by more than 0.7, and more
    than with any column itself. Joint targets beside the pose of the end effector do neither, and neither do commands
    of which the state does not tell.
    """
    pairs = [
        (np.asarray(action, dtype=np.float64), np.asarray(state, dtype=np.float64))
        for action, state in zip(actions, states, strict=True)
        if state is not None and len(action) == len(state) and len(action) > 1
    ]
    if sum(len(action) for action, _ in pairs) < 20:
        return None
    action = np.concatenate([action[:-1] for action, _ in pairs])
    state = np.concatenate([state[:-1] for _, state in pairs])
    change = np.concatenate([np.diff(state, axis=0) for _, state in pairs])
    moving = [column for column in range(action.shape[1]) if column not in grippers and np.ptp(action[:, column]) > 0]
    if not moving or not np.isfinite(action).all() or not np.isfinite(state).all():
        return None
    follows = _correlation(action[:, moving], state).max(axis=1, initial=0.0)
    differs = np.abs(_correlation(action[:, moving], change)).max(axis=1, initial=0.0)
    if ((follows > _ABSOLUTE) & (follows > differs)).mean() >= 0.5:
        return True
    return False if ((differs > _DELTA) & (differs > follows)).mean() >= 0.5 else None


def _correlation(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the correlation of every column of `left` with every column of `right`."""

    def scaled(values: NDArray[np.float64]) -> NDArray[np.float64]:
        centred = values - values.mean(axis=0)
        size = np.linalg.norm(centred, axis=0)
        return np.divide(centred, size, out=np.zeros_like(centred), where=size > 1e-9)

    result: NDArray[np.float64] = scaled(left).T @ scaled(right)
    return result


@dataclass(frozen=True)
class GripperGuess:
    """One gripper dimension of the action.

    Attributes:
        dim: which.
        label: its name, or what stands for one.
        low: least command.
        high: greatest command.
        kind: how the commands are spread; `"relative"` ones say open or close once and then stay at zero.
        open_at: the command that means open (`low` or `high`), or None where nothing tells.
        why: how that was found.
        steps: what brings it to 1 = open, 0 = closed: empty where it is so already, None where it is not known.
    """

    dim: int
    label: str
    low: float
    high: float
    kind: Kind
    open_at: float | None
    why: str
    steps: tuple[StepSpec, ...] | None


def guess_gripper(
    commands: Sequence[NDArray[np.floating]],
    dim: int,
    label: str,
    size: int,
    format: str,
    openings: Sequence[Opening | None] | None = None,
) -> GripperGuess:
    """Guess the convention of one dimension.

    The measured fingers tell it, else what most demonstrations begin with: a hand that goes to take something is open.
    What its name says ("gripper_close"), or the format prescribes (robosuite: -1 = open), holds where neither tells,
    and where they agree; where they contradict it, nothing is known.

    Args:
        commands: per episode `[T]`.
        dim: the dimension.
        label: its name, or that of the array it comes from.
        size: number of dimensions of the action.
        format: the source's format.
        openings: per episode how far the fingers are apart `[T]`, or None.
    """
    values = np.concatenate([np.asarray(command, dtype=np.float64) for command in commands])
    low, high = float(values.min()), float(values.max())
    kind = _kind(values, low, high)
    openings = openings or [None] * len(commands)
    if kind == "constant":
        return GripperGuess(dim, label, low, high, kind, None, "it never changes", None)
    if kind == "relative":
        closes, why = _closes_with_positive(commands, openings)
        return GripperGuess(dim, label, low, high, kind, None, why, _relative_steps(closes, dim, size))
    shown, seen = _shown(commands, low, high, opens_with_high(commands, openings))
    ruled, rule = _ruled(label, format, low, high)
    if ruled is None:
        opens, why = shown, seen
    elif shown is None or shown == ruled:
        opens, why = ruled, rule
    else:
        opens, why = None, f"it is not known which end is open: {high if ruled == high else low:.3g} {rule}, but {seen}"
    return GripperGuess(dim, label, low, high, kind, opens, why, _steps(low, high, opens, dim, size))


def _ruled(label: str, format: str, low: float, high: float) -> tuple[float | None, str]:
    """Return the command that should be open by name or format, and which of them says so."""
    word = label.lower()
    if "close" in word or "closing" in word:
        return low, f"by its name, {label}"
    if any(part in word for part in ("open", "width", "aperture")):
        return high, f"by its name, {label}"
    if format in ("robomimic", "libero") and low < -0.5:
        return low, "robosuite's controllers take -1 as open"
    if format == "isaac-lab" and low < -0.5:
        return high, "Isaac Lab's binary joint action takes +1 as open"
    if format == "aloha":
        return high, "ALOHA's gripper targets grow with the opening"
    return None, ""


def _shown(
    commands: Sequence[NDArray[np.floating]], low: float, high: float, measured: bool | None
) -> tuple[float | None, str]:
    """Return the command that is open by what the demonstrations show, and how that was found."""
    if measured is not None:
        opens = high if measured else low
        return opens, f"the measured fingers open with {opens:.3g}"
    firsts = np.asarray([float(command[0]) for command in commands if len(command)])
    at_high = int((firsts > (low + high) / 2).sum())
    most = max(at_high, len(firsts) - at_high)
    if len(firsts) < FEWEST_EPISODES or most < MOST_EPISODES * len(firsts):
        return None, "the data do not tell which end is open"
    opens = high if at_high == most else low
    return opens, f"{most} of {len(firsts)} episodes begin with {opens:.3g}"


def _closes_with_positive(
    commands: Sequence[NDArray[np.floating]], openings: Sequence[Opening | None]
) -> tuple[bool | None, str]:
    """Tell whether relative commands above zero close, as OpenVLA takes them, and how that was found."""
    intro = "it is zero but where it changes"
    closes = opens_with_high([relative_to_absolute(command.astype(np.float32)) for command in commands], openings)
    if closes is not None:
        return closes, f"{intro}; the measured fingers {'close' if closes else 'open'} with +"
    given = [np.asarray(command)[np.abs(command) > 0.1 * np.abs(command).max()] for command in commands if len(command)]
    firsts = [float(command[0]) for command in given if len(command)]
    closing = sum(first > 0 for first in firsts)
    most = max(closing, len(firsts) - closing)
    if len(firsts) < FEWEST_EPISODES or most < MOST_EPISODES * len(firsts):
        return None, f"{intro}; the data do not tell whether + closes or opens"
    closes = closing == most
    return closes, f"{intro}; {most} of {len(firsts)} episodes begin with {'+' if closes else '-'}, which should close"


def _relative_steps(closes: bool | None, dim: int, size: int) -> tuple[StepSpec, ...] | None:
    if closes is None:
        return None
    names = ["relative_gripper_to_absolute", *([] if closes else ["invert_gripper"])]
    return tuple(gripper_step(name, dim, size) for name in names)


def _kind(values: NDArray[np.float64], low: float, high: float) -> Kind:
    if high - low < 1e-9:
        return "constant"
    levels = np.unique(values.round(6))
    zero = float((np.abs(values) < 0.1 * max(abs(low), abs(high))).mean())
    if zero > 0.5 and low < 0 < high and min(-low, high) > 0.2 * max(-low, high):
        return "relative"
    if len(levels) == 2:
        return "binary"
    near = 0.05 * (high - low)
    return "nearly binary" if ((values < low + near) | (values > high - near)).mean() > 0.9 else "continuous"


def _steps(low: float, high: float, opens: float | None, dim: int, size: int) -> tuple[StepSpec, ...] | None:
    if opens is None:
        return None
    # ends that are nearly those of a usual range stand for them
    ends = next((pair for pair in ((0.0, 1.0), (-1.0, 1.0)) if np.allclose((low, high), pair, atol=0.05)), (low, high))
    if ends == (0.0, 1.0):
        return () if opens == high else (gripper_step("invert_gripper", dim, size),)
    source = list(ends) if opens == high else [ends[1], ends[0]]
    return (gripper_step("scale_gripper", dim, size, from_range=[float(f"{end:.4g}") for end in source]),)
