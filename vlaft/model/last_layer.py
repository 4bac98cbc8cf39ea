"""The last decoder block, computed only where its output is wanted.

A loss has labels at 8 of some 290 positions, and a prompt's first token is read off one. The blocks below need all
positions, because later blocks look at them; the last one needs keys and values of all and everything else (queries,
attention, MLP) of the wanted positions alone. The values there are the same, up to the order of sums.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, apply_rotary_pos_emb


class LastDecoderLayer(LlamaDecoderLayer):
    """A Llama block whose `forward` takes `rows`, the positions whose output is wanted."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        rows: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Run the block.

        Args:
            hidden_states: `[B, S, D]`.
            attention_mask: as `LlamaDecoderLayer` takes it; with `rows`, None for causal attention, or what every
                position may look at: bool `[B, 1, 1, S]`.
            position_ids: as `LlamaDecoderLayer`.
            past_key_values: an empty cache to fill, or None.
            use_cache: as `LlamaDecoderLayer`.
            position_embeddings: cosines and sines, each `[B or 1, S, head width]`.
            rows: `[B, K]` int64, or None for all positions.
            kwargs: handed on.

        Returns:
            `[B, K, D]`, or `[B, S, D]` without `rows`.
        """
        if rows is None:
            return super().forward(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        assert position_embeddings is not None
        attention = self.self_attn
        batch, length, _ = hidden_states.shape
        examples = torch.arange(batch, device=rows.device)[:, None]
        normalised = self.input_layernorm(hidden_states)

        def heads(x: Tensor) -> Tensor:  # [B, N, H * d] to [B, H, N, d]
            return x.view(batch, x.shape[1], -1, attention.head_dim).transpose(1, 2)

        query = heads(attention.q_proj(normalised[examples, rows]))
        key, value = heads(attention.k_proj(normalised)), heads(attention.v_proj(normalised))
        cos, sin = (table.expand(batch, -1, -1) for table in position_embeddings)
        query, _ = apply_rotary_pos_emb(query, query, cos[examples, rows], sin[examples, rows])
        _, key = apply_rotary_pos_emb(key, key, cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, attention.layer_idx)
        visible = attention_mask
        if kwargs.get("is_causal", True):
            assert attention_mask is None
            visible = torch.arange(length, device=rows.device) <= rows[:, None, :, None]  # [B, 1, K, S]
        mixed = F.scaled_dot_product_attention(
            query,
            key[:, :, :length],  # a preallocated cache is longer
            value[:, :, :length],
            attn_mask=visible,
            scale=attention.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        mixed = attention.o_proj(mixed.transpose(1, 2).reshape(batch, rows.shape[1], -1))
        hidden = hidden_states[examples, rows] + mixed
        return hidden + self.mlp(self.post_attention_layernorm(hidden))
