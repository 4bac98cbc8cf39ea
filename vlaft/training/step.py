"""One forward and backward pass: what a run does thousands of times, and what the memory model traces."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlaft.model.heads.tokens import TokenOutput
from vlaft.observation.augmentation import augment, pixel_values


@dataclass(frozen=True)
class Inputs:
    """A batch on the model's device.

    Attributes:
        input_ids: `[B, T]` int64, padded on the right.
        labels: `[B, T]` int64.
        label_positions: `[B, R]` int64, columns of `labels` that the loss uses.
        images: `[B, N, H, W, 3]` uint8, of N cameras.
        state: `[B, S]` float32, normalised; None where the policy does not read it.
        actions: `[B, K, A]` float32, normalised; None where the loss is of labels alone.
    """

    input_ids: Tensor
    labels: Tensor
    label_positions: Tensor
    images: Tensor
    state: Tensor | None = None
    actions: Tensor | None = None


@dataclass(frozen=True)
class Normalization:
    """Per ViT: channel means and standard deviations of its pixels, on the 0 to 1 scale."""

    means: Sequence[Sequence[float]]
    stds: Sequence[Sequence[float]]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Return the context in which forward passes run: matrix products in `dtype`, plain float32 without autocast."""
    # the meta device has no autocast; `vlaft.accounting` emulates CUDA's where the CPU's is on
    device_type = "cpu" if device.type == "meta" else device.type
    return nullcontext() if dtype == torch.float32 else torch.autocast(device_type, dtype)


def forward(
    model: nn.Module,
    inputs: Inputs,
    normalization: Normalization,
    compute: torch.dtype,
    generator: torch.Generator | None = None,
    vision_features: Tensor | None = None,
) -> TokenOutput:
    """Run the model on a batch and return its head's output, the loss among it.

    Args:
        model: bare, or wrapped by peft and by what distributes it.
        inputs: the batch.
        normalization: of the base's pixels.
        compute: number format of matrix products.
        generator: augment the images with random numbers from here; None leaves them as they are.
        vision_features: `[B, N * P, V]`, what the vision backbone gave for these images before; None computes them.
    """
    if vision_features is not None:
        seen = {"vision_features": vision_features}
    else:
        images = inputs.images if generator is None else augment(inputs.images, generator)
        seen = {"pixel_values": pixel_values(images, normalization.means, normalization.stds)}
    with autocast(inputs.input_ids.device, compute):
        return model(
            input_ids=inputs.input_ids,
            **seen,
            labels=inputs.labels,
            label_positions=inputs.label_positions,
            state=inputs.state,
            actions=inputs.actions,
        )
