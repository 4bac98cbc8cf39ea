"""Any checkpoint as a plain one: folders of OpenVLA-OFT's, and what is known of a policy that its folder does not tell.

A folder of OpenVLA-OFT's is written anew, once, as a folder in our own layout, to a cache: weights that stay as they
are become links, adapters are folded in, head, state's projector and FiLM get plain names, and `config.json` says what
the policy reads and writes. Whatever takes a merged policy takes such a folder then, and knows nothing of this.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlaft.action.statistics import BOUNDS, STATISTICS_FILE, read_statistics
from vlaft.adapt.merging import Change, ModuleAdapter, StoredSettings, changes, scaling_of
from vlaft.checksums import cache_folder, stamp
from vlaft.errors import CheckpointError, ConfigError, VlaftError
from vlaft.files import output_folder, read_json, write_json
from vlaft.model.configuration import Policy
from vlaft.model.load import BASES, write_policy_files
from vlaft.observation.images import ImagePipeline
from vlaft.observation.prompts import preprocessor_of
from vlaft.recipe.settings import PolicyConfig
from vlaft.weights.layout import (
    INDEX_FILE,
    RELEASE_FILES,
    TensorEntry,
    is_hub_name,
    read_header,
    resolve_checkpoint,
    tensor_table,
)
from vlaft.weights.oft import RELEASED, OftFolder, Vision, is_oft
from vlaft.weights.stream import DTYPES, TYPE_NAMES, ShardWriter, read_tensor
from vlaft.weights.trained import ADAPTER_CONFIG, Trained

_ASKED = {"chunk": "8", "cameras": "[main,wrist]", "normalization": "q99"}  # what no file tells, with an example
_COMPARED = ("head", "decoding", "chunk", "cameras", "state", "film", "normalization")
_VERSION = 2  # of what is written to the cache; part of the name


def recorded_policy(folder: Path) -> Policy | None:
    """Return what a checkpoint's `config.json` says that it reads and writes; None where it says nothing.

    Raises:
        CheckpointError: the file is damaged, or says what cannot be.
    """
    if not (folder / "config.json").is_file():
        return None
    config = read_json(folder / "config.json", CheckpointError)
    return Policy.of(config, str(folder / "config.json")) if config.get("policy") else None


def policy_folder(name: str, given: Mapping[str, Any] | None = None, *, base: str | None = None) -> Path:
    """Return the local folder of a checkpoint that is used as it is, in our own layout.

    Args:
        name: a folder or a Hub id; of a merged or exported checkpoint, a base, or OpenVLA-OFT's.
        given: settings of the policy that were asked for, by the names of `PolicyConfig`'s fields.
        base: of a folder of OpenVLA-OFT's without merged weights: folder or Hub id of the base, where its adapter does
            not name the right one.

    Raises:
        CheckpointError: it cannot be found, or what it needs to know is neither recorded nor given.
        ConfigError: what is given is not what it is.
    """
    given = dict(given or {})
    folder = checkpoint_folder(name)
    if is_oft(folder):
        return _as_plain(OftFolder.open(folder), RELEASED.get(name, {}) | given, base)
    recorded = recorded_policy(folder)
    if recorded is not None:
        check_policy(recorded, given, str(folder))
        if list(given.get("cameras", recorded.cameras)) != recorded.cameras:
            return _with_policy(folder, replace(recorded, cameras=list(given["cameras"])))
    elif given:
        return _told(folder, given)
    return folder


def base_folder(name: str, policy: Mapping[str, Any] | PolicyConfig | None = None) -> Path:
    """Return the local folder of a base, in our own layout: any checkpoint but a policy may become another one.

    Args:
        name: a folder or a Hub id.
        policy: what is trained on it, which has to be what a policy reads and writes already.

    Raises:
        CheckpointError, ConfigError: as `policy_folder`.
    """
    folder = checkpoint_folder(name)
    if not is_oft(folder):
        return folder
    return policy_folder(name, _settings(asdict(policy) if isinstance(policy, PolicyConfig) else policy or {}))


def policy_on_base(name: str, given: Mapping[str, Any]) -> PolicyConfig | None:
    """Return the policy of a recipe on a base, or None where the base is none and the recipe decides.

    A base that is not on this machine is not asked, unless it is known; whether it can be had is seen later.

    Args:
        name: folder or Hub id of the base.
        given: the settings that recipe, files and words have, by the names of `PolicyConfig`'s fields.

    Raises:
        CheckpointError, ConfigError: as `policy_folder`.
    """
    if name in BASES and not Path(name).is_dir():
        return None
    recorded: PolicyConfig | None
    if is_hub_name(name):
        recorded = PolicyConfig(head="l1", state=True, **RELEASED[name]) if name in RELEASED else None
    else:
        folder = _local(name)
        recorded = _policy_of(OftFolder.open(folder), given) if is_oft(folder) else recorded_policy(folder)
    if recorded is None:
        return None
    check_policy(recorded, given, name)
    return PolicyConfig(**_settings(asdict(recorded) | dict(given)))


def _settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a policy's keys that are settings: not the sizes that its data gave it."""
    return {field.name: content[field.name] for field in fields(PolicyConfig) if field.name in content}


