"""`train.batch_size=auto`: the largest micro-batch that fits, at an unchanged number of examples per step.

Which one fits, the memory model says (`vlaft.plan`). The update stays what `EFFECTIVE_BATCH` examples give, so only
speed and memory depend on the card.
"""

from __future__ import annotations

from dataclasses import replace

from vlaft.config import RecipeConfig

EFFECTIVE_BATCH = 16  # examples per device and step, upstream's batch size; times train.accumulation


def divisors(number: int) -> list[int]:
    """Return the divisors of `number`, largest first.

    >>> divisors(12)
    [12, 6, 4, 3, 2, 1]
    """
    return [size for size in range(number, 0, -1) if number % size == 0]


def with_batch(recipe: RecipeConfig, micro: int) -> RecipeConfig:
    """Return `recipe` with micro-batches of `micro` examples and as many examples per step as `auto` stands for."""
    effective = EFFECTIVE_BATCH * recipe.train.accumulation
    return replace(recipe, train=replace(recipe.train, batch_size=micro, accumulation=effective // micro))
