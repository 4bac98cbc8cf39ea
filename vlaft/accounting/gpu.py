"""What a real device does and the meta device does not: autocast, and attention in one kernel.

* Autocast works on a tensor's device, and the meta device has none. So this mode does above autograd what CUDA's does
  (the operation lists of PyTorch's documentation, and its cache): matrix products in half precision, norms and losses
  in float32. As there, the half-precision copy of a float32 leaf that needs a gradient is made once and lives until
  the autocast region ends, while every other copy lives as long as somebody needs it. Whether a region is on is the
  state of `torch.autocast("cpu", ...)`, which checkpointed blocks save and restore, and which leaves meta tensors
  alone.
* `scaled_dot_product_attention` falls back to plain matrix products on the meta device, which keep every score. Real
  devices run a fused kernel that keeps one number per query: on a GPU flash attention in half precision,
  and the memory-efficient kernel in float32 or with a mask.

The mode is entered around a forward pass, and by `in_recomputed_blocks` where a block is run again in the backward
pass; PyTorch sets modes aside during `backward`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vlaft.adapt.methods import SKIPPED
from vlaft.recipe.settings import AdaptConfig

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


class DeviceEmulation(TorchFunctionMode):
    """Makes operations on meta tensors take the storage that they take on a GPU or a CPU."""

    def __init__(self, on_gpu: bool) -> None:
        super().__init__()
        self.on_gpu = on_gpu
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}  # by id: the leaf, which keeps the id its own, and the copy

    def __exit__(self, *error: Any) -> None:
        self._copies.clear()
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Cast the tensors among the arguments where autocast would, then call `func` or its fused kernel."""
        kwargs = kwargs or {}
        if torch.is_autocast_enabled("cpu") and (func in _HALF or func in _FLOAT32):
            target = torch.get_autocast_dtype("cpu") if func in _HALF else torch.float32
            args = tuple(self._cast(value, target) for value in args)
            kwargs = {name: self._cast(value, target) for name, value in kwargs.items()}
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **others: Any,
    ) -> Tensor:
        aten = torch.ops.aten
        tensors = (query, key, value)
        if key.shape[1] != query.shape[1]:  # no base of the family shares keys between heads
            return F.scaled_dot_product_attention(*tensors, attn_mask, dropout_p, is_causal, scale=scale, **others)
        bias = None
        if attn_mask is not None:  # PyTorch turns it into numbers to add
            bias = torch.zeros(attn_mask.shape, dtype=query.dtype, device=query.device)
            bias = bias.expand(*query.shape[:2], -1, -1)
        if not self.on_gpu:
            fused = aten._scaled_dot_product_flash_attention_for_cpu
            return fused(*tensors, dropout_p, is_causal, attn_mask=bias, scale=scale)[0]
        if query.dtype == torch.float32 or bias is not None:
            fused = aten._scaled_dot_product_efficient_attention
            return fused(*tensors, bias, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale)[0]
        return aten._scaled_dot_product_flash_attention(*tensors, dropout_p, is_causal, False, scale=scale)[0]

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


def in_recomputed_blocks(model: nn.Module, on_gpu: bool) -> None:
    """Make checkpointed blocks of `model` enter the emulation where they are recomputed."""

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), DeviceEmulation(on_gpu)

    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            function: Any = module._gradient_checkpointing_func
            module._gradient_checkpointing_func = partial(function, context_fn=contexts)  # type: ignore


_BLOCK = 64  # weights per scale
_NESTED_BLOCK = 256  # scales per scale of scales
_CODEBOOKS = (256, 16)  # float32 entries that every layer keeps on the GPU besides


