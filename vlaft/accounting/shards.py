"""What a process holds of a model in shards, and what it gathers while a step runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from vlaft.accounting.gpu import GpuOptimizer
from vlaft.model.policy_parts import FullPrecisionLinear
from vlaft.recipe.settings import LoraConfig, PrecisionConfig, RecipeConfig
from vlaft.training.model import PRECISIONS, base_model, unreached_modules
from vlaft.training.sharding import units


@dataclass(frozen=True)
class Gathering:
    """What is whole at some moments of a step, however many processes share the model; bytes.

    Attributes:
        weights: held, of the whole model, adapters left out.
        adapters: held likewise.
        moments: held likewise.
        rest: what belongs to no unit: whole during a pass.
        unit: the largest unit's weights, in the format in which they are gathered.
        gradients: the largest unit's gradients, in that format.
        summed: the same in the format in which processes sum them.
        gathered: all weights that a pass needs, in the format in which they are gathered.
        reduced: all gradients, in the format in which they are summed.
        held: gradients as they are kept, of the whole model.
        traced: gradients as a step makes them, of the whole model.
    """

    weights: int
    adapters: int
    moments: int
    rest: int
    unit: int
    gradients: int
    summed: int
    gathered: int
    reduced: int
    held: int
    traced: int

    @property
    def forward(self) -> int:
        """In a forward pass: a unit at work, the buffer that it came in, and that of the next one."""
        return self.rest + 3 * self.unit

    @property
    def backward(self) -> int:
        """In a backward pass: the same, and the unit's gradients, as they were made and as they are summed."""
        return self.forward + self.gradients + self.summed


def can_be_sharded(recipe: RecipeConfig) -> bool:
    """Say whether a recipe's weights, and the moments of what it trains, can be cut into rows."""
    lora = recipe.adapt.lora if recipe.adapt.method == "lora" else LoraConfig()
    whole = recipe.adapt.quantize != "none" or lora.dora or lora.init == "pissa"
    return not whole and recipe.train.optimizer == "adamw"


def gathering(model: nn.Module, precision: PrecisionConfig) -> Gathering:
    """Return what is gathered of a model on the meta device that is ready to train, in the formats it is held in."""
    optimizer = GpuOptimizer([parameter for parameter in model.parameters() if parameter.requires_grad], "adamw")
    optimizer.step()
    moments = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    adapters = sum(parameter.nbytes for name, parameter in model.named_parameters() if ".lora_" in name)
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    compute = PRECISIONS[precision.compute]
    seen: set[int] = set()
    # never called, so never gathered
    idle = {id(inner) for unit in unreached_modules(base_model(model)) for inner in unit.modules()}
    sizes, all_held, all_traced, total, reduced = [], 0, 0, 0, 0
    for unit, in_half in [*units(model), (model, False)]:
        own = [parameter for parameter in unit.parameters() if id(parameter) not in seen]
        seen |= {id(parameter) for parameter in own}
        width = {id(parameter): compute.itemsize if in_half else parameter.itemsize for parameter in own}
        learning = [parameter for parameter in own if parameter.requires_grad]
        weights = sum(parameter.numel() * width[id(parameter)] for parameter in own)
        made = sum(parameter.numel() * width[id(parameter)] for parameter in learning)
        summed = sum(parameter.numel() * (4 if in_half else parameter.itemsize) for parameter in learning)
        sizes.append((weights, made, summed))
        all_held += sum(parameter.nbytes for parameter in learning)
        all_traced, reduced = all_traced + made, reduced + summed
        total += 0 if id(unit) in idle else weights
    *inner, rest = sizes
    largest = max(inner)
    return Gathering(held - adapters, adapters, moments, rest[0], *largest, total, reduced, all_held, all_traced)


def in_format_of_products(model: nn.Module, compute: torch.dtype) -> None:
    """Cast a model on the meta device to what a step in shards sees: units gathered in the format of products."""
    for unit, in_half in units(model):
        for module in unit.modules() if in_half else ():
            for parameter in module.parameters(recurse=False) if not isinstance(module, FullPrecisionLinear) else ():
                parameter.data = parameter.data.to(compute)
