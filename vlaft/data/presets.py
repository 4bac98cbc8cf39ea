"""Dataset presets: `recipes/datasets/*.yaml`, or a YAML file of one's own.

A preset says how the arrays of one dataset become OpenVLA's action: the fields of a `Layout`, what only the reader
understands (the mapping of an HDF5 file of its own layout, say), and under `datasets` the further names that the
dataset is published by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from vlaft.checked import fits
from vlaft.data.layout import Layout
from vlaft.data.reader_options import ADDED_STEPS, separate_options
from vlaft.data.standardize import parse_steps
from vlaft.errors import ConfigError, did_you_mean
from vlaft.plain_yaml import NotYaml, parse_yaml
from vlaft.recipe_files import recipes_folder

_KEYS = [field.name for field in fields(Layout)]
_TEXTS = ("action", "state", "action_names")
_LARGEST_FILE = 2**20  # bytes


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
    return with_fields(base or Layout(), layout_fields(separate_options(read_yaml(path)), path))


def with_fields(layout: Layout, values: Mapping[str, Any]) -> Layout:
    """Return the layout with the fields that `layout_fields` returned.

    Another action leaves the old one's names and mask behind; `steps+` adds to the steps.
    """
    values = dict(values)
    added = values.pop(ADDED_STEPS, ())
    if "action" in values:
        values = {"action_names": (), "action_mask": (), **values}
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
        str(dataset): path.stem for path in folder.glob("*.yaml") for dataset in read_yaml(path).get("datasets") or ()
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


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        ConfigError: it cannot be read, is too large, has aliases, is no YAML, or holds something else.
    """
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise ConfigError(f"{path} is too large for a preset")
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text") from None
    except NotYaml as error:
        line = f", line {error.line}" if error.line else ""
        raise ConfigError(f"{path}{line}: not valid YAML ({error})") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} has to be a mapping of keys to values")
    return content


def layout_fields(content: Mapping[str, Any], path: Path | str) -> dict[str, Any]:
    """Return the fields of a `Layout` that `content` (parsed YAML) sets, checked; `path` is named in errors.

    Raises:
        ConfigError: unknown keys, values of a wrong kind, or wrong standardizing steps; all problems together.
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    for key, value in content.items():
        problem = None
        if key == "datasets":
            problem = None if _is_texts(value) else "has to be a list of names"
        elif key not in _KEYS and key != ADDED_STEPS:
            problems.append(f"{path}: unknown key '{key}'{did_you_mean(str(key)[:100], [*_KEYS, 'datasets'])}")
        elif key in _TEXTS:
            problem = None if _is_texts(value) else "has to be a list of texts"
            values[key] = tuple(value or ()) if problem is None else ()
        elif key == "action_mask":
            is_mask = isinstance(value, list) and all(isinstance(entry, bool) for entry in value)
            problem = None if is_mask else "has to be a list of true or false"
            values[key] = tuple(value) if is_mask else ()
        elif key in ("steps", ADDED_STEPS):
            try:
                parse_steps(value or [])
                values[key] = tuple(value or ())
            except ConfigError as error:
                problems += [f"{path}: {line}" for line in error.problems]
        elif key == "cameras":
            is_names = isinstance(value, dict) and _is_texts([*value.keys(), *value.values()])
            problem = None if is_names else "has to map our camera names to the source's"
            values[key] = value
        elif key == "instruction":
            problem = None if value is None or isinstance(value, str) else "has to be a text"
            values[key] = value
        elif key == "fps":
            is_rate = fits(value, float) and value > 0
            problem = None if value is None or is_rate else "has to be a positive number (Hz)"
            values[key] = None if value is None else float(value) if is_rate else None
        else:
            problem = None if isinstance(value, dict) else "has to be a mapping"
            values[key] = value
        if problem:
            problems.append(f"{path}: '{key}' {problem}")
    if "action" in values and not values["action"] and not problems:
        problems.append(f"{path}: 'action' has to name at least one array")
    if problems:
        raise ConfigError(problems)
    return values


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)
