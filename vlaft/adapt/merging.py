"""What an adapter adds to a weight, in float32: the arithmetic of merging, tensor by tensor.

LoRA, rsLoRA and DoRA, on linear layers, convolutions and embeddings. The formulas are those of the papers and of
peft's `merge`; the sum is rounded to the weight's type once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from vlaft.adapt.adapter_files import PREFIX
from vlaft.errors import CheckpointError

_PARTS = ("A", "B", "embedding_A", "embedding_B", "magnitude_vector")
_ALTERS_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # peft's initialisations that subtract from the base


@dataclass(frozen=True)
class ModuleAdapter:
    """An adapter of one module.

    Attributes:
        a: `[r, in]`; `[r, in, kh, kw]` for a convolution; `[r, entries]` for an embedding.
        b: `[out, r]`; `[out, r, 1, 1]`; `[width, r]`.
        scaling: factor on the product.
        embedding: whether the module is an embedding, whose weight is transposed.
        magnitude: DoRA's trained norms, one per output, or None.
    """

    a: Tensor
    b: Tensor
    scaling: float
    embedding: bool = False
    magnitude: Tensor | None = None

    def update(self) -> Tensor:
        """Return scaling * B A in float32, shaped as the weight."""
        a, b = self.a.float(), self.b.float()
        if a.ndim == 4:
            return self.scaling * torch.einsum("or,rchw->ochw", b.flatten(1), a)
        product = self.scaling * (b @ a)
        return product.T if self.embedding else product

    def merged(self, weight: Tensor) -> Tensor:
        """Return the weight with the adapter folded in, of the weight's type and shape."""
        total = weight.float() + self.update()
        if self.magnitude is not None:
            # DoRA: the trained magnitude over the norm of each output's direction
            outputs = total.T if self.embedding else total.flatten(1)
            factor = self.magnitude.float().flatten() / torch.linalg.vector_norm(outputs, dim=1)
            total = total * (factor if self.embedding else factor.view(-1, *[1] * (total.ndim - 1)))
        return total.to(weight.dtype)


def module_adapters(config: LoraConfig, tensors: Mapping[str, Tensor]) -> dict[str, ModuleAdapter]:
    """Sort an adapter's tensors by the weight that each pair changes.

    Args:
        config: the adapter's configuration (rank, alpha, rsLoRA).
        tensors: as in `adapter_model.safetensors`.

    Returns:
        Name of the base's weight to its adapter.

    Raises:
        CheckpointError: a tensor without its partner, one that is no part of a LoRA adapter, or an adapter whose
            initialisation changed the base.
    """
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(_ALTERS_BASE):
        raise CheckpointError(
            f"the adapter was initialised with '{init}', which changes the base's weights, so it cannot be merged"
            " into the base as released; save it converted to plain LoRA first"
        )
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, separator, part = name.removeprefix(PREFIX).rpartition(".lora_")
        if not separator or not name.startswith(PREFIX):
            raise CheckpointError(f"adapter tensor '{name}' is not one that can be merged")
        part = part.removesuffix(".weight")
        if part not in _PARTS:
            raise CheckpointError(f"adapter tensor '{name}' is not one that can be merged")
        parts.setdefault(module, {})[part] = tensor
    adapters = {}
    for module, found in parts.items():
        embedding = "embedding_A" in found
        a, b = (found.get(f"{'embedding_' if embedding else ''}{side}") for side in "AB")
        if a is None or b is None:
            raise CheckpointError(f"adapter of '{module}': one of its two matrices is missing")
        magnitude = found.get("magnitude_vector")
        fits = a.ndim in (2, 4) and a.ndim == b.ndim and b.numel() == len(b) * len(a)
        if not fits or (magnitude is not None and magnitude.numel() != len(b)):
            raise CheckpointError(f"adapter of '{module}': the shapes of its tensors do not fit together")
        rank = a.shape[0]
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
        scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        adapters[f"{module}.weight"] = ModuleAdapter(a, b, scaling, embedding, magnitude)
    return adapters
