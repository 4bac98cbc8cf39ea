"""From a recipe to a model that is ready to train: the base in the recipe's precision, with what it trains."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from vlaft.adapt import adapt
from vlaft.adapt.methods import quantization_config
from vlaft.adapt.policies import recorded_policy
from vlaft.model.configuration import Policy
from vlaft.model.load import fill_policy, load_model, read_policy_files
from vlaft.model.openvla import OpenVLAForActionPrediction
from vlaft.model.vision import AttentionPool, VisionTransformer
from vlaft.recipe.settings import PrecisionConfig, RecipeConfig

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_trainable(
    recipe: RecipeConfig,
    precision: PrecisionConfig,
    folder: Any,
    device: torch.device,
    policy: Policy | None = None,
) -> tuple[nn.Module, tuple[int, int]]:
    """Load a base and make it trainable as the recipe says.

    Args:
        recipe: resolved settings.
        precision: number formats without `auto`.
        folder: the base's local folder.
        device: where to put the model.
        policy: what it is to read and write; None leaves it as the base is. Modules that the base has of its own, being
            a policy already, begin with its tensors.

    Returns:
        The model, and how many parameters are trained (those that no loss reaches included) and how many there are.
    """
    quantization = quantization_config(recipe.adapt, PRECISIONS[precision.compute])
    frozen = PRECISIONS[precision.frozen]
    model = load_model(folder, dtype=frozen, device=device, quantization=quantization, bare=True)
    begun = recorded_policy(folder)
    trainable = adapt_and_cast(model, recipe, precision, policy or begun)
    if begun is not None:
        fill_policy(model, read_policy_files(folder), str(folder))
    counts = trainable_and_total(trainable)
    prepare_passes(model, recipe)
    if recipe.train.compile:
        compile_blocks(model)
    return trainable, counts


def make_trainable(
    model: OpenVLAForActionPrediction,
    recipe: RecipeConfig,
    precision: PrecisionConfig,
    policy: Policy | None = None,
) -> nn.Module:
    """Add adapters or unfreeze, attach a policy's modules, cast what is trained, and set up recomputation, in place.

    Parameters that no loss reaches (last ViT blocks, final norms, pooling head and adapters on them) are frozen:
    the optimizer would skip them anyway, and with several GPUs they would stall it.
    """
    trainable = adapt_and_cast(model, recipe, precision, policy)
    prepare_passes(model, recipe)
    return trainable


def adapt_and_cast(
    model: OpenVLAForActionPrediction, recipe: RecipeConfig, precision: PrecisionConfig, policy: Policy | None
) -> nn.Module:
    """Add adapters or unfreeze, cast what is trained, and attach a policy's modules, in place."""
    trainable = adapt(model, recipe.adapt, upcast=precision.trained == "float32")
    for parameter in trainable.parameters():
        if parameter.requires_grad:
            parameter.data = _converted(parameter.data, PRECISIONS[precision.trained])
    # The modules of a policy are trained in full and in float32, whatever else is.
    if policy is not None and policy != model.policy:
        model.attach(policy)
    for parameter in model.policy_parameters().values():
        parameter.requires_grad_(True)
    return trainable


def _converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in another type; one number that stands for all of them stays one."""
    if tensor.ndim and not any(tensor.stride()):
        return tensor[(0,) * tensor.ndim].to(dtype).expand(tensor.shape)
    return tensor.to(dtype)


def prepare_passes(model: OpenVLAForActionPrediction, recipe: RecipeConfig) -> None:
    """Freeze what no loss reaches, and set up recomputation, in place."""
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
    for block in chain.from_iterable(model.stacks()):
        block.compile(dynamic=True)


def unreached_modules(model: OpenVLAForActionPrediction) -> Iterator[nn.Module]:
    """Yield the modules that the release stores and no loss reaches."""
    if model.policy.head == "l1":
        yield model.parts()["head"]
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
    *vision, decoder = model.stacks()
    for block in [*chain.from_iterable(vision), *(decoder[::every] if every is not None else ())]:
        assert isinstance(block, GradientCheckpointingLayer)
        block.gradient_checkpointing = True
        block._gradient_checkpointing_func = function


def trainable_and_total(model: nn.Module) -> tuple[int, int]:
    """Return how many parameters are trained and how many there are; packed weights count as what they stand for."""
    trainable = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        count = parameter.numel() if state is None else state.shape.numel()
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


def trained_names(model: nn.Module) -> list[str]:
    """Return the names of the trainable parameters."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model without what copies it over processes."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def base_model(model: nn.Module) -> OpenVLAForActionPrediction:
    """Return the OpenVLA model inside what copies and adapts it."""
    inner = unwrapped(model)
    return inner.get_base_model() if isinstance(inner, PeftModel) else inner  # type: ignore[return-value]
