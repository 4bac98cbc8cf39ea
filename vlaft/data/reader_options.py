"""Which settings of a source are the layout's, and which only its reader understands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from vlaft.data.layout import Layout

ADDED_STEPS = "steps+"  # the key that adds standardizing steps instead of replacing them
_KNOWN = [*(field.name for field in fields(Layout)), ADDED_STEPS, "datasets"]
_MAPPED = ("action", "state", "cameras", "instruction", "fps")  # what an HDF5 mapping says beside `episodes`


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
    whole = "episodes" in settings
    options: dict[str, Any] = {}
    for key, value in settings.items():
        nested = value.values() if key == "cameras" and isinstance(value, dict) else [value]
        rule = key in ("cameras", "instruction", "fps") and any(isinstance(inner, dict) for inner in nested)
        foreign = key not in _KNOWN and not get_close_matches(str(key), _KNOWN, n=1, cutoff=0.8)
        if foreign or rule or (whole and key in _MAPPED) or (mapped and key == "cameras"):
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
