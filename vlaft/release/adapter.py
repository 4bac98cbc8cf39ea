"""Write an adapter as upstream's stack reads it: peft 0.11.1, which refuses a configuration with keys that it lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from vlaft.action.statistics import STATISTICS_FILE, write_statistics
from vlaft.adapt.adapter import adapter_table, read_adapter_tensors, read_settings
from vlaft.adapt.merging import StoredSettings, sort_parts
from vlaft.errors import CheckFailed, CheckpointError
from vlaft.files import check_apart, output_folder, read_json, write_json
from vlaft.model.configuration import Policy
from vlaft.release.card import write_model_card
from vlaft.release.export import ExportResult, stored_bytes
from vlaft.release.layout import public_name
from vlaft.release.record import base_licence, training_record
from vlaft.weights.layout import is_hub_name, resolve_checkpoint, tensor_table
from vlaft.weights.trained import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Trained, adapter_base, base_metadata

# `LoraConfig` of peft 0.11.1 with its defaults, key for key as it writes them.
_KEYS: dict[str, Any] = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": "",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "task_type": None,
    "use_dora": False,
    "use_rslora": False,
}
_OWN = ("auto_mapping", "inference_mode", "peft_type", "base_model_name_or_path")  # not taken from the source


def export_adapter(trained: Trained, out: Path, *, base: str | None = None, overwrite: bool = False) -> ExportResult:
    """Write a run's adapter to `out` with its configuration, statistics and model card.

    Args:
        trained: an adapter.
        out: written beside its place and renamed into it at the end.
        base: name of the base on the Hub, for those who download the adapter; None takes the run's.
        overwrite: replace what is in `out`.

    Raises:
        CheckpointError: there are whole tensors, the policy is another than the released one, or the adapter is damaged
            or of a kind that peft 0.11.1 cannot read.
        CheckFailed: the exported folder is not what it should be, or does not fit its base.
        VlaftError: `out` is in use, or holds something without `overwrite`, or there is too little room on the disk.
    """
    check_apart(out, [trained.weights])
    if not trained.has_adapter:
        raise CheckpointError(f"{trained.weights} holds trained tensors and no adapter; merge it: vlaft merge")
    if trained.has_tensors:
        raise CheckpointError(
            f"{trained.weights} holds trained tensors besides its adapter, which would be lost; merge it: vlaft merge"
        )
    if Policy.of(trained.inference, str(trained.weights)) != Policy():
        raise CheckpointError(
            f"{trained.weights}: an adapter's folder cannot say what this policy reads and writes, and would act as the"
            " released one; merge it: vlaft merge"
        )
    name = base or trained.base or ""
    settings = read_settings(trained.weights)
    config = _KEYS | {key: settings[key] for key in _KEYS if key in settings and key not in _OWN}
    config["base_model_name_or_path"] = public_name(name) if name else ""
    if config["target_modules"] is None:
        raise CheckpointError(f"{trained.weights / ADAPTER_CONFIG}: target_modules is missing")
    if not isinstance(config["init_lora_weights"], bool) and config["init_lora_weights"] != "gaussian":
        config["init_lora_weights"] = True  # of no consequence: the values are loaded
    if isinstance(config["lora_alpha"], float) and config["lora_alpha"].is_integer():
        config["lora_alpha"] = int(config["lora_alpha"])
    tensors = read_adapter_tensors(trained.weights)
    sort_parts(StoredSettings.from_json(settings, str(trained.weights)), _shapes(trained.weights))
    size = sum(tensor.nbytes for tensor in tensors.values())
    fingerprint, checksums = adapter_base(trained.weights)
    fingerprint, checksums = trained.base_fingerprint or fingerprint, trained.base_checksums or checksums
    with output_folder(out, size, overwrite=overwrite) as partial:
        save_file(tensors, partial / ADAPTER_WEIGHTS, metadata=base_metadata(fingerprint, checksums))
        write_json(partial / ADAPTER_CONFIG, dict(sorted(config.items())))
        if trained.statistics:
            write_statistics(partial / STATISTICS_FILE, trained.statistics)
        folder = _local_base(name)
        _check(partial, trained.weights, folder)
        record = {"base": name, "training": training_record(trained)}
        record["base_licence"] = base_licence(name, folder or Path())
        content = (read_json(folder / "config.json", CheckpointError) if folder else {}) | dict(trained.inference)
        write_model_card(partial, "adapter", trained.statistics, record, content)
    return ExportResult(out, size, stored_bytes(adapter_table(trained.weights).values()))


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {name: entry.shape for name, entry in adapter_table(folder).items()}


def _local_base(name: str) -> Path | None:
    """Return the base's folder where it is on this machine; nothing is downloaded for a check."""
    if not name or is_hub_name(name):
        return None
    try:
        return resolve_checkpoint(name)
    except CheckpointError:
        return None


def _check(folder: Path, source: Path, base: Path | None) -> None:
    """Read the exported folder back and hold it against the source and, where it is at hand, the base."""
    config = read_json(folder / ADAPTER_CONFIG, CheckpointError)
    if set(config) != set(_KEYS):
        raise CheckFailed(f"the exported adapter is not right: {ADAPTER_CONFIG} has other keys than peft 0.11.1's")
    before, after = adapter_table(source), adapter_table(folder)
    if {name: (e.dtype, e.shape) for name, e in before.items()} != {
        name: (e.dtype, e.shape) for name, e in after.items()
    }:
        raise CheckFailed("the exported adapter is not right: its tensors are not those of the source")
    parts = sort_parts(StoredSettings.from_json(config, str(folder)), _shapes(folder))
    if base is not None:
        table = tensor_table(base)
        for name, part in parts.items():
            if name not in table or table[name].shape != part.shape:
                raise CheckFailed(f"the exported adapter does not fit {base}: '{name}' is not of its shape there")
