"""Actions as tokens: the last ids of the vocabulary, read off the language model's own head (OpenVLA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.utils import ModelOutput

from vlaft.action.tokens import IGNORED, ActionTokenizer
from vlaft.action.written import Compared, Written
from vlaft.model.cuda_graphs import CudaGraphs
from vlaft.model.generation import decode_both, generate_action_ids, likeliest
from vlaft.model.parallel import action_states
from vlaft.observation.batch import Observation


@dataclass
class TokenOutput(ModelOutput):
    """What a forward pass returns.

    Attributes:
        loss: mean cross-entropy over all labels of the batch, a scalar; None without labels.
        logits: with labels `[N, vocabulary]`, one row per label in row-major order; without `[B, S, vocabulary]`
            with S = 1 + P + (T - 1).
        label_ids: `[N]` int64, the label that each row of `logits` predicts; None without labels.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    label_ids: Tensor | None = None


class TokenHead:
    """Writes each dimension of an action as one token, one after the other or all at once.

    It has no parameters of its own. The actions of a forward pass with labels are the likeliest tokens at the label
    positions, the last of which is the end of the sequence.
    """

    def __init__(self, writer: nn.Module, actions: ActionTokenizer, parallel_chunk: int | None = None) -> None:
        """Take what it writes with.

        Args:
            writer: the language model's head, which gives logits `[..., vocabulary]`.
            actions: the action tokens.
            parallel_chunk: K, of a policy that writes all at once; None writes one action, token by token.
        """
        self.writer = writer
        self.actions = actions
        self.parallel_chunk = parallel_chunk
        self.chunk = parallel_chunk or 1

    def loss(self, hidden: Tensor, label_ids: Tensor, actions: Tensor | None = None) -> TokenOutput:
        """Return cross-entropy and logits.

        Args:
            hidden: `[..., D]`.
            label_ids: `[...]` int64; `IGNORED` where there is none.
            actions: not looked at.
        """
        logits = self.writer(hidden.flatten(0, -2))
        labels = label_ids.flatten()
        loss = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED)
        return TokenOutput(loss=loss, logits=logits, label_ids=labels)

    @torch.no_grad()
    def compared(self, output: TokenOutput, batch_size: int) -> Compared:
        """Return the likeliest actions beside the demonstrated ones.

        Args:
            output: of `loss`, with the same number of labels in each row, the last one the end of the sequence.
            batch_size: B.
        """
        assert output.logits is not None and output.label_ids is not None
        predicted, demonstrated = (
            ids.view(batch_size, -1)[:, :-1].view(batch_size, self.chunk, -1)
            for ids in (output.logits.argmax(dim=-1), output.label_ids)
        )
        return Compared(
            actions=self._decode(predicted),
            demonstrated=self._decode(demonstrated),
            correct=predicted == demonstrated,
            terms=(output.label_ids != IGNORED).sum(),
        )

    def predict(
        self,
        model: Any,
        observation: Observation,
        size: int,
        *,
        action_ids_only: bool = False,
        graphs: CudaGraphs | None = None,
        **_: Any,
    ) -> Written:
        """Write actions of `size` dimensions, each token the likeliest.

        Args:
            model: the model, bare or wrapped by peft.
            observation: on the model's device.
            size: A.
            action_ids_only: choose among action tokens only (upstream chooses among all).
            graphs: recordings of earlier calls with this model, whose weights must not have moved since.
        """
        if self.parallel_chunk is not None:
            return self._written(self._at_once(model, observation, size, action_ids_only=action_ids_only))
        ids = generate_action_ids(
            model,
            observation.prompt_ids,
            observation.pixel_values,
            observation.prompt_mask,
            num_tokens=size,
            action_ids_only=action_ids_only,
            graphs=graphs,
        )
        return self._written(ids[:, None].cpu().numpy())

    @torch.inference_mode()
    def _at_once(self, model: Any, observation: Observation, size: int, *, action_ids_only: bool) -> NDArray[np.int64]:
        hidden = action_states(model, observation, self.chunk * size)
        ids = likeliest(model, hidden, action_ids_only=action_ids_only)
        return ids.view(len(ids), self.chunk, size).cpu().numpy()

    def predict_both(
        self, model: Any, observation: Observation, demonstrated: Written
    ) -> tuple[Written | None, Written]:
        """Write actions twice: each token after the demonstrated ones (teacher-forced), and as `predict` does.

        A policy that writes all at once feeds nothing back, so that there is nothing to force.

        Args:
            model: in eval mode.
            observation: on the model's device.
            demonstrated: `[B, 1, A]`, of `as_written`.
        """
        if self.parallel_chunk is not None:
            return None, self.predict(model, observation, demonstrated.actions.shape[-1])
        assert demonstrated.token_ids is not None
        targets = torch.from_numpy(demonstrated.token_ids[:, 0]).to(observation.prompt_ids.device)
        forced, free = decode_both(
            model, observation.prompt_ids, observation.prompt_mask, observation.pixel_values, targets
        )
        return self._written(forced[:, None].cpu().numpy()), self._written(free[:, None].cpu().numpy())

    @property
    def ends(self) -> tuple[float, float]:
        """The least and the largest value that a token stands for."""
        centers = self.actions.centers
        return float(centers[0]), float(centers[-1])

    def as_written(self, actions: NDArray[np.floating]) -> Written:
        """Return normalised actions `[B, K, A]` as this head writes them: rounded to bins."""
        return self._written(self.actions.encode(actions).astype(np.int64))

    def _written(self, tokens: NDArray[np.int64]) -> Written:
        return Written(self.actions.decode(tokens), tokens, self.actions.is_action(tokens))

    def _decode(self, ids: Tensor) -> Tensor:
        """Return what `ActionTokenizer.decode` does, float32, on the device."""
        centers = torch.tensor(self.actions.centers, dtype=torch.float32, device=ids.device)
        return centers[(self.actions.vocab_size - ids - 1).clamp(0, len(centers) - 1)]
