"""How the processes of a run share a model: each has a copy (DDP), or each has its rows of every tensor (FSDP2, HSDP).

* `ddp`: a copy in every process; gradients are averaged.
* `fsdp`: every process holds its rows of every parameter, gradient and moment; a block is gathered while it runs.
* `hsdp`: the same within each node, whose processes are near each other; nodes hold copies and average gradients.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain
from typing import Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.parallel import DistributedDataParallel

from vlaft.errors import ConfigError
from vlaft.model.openvla import OpenVLAForActionPrediction
from vlaft.model.policy_parts import FullPrecisionLinear
from vlaft.model.vision import AttentionPool
from vlaft.recipe.settings import RecipeConfig

Style = Literal["alone", "ddp", "fsdp", "hsdp"]
SHARDED_METHODS = ("full", "frozen-vision")  # by `train.parallel=auto`: whole weights with their moments fit few GPUs


def processes() -> int:
    """Return how many processes `torchrun` or `accelerate launch` started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def several() -> bool:
    """Say whether `torchrun` or `accelerate launch` started this process as one of several."""
    return processes() > 1


def is_first() -> bool:
    """Say, before the processes have joined, whether this is the main one."""
    return not several() or os.environ.get("RANK", "0") == "0"


def per_node() -> int:
    """Return how many of the run's processes this machine has."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or processes())


def join_processes() -> Accelerator:
    """Join the processes that `torchrun` or `accelerate launch` started; alone, be the only one."""
    return Accelerator(
        cpu=several()
        and not torch.accelerator.is_available(),  # torchrun says nothing about CPUs; the rest would follow
        mixed_precision="no",  # the recipe says how to compute, not the launcher
    )


def parallel_style(recipe: RecipeConfig) -> Style:
    """Return how this run's processes share the model, `train.parallel=auto` settled.

    Raises:
        ConfigError: `hsdp` over machines with one process each or with different numbers of them, or shards of whole
            weights whose moments are in 8 bits.
    """
    if not several():
        return "alone"
    asked = recipe.train.parallel
    style = asked if asked != "auto" else "fsdp" if recipe.adapt.method in SHARDED_METHODS else "ddp"
    if style == "hsdp" and (per_node() == 1 or processes() % per_node()):
        raise ConfigError(
            "train.parallel=hsdp shards within a node, and needs as many processes on each, at least two; here are"
            f" {per_node()} of {processes()}: take train.parallel=fsdp"
        )
    if style != "ddp" and recipe.train.optimizer != "adamw":
        raise ConfigError(
            f"train.optimizer={recipe.train.optimizer} keeps moments of whole tensors, which shards have not: take"
            " train.optimizer=adamw, or a copy in every process with train.parallel=ddp"
        )
    return style


def mesh_of(style: Style, device: torch.device) -> DeviceMesh:
    """Return the processes as FSDP takes them: a line, or nodes by processes of a node."""
    world = dist.get_world_size()
    if style == "hsdp":
        return init_device_mesh(device.type, (world // per_node(), per_node()), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))


def copy_to_all(model: nn.Module, device: torch.device) -> nn.Module:
    """Return `model`, which every process has, with gradients that are averaged over all."""
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def shard(model: nn.Module, mesh: DeviceMesh, compute: torch.dtype) -> None:
    """Shard parameters over a mesh, in place; each unit is gathered while it runs.

    Units are the blocks, the embeddings, the projector, the head, and each module of a policy, so that nothing large is
    left to the rest, which stays gathered for a whole pass. What computes in half precision is gathered in it: autocast
    would keep a copy of each gathered weight for the backward pass, and in the end of all of them. Gradients are summed
    in float32. The modules of a policy, which compute in float32, and embeddings, whose sums do, are gathered as held.

    Args:
        model: an OpenVLA model, adapted by peft or not; on the meta device, or on the mesh's.
        mesh: from `mesh_of`.
        compute: number format of matrix products.
    """
    half = MixedPrecisionPolicy(
        param_dtype=None if compute == torch.float32 else compute,
        reduce_dtype=None if compute == torch.float32 else torch.float32,
        cast_forward_inputs=False,
    )
    whole = MixedPrecisionPolicy(reduce_dtype=half.reduce_dtype)
    for unit, in_half in units(model):
        fully_shard(unit, mesh=mesh, mp_policy=half if in_half else whole)
    fully_shard(model, mesh=mesh, mp_policy=whole)


def units(model: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
    """Yield what is gathered at once, what lies in another unit before that, and whether in the format of products."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, OpenVLAForActionPrediction)
    for module in [module for module in base.modules() if isinstance(module, FullPrecisionLinear)]:
        yield module, False
    pools = [module for module in base.modules() if isinstance(module, AttentionPool)]  # which no loss reaches
    parts = [base.parts()["projector"], base.get_output_embeddings()]
    for unit in [*chain.from_iterable(base.stacks()), *pools, *parts]:
        yield unit, True
    yield base.get_input_embeddings(), False


def is_sharded(model: nn.Module) -> bool:
    """Say whether the model's parameters lie in shards."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def reshard(model: nn.Module) -> None:
    """Give back what is still gathered: after a pass without gradients, that is what belongs to no unit of its own."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gathered(tensor: Tensor) -> Tensor:
    """Return a sharded tensor gathered (all processes must ask at once), any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_part(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor, any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_rows(tensor: Tensor) -> range:
    """Return which rows of a tensor this process holds: of a sharded one its own, of any other all; a number is a row.

    Raises:
        ValueError: sharded otherwise than by rows.
    """
    if not isinstance(tensor, DTensor):
        return range(tensor.shape[0] if tensor.ndim else 1)
    if any(isinstance(placement, Shard) and placement.dim for placement in tensor.placements):
        raise ValueError(f"sharded otherwise than by rows: {tensor.placements}")
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return range(offset[0], offset[0] + shape[0])


def as_part(local: Tensor, example: Tensor) -> Tensor:
    """Return this process's rows of a tensor as one that is sharded as `example` is; as they are where it is not."""
    if not isinstance(example, DTensor):
        return local
    return DTensor.from_local(
        local.to(example.device),
        example.device_mesh,
        example.placements,
        run_check=False,
        shape=example.shape,
        stride=example.stride(),
    )


def spread_like(tensor: Tensor, example: Tensor) -> Tensor:
    """Return a whole tensor, the same in every process, sharded as `example` is; as it is where that is not."""
    rows = own_rows(example)
    return as_part(tensor[rows.start : rows.stop], example) if isinstance(example, DTensor) else tensor
