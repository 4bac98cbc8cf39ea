"""A model that begins in shards: no process ever has the whole of it, on its GPU or in its main memory.

The model is built on the meta device, where parameters have shapes and no bytes; shards are cut there; each process
then reads its own rows of each tensor from the base's files. Only what training adds (adapters, a policy's modules) is
made whole first: its random numbers are the ones that a single process draws.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from vlaft.adapt.adapter import base_parameters
from vlaft.adapt.policies import recorded_policy
from vlaft.errors import CheckpointError
from vlaft.model.configuration import Policy
from vlaft.model.load import empty_model, fill_policy, read_policy_files
from vlaft.model.openvla import OpenVLAForActionPrediction
from vlaft.recipe.settings import PrecisionConfig, RecipeConfig
from vlaft.training.model import PRECISIONS, adapt_and_cast, compile_blocks, prepare_passes, trainable_and_total
from vlaft.training.sharding import local_part, own_rows, shard
from vlaft.weights.layout import TensorEntry
from vlaft.weights.stream import DTYPES, Scratch, read_rows


def load_sharded(
    recipe: RecipeConfig,
    precision: PrecisionConfig,
    folder: Path,
    device: torch.device,
    mesh: DeviceMesh,
    policy: Policy | None = None,
) -> tuple[nn.Module, tuple[int, int]]:
    """Do what `load_trainable` does, in shards; all processes of the mesh at once.

    Args:
        recipe: resolved settings.
        precision: number formats without `auto`.
        folder: the base's local folder.
        device: of this process.
        mesh: the processes, as `sharding.mesh_of` gives them.
        policy: what it is to read and write; None leaves it as the base is.

    Returns:
        The model, and how many parameters are trained and how many there are.

    Raises:
        CheckpointError: the base is damaged, or was saved quantised.
    """
    model, table = empty_model(folder)
    if any(entry.dtype not in DTYPES or not DTYPES[entry.dtype].is_floating_point for entry in table.values()):
        raise CheckpointError(f"{folder}: quantised weights cannot be sharded; take train.parallel=ddp")
    frozen = PRECISIONS[precision.frozen]
    _replace_parameters(model, lambda tensor: torch.empty((), dtype=frozen).expand(tensor.shape))
    _compute_buffers(model)
    begun = recorded_policy(folder)
    trainable = adapt_and_cast(model.eval(), recipe, precision, policy or begun)
    if begun is not None:
        fill_policy(model, read_policy_files(folder), str(folder))
    counts = trainable_and_total(trainable)
    prepare_passes(model, recipe)
    if recipe.train.compile:
        compile_blocks(model)
    _replace_parameters(trainable, lambda tensor: tensor.to("meta") if _bodiless(tensor) else tensor.to(device))
    shard(trainable, mesh, PRECISIONS[precision.compute])
    trainable._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device))
    fill(trainable, folder, table, frozen)
    return trainable, counts


@torch.no_grad()
def fill(model: nn.Module, folder: Path, table: dict[str, TensorEntry], frozen: torch.dtype) -> int:
    """Read this process's rows of a base's tensors into `model`; return the bytes that were read.

    Args:
        model: adapted by peft or not.
        folder: the base's folder.
        table: where its tensors lie.
        frozen: the type that the base is held in; what is trained in a wider one has its values.

    Raises:
        CheckpointError: a file ends early.
    """
    scratch, count = Scratch(), 0
    for name, parameter in base_parameters(model).items():
        if name not in table:
            continue
        rows, target = own_rows(parameter), local_part(parameter.detach())
        target = target if target.ndim else target[None]
        for first, block in read_rows(folder, table[name], scratch, rows):
            at = first - rows.start
            target[at : at + len(block)].copy_(block.to(frozen))
            count += block.nbytes
    return count


def _replace_parameters(model: nn.Module, make: Callable[[Tensor], Tensor]) -> None:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(make(parameter.detach()), requires_grad=parameter.requires_grad))


def _bodiless(tensor: Tensor) -> bool:
    return tensor.ndim > 0 and not any(tensor.stride())


def _compute_buffers(model: OpenVLAForActionPrediction) -> None:
    """Make the modules anew whose buffers no file holds: the rotary embedding's frequencies."""
    llama = model.language_model.model
    llama.rotary_emb = type(llama.rotary_emb)(model.config.text_config)
    if odd := [name for name, buffer in model.named_buffers() if buffer.is_meta]:
        raise AssertionError(f"nothing computes the buffers {', '.join(odd)}")
