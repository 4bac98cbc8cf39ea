"""How much main memory a training step takes on a CPU, predicted from the same trace as a GPU's.

What is different there: numbers are float32 unless the recipe says otherwise, the optimizer is PyTorch's own, and
weights that are stored as they are needed are never copied: the base's files are mapped, so the kernel can take their
pages back at any time.

Left out: Python and its libraries (measured when a run begins), what loading and the kernels of products use in
between, batches that are read ahead, and what malloc keeps of memory that was freed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlaft.accounting.memory import LABELS, usual_tokens
from vlaft.accounting.parameters import base_name
from vlaft.weights.layout import tensor_table

if TYPE_CHECKING:
    from torch import nn

    from vlaft.model.configuration import OpenVLAConfig
    from vlaft.recipe.settings import RecipeConfig


@dataclass(frozen=True)
class MainMemory:
    """What the tensors of a training step take of a CPU's main memory at their peak.

    Attributes:
        own: bytes that the process has to hold.
        mapped: bytes of frozen weights that are used where they lie in the base's files.
        moment: phase and module of the peak: `backward language_model.model.layers.31`.
    """

    own: int
    mapped: int
    moment: str


def predict_main_memory(recipe: RecipeConfig, config: OpenVLAConfig) -> MainMemory:
    """Predict the main memory of a recipe's training step on a CPU, at its batch size, in one process.

    Args:
        recipe: resolved settings, `train.batch_size` a number.
        config: of the base.

    Raises:
        CheckpointError: the files of a local base are missing or damaged.
    """
    from vlaft.accounting.step import trace_step, trainable_without_data
    from vlaft.recipe.settings import resolve_precision

    (trace,), _ = trace_step(
        recipe,
        config,
        batch_sizes=[int(recipe.train.batch_size)],
        tokens=usual_tokens(config),
        labels=LABELS,
        on_gpu=False,
    )
    live, event = trace.at_peak()
    model, _ = trainable_without_data(recipe, config, resolve_precision(recipe.precision, on_gpu=False))
    mapped = _mapped_bytes(model, recipe.base, config)
    return MainMemory(live - mapped, mapped, trace.names[trace.places[event]])


def _mapped_bytes(model: nn.Module, base: str, config: OpenVLAConfig) -> int:
    """Return the bytes of frozen parameters whose type is the stored one; packed ones are no parameters here.

    The types of a base that does not lie here are as its configuration says.
    """
    from vlaft.weights.stream import DTYPES

    table = tensor_table(Path(base)) if Path(base).is_dir() else None
    size = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or ".lora_" in name:  # adapters that no loss reaches are frozen, and made here
            continue
        plain = base_name(name)
        stored = config.dtype if table is None else DTYPES.get(table[plain].dtype) if plain in table else None
        size += parameter.nbytes if parameter.dtype == stored else 0
    return size
