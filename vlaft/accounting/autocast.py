"""`torch.autocast("cuda")` for tensors on the meta device, which PyTorch's own does not touch.

Autocast works on a tensor's device, and no device of the meta kind has one. So this mode does above autograd what
CUDA's autocast does (the operation lists of PyTorch's documentation, and its cache): matrix products in half
precision, norms and losses in float32. As there, the half-precision copy of a float32 leaf that needs a gradient is
made once and lives until the autocast region ends, while every other copy lives as long as somebody needs it.

Whether a region is on is the state of `torch.autocast("cpu", ...)`, which checkpointed blocks save and restore, and
which leaves meta tensors alone. The mode is entered around a forward pass, and by `in_recomputed_blocks` where a block
is run again in the backward pass; PyTorch sets modes aside during `backward`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_HALF: set[Callable] = {
    *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.scaled_dot_product_attention),
    *(torch.matmul, torch.mm, torch.bmm, torch.mv, torch.addmm, torch.baddbmm),
    *(Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm, Tensor.mv, Tensor.addmm, Tensor.baddbmm),
}
_FLOAT32: set[Callable] = {
    *(F.layer_norm, torch.layer_norm, F.cross_entropy, F.softmax, F.log_softmax, F.nll_loss),
    *(torch.softmax, torch.log_softmax, torch.exp, torch.log, torch.pow, torch.rsqrt, torch.reciprocal, torch.sum),
    *(torch.norm, torch.cumsum, torch.prod, torch.linalg.norm, torch.linalg.vector_norm),
    *(Tensor.softmax, Tensor.log_softmax, Tensor.exp, Tensor.log, Tensor.pow, Tensor.__pow__, Tensor.rsqrt),
    *(Tensor.reciprocal, Tensor.sum, Tensor.norm, Tensor.cumsum, Tensor.prod),
}


class CudaAutocast(TorchFunctionMode):
    """Casts arguments as CUDA's autocast does, where CPU autocast is on and the tensor is on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}  # by id: the leaf, which keeps the id its own, and the copy

    def __exit__(self, *error: Any) -> None:
        self._copies.clear()
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Cast the tensors among the arguments, then call `func`."""
        kwargs = kwargs or {}
        if not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        if func in _HALF:
            target = torch.get_autocast_dtype("cpu")
        elif func in _FLOAT32:
            target = torch.float32
        else:
            return func(*args, **kwargs)
        args = tuple(self._cast(value, target) for value in args)
        return func(*args, **{name: self._cast(value, target) for name, value in kwargs.items()})

    def _cast(self, value: Any, target: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_meta or not value.is_floating_point():
            return value
        if value.dtype in (target, torch.float64):
            return value
        kept = (
            target != torch.float32
            and value.dtype == torch.float32
            and value.requires_grad
            and value.is_leaf
            and not value._is_view()
        )
        if not kept:
            return value.to(target)
        if id(value) not in self._copies:
            self._copies[id(value)] = (value, value.to(target))
        return self._copies[id(value)][1]


def in_recomputed_blocks(model: nn.Module) -> None:
    """Make checkpointed blocks of `model` enter the emulation where they are recomputed."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            function = module._gradient_checkpointing_func
            module._gradient_checkpointing_func = partial(function, context_fn=_contexts)  # type: ignore[assignment]


def _contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    return nullcontext(), CudaAutocast()