def check_policy(policy: PolicyConfig, given: Mapping[str, Any], where: str) -> None:
    """Hold settings against the policy that a checkpoint is.

    Cameras have to be as many; their names are those of the data, but the same names stay in their order. How examples
    are cut and padded in training (`tail`, `film_mean`) may be another thing.

    Raises:
        ConfigError: the settings that are not the checkpoint's.
    """
    problems = [
        f"policy.{key}={_as_word(given[key])} is not what {where} was trained with ({_as_word(getattr(policy, key))})"
        for key in _COMPARED
        if key in given and not _agrees(key, given[key], policy)
    ]
    if problems:
        raise ConfigError(problems)


def _agrees(key: str, asked: Any, policy: PolicyConfig) -> bool:
    if key == "cameras":
        renamed = set(asked) != set(policy.cameras)
        return len(asked) == len(policy.cameras) and (renamed or list(asked) == policy.cameras)
    if key == "decoding":  # with a head that regresses it is parallel, whatever is said
        return PolicyConfig(head=policy.head, decoding=asked).parallel == policy.parallel
    return bool(asked == getattr(policy, key))


def _as_word(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(value)}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def checkpoint_folder(name: str) -> Path:
    """Return a checkpoint's local folder; one of OpenVLA-OFT's may be without `config.json`."""
    return folder if is_oft(folder := _local(name)) else resolve_checkpoint(name)


def _local(name: str) -> Path:
    return Path(name).expanduser() if name.startswith("~/") else Path(name)


def _told(folder: Path, given: Mapping[str, Any]) -> Path:
    """Return a checkpoint that says nothing of its policy as the one that is given: tokens, all at once."""
    policy = PolicyConfig(**given)
    if policy.head != "tokens" or policy.state or policy.film:
        lacking = "head" if policy.head != "tokens" else "state" if policy.state else "film"
        raise ConfigError(
            f"policy.{lacking} asks for a module that {folder} does not have: it is neither a policy of vlaft's nor"
            " one of OpenVLA-OFT's"
        )
    if not policy.parallel:
        if policy == PolicyConfig():
            return folder
        raise ConfigError(
            f"{folder} says nothing of a policy: policy.decoding=parallel, with policy.chunk, makes it one that writes"
            " tokens all at once"
        )
    if missing := [key for key in _ASKED if key not in given]:
        raise CheckpointError(_missing(folder, missing))
    return _with_policy(folder, Policy(**asdict(policy)))


def _with_policy(folder: Path, policy: Policy) -> Path:
    """Return a checkpoint in our own layout with another policy in its `config.json`."""
    key = {"files": {path.name: stamp(path) for path in sorted(folder.iterdir())}, "policy": asdict(policy)}

    def write(target: Path) -> None:
        config = read_json(folder / "config.json", CheckpointError) | {"policy": asdict(policy)}
        for path in folder.iterdir():
            if path.is_file() and path.name != "config.json":
                (target / path.name).symlink_to(path.resolve())
        write_json(target / "config.json", config)

    return _cached(folder, key, 0, write)


def _policy_of(source: OftFolder, given: Mapping[str, Any]) -> Policy:
    """Return what a policy of OpenVLA-OFT's reads and writes, by its files, its `config.json`, and what is given.

    Raises:
        CheckpointError: what no file tells is not given.
        ConfigError: what is given is not what the files tell.
    """
    head: dict[str, Any] = {"head": "l1" if source.head else "tokens", "decoding": "parallel"}
    told = head | {"state": bool(source.projector), "film": source.vision is not None}
    check_policy(Policy(**told, **{key: given[key] for key in _ASKED if key in given}), given, str(source.folder))
    recorded = recorded_policy(source.folder)
    if recorded is not None:
        check_policy(recorded, told, str(source.folder))
        check_policy(recorded, given, str(source.folder))
        given = asdict(recorded) | dict(given)
    if missing := [key for key in _ASKED if key not in given]:
        raise CheckpointError(_missing(source.folder, missing))
    sizes = {"action_size": source.action_size, "state_size": source.state_size}
    return Policy(**dict(given) | told | sizes)


def _missing(folder: Path, keys: list[str]) -> str:
    words = " ".join(f"policy.{key}={_ASKED[key]}" for key in keys)
    named = " and ".join(f"policy.{key}" for key in keys)
    return f"{folder}: nothing there says {named}, which its training had in flags: say it, as in {words}"


