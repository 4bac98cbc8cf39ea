"""Read recipe files and `key=value` words, and lay them over the defaults key by key, gathering every problem.

A recipe is data that may come from a stranger: aliases, interpolations (`${oc.env:...}` would read the
environment) and large files are refused.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vlaft.config import RecipeConfig
from vlaft.errors import ConfigError, did_you_mean
from vlaft.recipe_files import recipes_folder

MAX_RECIPE_BYTES = 64 * 1024  # a recipe has some thirty lines
MAX_DEPTH = 10  # of nested mappings and lists; the settings themselves need four


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes, sorted with numbers in numeric order (lora8 before lora16)."""
    names = [file.stem for file in recipes_folder().glob("*.yaml")]
    return sorted(names, key=lambda name: (name.rstrip("0123456789"), len(name), name))


def find_recipe(recipe: str | Path) -> Path:
    """Return the file of a shipped recipe's name, or of a path (has a folder or ends in .yaml or .yml).

    Raises:
        ConfigError: there is no such recipe or file.
    """
    text = str(recipe)
    if isinstance(recipe, Path) or "/" in text or text.endswith((".yaml", ".yml")):
        path = Path(recipe)
        if not path.is_file():
            raise ConfigError(f"there is no recipe file {path}")
        return path
    names = recipe_names()
    if text not in names:
        raise ConfigError(f"unknown recipe '{text}'{did_you_mean(text, names)} (there are: {', '.join(names)})")
    return recipes_folder() / f"{text}.yaml"


def opening_comments(file: Path) -> tuple[str, str]:
    """Return the first two lines of a recipe without their `# `: what it is for, and what it costs.

    A line that is no comment gives an empty text.
    """
    with file.open(encoding="utf-8") as stream:
        lines = [stream.readline(), stream.readline()]
    purpose, cost = (line.removeprefix("#").strip() if line.startswith("#") else "" for line in lines)
    return purpose, cost


def read_settings(file: Path) -> dict[str, Any]:
    """Return a YAML file's mapping as plain dicts, lists and scalars.

    Raises:
        ConfigError: the file is missing, too large, not UTF-8 or not YAML, has aliases, or is no mapping.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_RECIPE_BYTES + 1)
        if len(raw) > MAX_RECIPE_BYTES:
            raise ConfigError(f"{file}: larger than {MAX_RECIPE_BYTES // 1024} KiB, so not a recipe")
        text = raw.decode("utf-8")
        _refuse_tricks(text)
        if not text.strip() or yaml.compose(text, yaml.SafeLoader) is None:
            return {}
        content = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 text") from error
    except yaml.MarkedYAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{file}{where}: not valid YAML ({error.problem or error.context})") from error
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError, ValueError, TypeError, AssertionError) as error:
        raise ConfigError(f"{file}: not valid YAML ({_first_line(error)})") from error
    if not isinstance(content, dict) or (len(content) == 1 and ":" not in text):
        raise ConfigError(f"{file}: a recipe is a mapping of keys to values")
    return {str(key): value for key, value in content.items()}


def _refuse_tricks(text: str) -> None:
    """Refuse YAML that is small to write and large or slow to load: aliases, and deep nesting.

    Raises:
        ValueError: the text has either.
    """
    import yaml

    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):  # lazily, so a deep text is left before it gets slow
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("aliases, *name, are not supported; write the value out")


def parse_word(word: str) -> dict[str, Any]:
    """Return `{"train.steps": 10}` for the word `train.steps=10`; the value is read as YAML.

    Raises:
        ConfigError: the word is not `key=value`, begins with a dash, or its value is not YAML.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if word.startswith("-"):
        raise ConfigError(f"'{word}' is no setting; write key=value, no dashes")
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise ConfigError(f"'{word}' is no setting; write key=value, such as train.steps=1000")
    try:
        _refuse_tricks(value)
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError, ValueError, TypeError) as error:
        raise ConfigError(f"'{word}': the value is not valid YAML ({_first_line(error)})") from error
    return {key: parsed["value"] if isinstance(parsed, dict) else None}


