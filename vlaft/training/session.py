"""From a recipe to a model that is ready to train: the base in the recipe's precision, with what it trains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from vlaft.adapt import adapt
from vlaft.adapt.quantize import quantization_config
from vlaft.config import PrecisionConfig, RecipeConfig
from vlaft.model.openvla import OpenVLAForActionPrediction
from vlaft.model.vision import AttentionPool, VisionTransformer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_trainable(
    recipe: RecipeConfig, precision: PrecisionConfig, folder: Any, device: torch.device
) -> tuple[nn.Module, ParameterCount]:
    """Load a base and make it trainable as the recipe says.

    Args:
        recipe: resolved settings.
        precision: number formats without `auto`.
        folder: the base's local folder.
        device: where to put the model.

    Returns:
        The model, and its parameters counted, those that no loss reaches included.
    """
    from vlaft.model.checkpoint import load_model

    quantization = quantization_config(recipe.adapt, DTYPES[precision.compute])
    model = load_model(folder, dtype=DTYPES[precision.frozen], device=device, quantization=quantization)
    trainable = _adapt_and_cast(model, recipe, precision)
    count = count_parameters(trainable)
    _prepare_passes(model, recipe)
    return trainable, count


def make_trainable(model: OpenVLAForActionPrediction, recipe: RecipeConfig, precision: PrecisionConfig) -> nn.Module:
    """Add adapters or unfreeze, cast what is trained, and set up recomputation, in place.

    Parameters that no loss reaches (last ViT blocks, final norms, pooling head and adapters on them) are frozen:
    the optimizer would skip them anyway, and with several GPUs they would stall it.
    """
    trainable = _adapt_and_cast(model, recipe, precision)
    _prepare_passes(model, recipe)
    return trainable


def _adapt_and_cast(model: OpenVLAForActionPrediction, recipe: RecipeConfig, precision: PrecisionConfig) -> nn.Module:
    trainable = adapt(model, recipe.adapt, upcast=precision.trained == "float32")
    for parameter in trainable.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(DTYPES[precision.trained])
    return trainable


def _prepare_passes(model: OpenVLAForActionPrediction, recipe: RecipeConfig) -> None:
    for module in unreached_modules(model):
        module.requires_grad_(False)
    if recipe.train.gradient_checkpointing != "none":
        every = 1 if recipe.train.gradient_checkpointing == "all" else int(recipe.train.gradient_checkpointing)
        recompute_blocks(model, every)


def unreached_modules(model: OpenVLAForActionPrediction) -> Iterator[nn.Module]:
    """Yield the modules that the release stores and no forward pass runs."""
    for module in model.modules():
        if isinstance(module, VisionTransformer):
            yield from (module.blocks[-1], module.norm)
        elif isinstance(module, AttentionPool):
            yield module


def recompute_blocks(model: OpenVLAForActionPrediction, every: int) -> None:
    """Store only the input of every `every`-th transformer block and recompute the rest in the backward pass."""
    function = partial(checkpoint, use_reentrant=False)  # reentrant would lose gradients behind frozen inputs
    stacks = [vit.live_blocks for vit in model.vision_backbone.featurizers]
    for stack in [*stacks, list(model.language_model.model.layers)]:
        for index, block in enumerate(stack):
            assert isinstance(block, GradientCheckpointingLayer)
            if index % every == 0:
                block.gradient_checkpointing = True
                block._gradient_checkpointing_func = function


@dataclass(frozen=True)
class ParameterCount:
    """How many parameters are trained, and how many there are, adapters included."""

    trainable: int
    total: int


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count a model's parameters; packed 4-bit weights count as what they stand for."""
    trainable = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        count = parameter.numel() if state is None else state.shape.numel()
        total += count
        trainable += count if parameter.requires_grad else 0
    return ParameterCount(trainable, total)


def trained_names(model: nn.Module) -> list[str]:
    """Return the names of the trainable parameters."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
