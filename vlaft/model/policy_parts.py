"""Modules that a policy has besides OpenVLA's own: the state's projector and, in the ViTs' blocks, FiLM.

They are held and computed in float32, whatever the rest is: upstream creates its own so, and they are small.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FullPrecisionLinear(nn.Linear):
    """A linear layer in float32, under autocast as well."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` of any type to float32 `[..., out]`."""
        # the meta device has no autocast of its own; `vlaft.accounting` emulates it where the CPU's is on
        with torch.autocast("cpu" if x.device.type == "meta" else x.device.type, enabled=False):
            return F.linear(x.float(), self.weight, self.bias)


class ProprioProjector(nn.Module):
    """The robot's state as one token: an MLP with exact GELU (OpenVLA-OFT's `proprio_projector`)."""

    def __init__(self, state_size: int, text_dim: int) -> None:
        super().__init__()
        self.fc1 = FullPrecisionLinear(state_size, text_dim)
        self.fc2 = FullPrecisionLinear(text_dim, text_dim)

    def forward(self, state: Tensor) -> Tensor:
        """Map normalised states `[B, S]` to float32 `[B, D]`."""
        return self.fc2(F.gelu(self.fc1(state)))


def modulate(x: Tensor, language: Tensor, scale: nn.Module, shift: nn.Module) -> Tensor:
    """Scale and shift features `[B, N, V]` by what the instruction's mean embedding `[B, D]` says (FiLM)."""
    return x * (1 + scale(language)[:, None].to(x.dtype)) + shift(language)[:, None].to(x.dtype)
