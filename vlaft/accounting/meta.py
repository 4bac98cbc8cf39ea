"""A model and a batch on the meta device: shapes and number formats without a byte of data."""

from __future__ import annotations

import torch

from vlaft.model.configuration import OpenVLAConfig
from vlaft.model.openvla import OpenVLAForActionPrediction
from vlaft.training.step import Inputs, Normalization

META = torch.device("meta")


def meta_model(config: OpenVLAConfig, dtype: torch.dtype = torch.float32) -> OpenVLAForActionPrediction:
    """Build a base on the meta device, in eval mode as checkpoints are loaded."""
    with META:
        model = OpenVLAForActionPrediction(config)
    return model.to(dtype).eval()


def example_inputs(
    config: OpenVLAConfig, *, batch_size: int, tokens: int, labels: int, device: torch.device = META
) -> Inputs:
    """Return a batch of zeros.

    Args:
        config: of the base.
        batch_size: B.
        tokens: T, prompt and actions after padding.
        labels: K, labels per example, the last ones of each row.
        device: where; the meta device allocates nothing.
    """
    side = config.image_sizes[0]  # type: ignore[index]
    positions = torch.arange(tokens - labels, tokens, device=device).repeat(batch_size, 1)
    return Inputs(
        input_ids=torch.zeros(batch_size, tokens, dtype=torch.int64, device=device),
        labels=torch.zeros(batch_size, tokens, dtype=torch.int64, device=device),
        label_positions=positions,
        images=torch.zeros(batch_size, side, side, 3, dtype=torch.uint8, device=device),
    )


def example_normalization(config: OpenVLAConfig) -> Normalization:
    """Return one normalisation per ViT; its values change no size."""
    half = [[0.5] * 3] * len(config.timm_model_ids)  # type: ignore[arg-type]
    return Normalization(half, half)
