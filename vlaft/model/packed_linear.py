"""Linear layers of a model that only predicts on a CPU, in the layout that oneDNN's kernels want.

PyTorch hands float32 products to MKL, which on AMD's processors takes slow paths, and re-orders bfloat16 weights at
every call. oneDNN, which PyTorch brings along too, has neither fault once a weight is in its own layout: two to five
times the rate for float32 prompts, twice for bfloat16 tokens (figures: `docs/measurements.md`). The products are the
same up to the order of sums. These are the operators that `torch.compile` calls for frozen weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """Compute what an `nn.Linear` computes; its weight can no longer be read, saved, trained or moved."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` `[..., in]` to `[..., out]`."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def can_pack(dtype: torch.dtype) -> bool:
    """Say whether this machine's PyTorch has oneDNN's kernels for weights of `dtype`."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_linears(model: nn.Module, keep: tuple[str, ...] = ("lm_head",)) -> None:
    """Replace the plain linear layers of `model` in place, one at a time; quantised and adapted ones stay.

    Args:
        model: on a CPU, in eval mode; afterwards it can predict and nothing else.
        keep: names of modules to leave alone: rows of the head are read one by one where only some are wanted.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and name not in keep and can_pack(child.weight.dtype):
                setattr(module, name, PackedLinear(child))
