"""Dataset presets: `recipes/datasets/*.yaml`, or a YAML file of one's own.

A preset says how the arrays of one dataset become OpenVLA's action: the fields of a `Layout`, what only the reader
understands (the mapping of an HDF5 file of its own layout, say), and under `datasets` the further names that the
dataset is published by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from vlaft.data.layout import ADDED_STEPS, Layout, separate_options
from vlaft.data.standardize.steps import parse_steps
from vlaft.documents import fits, in_words
from vlaft.errors import ConfigError, did_you_mean
from vlaft.files import read_yaml
from vlaft.recipe.resolve import recipes_folder

_HAS_TO = {  # where the kind of a field does not say it all
    "cameras": "map our camera names to the source's",
    "fps": "be a positive number (Hz)",
    "options": "be a mapping",
    "datasets": "be a list of names",
}


def preset_names() -> list[str]:
    """List the presets that come with vlaft."""
    return sorted(path.stem for path in (recipes_folder() / "datasets").glob("*.yaml"))


def preset_of_dataset(dataset: str) -> str | None:
    """Return the preset made for the published dataset of this name, or None."""
    return _published().get(dataset)


def load_preset(name_or_path: str | Path, base: Layout | None = None) -> Layout:
    """Return the layout of a preset.

    Args:
        name_or_path: a preset's name, the published name of a dataset that has one, or a YAML file of one's own.
        base: the layout whose fields stay where the preset says nothing (the reader's default); a preset that
            names another action leaves the base's `action_names` and `action_mask` behind.

    Raises:
        ConfigError: no such preset or file, unknown keys, values of a wrong kind, or wrong standardizing steps;
            all problems of the file together.
    """
    path = find_file(name_or_path, "datasets", "preset", {**{name: name for name in preset_names()}, **_published()})
    return with_fields(base or Layout(), layout_fields(separate_options(read_yaml(path, "a preset")), path))


def with_fields(layout: Layout, values: Mapping[str, Any]) -> Layout:
    """Return the layout with the fields that `layout_fields` returned.

    Another action leaves the old one's names and mask behind, another state its names; `steps+` adds to the steps.
    """
    values = dict(values)
    added = values.pop(ADDED_STEPS, ())
    if "action" in values:
        values = {"action_names": (), "action_mask": (), **values}
    if "state" in values:
        values = {"state_names": (), **values}
    changed = replace(layout, **values)
    return replace(changed, steps=(*changed.steps, *added))


def known_datasets() -> list[str]:
    """List all names that `load_preset` takes: the presets' own, and those that their datasets are published by."""
    return [*preset_names(), *_published()]


def _published() -> dict[str, str]:
    """Map the published names of datasets to presets."""
    return _published_in(recipes_folder() / "datasets")


@cache
def _published_in(folder: Path) -> dict[str, str]:
    return {
        str(dataset): path.stem
        for path in folder.glob("*.yaml")
        for dataset in read_yaml(path, "a preset").get("datasets") or ()
    }


def find_file(name_or_path: str | Path, folder: str, kind: str, names: Mapping[str, str]) -> Path:
    """Return the file of one of the known `names` (name to stem), or a YAML file of the user's own.

    Raises:
        ConfigError: there is none; the sentence has the nearest known name.
    """
    text = str(name_or_path)
    if text in names:
        return recipes_folder() / folder / f"{names[text]}.yaml"
    path = Path(text)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if path.is_file():
            return path
        raise ConfigError(f"there is no {kind} file {path}")
    hint = did_you_mean(text, list(names)) or f" (known: {', '.join(sorted(set(names.values())))})"
    raise ConfigError(f"unknown {kind} '{text}'{hint}")


def layout_fields(content: Mapping[str, Any], path: Path | str) -> dict[str, Any]:
    """Return the fields of a `Layout` that `content` (parsed YAML) sets, checked; `path` is named in errors.

    Raises:
        ConfigError: unknown keys, values of a wrong kind, or wrong standardizing steps; all problems together.
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    hints = {**get_type_hints(Layout), "datasets": tuple[str, ...]}
    for key, value in content.items():
        if key in ("steps", ADDED_STEPS):
            try:
                parse_steps(value or [])
                values[key] = tuple(value or ())
            except ConfigError as error:
                problems += [f"{path}: {line}" for line in error.problems]
        elif key not in hints:
            problems.append(f"{path}: unknown key '{key}'{did_you_mean(str(key), list(hints))}")
        elif not (isinstance(value, dict) if key == "options" else fits(value, hints[key])) or (
            key == "fps" and value is not None and value <= 0
        ):
            problems.append(f"{path}: '{key}' has to {_HAS_TO.get(key) or 'be ' + in_words(hints[key])}")
        elif key != "datasets":
            kind = {list: tuple, int: float}.get(type(value))  # a rate may be written without its point
            values[key] = kind(value) if kind else value
    if "action" in values and not values["action"] and not problems:
        problems.append(f"{path}: 'action' has to name at least one array")
    if problems:
        raise ConfigError(problems)
    return values
