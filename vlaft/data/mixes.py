"""Mixes: several datasets converted into one (`recipes/mixes/*.yaml`, or a YAML file of one's own).

    datasets:
      bridge_orig: 1.0              a weight alone: the dataset lies under this name in the folder that is given
      kitchen:                      or what is to be said of it:
        path: demos/kitchen.hdf5      file, folder (seen from the mix's file) or Hub id; by default as above
        preset: robomimic             by default the one made for a dataset of this name
        weight: 2.0                   by default 1.0
        instruction: open the drawer  any setting of the layout or the reader, as words on the command line

The name is the dataset's key in the statistics. A weight multiplies its number of steps, as in OpenVLA's mixtures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlaft.data.layout import separate_options
from vlaft.data.presets import find_file, known_datasets, layout_fields, preset_of_dataset
from vlaft.data.source import SourceRequest
from vlaft.documents import fits, shown
from vlaft.errors import ConfigError, DataError, did_you_mean
from vlaft.files import read_yaml
from vlaft.recipe.resolve import recipes_folder
from vlaft.remote import url_of

_OWN_KEYS = ("path", "preset", "weight")


@dataclass(frozen=True, kw_only=True)
class MixedDataset:
    """One dataset of a mix.

    Attributes:
        name: its name, and its key in the statistics.
        weight: how often training samples it: times its number of steps.
        path: where it lies; None: under its name in the folder that the user gives.
        preset: its preset, or None for the reader's own layout.
        settings: fields of its layout and options of its reader.
    """

    name: str
    weight: float = 1.0
    path: Path | None = None
    preset: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def mix_names() -> list[str]:
    """List the mixes that come with vlaft."""
    return sorted(path.stem for path in (recipes_folder() / "mixes").glob("*.yaml"))


def load_mix(name_or_path: str | Path) -> list[MixedDataset]:
    """Return the datasets of a mix.

    Raises:
        ConfigError: no such mix, a dataset of which only the weight is given without a preset for it, a weight that
            is no positive number, or wrong settings; all problems together.
    """
    file = find_file(name_or_path, "mixes", "mix", {name: name for name in mix_names()})
    content = read_yaml(file, "a mix")
    problems = [f"{file}: unknown key '{key}'{did_you_mean(key, ['datasets'])}" for key in content if key != "datasets"]
    datasets = content.get("datasets")
    if not isinstance(datasets, Mapping) or not datasets:
        raise ConfigError([*problems, f"{file}: 'datasets' has to map names of datasets to weights"])
    mixed = [_mixed(str(name), entry, file, problems) for name, entry in datasets.items()]
    if problems:
        raise ConfigError(problems)
    return mixed


def mix_requests(
    name_or_path: str | Path, root: Path | None = None, settings: Mapping[str, Any] | None = None
) -> list[SourceRequest]:
    """Return a request for every dataset of a mix.

    Args:
        name_or_path: as `load_mix` takes it.
        root: the folder that holds the datasets for which the mix names no path.
        settings: laid over the settings of every dataset.

    Raises:
        ConfigError: as `load_mix`, or datasets need a `root` that is not given.
        DataError: datasets are not in `root`.
    """
    mixed = load_mix(name_or_path)
    _check_root(name_or_path, root, [dataset.name for dataset in mixed if dataset.path is None])
    return [
        SourceRequest(
            path=dataset.path or (root or Path()) / dataset.name,
            preset=dataset.preset,
            layout={**dataset.settings, **(settings or {})},
            name=dataset.name,
            weight=dataset.weight,
        )
        for dataset in mixed
    ]


def _check_root(mix: str | Path, root: Path | None, names: Sequence[str]) -> None:
    if root is None and names:
        raise ConfigError(f"the mix '{mix}' does not say where '{names[0]}' lies; name the folder that holds it")
    absent = [name for name in names if not ((root or Path()) / name).exists()]
    if absent:
        listed = ", ".join(absent[:8]) + (" ..." if len(absent) > 8 else "")
        raise DataError(f"{len(absent)} of the datasets of the mix '{mix}' are not in {root}: {listed}")


def _mixed(name: str, entry: object, file: Path, problems: list[str]) -> MixedDataset:
    """Return one dataset; what is wrong with it is added to `problems`."""
    content: dict[Any, Any] = dict(entry) if isinstance(entry, Mapping) else {"weight": entry}
    weight, preset, path = content.get("weight", 1.0), content.get("preset"), content.get("path")
    known = known_datasets()
    if not isinstance(entry, Mapping) and name not in known:
        problems.append(f"{file}: no preset for dataset '{name}'{did_you_mean(name, known)}")
    if not fits(weight, float) or not weight > 0:
        problems.append(f"{file}: the weight of '{name}' is {shown(weight)}; it has to be a positive number")
        weight = 1.0
    for key, value in (("preset", preset), ("path", path)):
        if value is not None and (not isinstance(value, str) or not value):
            problems.append(f"{file}: '{key}' of '{name}' is {value!r}; it has to be a text")
    settings = {str(key): value for key, value in content.items() if key not in _OWN_KEYS}
    try:
        layout_fields(separate_options(settings), f"{file}: {name}")
    except ConfigError as error:
        problems += error.problems
    if preset is None:
        preset = preset_of_dataset(name) or (name if name in known else None)
    return MixedDataset(
        name=name,
        weight=float(weight),
        path=_resolved(path, file) if isinstance(path, str) else None,
        preset=_preset(str(preset), file) if preset is not None else None,
        settings=settings,
    )


def _resolved(text: str, file: Path) -> Path:
    """A path is seen from the mix's folder; what is not there may be the id of a dataset on the Hub."""
    if url_of(text):
        return Path(text)
    beside = file.parent / text
    return beside if beside.exists() or text.count("/") != 1 else Path(text)


def _preset(text: str, file: Path) -> str:
    beside = file.parent / text
    return str(beside) if beside.suffix in (".yaml", ".yml") else text