def merge_layers(layers: Sequence[tuple[str, dict[str, Any]]]) -> tuple[RecipeConfig, list[str]]:
    """Lay settings over the defaults, later layers over earlier ones.

    Args:
        layers: for each layer the prefix of its problems (a file and a colon, or nothing) and its settings.

    Returns:
        The configuration, without the keys that had a problem, and the problems.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    hints = dict(leaf_types())
    merged = OmegaConf.structured(RecipeConfig)
    _make_writable(merged)
    problems = []
    for prefix, settings in layers:
        for key, value in _leaves(settings, hints):
            if key not in hints:
                problems.append(f"{prefix}{_unknown(key, list(hints))}")
            elif _has_interpolation(value):
                problems.append(f"{prefix}{key}: '{value}' is an interpolation; write the value itself")
            else:
                try:
                    OmegaConf.update(merged, key, value, merge=False)
                except (OmegaConfBaseException, ValueError, TypeError):
                    problems.append(f"{prefix}{_wrong_value(key, value, hints[key])}")
    config = OmegaConf.to_object(merged)
    assert isinstance(config, RecipeConfig)
    return config, problems


def leaf_types(section: type = RecipeConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every setting's dotted key and type hint."""
    for name, hint in get_type_hints(section).items():
        if is_dataclass(hint) and isinstance(hint, type):
            yield from leaf_types(hint, f"{prefix}{name}.")
        else:
            yield prefix + name, hint


def _leaves(value: Any, hints: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Flatten nested mappings to dotted keys; an empty section (`train:` with nothing below) says nothing."""
    if isinstance(value, dict) and prefix.rstrip(".") not in hints:
        for key, inner in value.items():
            yield from _leaves(inner, hints, f"{prefix}{key}.")
        return
    key = prefix.rstrip(".")
    is_section = any(known.startswith(prefix) for known in hints)
    if not (is_section and value is None):
        yield key, value


def _unknown(key: str, known: list[str]) -> str:
    if any(name.startswith(f"{key}.") for name in known):
        return f"'{key}' is a section, not a setting; write its keys, such as '{_first_below(key, known)}'"
    same_name = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    hint = f"; did you mean '{same_name[0]}'?" if len(same_name) == 1 else did_you_mean(key, known)
    return f"unknown key '{key}'{hint}"


def _first_below(section: str, known: list[str]) -> str:
    return next(name for name in known if name.startswith(f"{section}."))


def _has_interpolation(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_has_interpolation(item) for item in value)
    return isinstance(value, str) and ("${" in value or value == "???")  # ??? is OmegaConf's missing value


def _wrong_value(key: str, value: Any, hint: Any) -> str:
    choices = [
        str(choice) for part in (hint, *get_args(hint)) if get_origin(part) is Literal for choice in get_args(part)
    ]
    shown = "null" if value is None else f"'{str(value).lower() if isinstance(value, bool) else value}'"
    return f"{key} must be {_describe(hint)}, not {shown}{did_you_mean(str(value), choices)}"


_PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}


def _describe(hint: Any) -> str:
    """Return a type hint in words: `a whole number or one of none, all`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(argument) for argument in arguments)
    if origin is Literal:
        names = ", ".join(str(argument) for argument in arguments)
        return f"one of {names}" if len(arguments) > 1 else f"'{names}'"
    if origin is list:
        return "a list of texts, such as [a, b]"
    if origin is tuple:
        return f"a list of {len(arguments)} numbers, such as [{', '.join('0.9' for _ in arguments)}]"
    return _PLAIN[hint]


def _make_writable(node: Any) -> None:
    """Lift the read-only flag that OmegaConf sets on every node of a frozen dataclass."""
    from omegaconf import DictConfig, OmegaConf

    OmegaConf.set_readonly(node, None)
    for key in node:
        if isinstance(node[key], DictConfig):
            _make_writable(node[key])


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
