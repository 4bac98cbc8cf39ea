"""PiSSA (Meng et al. 2024): adapters that start as a weight's largest singular directions.

The base then holds the rest, W - s B0 A0, so that the model begins unchanged. An adapter of rank r trained that way
is stored as a plain one of rank 2r on the base as released, because s (B A - B0 A0) = s [B, -B0] [A; A0]: whoever
reads it needs to know nothing of PiSSA, and both pairs of factors are there to continue from.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from vlaft.adapt.adapter import read_adapter_tensors, write_adapter
from vlaft.errors import CheckpointError
from vlaft.weights.layout import tensor_table
from vlaft.weights.stream import read_tensor

_NAME = "default"  # peft's name of the only adapter
_POWER_ITERATIONS = 16  # of the randomised decomposition; the paper's figures use as many


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Yield name and layer of every linear layer whose adapter is trained and smaller than the weight.

    Convolutions, layers that no loss reaches, and weights smaller than the rank keep the usual start (B = 0).
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or _NAME not in layer.lora_A:
            continue
        base, matrix = layer.get_base_layer(), layer.lora_A[_NAME].weight
        if isinstance(base, nn.Linear) and matrix.requires_grad and layer.r[_NAME] <= min(base.weight.shape):
            yield name, layer


@torch.no_grad()
def initialise(model: PeftModel) -> dict[str, Tensor]:
    """Move the largest singular directions from the base into the adapters, in place.

    Returns:
        The adapter's tensors as training begins, on the CPU, by peft's names.
    """
    for _, layer in adapted_layers(model):
        base, rank, scaling = layer.get_base_layer(), layer.r[_NAME], layer.scaling[_NAME]
        weight = base.weight.float()
        width = min(2 * rank, *weight.shape)  # more directions than needed make the needed ones accurate
        left, values, right = torch.svd_lowrank(weight, q=width, niter=_POWER_ITERATIONS)
        root = (values[:rank] / scaling).sqrt()
        layer.lora_B[_NAME].weight.copy_(left[:, :rank] * root)
        layer.lora_A[_NAME].weight.copy_((right[:, :rank] * root).T)
        _subtract(layer, base.weight)
    return _state(model)


def _subtract(layer: LoraLayer, weight: Tensor) -> None:
    base = layer.get_base_layer()
    product = layer.lora_B[_NAME].weight.float() @ layer.lora_A[_NAME].weight.float()
    base.weight.copy_(weight.float() - layer.scaling[_NAME] * product)


def _state(model: PeftModel) -> dict[str, Tensor]:
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}


def save_converted(
    model: PeftModel,
    initial: dict[str, Tensor],
    folder: Path,
    fingerprint: str | None,
    checksums: str | None = None,
) -> None:
    """Write the adapter as a plain one of twice the rank into the existing `folder`.

    Args:
        model: trained on the base without `initial`.
        initial: what `initialise` returned.
        folder: where to write.
        fingerprint: of the base as released.
        checksums: of its tensors.
    """
    tensors = {}
    for name, now in _state(model).items():
        if ".lora_A." in name:
            tensors[name] = torch.cat([now, initial[name]], dim=0)
        elif ".lora_B." in name:
            tensors[name] = torch.cat([now, -initial[name]], dim=1)
        else:  # DoRA's magnitudes
            tensors[name] = now
    config = model.peft_config[_NAME].to_dict()
    scaling = next(layer.scaling[_NAME] for layer in model.modules() if isinstance(layer, LoraLayer))
    rank = 2 * config["r"]
    config |= {"r": rank, "lora_alpha": scaling * rank, "use_rslora": False, "init_lora_weights": True}
    write_adapter(folder, tensors, config, fingerprint, checksums)


@torch.no_grad()
def load_converted(model: PeftModel, folder: Path, base: Path) -> dict[str, Tensor]:
    """Continue from what `save_converted` wrote: set the adapters, and take their start out of the base again.

    Args:
        model: its linear weights may be changed already; they are read anew.
        folder: with the adapter.
        base: the base's folder.

    Returns:
        The adapter's tensors as training began.

    Raises:
        CheckpointError: the adapter is of another model or rank.
    """
    stored, expected = read_adapter_tensors(folder), _state(model)
    current, initial = {}, {}
    for name, tensor in stored.items():
        side = 0 if ".lora_A." in name else 1 if ".lora_B." in name else None
        if side is None:
            current[name] = initial[name] = tensor
        else:
            half = tensor.shape[side] // 2
            current[name], begun = (part.contiguous() for part in tensor.split(half, dim=side))
            initial[name] = begun if side == 0 else -begun
    if {name: tensor.shape for name, tensor in current.items()} != {
        name: tensor.shape for name, tensor in expected.items()
    }:
        raise CheckpointError(f"{folder}: this adapter belongs to another base, rank or initialisation")
    table = tensor_table(base)
    set_peft_model_state_dict(model, initial)
    for name, layer in adapted_layers(model):
        weight = layer.get_base_layer().weight
        original = read_tensor(base, table[f"{name.removeprefix('base_model.model.')}.weight"])
        _subtract(layer, original.to(device=weight.device, dtype=weight.dtype))
    set_peft_model_state_dict(model, current)
    return initial
