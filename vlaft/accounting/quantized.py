"""Linear layers in 4 or 8 bits as bitsandbytes 0.50 lays them out on a GPU, on the meta device and without it.

What counts for memory, read from its source (`autograd/_functions.py`, `nn/modules.py`):

* nf4: half a byte per weight and a float32 scale per block of 64; with double quantisation a byte per scale and a
  float32 per 256 scales. From about 1,500 rows on, and below them on most GPUs, the forward pass dequantises the
  whole weight into a buffer that dies with the operation; the backward pass does so always. The input is cast to the
  compute type and not saved: a frozen weight's gradient is not wanted. The output has the type of the input.
* int8: a byte per weight and a float32 per output. The input is quantised, and saved in its own type; the product is
  an int32 buffer before it is scaled. The backward pass dequantises the weight.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlaft.adapt.quantize import SKIPPED
from vlaft.config import AdaptConfig

_BLOCK = 64  # weights per scale
_NESTED_BLOCK = 256  # scales per scale of scales
_CODEBOOKS = (256, 16)  # float32 entries that every layer keeps on the GPU besides


class PackedLinear(nn.Module):
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


def pack_linears(model: nn.Module, adapt: AdaptConfig, compute: torch.dtype) -> None:
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
            setattr(module, child_name, PackedLinear(child, bits, adapt.double_quant, compute))
            if child_name == "base_layer" and bits == 4:
                module.cast_input_dtype_enabled = False  # under autocast peft's 4-bit layer does not cast  # type: ignore
