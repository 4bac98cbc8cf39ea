"""What each part of a model takes in training: parameters, and the bytes that they, gradients and moments lie in."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vlaft.accounting.gpu import GpuOptimizer
from vlaft.accounting.meta import policy_of
from vlaft.accounting.parameters import part_of
from vlaft.accounting.step import held, trainable_without_data
from vlaft.model.configuration import OpenVLAConfig, Policy
from vlaft.recipe.settings import RecipeConfig, resolve_precision


@dataclass(frozen=True)
class PartMemory:
    """One part of a model on a GPU, in bytes, besides activations.

    Attributes:
        weights: quantised ones as they are packed, adapters included.
        gradients: of what a loss reaches.
        moments: of the optimizer.
    """

    weights: int = 0
    gradients: int = 0
    moments: int = 0


def part_memory(recipe: RecipeConfig, config: OpenVLAConfig, policy: Policy | None = None) -> dict[str, PartMemory]:
    """Return what each part takes in training on one GPU, by the parts of `ParameterCount`.

    Args:
        recipe: resolved settings.
        config: of the base.
        policy: what is read and written; None takes the recipe's on usual data.
    """
    precision = resolve_precision(recipe.precision, on_gpu=True)
    model, counted = trainable_without_data(recipe, config, precision, policy or policy_of(recipe))
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = GpuOptimizer(learning.values(), recipe.train.optimizer)
    optimizer.step()
    found = dict.fromkeys(counted.parts, PartMemory())
    for name, tensor in held(model):
        part = part_of(name)
        found[part] = replace(found[part], weights=found[part].weights + tensor.nbytes)
    for name, parameter in learning.items():
        part = part_of(name)
        found[part] = replace(
            found[part],
            gradients=found[part].gradients + parameter.nbytes,
            moments=found[part].moments + sum(state.nbytes for state in optimizer.state[parameter].values()),
        )
    return found
