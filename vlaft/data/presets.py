"""Dataset presets (`recipes/datasets/*.yaml`) and mixes of datasets (`recipes/mixes/*.yaml`).

A preset says how the arrays of one published dataset become OpenVLA's action: the fields of a `Layout`, and under
`datasets` the further names that the dataset is published by. A mix is a mapping `datasets: {name: weight}`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from vlaft.data.layout import Layout
from vlaft.data.standardize import parse_steps
from vlaft.errors import ConfigError, did_you_mean
from vlaft.recipe_files import recipes_folder

_KEYS = [field.name for field in fields(Layout)]
_TEXTS = ("action", "state", "action_names")
_LARGEST_FILE = 2**20  # bytes


def preset_names() -> list[str]:
    """List the presets that come with vlaft."""
    return sorted(path.stem for path in (recipes_folder() / "datasets").glob("*.yaml"))


def mix_names() -> list[str]:
    """List the mixes that come with vlaft."""
    return sorted(path.stem for path in (recipes_folder() / "mixes").glob("*.yaml"))


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
    path = _find(name_or_path, "datasets", "preset", {**{name: name for name in preset_names()}, **_published()})
    values = layout_fields(_read(path), path)
    if "action" in values:  # names and mask of the base describe the base's action
        values = {"action_names": (), "action_mask": (), **values}
    return replace(base or Layout(), **values)


def load_mix(name_or_path: str | Path) -> list[tuple[str, float]]:
    """Return the datasets of a mix with their sampling weights; `load_preset` accepts each name.

    A weight multiplies the dataset's number of steps, as in OpenVLA's mixtures.

    Raises:
        ConfigError: no such mix, a dataset without a preset, or a weight that is no positive number.
    """
    path = _find(name_or_path, "mixes", "mix", {name: name for name in mix_names()})
    content = _read(path)
    problems = [f"{path}: unknown key '{key}'{did_you_mean(key, ['datasets'])}" for key in content if key != "datasets"]
    datasets = content.get("datasets")
    if not isinstance(datasets, Mapping) or not datasets:
        raise ConfigError([*problems, f"{path}: 'datasets' has to map names of datasets to weights"])
    known = [*preset_names(), *_published()]
    for name, weight in datasets.items():
        if name not in known:
            problems.append(f"{path}: no preset for dataset '{name}'{did_you_mean(str(name), known)}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            problems.append(f"{path}: the weight of '{name}' is {weight!r}; it has to be a positive number")
    if problems:
        raise ConfigError(problems)
    return [(str(name), float(weight)) for name, weight in datasets.items()]


def _published() -> dict[str, str]:
    """Map the published names of datasets to presets."""
    return _published_in(recipes_folder() / "datasets")


@cache
def _published_in(folder: Path) -> dict[str, str]:
    return {str(dataset): path.stem for path in folder.glob("*.yaml") for dataset in _read(path).get("datasets") or ()}


def _find(name_or_path: str | Path, folder: str, kind: str, names: Mapping[str, str]) -> Path:
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


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise ConfigError(f"{path} is too large for a preset")
        text = path.read_text(encoding="utf-8")
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ConfigError(f"{path} uses YAML aliases; write the values out")
        content = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark is not None else ""
        raise ConfigError(f"{path} is not valid YAML{line}") from None
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
        elif key not in _KEYS:
            problems.append(f"{path}: unknown key '{key}'{did_you_mean(str(key), [*_KEYS, 'datasets'])}")
        elif key in _TEXTS:
            problem = None if _is_texts(value) else "has to be a list of texts"
            values[key] = tuple(value or ()) if problem is None else ()
        elif key == "action_mask":
            is_mask = isinstance(value, list) and all(isinstance(entry, bool) for entry in value)
            problem = None if is_mask else "has to be a list of true or false"
            values[key] = tuple(value) if is_mask else ()
        elif key == "steps":
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
            is_rate = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
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
