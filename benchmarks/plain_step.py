"""A forward pass as upstream's fine-tuning script runs it, on vlaft's modules: what vlaft's own step is compared with.

It does what `vlaft` leaves out: a padding mask over the whole sequence (upstream pads each batch to its longest prompt,
so that almost every batch needs one), logits of all positions in float32, and a loss over all of them. Upstream's last
ViT block is left out here too: its result is dropped at once, which costs time and no memory at the peak.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from vlaft.action.tokens import IGNORED
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
