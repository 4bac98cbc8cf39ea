"""Adapters on disk, in peft's layout: `adapter_config.json` and `adapter_model.safetensors`.

* Upstream's own script also stores the frozen head as `...lm_head.base_layer.weight`; it is skipped on reading.
* vlaft's adapters carry the fingerprint of the base that they were trained on, and its tensors' checksums, in the
  safetensors metadata, which every other reader ignores.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from vlaft.errors import CheckpointError
from vlaft.files import read_json
from vlaft.weights.layout import TensorEntry, read_header
from vlaft.weights.trained import ADAPTER_CONFIG, ADAPTER_WEIGHTS, base_metadata

if TYPE_CHECKING:  # peft is loaded where it is used: merging needs none of it
    import torch
    from peft import LoraConfig, PeftModel
    from torch import nn

PREFIX = "base_model.model."
_BASE_LAYER = ".base_layer."


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return a model's parameters under the base's names: peft keeps those of an adapted layer in its `base_layer`."""
    found = {name.removeprefix(PREFIX): parameter for name, parameter in model.named_parameters()}
    return {name.replace(_BASE_LAYER, "."): parameter for name, parameter in found.items()}


def read_settings(folder: Path) -> dict[str, Any]:
    """Read `adapter_config.json` as it is.

    Raises:
        CheckpointError: missing or damaged, or not a LoRA adapter.
    """
    content = read_json(folder / ADAPTER_CONFIG, CheckpointError)
    if content.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: peft_type is '{content.get('peft_type')}', expected 'LORA'")
    return content


def adapter_table(folder: Path) -> dict[str, TensorEntry]:
    """List an adapter's own tensors, without the frozen copies that some writers add.

    Raises:
        CheckpointError: missing or damaged.
    """
    return {name: entry for name, entry in read_header(folder / ADAPTER_WEIGHTS).items() if _BASE_LAYER not in name}


def read_adapter_config(folder: Path) -> LoraConfig:
    """Read an adapter's configuration; fields of other peft versions are ignored.

    Raises:
        CheckpointError: missing or damaged, or not a LoRA adapter.
    """
    from peft import LoraConfig

    content = read_settings(folder)
    known = set(LoraConfig.__dataclass_fields__)
    # `auto_mapping` names upstream's remote code; nothing here imports it, so it is dropped.
    kept = {key: value for key, value in content.items() if key in known - {"auto_mapping", "peft_type"}}
    try:
        return LoraConfig(**kept)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: {error}") from None


def read_adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read an adapter's own tensors, without the frozen copies that some writers add.

    Raises:
        CheckpointError: missing or damaged.
    """
    table = adapter_table(folder)
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            return {name: file.get_tensor(name) for name in table}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / ADAPTER_WEIGHTS}: {error}") from None


def adapter_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return `model`'s adapter by peft's names; the frozen head is no part of it."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, save_embedding_layers=False)  # type: ignore[no-any-return]


def save_adapter(model: PeftModel, folder: Path, fingerprint: str | None = None, checksums: str | None = None) -> None:
    """Write `model`'s adapter into the existing `folder`."""
    write_adapter(folder, adapter_tensors(model), model.peft_config["default"].to_dict(), fingerprint, checksums)


def write_adapter(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    fingerprint: str | None,
    checksums: str | None,
) -> None:
    """Write an adapter's tensors and peft's `config` of it into the existing `folder`.

    Args:
        folder: where to write.
        tensors: by peft's names.
        config: as peft has it.
        fingerprint: of the base.
        checksums: of the base's tensors.
    """
    from safetensors.torch import save_file

    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        folder / ADAPTER_WEIGHTS,
        metadata=base_metadata(fingerprint, checksums),
    )
    content = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    content |= {"inference_mode": True, "auto_mapping": None}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True, default=str) + "\n")


def load_adapter_weights(
    model: PeftModel,
    folder: Path,
    place: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = lambda tensor, example: tensor,
) -> None:
    """Load an adapter's tensors into `model`, which has an adapter of the same configuration.

    Args:
        model: as said.
        folder: with the adapter.
        place: makes of a whole tensor what takes the place of another, where the model is sharded.

    Raises:
        CheckpointError: the adapter's tensors are not those of this model: it belongs to another base or rank.
    """
    from peft import set_peft_model_state_dict

    found, expected = read_adapter_tensors(folder), adapter_tensors(model)
    odd = sorted(set(found) ^ set(expected))
    if odd:
        raise CheckpointError(
            f"{folder}: this adapter belongs to another base: {len(odd)} tensors differ, first '{odd[0]}'"
        )
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{folder}: this adapter belongs to another base: '{name}' is {tuple(tensor.shape)},"
                f" expected {tuple(expected[name].shape)}"
            )
    set_peft_model_state_dict(model, {name: place(tensor, expected[name]) for name, tensor in found.items()})


def load_adapter(model: Any, folder: Path) -> PeftModel:
    """Attach the adapter in `folder` to `model`, in place, frozen and in eval mode.

    Raises:
        CheckpointError: damaged, or made for another base.
    """
    from peft import get_peft_model

    config = read_adapter_config(folder)
    config.init_lora_weights = True  # the values are loaded next; special initialisations would alter the base
    config.base_model_name_or_path = None  # peft would warn that the base lies elsewhere now
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(is_gradient_checkpointing|tie_word_embeddings).*")
            wrapped = get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: the adapter does not fit this base: {error}") from None
    load_adapter_weights(wrapped, folder)
    return wrapped.requires_grad_(False).eval()
