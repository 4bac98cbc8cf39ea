"""Decode the same actions twice from one look at image and prompt: with the demonstrated tokens as input, and alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlaft.model.generation import continue_greedily, feed, likeliest, read_prompt


@torch.inference_mode()
def decode_both(
    model: Any, prompts: Tensor, mask: Tensor, pixel_values: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the tokens that the model finds most likely, teacher-forced and free-running.

    Image and prompt are nearly the whole cost of a prediction, and both ways share them: their keys and values are
    computed once, extended by the demonstrated tokens, and then by the model's own in their place.

    Args:
        model: bare or wrapped by peft, in eval mode.
        prompts: `[B, T]` int64, beginning with BOS, padded on the right.
        mask: `[B, T]`, 1 where there is a token.
        pixel_values: `[B, 3 * number of ViTs, H, W]`, normalised, of the model's dtype.
        targets: `[B, A]` int64, the demonstrated action tokens.

    Returns:
        Two tensors `[B, A]` int64. The first is what `forward` with labels gives by argmax, the second what
        `generate_action_ids` gives.
    """
    count = targets.shape[1]
    prompt = read_prompt(model, prompts, pixel_values, mask, room=count - 1)
    hidden = prompt.last[:, None]
    if count > 1:  # the first token needs no other
        hidden = torch.cat([hidden, feed(model, prompt, targets[:, :-1], fed=0)], dim=1)
    return likeliest(model, hidden), continue_greedily(model, prompt, count)
