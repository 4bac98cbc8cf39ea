"""One model on several devices: copies that average their gradients (DDP), or one model in shards (FSDP2).

* Adapters and small sets of weights are copied: their optimizer state is small, and nothing but gradients travels.
* `full` and `frozen-vision` are sharded, each transformer block for itself: weights, gradients and moments of 7B
  parameters in float32 (112 GB) fit no single GPU.

PyTorch's own `fully_shard` is used, not accelerate's plugin, which refuses to shard on CPUs, where this is tested.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from vlaft.model.openvla import OpenVLAForActionPrediction

SHARDED_METHODS = ("full", "frozen-vision")


def several() -> bool:
    """Say whether `torchrun` or `accelerate launch` started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Say, before the processes have joined, whether this is the main one."""
    return not several() or os.environ.get("RANK", "0") == "0"


def join_processes() -> Accelerator:
    """Join the processes that `torchrun` or `accelerate launch` started; alone, be the only one."""
    return Accelerator(
        cpu=several()
        and not torch.accelerator.is_available(),  # torchrun says nothing about CPUs; the rest would follow
        mixed_precision="no",  # the recipe says how to compute, not the launcher
    )


def distribute(model: nn.Module, method: str, device: torch.device) -> nn.Module:
    """Return `model` ready for training by all processes of the run; alone, as it is.

    Args:
        model: on `device`, with `requires_grad` set; the same in every process.
        method: the recipe's `adapt.method`.
        device: of this process.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return model
    if method in SHARDED_METHODS:
        assert isinstance(model, OpenVLAForActionPrediction)
        shard(model, device)
        return model
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def shard(model: OpenVLAForActionPrediction, device: torch.device) -> None:
    """Shard parameters over all processes, in place; each block is gathered while it runs."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    stacks = [vit.blocks for vit in model.vision_backbone.featurizers] + [model.language_model.model.layers]
    for stack in stacks:
        for block in stack:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def bare(model: nn.Module) -> nn.Module:
    """Return the model without what copies it over processes."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def base_model(model: nn.Module) -> OpenVLAForActionPrediction:
    """Return the OpenVLA model inside what copies and adapts it."""
    inner = bare(model)
    return inner.get_base_model() if isinstance(inner, PeftModel) else inner  # type: ignore[return-value]


def is_sharded(model: nn.Module) -> bool:
    """Say whether the model's parameters lie in shards."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor gathered (all processes must ask at once), any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def mine(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor, any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: Tensor, example: Tensor) -> Tensor:
    """Return a whole tensor sharded as `example` is; as it is where the example is not sharded.

    Every process holds the same `tensor`; process 0's is taken.
    """
    if not isinstance(example, DTensor):
        return tensor
    return distribute_tensor(tensor.to(example.device), example.device_mesh, example.placements)
