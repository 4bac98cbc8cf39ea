"""Real training steps on random weights: what the prediction is held against.

On a GPU the measure is PyTorch's own (`max_memory_allocated`). Elsewhere it is the storage tracker's, and the
prediction that goes with it is one for that device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vlaft.accounting.costs import Measurement, RecipeCost
from vlaft.accounting.memory import LABELS
from vlaft.accounting.meta import example_normalization, meta_model, usual_policy
from vlaft.accounting.step import follow_steps, step_inputs, trace_step
from vlaft.adapt.methods import SKIPPED, quantization_config
from vlaft.errors import VlaftError
from vlaft.model.configuration import OpenVLAConfig
from vlaft.recipe.settings import RecipeConfig, resolve_precision
from vlaft.training.model import PRECISIONS, make_trainable
from vlaft.training.optimizer import build_optimizer
from vlaft.training.step import forward

_STEPS = 3


def random_base(config: OpenVLAConfig, recipe: RecipeConfig, dtype: torch.dtype, device: torch.device) -> Any:
    """Return a base with random weights on a device, quantised as the recipe says, one layer at a time.

    Raises:
        MissingExtra: a quantised recipe without bitsandbytes.
    """
    model = meta_model(config, dtype)
    compute = PRECISIONS[resolve_precision(recipe.precision, device.type == "cuda").compute]
    if (quantization := quantization_config(recipe.adapt, compute)) is not None:
        from transformers.integrations import replace_with_bnb_linear

        replace_with_bnb_linear(model, list(SKIPPED), quantization)
        # how peft chooses its layer
        setattr(model, "is_loaded_in_4bit" if recipe.adapt.quantize == "nf4" else "is_loaded_in_8bit", True)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                values = torch.empty(parameter.shape, dtype=dtype, device=device).normal_(std=0.02)
                setattr(module, name, _filled(parameter, values))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                setattr(module, name, torch.zeros_like(buffer, device=device))
    return model


def _filled(parameter: nn.Parameter, values: torch.Tensor) -> nn.Parameter:
    """Return a parameter of the same kind with these values; bitsandbytes' kinds are packed when they are moved."""
    if type(parameter) is nn.Parameter:
        return nn.Parameter(values)
    packed: Any = type(parameter)(values.cpu(), requires_grad=False, **vars(parameter))
    return packed.to(values.device)  # type: ignore[no-any-return]


def measure(recipe: RecipeConfig, config: OpenVLAConfig, cost: RecipeCost, device: torch.device) -> Measurement:
    """Run real steps of a recipe on random weights and measure the peak.

    Args:
        recipe: resolved settings.
        config: of the base.
        cost: the prediction; its batch size and tokens are used.
        device: where to run; a CPU takes small bases only.

    Raises:
        VlaftError: the GPU's memory is not enough.
    """
    on_gpu = device.type == "cuda"
    precision = resolve_precision(recipe.precision, on_gpu)
    batch_size, tokens = cost.memory.batch_size, cost.memory.tokens
    torch.manual_seed(recipe.train.seed)
    try:
        base = random_base(config, recipe, PRECISIONS[precision.frozen], device)
        policy = usual_policy(recipe, config)
        model = make_trainable(base, recipe, precision, policy)
        optimizer = build_optimizer(model, recipe.train, recipe.adapt.lora.plus_ratio)
        inputs = step_inputs(config, policy, batch_size=batch_size, tokens=tokens, labels=LABELS, device=device)
        normalization = example_normalization(config)
        if not on_gpu:
            real = follow_steps(model, optimizer, inputs, normalization, recipe, precision)
            (predicted,), _ = trace_step(
                recipe, config, batch_sizes=[batch_size], tokens=tokens, labels=LABELS, on_gpu=False
            )
            return Measurement(real.at_peak()[0], predicted.at_peak()[0], 0, "live tensors", str(device))
        torch.cuda.reset_peak_memory_stats(device)
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        generator = torch.Generator().manual_seed(0) if recipe.data.augment else None
        model.train()
        for _ in range(_STEPS):
            for _ in range(min(recipe.train.accumulation, 2)):
                output = forward(model, inputs, normalization, PRECISIONS[precision.compute], generator)
                assert output.loss is not None
                (output.loss / recipe.train.accumulation).backward()
            if recipe.train.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(learning, recipe.train.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        predicted_bytes = cost.memory.allocated
        if recipe.train.optimizer == "paged-adamw-8bit":
            predicted_bytes -= cost.memory.terms["optimizer state"]  # in managed memory, which PyTorch does not count
        return Measurement(
            torch.cuda.max_memory_allocated(device),
            predicted_bytes,
            torch.cuda.max_memory_reserved(device),
            "torch.cuda.max_memory_allocated",
            torch.cuda.get_device_name(device),
        )
    except torch.cuda.OutOfMemoryError:
        raise VlaftError(
            f"{recipe.name} at batch size {batch_size} does not fit this GPU; name a smaller one with --batch-size"
        ) from None


def measured(
    recipes: Sequence[RecipeConfig], config: OpenVLAConfig, costs: Sequence[RecipeCost], device: torch.device
) -> list[RecipeCost]:
    """Return the costs with a measurement each."""
    found = []
    for recipe, cost in zip(recipes, costs, strict=True):
        found.append(replace(cost, measurement=measure(recipe, config, cost, device)))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found
