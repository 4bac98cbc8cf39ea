"""How much memory a run took, and what to do when there is not enough."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vlaft.config import RecipeConfig
from vlaft.errors import VlaftError


def peak_memory(device: torch.device) -> int:
    """Return the peak of what was allocated on a GPU, or of this process's resident memory on a CPU, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def out_of_memory_told(recipe: RecipeConfig, doing: str) -> Iterator[None]:
    """Turn PyTorch's running out of memory into a sentence that says what of this recipe to change.

    Raises:
        VlaftError: the memory was not enough for what was being done.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise VlaftError(f"the GPU's memory is not enough for {doing}: {_advice(recipe)}") from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise VlaftError(f"the main memory is not enough for {doing}: {_advice(recipe)}") from error


def _advice(recipe: RecipeConfig) -> str:
    train = recipe.train
    steps = []
    if train.batch_size != 1:
        half = "train.batch_size=1" if train.batch_size == "auto" else f"train.batch_size={train.batch_size // 2}"
        steps.append(f"{half} with train.accumulation={2 * train.accumulation}")
    if train.gradient_checkpointing != "all":
        steps.append("train.gradient_checkpointing=all")
    if recipe.adapt.quantize == "none":
        steps.append("--recipe qlora32")
    listed = ", or ".join(steps) or "a larger GPU or a smaller base"
    return f"take {listed}; `vlaft report` says what fits"
