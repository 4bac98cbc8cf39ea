"""The default layout of a LeRobot dataset: which columns are the action and the state, and short camera names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyarrow as pa

from vlaft.data.layout import Layout
from vlaft.data.readers.lerobot_arrays import Slices
from vlaft.data.readers.lerobot_rows import is_list, is_number
from vlaft.data.typed_words import word

_ACTIONS = ("action", "actions")
_STATES = ("observation.state", "state")
_PREFIX = re.compile(r"^(?:observation\.)?(?:images?|video)\.|^observation\.")
_MAIN = ("top", "ego", "front", "base", "exterior", "high", "main")
_WRIST = ("wrist", "hand", "gripper")


def column_widths(schema: pa.Schema, features: Mapping[str, Mapping[str, Any]]) -> dict[str, int | None]:
    """Return the columns that hold numbers, with their width where the type or the metadata tell it."""
    widths: dict[str, int | None] = {}
    for part in schema:
        if is_number(part.type):
            widths[part.name] = 1
        elif pa.types.is_fixed_size_list(part.type) and is_number(part.type.value_type):
            widths[part.name] = part.type.list_size
        elif is_list(part.type) and is_number(part.type.value_type):
            shape = features.get(part.name, {}).get("shape")
            known = isinstance(shape, list) and len(shape) == 1 and type(shape[0]) is int and shape[0] > 0
            widths[part.name] = shape[0] if known and isinstance(shape, list) else None
    return widths


def default_layout(
    features: Mapping[str, Mapping[str, Any]],
    widths: Mapping[str, int | None],
    slices: Slices,
    chunks: Collection[str],
    cameras: Sequence[str],
    fps: float | None,
    warnings: list[str],
) -> Layout:
    """Return the layout that fits the names in use.

    Args:
        features: the feature entries of info.json.
        widths: the columns that hold numbers.
        slices: further array names, of modality.json.
        chunks: columns that hold several vectors per row.
        cameras: the cameras, in the metadata's order.
        fps: control rate in Hz.
        warnings: gets a sentence when there is no single action column, and when it holds chunks.
    """
    action = next((name for name in _ACTIONS if name in widths or name in chunks), None)
    if action is None:
        parts = sorted({name for name in (*widths, *slices) if name.startswith(("action.", "actions."))})
        if parts:
            warnings.append(
                "there is no single action column; say which parts make the action, for example"
                f" {word('action', _example(parts))} (there are: {', '.join(parts)})"
            )
        else:
            warnings.append(f"there is no action column (number columns: {', '.join(sorted(widths)) or 'none'})")
    elif action in chunks:
        warnings.append(f"column '{action}' holds action chunks, several vectors per row, which cannot be read")
    names = _flat_names(features.get(action or "", {}).get("names"))
    width = widths.get(action or "")
    return Layout(
        action=(action or "action",),
        state=next(((name,) for name in _STATES if name in widths), ()),
        cameras=_short_names(sorted(cameras, key=_rank)),
        fps=fps,
        action_names=names if len(names) == width else (),
    )


def _example(parts: Sequence[str]) -> list[str]:
    """Return OpenVLA-like parts when the dataset has them: end-effector deltas, then the gripper."""
    deltas = [part for part in parts if re.search(r"delta_(eef|ee|tcp)_(pos|rot|position|rotation)$", part)]
    gripper = [part for part in parts if "gripper" in part]
    closing = [part for part in gripper if re.search("close|open", part)] or gripper
    return [*deltas, *closing[:1]] if deltas else list(parts)


def _flat_names(names: object) -> tuple[str, ...]:
    """Return dimension names out of a list, a nested list or `{"motors": [...]}`."""
    if isinstance(names, dict) and len(names) == 1:
        names = next(iter(names.values()))
    if isinstance(names, list) and len(names) == 1 and isinstance(names[0], list):
        names = names[0]
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return tuple(names)
    return ()


def _short_names(cameras: Sequence[str]) -> dict[str, str]:
    """Return short name to key, in order; keys whose short names collide keep their full names."""
    short = [re.sub(r"\W+", "_", _PREFIX.sub("", key)).strip("_") or key for key in cameras]
    return {name if short.count(name) == 1 else key: key for name, key in zip(short, cameras, strict=True)}


def _rank(key: str) -> int:
    words = key.lower()
    if any(word in words for word in _WRIST):
        return 2
    return 0 if any(word in words for word in _MAIN) else 1
