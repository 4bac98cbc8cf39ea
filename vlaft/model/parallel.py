"""All actions at once: one forward pass under bidirectional attention over empty placeholders (OpenVLA-OFT).

Behind the prompt stand K * A placeholders, whose embeddings are zero, and the end of the sequence. Every token sees
every other, and the hidden state one position before a placeholder becomes that placeholder's action.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlaft.observation.batch import Observation


def action_states(model: Any, observation: Observation, count: int) -> Tensor:
    """Return the hidden states that `count` action values are read from: `[B, count, D]`.

    Args:
        model: an `OpenVLAForActionPrediction`, bare or wrapped by peft.
        observation: on the model's device.
        count: K * A.
    """
    prompts = observation.prompt_ids
    batch, longest = prompts.shape
    mask = observation.prompt_mask
    lengths = prompts.new_full((batch, 1), longest) if mask is None else mask.sum(dim=1, keepdim=True)
    columns = lengths + torch.arange(count + 1, device=prompts.device)  # of the placeholders, and the end behind them
    ids = torch.cat([prompts, prompts.new_zeros(batch, count + 1)], dim=1)
    ids = ids.scatter(1, columns[:, -1:], model.config.text_config.eos_token_id)
    # upstream predicts one row at a time, without padding: here too an answer must not depend on its neighbours
    hidden: Tensor = model.label_states(
        ids, columns, observation.pixel_values, state=observation.state, padding_speaks=False
    )
    return hidden[:, :-1]
