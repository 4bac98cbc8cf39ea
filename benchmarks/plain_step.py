"""A forward pass as upstream's fine-tuning script runs it, on vlaft's modules: what vlaft's own step is compared with.

It does what `vlaft` leaves out: a padding mask over the whole sequence (upstream pads each batch to its longest prompt,
so that almost every batch needs one), logits of all positions in float32, and a loss over all of them. Upstream's last
ViT block is left out here too: its result is dropped at once, which costs time and no memory at the peak.

`plain_chunk_forward` does the same as OpenVLA-OFT's script does it: besides, the hidden states of every block are kept
though the last ones alone are read, and logits and their loss are computed though an L1 head needs neither.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from vlaft.action.tokens import IGNORED
from vlaft.model.heads.regression import RegressionOutput
from vlaft.model.heads.tokens import TokenOutput
from vlaft.model.openvla import OpenVLAForActionPrediction
from vlaft.observation.augmentation import pixel_values
from vlaft.training.step import Inputs, Normalization, autocast


def plain_forward(
    model: nn.Module,
    inputs: Inputs,
    normalization: Normalization,
    compute: torch.dtype,
    generator: torch.Generator | None = None,
) -> TokenOutput:
    """Take the place of `vlaft.training.step.forward`; images are used as they are."""
    base = cast(OpenVLAForActionPrediction, model.get_base_model() if hasattr(model, "get_base_model") else model)
    pixels = pixel_values(inputs.images, normalization.means, normalization.stds)
    with autocast(pixels.device, compute):
        embeddings = base.embed(inputs.input_ids, pixels)
        keys = base.splice_mask(torch.ones_like(inputs.input_ids)).bool()[:, None, None]
        length = keys.shape[-1]
        mask = keys & torch.ones(length, length, dtype=torch.bool, device=keys.device).tril()
        logits = base.language_model.lm_head(base.decode(embeddings, mask=mask)).float()
        ignored = inputs.labels.new_full((len(inputs.labels), base.context_size), IGNORED)
        labels = torch.cat([inputs.labels[:, :1], ignored, inputs.labels[:, 1:]], dim=1)
        shifted = logits[:, :-1].contiguous().flatten(0, 1)
        label_ids = labels[:, 1:].contiguous().flatten()
        loss = F.cross_entropy(shifted, label_ids, ignore_index=IGNORED)
    return TokenOutput(loss=loss, logits=logits, label_ids=label_ids)


def plain_chunk_forward(
    model: nn.Module,
    inputs: Inputs,
    normalization: Normalization,
    compute: torch.dtype,
    generator: torch.Generator | None = None,
) -> RegressionOutput:
    """Take the place of `vlaft.training.step.forward` for a policy with an L1 head; images are used as they are."""
    base = cast(OpenVLAForActionPrediction, model.get_base_model() if hasattr(model, "get_base_model") else model)
    pixels = pixel_values(inputs.images, normalization.means, normalization.stds)
    positions, actions = inputs.label_positions, inputs.actions
    assert actions is not None
    with autocast(pixels.device, compute):
        empty = torch.zeros_like(inputs.input_ids, dtype=torch.bool).scatter(1, positions[:, :-1], True)
        real = torch.arange(inputs.input_ids.shape[1], device=empty.device) <= positions[:, -1:]
        spoken = (~empty).float()
        hidden = base.embed(inputs.input_ids, pixels, state=inputs.state, empty=empty, spoken=spoken)
        length = hidden.shape[1]
        mask = base.splice_mask(real)[:, None, None].expand(-1, 1, length, -1)
        llama, place = base.language_model.model, torch.arange(length, device=empty.device)[None]
        rotary = llama.rotary_emb(hidden, position_ids=place)
        states = [hidden]
        for layer in llama.layers:
            states.append(
                layer(
                    states[-1],
                    attention_mask=mask,
                    position_ids=place,
                    past_key_values=None,
                    use_cache=False,
                    position_embeddings=rotary,
                    is_causal=False,
                )
            )
        states[-1] = llama.norm(states[-1])
        logits = base.language_model.lm_head(states[-1]).float()
        ignored = inputs.labels.new_full((len(inputs.labels), base.context_size), IGNORED)
        labels = torch.cat([inputs.labels[:, :1], ignored, inputs.labels[:, 1:]], dim=1)
        unused = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        rows = (base.context_size + positions[:, :-1] - 1)[..., None].expand(-1, -1, hidden.shape[-1])
        written = base.action_head(states[-1].gather(1, rows))
        loss = (written - actions).abs().mean()
    output = RegressionOutput(loss=loss, actions=written, demonstrated=actions)
    setattr(output, "held", (unused, logits, states))  # noqa: B010  # as upstream's output does until the step is over
    return output
