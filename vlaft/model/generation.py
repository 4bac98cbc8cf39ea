"""Greedy decoding of exactly A action tokens, for a batch of prompts of different lengths, with a cache.

* Every prompt token is attended, the blank (29871) that ends an OpenVLA prompt included; upstream leaves that
  one out of its mask, which today's transformers would hide from the model.
* Exactly A tokens are decoded: an end-of-sequence token is a token like any other here.
* Prompts stay padded on the right, as in training. The padding between a short prompt and its first new token is
  masked, and positions count real tokens only, so each row is what it would be alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from vlaft.model.openvla import OpenVLAForActionPrediction


@torch.inference_mode()
def generate_action_ids(
    model: OpenVLAForActionPrediction,
    input_ids: Tensor,
    pixel_values: Tensor,
    attention_mask: Tensor | None = None,
    *,
    num_tokens: int,
    action_ids_only: bool = False,
) -> Tensor:
    """Decode `num_tokens` tokens for each row, greedily.

    Args:
        model: the model, bare or wrapped by peft.
        input_ids: `[B, T]` int64 prompts beginning with BOS, padded on the right.
        pixel_values: `[B, 3 * number of ViTs, H, W]`, normalised, of the model's dtype.
        attention_mask: `[B, T]`, 1 where there is a token; None when no row is padded.
        num_tokens: A, the number of action dimensions.
        action_ids_only: choose among action tokens only (upstream chooses among all).

    Returns:
        `[B, num_tokens]` int64.
    """
    was_training = model.training
    model.eval()
    try:
        return _decode(model, input_ids, pixel_values, attention_mask, num_tokens, action_ids_only)
    finally:
        model.train(was_training)


def _decode(
    model: OpenVLAForActionPrediction,
    input_ids: Tensor,
    pixel_values: Tensor,
    attention_mask: Tensor | None,
    num_tokens: int,
    action_ids_only: bool,
) -> Tensor:
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    embeddings = model.embed(input_ids, pixel_values)
    keys = model.splice_mask(attention_mask).bool()  # [B, S], False on padding
    lengths = keys.sum(dim=1)  # [B], patches and real tokens
    cache = DynamicCache(config=model.config.text_config)
    # Causal attention keeps what lies to the right of a prompt's last token out of it, padding included.
    hidden = model.decode(embeddings, cache=cache)
    last = hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]  # [B, D]

    stop = model.config.action_vocab_size
    start = stop - model.config.n_action_bins
    tokens: list[Tensor] = []
    for step in range(num_tokens):
        logits = model.language_model.lm_head(last)  # [B, vocabulary]
        token = logits[:, start:stop].argmax(dim=-1) + start if action_ids_only else logits.argmax(dim=-1)
        tokens.append(token)
        if step == num_tokens - 1:
            break
        keys = torch.cat([keys, keys.new_ones(len(keys), 1)], dim=1)
        last = model.decode(
            model.get_input_embeddings()(token[:, None]),
            mask=keys[:, None, None],  # hides the padding that lies between a short prompt and its new tokens
            position_ids=(lengths + step)[:, None],
            cache=cache,
        )[:, -1]
    return torch.stack(tokens, dim=1)
