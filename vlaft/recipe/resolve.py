"""Read recipe files and `key=value` words, and lay them over the defaults key by key, gathering every problem.

A recipe is data that may come from a stranger: aliases, interpolations (`${oc.env:...}` would read the
environment) and large files are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from vlaft.documents import NotYaml, in_words, is_text, parse_yaml, shown
from vlaft.errors import ConfigError, did_you_mean
from vlaft.files import read_yaml
from vlaft.recipe.settings import PolicyConfig, RecipeConfig


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


def parse_word(word: str) -> dict[str, Any]:
    """Return `{"train.steps": 10}` for the word `train.steps=10`; the value is read as YAML.

    Raises:
        ConfigError: the word is not `key=value`, begins with a dash, or its value is not YAML.
    """
    if not is_text(word):
        raise ConfigError(f"{shown(word)} is no text in UTF-8")
    if word.startswith("-"):
        raise ConfigError(f"'{word}' is no setting; write key=value, no dashes")
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise ConfigError(f"'{word}' is no setting; write key=value, such as train.steps=1000")
    try:
        return {key: parse_yaml(value)}
    except NotYaml as error:
        raise ConfigError(f"'{word}': the value is not valid YAML ({error})") from error


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
                except (OmegaConfBaseException, ValueError, TypeError, OverflowError):
                    problems.append(f"{prefix}{_wrong_value(key, value, hints[key])}")
    config = OmegaConf.to_object(merged)
    assert isinstance(config, RecipeConfig)
    return config, problems


def given_keys(settings: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys of all settings that a layer has."""
    return [key for key, _ in _leaves(dict(settings), dict(leaf_types()))]


def given_policy(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of a policy by the names of `PolicyConfig`'s fields, with their values as that has them.

    Args:
        settings: by dotted keys such as `policy.chunk`.

    Raises:
        ConfigError: one is no setting of a policy, or holds what it cannot.
    """
    from vlaft.recipe.checks import out_of_range

    config, problems = merge_layers([("", dict(settings))])
    keys = given_keys(settings)
    others = [key for key in keys if not key.startswith("policy.")]
    problems += [
        f"'{key}' is no setting of a policy; of a model that is there, only policy.* is asked" for key in others
    ]
    problems += out_of_range(config)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return {key.removeprefix("policy."): getattr(config.policy, key.removeprefix("policy.")) for key in keys}


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
    yaml = {True: "true", False: "false", None: "null"}
    named = yaml[value] if value is None or isinstance(value, bool) else shown(value)
    told = named if value is None or named.startswith("'") else f"'{named}'"
    return f"{key} must be {in_words(hint)}, not {told}{did_you_mean(named.strip(chr(39)), choices)}"


def _make_writable(node: Any) -> None:
    """Lift the read-only flag that OmegaConf sets on every node of a frozen dataclass."""
    from omegaconf import DictConfig, OmegaConf

    OmegaConf.set_readonly(node, None)
    for key in node:
        if isinstance(node[key], DictConfig):
            _make_writable(node[key])


def recipes_folder() -> Path:
    """Return the folder of recipes: `vlaft/recipes` in an installed wheel, `recipes` of the checkout otherwise.

    Raises:
        ConfigError: neither is there (a damaged installation).
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "recipes", package.parent / "recipes"):
        if (folder / "datasets").is_dir():
            return folder
    raise ConfigError(f"the recipes that belong to vlaft are not beside {package}; install vlaft again")


def resolve(
    recipe: str | Path | None = None,
    config_files: Sequence[str | Path] = (),
    words: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    policy_on: Callable[[str, Mapping[str, Any]], PolicyConfig | None] | None = None,
) -> RecipeConfig:
    """Return the settings of one call; later layers win: defaults, recipe, files in order, words in order, settings.

    Args:
        recipe: name of a shipped recipe, or path of a YAML file; None for the defaults alone.
        config_files: YAML files in the shape of a recipe.
        words: `key=value` overrides, the key with dots (`train.batch_size=4`), the value in YAML.
        settings: overrides by their dotted keys, as values: a path may hold any sign.
        policy_on: says which policy a base is, from the base's name and those settings of `policy` that were given;
            None where the base is none. It raises where they contradict it.

    Raises:
        ConfigError: every unknown key, wrong value, unreadable file and contradiction, all in one.
    """
    from vlaft.recipe.checks import find_problems

    problems: list[str] = []
    layers: list[tuple[str, dict[str, Any]]] = []
    files = [Path(file) for file in config_files]
    recipe_file = None
    if recipe is not None:
        try:
            recipe_file = find_recipe(recipe)
            files.insert(0, recipe_file)
        except ConfigError as error:
            problems += error.problems
    for file in files:
        try:
            layers.append((f"{file}: ", read_yaml(file, "a recipe")))
        except ConfigError as error:
            problems += error.problems
    for word in words:
        try:
            layers.append(("", parse_word(word)))
        except ConfigError as error:
            problems += error.problems

    layers.append(("", dict(settings or {})))
    config, layer_problems = merge_layers(layers)
    problems += layer_problems
    if policy_on is not None and not problems:
        given = {key for _, layer in layers for key in given_keys(layer)}
        asked = {key: getattr(config.policy, key.removeprefix("policy.")) for key in given if key.startswith("policy.")}
        found = policy_on(config.base, {key.removeprefix("policy."): value for key, value in asked.items()})
        config = config if found is None else replace(config, policy=found)
    problems += find_problems(config)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    if recipe_file is not None:
        config = replace(
            config,
            name=config.name or recipe_file.stem,
            description=config.description or opening_comments(recipe_file)[0],
        )
    return config


def to_yaml(config: RecipeConfig) -> str:
    """Return every setting as YAML that `resolve` reads back to an equal configuration."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))
