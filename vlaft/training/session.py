"""From a recipe to a model that is ready to train: the base in the recipe's precision, with what it trains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
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
    if recipe.train.compile:
        compile_blocks(model)
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
    for module in model.modules():
        if isinstance(module, LoraLayer):
            # Forward passes run under autocast, which casts for each product. peft's own cast to the adapter's float32
            # before it changes no number, but gives every adapter a bfloat16 copy of its own of an input that it
            # shares with its neighbours, kept for the backward pass: 14 % of the activations of lora32.
            module.cast_input_dtype_enabled = False
    policy = recipe.train.gradient_checkpointing
    if policy != "none":
        recompute_blocks(model, {"vision": None, "all": 1}[policy] if isinstance(policy, str) else policy)


def compile_blocks(model: OpenVLAForActionPrediction) -> None:
    """Compile each transformer block for itself, in place.

    The blocks of a stack are alike, so one compilation serves them all and the start takes about a minute instead of
    the whole model's many. Prompt lengths vary from batch to batch, hence dynamic shapes.
    """
    stacks = [vit.live_blocks for vit in model.vision_backbone.featurizers]
    for stack in [*stacks, list(model.language_model.model.layers)]:
        for block in stack:
            block.compile(dynamic=True)


def unreached_modules(model: OpenVLAForActionPrediction) -> Iterator[nn.Module]:
    """Yield the modules that the release stores and no forward pass runs."""
    for module in model.modules():
        if isinstance(module, VisionTransformer):
            yield from (module.blocks[-1], module.norm)
        elif isinstance(module, AttentionPool):
            yield module


def recompute_blocks(model: OpenVLAForActionPrediction, every: int | None) -> None:
    """Keep only the inputs of some transformer blocks, and run those again in the backward pass.

    The ViTs' blocks come first: a narrow block keeps more bytes per operation that brings them back. On openvla-7b
    they hold a fifth of the activations for a tenth of the operations.

    Args:
        model: the base, adapted or not.
        every: besides the ViTs' blocks, every `every`-th decoder block; None: the ViTs' alone.
    """
    function = partial(checkpoint, use_reentrant=False)  # reentrant would lose gradients behind frozen inputs
    blocks = [block for vit in model.vision_backbone.featurizers for block in vit.live_blocks]
    if every is not None:
        blocks += list(model.language_model.model.layers)[::every]
    for block in blocks:
        assert isinstance(block, GradientCheckpointingLayer)
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
