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
from vlaft.accounting.meta import example_inputs, example_normalization, meta_model
from vlaft.accounting.step import follow_steps, trace_step
from vlaft.adapt.methods import SKIPPED
from vlaft.errors import MissingExtra, VlaftError
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
    if recipe.adapt.quantize != "none":
        _quantize(model, recipe, device)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                values = torch.empty_like(parameter, device=device).normal_(std=0.02)
                setattr(module, name, nn.Parameter(values))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                setattr(module, name, torch.zeros_like(buffer, device=device))
    return model


def _quantize(model: Any, recipe: RecipeConfig, device: torch.device) -> None:
    """Put bitsandbytes' layers where `quantization_config` would."""
    try:
        from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
    except ImportError:
        raise MissingExtra(f"adapt.quantize={recipe.adapt.quantize}", "bitsandbytes", "qlora") from None
    four = recipe.adapt.quantize == "nf4"
    compute = PRECISIONS[resolve_precision(recipe.precision, device.type == "cuda").compute]
    for name, module in list(model.named_modules()):
        for child_name, child in list(module.named_children()):
            if type(child) is not nn.Linear or any(skipped in f"{name}.{child_name}" for skipped in SKIPPED):
                continue
            weight = torch.empty(child.weight.shape, dtype=child.weight.dtype, device=device).normal_(std=0.02)
            bias = child.bias is not None
            layer: Any
            with torch.device("meta"):
                if four:
                    layer = Linear4bit(
                        child.in_features,
                        child.out_features,
                        bias=bias,
                        compute_dtype=compute,
                        compress_statistics=recipe.adapt.double_quant,
                        quant_type="nf4",
                    )
                else:
                    layer = Linear8bitLt(
                        child.in_features, child.out_features, bias=bias, has_fp16_weights=False, threshold=6.0
                    )
            layer.bias = child.bias
            if four:
                packed = Params4bit(
                    weight,
                    requires_grad=False,
                    compress_statistics=recipe.adapt.double_quant,
                    quant_type="nf4",
                    module=layer,
                )
            else:
                packed = Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)  # moving quantises
            layer.weight = packed.to(device)
            setattr(module, child_name, layer)
    setattr(model, "is_loaded_in_4bit" if four else "is_loaded_in_8bit", True)  # how peft chooses its layer


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
        model = make_trainable(base, recipe, precision)
        optimizer = build_optimizer(model, recipe.train, recipe.adapt.lora.plus_ratio)
        inputs = example_inputs(config, batch_size=batch_size, tokens=tokens, labels=LABELS, device=device)
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
