"""What an optimizer keeps on a GPU, allocated on the meta device by the rules of its CUDA kernels.

PyTorch's fused AdamW and bitsandbytes' 8-bit one run on a GPU only, and work in place: they need no buffers besides
their state.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

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
