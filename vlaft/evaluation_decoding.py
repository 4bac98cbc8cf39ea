"""Decode the same actions twice from one look at image and prompt: with the demonstrated tokens as input, and alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


@torch.inference_mode()
def decode_both(
    model: Any, prompts: Tensor, mask: Tensor, pixel_values: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the tokens that the model finds most likely, teacher-forced and free-running.

    Image and prompt are nearly the whole cost of a prediction, and both ways share them: their keys and values are
    computed once, extended by the demonstrated tokens, cut back, and extended by the model's own.

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
    head, embed = model.get_output_embeddings(), model.get_input_embeddings()
    steps = targets.shape[1] - 1  # the first token needs no other
    keys = model.splice_mask(mask).bool()  # [B, S], False on padding
    lengths = keys.sum(dim=1)
    cache = DynamicCache(config=model.config.text_config)
    hidden = model.decode(model.embed(prompts, pixel_values), cache=cache)
    first = head(hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]).argmax(dim=-1, keepdim=True)
    if steps == 0:
        return first, first

    causal = torch.ones(steps, steps, dtype=torch.bool, device=keys.device).tril()
    seen = torch.cat([keys[:, None].expand(-1, steps, -1), causal.expand(len(keys), -1, -1)], dim=-1)
    positions = lengths[:, None] + torch.arange(steps, device=keys.device)
    hidden = model.decode(embed(targets[:, :-1]), mask=seen[:, None], position_ids=positions, cache=cache)
    forced = torch.cat([first, head(hidden).argmax(dim=-1)], dim=1)

    cache.crop(-steps)
    free = first
    for step in range(steps):
        keys = torch.cat([keys, keys.new_ones(len(keys), 1)], dim=1)
        hidden = model.decode(
            embed(free[:, -1:]), mask=keys[:, None, None], position_ids=positions[:, step : step + 1], cache=cache
        )
        free = torch.cat([free, head(hidden[:, -1:]).argmax(dim=-1)], dim=1)
    return forced, free
