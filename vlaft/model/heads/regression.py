"""Actions as numbers: an MLP over the hidden states of a chunk, trained with the L1 distance (OpenVLA-OFT)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.utils import ModelOutput

from vlaft.action.written import Compared, Written
from vlaft.model.parallel import action_states
from vlaft.model.policy_parts import FullPrecisionLinear
from vlaft.observation.batch import Observation


@dataclass
class RegressionOutput(ModelOutput):
    """What a forward pass returns.

    Attributes:
        loss: mean distance over B, K and A, a scalar.
        actions: float32 `[B, K, A]`, normalised, as written.
        demonstrated: float32 `[B, K, A]`, normalised.
    """

    loss: Tensor | None = None
    actions: Tensor | None = None
    demonstrated: Tensor | None = None


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), FullPrecisionLinear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


class _ActionMLP(nn.Module):
    """Upstream's names; two residual blocks between two linear layers."""

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(inputs)
        self.fc1 = FullPrecisionLinear(inputs, width)
        self.mlp_resnet_blocks = nn.ModuleList(_Residual(width) for _ in range(2))
        self.layer_norm2 = nn.LayerNorm(width)
        self.fc2 = FullPrecisionLinear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(self.layer_norm1(x.float())))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


class RegressionHead(nn.Module):
    """Writes K actions from the hidden states of K * A positions; K is in no shape, A is.

    Held and computed in float32, whatever the rest is. What it writes is not clipped: it may leave [-1, 1].
    """

    ends = (-1.0, 1.0)

    def __init__(self, chunk: int, action_size: int, text_dim: int) -> None:
        """Take K, A and the language model's width D."""
        super().__init__()
        self.chunk = chunk
        self.action_size = action_size
        self.model = _ActionMLP(action_size * text_dim, text_dim, action_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states `[B, K * A, D]` to normalised actions, float32 `[B, K, A]`."""
        return self.model(hidden.reshape(len(hidden), self.chunk, -1))

    def loss(self, hidden: Tensor, label_ids: Tensor, actions: Tensor | None) -> RegressionOutput:
        """Return the L1 distance to the demonstrated actions.

        Args:
            hidden: `[B, K * A + 1, D]`: at the actions' positions, and at that of the end of the sequence.
            label_ids: not looked at.
            actions: float32 `[B, K, A]`, normalised.
        """
        assert actions is not None
        written = self(hidden[:, :-1])
        return RegressionOutput(loss=(written - actions).abs().mean(), actions=written, demonstrated=actions)

    @torch.no_grad()
    def compared(self, output: RegressionOutput, batch_size: int) -> Compared:
        """Return the written actions beside the demonstrated ones."""
        assert output.actions is not None and output.demonstrated is not None
        terms = output.actions.new_tensor(output.actions.numel())
        return Compared(output.actions.detach(), output.demonstrated, None, terms)

    def as_written(self, actions: NDArray[np.floating]) -> Written:
        """Return normalised actions `[B, K, A]` as they are: nothing is rounded."""
        return Written(actions.astype(np.float64))

    @torch.inference_mode()
    def predict(self, model: Any, observation: Observation, size: int, **_: Any) -> Written:
        """Write K actions of `size` dimensions for each row, in one forward pass."""
        hidden = action_states(model, observation, self.chunk * size)
        return Written(self(hidden).cpu().numpy().astype(np.float64))

    def predict_both(self, model: Any, observation: Observation, demonstrated: Written) -> tuple[None, Written]:
        """Write actions; nothing is teacher-forced where nothing is fed back."""
        return None, self.predict(model, observation, demonstrated.actions.shape[-1])
