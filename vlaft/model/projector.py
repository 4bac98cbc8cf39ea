"""The projector: patch features to the language model's width."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Projector(nn.Module):
    """An MLP with exact GELU and biases.

    A single backbone has two layers (`fc1`: V to D, `fc2`: D to D), the fused one three (`fc1`: V to 4V,
    `fc2`: 4V to D, `fc3`: D to D), as in the released checkpoints.
    """

    def __init__(self, vision_dim: int, text_dim: int, *, fused: bool) -> None:
        super().__init__()
        hidden = 4 * vision_dim if fused else text_dim
        self.fc1 = nn.Linear(vision_dim, hidden)
        self.fc2 = nn.Linear(hidden, text_dim)
        self.fc3 = nn.Linear(text_dim, text_dim) if fused else None

    def forward(self, features: Tensor) -> Tensor:
        """Map `[B, P, V]` to `[B, P, D]`."""
        x = self.fc2(F.gelu(self.fc1(features)))
        return x if self.fc3 is None else self.fc3(F.gelu(x))
