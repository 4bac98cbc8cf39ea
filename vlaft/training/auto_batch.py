"""`train.batch_size=auto`: the largest micro-batch that fits, at an unchanged number of examples per step.

The memory model proposes, a real forward and backward pass confirms. The update stays what `EFFECTIVE_BATCH` examples
give, so only speed and memory depend on the card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from vlaft.config import RecipeConfig
from vlaft.errors import VlaftError

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


def candidates(recipe: RecipeConfig, predicted_to_fit: Callable[[int], bool]) -> Iterator[RecipeConfig]:
    """Yield `recipe` with ever smaller micro-batches, beginning at the largest that is predicted to fit.

    The smallest is yielded in any case: a prediction may err on the safe side.
    """
    sizes = divisors(EFFECTIVE_BATCH * recipe.train.accumulation)
    fitting = [size for size in sizes if size == 1 or predicted_to_fit(size)]
    for size in fitting:
        yield with_batch(recipe, size)


def find_batch(
    recipe: RecipeConfig, predicted_to_fit: Callable[[int], bool], attempt: Callable[[RecipeConfig], None]
) -> RecipeConfig:
    """Return the first candidate whose `attempt` does not run out of the GPU's memory.

    Args:
        recipe: with `train.batch_size=auto`.
        predicted_to_fit: of a micro-batch size.
        attempt: does a forward and backward pass at a candidate's micro-batch.

    Raises:
        VlaftError: not even one example at a time fits.
    """
    for candidate in candidates(recipe, predicted_to_fit):
        try:
            attempt(candidate)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            continue
        return candidate
    raise VlaftError(
        "not even one example at a time fits this GPU: set train.gradient_checkpointing=all or use --recipe qlora32;"
        " `vlaft report --gpu-memory` says what fits"
    )