def _as_plain(source: OftFolder, given: Mapping[str, Any], base: str | None) -> Path:
    """Return a folder of OpenVLA-OFT's in our own layout, from the cache where it has been made before."""
    policy = _policy_of(source, given)
    weights = weights_of(source, base)
    names = {*source.files.values(), *weights.glob("*.safetensors*"), *weights.glob("*.json")}
    names |= set(source.folder.glob("*.json"))
    if source.adapter is not None:
        names |= set(source.adapter.iterdir())
    key = {"files": {str(path.resolve()): stamp(path) for path in sorted(names)}, "policy": asdict(policy)}
    overlay = _overlay(source, weights)
    files = {entry.file for name, entry in tensor_table(weights).items() if name in overlay.changes}
    size = sum(path.stat().st_size for path in source.files.values())
    size += 2 * sum((weights / file).stat().st_size for file in files)  # at most: in float32 where it was in half
    return _cached(
        source.folder, key, size, lambda target: _write_plain(source, weights, policy, target, overlay, link=True)
    )


def _cached(folder: Path, key: Mapping[str, Any], size: int, write: Callable[[Path], None]) -> Path:
    """Return the folder in the cache that `write` makes, unless it is there already.

    Args:
        folder: what it is made from.
        key: all that its content depends on.
        size: bytes that are written.
        write: called with the folder to write into.
    """
    text = json.dumps([_VERSION, str(folder.resolve()), key], sort_keys=True)
    place = cache_folder("policies") / f"{folder.resolve().name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if not (place / "config.json").is_file():
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with output_folder(place, size, overwrite=True) as partial:
                write(partial)
        except OSError as error:
            raise VlaftError(f"{place}: cannot be written ({error.strerror or error}); set XDG_CACHE_HOME") from None
        except VlaftError:
            if not (place / "config.json").is_file():  # else another process was faster
                raise
    return place


def import_oft(
    name: str,
    target: Path,
    given: Mapping[str, Any] | None = None,
    *,
    base: str | None = None,
    link: bool = False,
    advance: Callable[[int], None] = lambda count: None,
) -> Policy:
    """Write a folder of OpenVLA-OFT's into `target`, in our own layout, and return what it reads and writes.

    Args:
        name: a folder or a Hub id.
        target: an existing, empty folder.
        given: as `policy_folder` takes it.
        base: likewise.
        link: link to what stays as it is, instead of copying it.
        advance: called with the bytes of the weights that were written.

    Raises:
        CheckpointError, ConfigError: as `policy_folder`.
    """
    source = OftFolder.open(checkpoint_folder(name))
    policy, weights = _policy_of(source, RELEASED.get(name, {}) | dict(given or {})), weights_of(source, base)
    _write_plain(source, weights, policy, target, _overlay(source, weights), link=link, advance=advance)
    return policy


def weights_of(source: OftFolder, base: str | None = None) -> Path:
    """Return the folder of the weights that the policy's own files go with: its own, or the base of its adapter.

    Raises:
        CheckpointError: neither is there.
    """
    if source.merged:
        if not (source.folder / "config.json").is_file():
            raise CheckpointError(f"{source.folder}: config.json is missing; copy or download it again")
        return source.folder
    if source.adapter is None:
        raise CheckpointError(
            f"{source.folder}: a head without its model: neither merged weights (model.safetensors) nor lora_adapter"
            " are here; copy or download all of it"
        )
    named = base or read_json(source.adapter / ADAPTER_CONFIG, CheckpointError).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise CheckpointError(f"{source.adapter} does not say on which base it was trained; give it with --base")
    return resolve_checkpoint(named)


@dataclass(frozen=True)
class _Overlay:
    """What is another than in the folder of the weights.

    Attributes:
        changes: by name.
        dtypes: of those that are no longer of the type that they have there.
    """

    changes: dict[str, Change]
    dtypes: dict[str, torch.dtype]


def _overlay(source: OftFolder, weights: Path) -> _Overlay:
    """Return what the files beside the weights change of these.

    Upstream's adapter is found under other names where a backbone has FiLM, so that upstream merges the rest alone: the
    backbone is in a file of its own then, its adapters unmerged. They are folded in here in float32, so that nothing
    is rounded away that upstream keeps.
    """
    vision, found = source.vision, {}
    if not source.merged and source.adapter is not None:
        rest = ("language_model.", "projector.") if vision else ("",)
        found = changes(Trained(source.adapter, None), weights, only=lambda name: name.startswith(rest))
    if vision is None:
        return _Overlay(found, {})
    settings = None
    if source.adapter is not None:
        content = read_json(source.adapter / ADAPTER_CONFIG, CheckpointError)
        settings = StoredSettings.from_json(content, str(source.adapter))
    for name, weight in vision.weights.items():
        found[name] = Change(tuple(weight.shape), partial(_folded, vision, name, settings))
    learned = {name for name, (_, b) in vision.adapters.items() if bool(b.any())}
    dtypes = {name: torch.float32 if name in learned else weight.dtype for name, weight in vision.weights.items()}
    return _Overlay(found, dtypes)