class QuantizedStandIn(nn.Module):
    """Stands for bitsandbytes' `Linear4bit` or `Linear8bitLt`: same storage, same buffers, no numbers."""

    def __init__(self, linear: nn.Linear, bits: Literal[4, 8], double_quant: bool, compute: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bits = bits
        self.compute = compute
        self.bias = linear.bias
        size = linear.weight.numel()
        if bits == 8:
            self._keep("weight", size, torch.uint8)
            self._keep("scales", linear.out_features, torch.float32)
            return
        blocks = -(-size // _BLOCK)
        self._keep("weight", -(-size // 2), torch.uint8)
        self._keep("scales", blocks, torch.uint8 if double_quant else torch.float32)
        self._keep("codebook", _CODEBOOKS[1], torch.float32)
        if double_quant:
            self._keep("nested_scales", -(-blocks // _NESTED_BLOCK), torch.float32)
            self._keep("nested_codebook", _CODEBOOKS[0], torch.float32)
            self._keep("offset", 1, torch.float32)

    def _keep(self, name: str, size: int, dtype: torch.dtype) -> None:
        self.register_buffer(name, torch.empty(size, dtype=dtype, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` `[..., in]` to `[..., out]`, of the same type."""
        shape = (self.out_features, self.in_features)
        if self.bits == 8:
            return _Product8.apply(x, shape, self.bias)
        # peft copies the result of a 4-bit layer
        return _Product4.apply(x.to(self.compute), shape, self.bias).to(x.dtype).clone()


class _Product4(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int], bias: Tensor | None) -> Tensor:
        ctx.shape = shape
        return F.linear(x, torch.empty(shape, dtype=x.dtype, device=x.device), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        weight = torch.empty(ctx.shape, dtype=gradient.dtype, device=gradient.device)
        return torch.matmul(gradient, weight), None, None


class _Product8(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int], bias: Tensor | None) -> Tensor:
        ctx.shape, ctx.dtype, ctx.x = shape, x.dtype, x
        quantised = x.to(torch.float16).to(torch.int8)
        scales = x.new_empty(x.shape[:-1], dtype=torch.float32)
        product = x.new_empty((*x.shape[:-1], shape[0]), dtype=torch.int32)
        del quantised, scales
        return product.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        weight = torch.empty(ctx.shape, dtype=ctx.dtype, device=gradient.device)
        return torch.matmul(gradient.to(ctx.dtype), weight), None, None


def quantize_stand_in(model: nn.Module, adapt: AdaptConfig, compute: torch.dtype) -> None:
    """Replace the linear layers that a recipe quantises, adapted ones included, in place."""
    if adapt.quantize == "none":
        return
    bits: Literal[4, 8] = 4 if adapt.quantize == "nf4" else 8
    for name, module in list(model.named_modules()):
        if any(skipped in name for skipped in SKIPPED) or "lora_" in name:
            continue
        for child_name, child in list(module.named_children()):
            if type(child) is not nn.Linear or any(skipped in f"{name}.{child_name}" for skipped in SKIPPED):
                continue
            setattr(module, child_name, QuantizedStandIn(child, bits, adapt.double_quant, compute))
            if child_name == "base_layer" and bits == 4:
                module.cast_input_dtype_enabled = False  # under autocast peft's 4-bit layer does not cast  # type: ignore


_MIN_8BIT = 4096  # bitsandbytes keeps the moments of smaller parameters in 32 bits
_BLOCK_8BIT = 256  # 8-bit moments per float32 scale


class GpuOptimizer:
    """Allocates the state of `train.optimizer` at its first step and does nothing else."""

    def __init__(self, parameters: Iterable[nn.Parameter], name: str) -> None:
        self.parameters = list(parameters)
        self.name = name
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}

    def step(self) -> None:
        """Allocate the state of every trained parameter that lacks it."""
        for parameter in self.parameters:
            if parameter not in self.state:
                self.state[parameter] = self._state(parameter)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Free the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        if self.name == "adamw":
            moments = {name: torch.empty_like(parameter, requires_grad=False) for name in ("first", "second")}
            return {**moments, "step": parameter.new_empty((), dtype=torch.float32)}
        small = parameter.numel() < _MIN_8BIT
        dtype = torch.float32 if small else torch.uint8
        state = {name: parameter.new_empty(parameter.shape, dtype=dtype) for name in ("first", "second")}
        if not small:
            blocks = -(-parameter.numel() // _BLOCK_8BIT)
            state |= {name: parameter.new_empty(blocks, dtype=torch.float32) for name in ("scales1", "scales2")}
        return state
