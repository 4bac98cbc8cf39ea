"""A training step, followed by a tracker: on the meta device to predict, on a real one to check the prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from vlaft.accounting.gpu import DeviceEmulation, GpuOptimizer, in_recomputed_blocks, quantize_stand_in
from vlaft.accounting.meta import (
    ACTION_SIZE,
    META,
    WithoutValues,
    example_inputs,
    example_normalization,
    meta_model,
    usual_policy,
)
from vlaft.accounting.parameters import ParameterCount, count, trained_by
from vlaft.accounting.shards import in_format_of_products
from vlaft.accounting.tracker import ADAPTERS, GRADIENTS, OPTIMIZER, WEIGHTS, StorageTracker, Trace
from vlaft.model.configuration import OpenVLAConfig, Policy
from vlaft.model.heads.tokens import TokenOutput
from vlaft.recipe.settings import PrecisionConfig, RecipeConfig, resolve_precision
from vlaft.training.model import PRECISIONS, make_trainable
from vlaft.training.optimizer import build_optimizer
from vlaft.training.step import Inputs, Normalization, forward

ForwardPass = Callable[..., TokenOutput]  # as `vlaft.training.step.forward`


def trace_step(
    recipe: RecipeConfig,
    config: OpenVLAConfig,
    *,
    batch_sizes: Sequence[int],
    tokens: int,
    labels: int,
    on_gpu: bool = True,
    forward_pass: ForwardPass = forward,
    policy: Policy | None = None,
    sharded: bool = False,
) -> tuple[list[Trace], ParameterCount]:
    """Follow a training step of `recipe` on the meta device, once for each batch size.

    On a GPU, the step is one of many: the optimizer has its state already and, where gradients are accumulated, the
    gradients are there. On a CPU, two steps are run from the start with PyTorch's own optimizer.

    Args:
        recipe: resolved settings.
        config: of the base.
        batch_sizes: examples per forward pass.
        tokens: text tokens per example, actions and end of sequence included.
        labels: of those, the ones with a label.
        on_gpu: whose number formats and kernels.
        forward_pass: the trainer's, or another to compare it with.
        policy: what is read and written; None takes the recipe's on usual data.
        sharded: see weights as shards give them to a step: gathered in the format of products.
    """
    policy = policy or usual_policy(recipe, config)
    precision = resolve_precision(recipe.precision, on_gpu)
    model, counted = trainable_without_data(recipe, config, precision, policy)
    if sharded:
        in_format_of_products(model, PRECISIONS[precision.compute])
    in_recomputed_blocks(model, on_gpu)
    traces = []
    for batch_size in batch_sizes:
        inputs = step_inputs(config, policy, batch_size=batch_size, tokens=tokens, labels=labels)
        optimizer: Any
        if on_gpu:
            optimizer = GpuOptimizer([p for p in model.parameters() if p.requires_grad], recipe.train.optimizer)
        else:
            optimizer = build_optimizer(model, recipe.train, recipe.adapt.lora.plus_ratio)
        normalization = example_normalization(config)
        step = partial(follow_steps, forward_pass=forward_pass, steady=on_gpu)
        traces.append(step(model, optimizer, inputs, normalization, recipe, precision))
    return traces, counted


def step_inputs(
    config: OpenVLAConfig,
    policy: Policy,
    *,
    batch_size: int,
    tokens: int,
    labels: int,
    device: torch.device = META,
) -> Inputs:
    """Return examples for a policy; `tokens` and `labels` are those of one action of the usual arm."""
    written = policy.chunk * (policy.action_size or ACTION_SIZE) - ACTION_SIZE
    return example_inputs(
        config, batch_size=batch_size, tokens=tokens + written, labels=labels + written, device=device, policy=policy
    )


def trainable_without_data(
    recipe: RecipeConfig, config: OpenVLAConfig, precision: PrecisionConfig, policy: Policy | None = None
) -> tuple[nn.Module, ParameterCount]:
    """Return the model that a recipe trains, on the meta device and quantised as it says, and its parameters.

    Args:
        recipe: resolved settings.
        config: of the base.
        precision: number formats without `auto`.
        policy: what is read and written; None takes the recipe's on usual data.
    """
    base = meta_model(config, PRECISIONS[precision.frozen])
    with WithoutValues():
        model = make_trainable(base, recipe, precision, policy or usual_policy(recipe, config))
    counted = count(model, trained_by(recipe.adapt, model, base))
    quantize_stand_in(model, recipe.adapt, PRECISIONS[precision.compute])
    return model, counted


def follow_steps(
    model: nn.Module,
    optimizer: Any,
    inputs: Inputs,
    normalization: Normalization,
    recipe: RecipeConfig,
    precision: PrecisionConfig,
    *,
    steady: bool = False,
    forward_pass: ForwardPass = forward,
) -> Trace:
    """Run training steps as the trainer does and follow every storage.

    Args:
        model: ready to train, on the inputs' device.
        optimizer: over its trained parameters.
        inputs: the batch; every forward pass gets the same one.
        normalization: of the base's pixels.
        recipe: resolved settings.
        precision: number formats without `auto`.
        steady: follow a single forward and backward pass with the optimizer's state in place, and with gradients
            where the recipe accumulates them; otherwise two steps of up to two passes each from a fresh start.
        forward_pass: the trainer's, or another to compare it with.
    """
    train = recipe.train
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tracker = StorageTracker()
    for name, tensor in held(model):
        tracker.add(tensor, ADAPTERS if ".lora_" in name else WEIGHTS)
    tracker.begin("forward")
    for tensor in vars(inputs).values():
        if tensor is not None:
            tracker.add(tensor)
    passes = min(train.accumulation, 2)
    generator = torch.Generator().manual_seed(0) if recipe.data.augment else None
    emulated = DeviceEmulation(on_gpu=steady) if inputs.images.device == META else nullcontext()
    with tracker, tracker.watching(model):
        if steady:
            tracker.kind = OPTIMIZER
            optimizer.step()
            tracker.kind = GRADIENTS
            if passes > 1:
                for parameter in learning:
                    parameter.grad = torch.empty_like(parameter, requires_grad=False)
        model.train()
        for _ in range(1 if steady else 2):
            for _ in range(1 if steady else passes):
                tracker.begin("forward")
                with emulated:
                    output = forward_pass(model, inputs, normalization, PRECISIONS[precision.compute], generator)
                assert output.loss is not None
                tracker.begin("backward")
                (output.loss / train.accumulation).backward()
            tracker.begin("optimizer")
            if train.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(learning, train.max_grad_norm)
            optimizer.step()
            for state in optimizer.state.values():
                for value in state.values():
                    if isinstance(value, torch.Tensor) and value.device == inputs.images.device:
                        tracker.relabel(value, OPTIMIZER)
            optimizer.zero_grad(set_to_none=True)
    trace = tracker.trace()
    tracker.close()
    return trace


def held(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield everything that a model holds: parameters, buffers, and what bitsandbytes keeps beside packed weights."""
    yield from model.named_buffers()
    for name, parameter in model.named_parameters():
        yield name, parameter
        state = getattr(parameter, "quant_state", None)
        for level in (state, getattr(state, "state2", None)):
            for key in ("absmax", "code", "offset"):
                value = getattr(level, key, None)
                if isinstance(value, torch.Tensor):
                    yield name, value