def _folded(vision: Vision, name: str, settings: StoredSettings | None) -> Tensor:
    """Return a weight with its adapter in it; without settings at hand, by the factor that upstream always has."""
    weight = vision.weights[name]
    if name not in vision.adapters:
        return weight
    a, b = vision.adapters[name]
    rank = len(a)
    scaling = min(rank, 16) / rank if settings is None else scaling_of(name.removesuffix(".weight"), rank, settings)
    return ModuleAdapter(a, b, scaling).merged(weight.float())


def _write_plain(
    source: OftFolder,
    weights: Path,
    policy: Policy,
    target: Path,
    overlay: _Overlay,
    *,
    link: bool,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Write a policy in our own layout.

    Args:
        source: whose it is.
        weights: folder of its merged weights, or of its base.
        policy: what it reads and writes.
        target: an existing, empty folder.
        overlay: what of the weights is another.
        link: link to what stays as it is instead of copying it.
        advance: called with the bytes of the weights that were written.
    """

    def take(path: Path) -> None:
        if link:
            (target / path.name).symlink_to(path.resolve())
        else:
            shutil.copyfile(path, target / path.name)

    for name in RELEASE_FILES:
        place = next((folder / name for folder in (source.folder, weights) if (folder / name).is_file()), None)
        if place is not None:
            take(place)
    _write_weights(weights, target, overlay, take, advance)
    tensors = source.policy_tensors()
    write_policy_files(target, {name: tensor.contiguous() for name, tensor in tensors.items()})
    place = source.folder if (source.folder / "config.json").is_file() else weights
    config = read_json(place / "config.json", CheckpointError) | {"policy": asdict(policy)}
    if not isinstance(config.get("image_pipeline"), Mapping):
        # As upstream prepares frames: Lanczos, and the centre of those that it was trained on random crops of.
        pipeline = replace(ImagePipeline.for_training(config, preprocessor_of(target)), jpeg="resized").to_json()
        config["image_pipeline"] = pipeline | {"center_crop": bool(config.get("center_crop", True))}
    statistics = read_statistics(source.folder, BOUNDS)  # those in `config.json` are still the base's
    _check_sizes(source, policy, statistics)
    config["norm_stats"] = statistics
    write_json(target / STATISTICS_FILE, statistics)
    write_json(target / "config.json", config)


def _check_sizes(source: OftFolder, policy: Policy, statistics: Mapping[str, Any]) -> None:
    """Hold the widths of head and projector against the statistics that turn their numbers into the robot's units.

    Raises:
        CheckpointError: they are of another robot.
    """
    for name, entry in statistics.items():
        parts = {"action": ("actions", policy.action_size), "proprio": ("states", policy.state_size)}
        for key, (word, size) in parts.items():
            count = len(entry[key]["q01"]) if key in entry else size
            if size is not None and count != size:
                raise CheckpointError(
                    f"{source.folder / STATISTICS_FILE}: the {word} of '{name}' have {count} dimensions, and the"
                    f" policy's {size}"
                )


def _write_weights(
    weights: Path, target: Path, overlay: _Overlay, take: Callable[[Path], None], advance: Callable[[int], None]
) -> None:
    """Write the shards in which a tensor is another, and take the others as they are."""
    table, changed = tensor_table(weights), overlay.changes
    if odd := [name for name in changed if name not in table or table[name].shape != changed[name].shape]:
        raise CheckpointError(f"{weights}: '{odd[0]}' is not as the policy's own files have it; give the right --base")
    by_file: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in table.items():
        by_file.setdefault(entry.file, {})[name] = entry
    for file, entries in by_file.items():
        if not any(name in changed for name in entries):
            take(weights / file)
            advance((weights / file).stat().st_size)
            continue
        kinds = {name: overlay.dtypes.get(name, DTYPES[entry.dtype]) for name, entry in entries.items()}
        layout = {name: (TYPE_NAMES[kinds[name]], entry.shape) for name, entry in entries.items()}
        with ShardWriter(target / file, layout) as out:
            for name, entry in entries.items():
                made = changed[name].load() if name in changed else read_tensor(weights, entry)
                if isinstance(made, ModuleAdapter):
                    made = made.merged(read_tensor(weights, entry))
                out.write(name, made.to(kinds[name]))
                advance(entry.end - entry.begin)
    if (weights / INDEX_FILE).is_file():
        size = sum(entry.end - entry.begin for file in by_file for entry in read_header(target / file).values())
        weight_map = {name: table[name].file for name in sorted(table)}
        write_json(target / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": weight_map})
