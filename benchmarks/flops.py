"""Floating-point operations of a training step, counted on the meta device as PyTorch's own counter counts them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlaft.model.configuration import OpenVLAConfig, Policy
    from vlaft.recipe.settings import RecipeConfig


@dataclass(frozen=True)
class StepOperations:
    """Operations (a multiplication and an addition are two) of one forward and backward pass.

    Attributes:
        forward: of the forward pass.
        backward: of the backward pass, recomputed blocks included.
        parts: of the forward pass, by part: `vision`, `projector`, `language model` (the head is in it).
    """

    forward: int
    backward: int
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Of both passes."""
        return self.forward + self.backward


def step_operations(
    recipe: RecipeConfig,
    config: OpenVLAConfig,
    *,
    batch_size: int,
    tokens: int | None = None,
    labels: int | None = None,
    policy: Policy | None = None,
) -> StepOperations:
    """Count the matrix products and attention of a recipe's forward and backward pass as they run on a GPU.

    Element-wise operations, norms and the optimizer are not counted: they are bound by memory, not by arithmetic.

    Args:
        recipe: resolved settings.
        config: of the base.
        batch_size: examples.
        tokens: text tokens of an example with one action; None: as usual for the base.
        labels: of those, the ones with a label; None: as usual.
        policy: what is read and written; None takes the recipe's on usual data.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from vlaft.accounting.gpu import DeviceEmulation, in_recomputed_blocks
    from vlaft.accounting.memory import LABELS, usual_tokens
    from vlaft.accounting.meta import (
        ACTION_SIZE,
        WithoutValues,
        example_inputs,
        example_normalization,
        meta_model,
        policy_of,
    )
    from vlaft.recipe.settings import resolve_precision
    from vlaft.training.model import PRECISIONS, make_trainable
    from vlaft.training.step import forward

    precision = resolve_precision(recipe.precision, on_gpu=True)
    base, policy = meta_model(config, PRECISIONS[precision.frozen]), policy or policy_of(recipe)
    more = policy.chunk * (policy.action_size or ACTION_SIZE) - ACTION_SIZE
    with WithoutValues():
        model = make_trainable(base, recipe, precision, policy).train()
    in_recomputed_blocks(model, on_gpu=True)
    inputs = example_inputs(
        config,
        batch_size=batch_size,
        tokens=(tokens or usual_tokens(config)) + more,
        labels=(labels or LABELS) + more,
        policy=policy,
    )
    counter = FlopCounterMode(display=False)
    with counter:
        with DeviceEmulation(on_gpu=True):
            output = forward(model, inputs, example_normalization(config), PRECISIONS[precision.compute])
        forward_operations = counter.get_total_flops()
        counts = {name.rpartition(".")[2]: sum(found.values()) for name, found in counter.get_flop_counts().items()}
        parts = {"vision": counts["vision_backbone"], "projector": counts["projector"]}
        parts["language model"] = forward_operations - sum(parts.values())
        assert output.loss is not None
        output.loss.backward()
    return StepOperations(forward_operations, counter.get_total_flops() - forward_operations, parts)
