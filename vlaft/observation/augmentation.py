"""Image operations on whole batches, on the device where the batch is: crops, augmentation, normalisation.

The operations and their parameters are those with which OpenVLA was fine-tuned (docs/upstream.md, Augmentation).
Where the random numbers differ: upstream draws all of a frame's parameters from one seed, so that crop offset,
brightness, contrast, saturation and hue rise and fall together; here they are independent of each other, except that
the crop's two offsets are equal, as upstream's are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Generator, Tensor

CROP_AREA = 0.9
BRIGHTNESS = 0.2  # added, in [-0.2, 0.2) of the 0..1 scale
CONTRAST = (0.8, 1.2)  # factor on the distance from each channel's mean
SATURATION = (0.8, 1.2)  # factor on the saturation of HSV
HUE = 0.05  # added to the hue of HSV, in turns
_WITH_CAMERAS = 5  # dimensions of a batch with several images per example


def pixel_values(images: Tensor, means: Sequence[Sequence[float]], stds: Sequence[Sequence[float]]) -> Tensor:
    """Return the vision backbones' input: float32 `[B, N * 3 * n, H, W]`, one normalised copy per camera and backbone.

    Args:
        images: uint8 `[B, H, W, 3]`, or `[B, N, H, W, 3]` of N cameras.
        means: per backbone and channel, on the 0..1 scale.
        stds: likewise.
    """
    import torch

    if images.ndim == _WITH_CAMERAS:
        each = pixel_values(images.flatten(0, 1), means, stds)
        return each.unflatten(0, images.shape[:2]).flatten(1, 2)
    scaled = images.permute(0, 3, 1, 2).to(torch.float32) / 255.0
    mean = scaled.new_tensor(means)[:, :, None, None]  # [n, 3, 1, 1]
    std = scaled.new_tensor(stds)[:, :, None, None]
    return ((scaled[:, None] - mean) / std).flatten(1, 2)


def center_crop(images: Tensor) -> Tensor:
    """Return the central 90 % of each image's area at the old size: uint8, of the same shape.

    For a model trained with random crops of that area (docs/upstream.md, At evaluation).

    Args:
        images: uint8 `[B, H, W, 3]`, or `[B, N, H, W, 3]` of N cameras.
    """
    import torch

    if images.ndim == _WITH_CAMERAS:
        return center_crop(images.flatten(0, 1)).unflatten(0, images.shape[:2])
    offset = torch.full((len(images),), (1.0 - CROP_AREA**0.5) / 2.0, device=images.device)
    return _to_uint8(_crop_and_resize(_to_float(images), offset))


def augment(images: Tensor, generator: Generator | None = None) -> Tensor:
    """Return randomly cropped and recoloured images: uint8, of the same shape, on the same device.

    In this order, each with its own parameters per image and clipped to 0..1: a crop of 90 % of the area,
    brightness, contrast, saturation, hue. Cameras are images like any other: each has its own parameters.

    Args:
        images: uint8 `[B, H, W, 3]`, or `[B, N, H, W, 3]` of N cameras.
        generator: source of the random numbers, on the images' device or on the CPU; None takes torch's global one.
    """
    import torch

    if images.ndim == _WITH_CAMERAS:
        return augment(images.flatten(0, 1), generator).unflatten(0, images.shape[:2])
    device = images.device if generator is None else generator.device
    draws = torch.rand((5, len(images)), generator=generator, device=device).to(images.device)
    parameters = draws[:, :, None, None, None]
    batch = _crop_and_resize(_to_float(images), draws[0] * (1.0 - CROP_AREA**0.5))
    batch = (batch + _between(parameters[1], (-BRIGHTNESS, BRIGHTNESS))).clamp(0, 1)
    mean = batch.mean(dim=(2, 3), keepdim=True)
    batch = ((batch - mean) * _between(parameters[2], CONTRAST) + mean).clamp(0, 1)
    hue, saturation, value = _to_hsv(batch)
    saturation = (saturation * _between(parameters[3], SATURATION)[:, 0]).clamp(0, 1)
    # converting back to RGB between the two would change nothing: neither touches what the other does
    hue = (hue + _between(parameters[4], (-HUE, HUE))[:, 0]) % 1.0
    return _to_uint8(_to_rgb(hue, saturation, value))


def _between(draw: Tensor, bounds: tuple[float, float]) -> Tensor:
    return draw * (bounds[1] - bounds[0]) + bounds[0]


def _to_float(images: Tensor) -> Tensor:
    """Return uint8 `[B, H, W, 3]` as float32 `[B, 3, H, W]` in 0..1."""
    import torch

    return images.permute(0, 3, 1, 2).to(torch.float32) / 255.0


def _to_uint8(batch: Tensor) -> Tensor:
    """Return float `[B, 3, H, W]` as uint8 `[B, H, W, 3]`, as TensorFlow's saturating conversion (x 255.5, cut off)."""
    import torch

    return (batch.clamp(0, 1) * 255.5).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _crop_and_resize(batch: Tensor, offset: Tensor) -> Tensor:
    """Cut squares of `CROP_AREA` whose top-left corners lie at `offset` (`[B]`, of the edge, for y and x alike).

    Bilinear without antialiasing; the sample grid spans the box in units of H - 1 (`tf.image.crop_and_resize`).
    """
    import torch
    from torch.nn.functional import grid_sample

    height, width = batch.shape[2:]
    side = CROP_AREA**0.5
    # grid_sample with align_corners counts the same units, from -1 to 1
    across = 2.0 * (offset[:, None] + side * torch.linspace(0, 1, width, device=batch.device)) - 1.0
    down = 2.0 * (offset[:, None] + side * torch.linspace(0, 1, height, device=batch.device)) - 1.0
    grid = torch.stack(
        [across[:, None, :].expand(-1, height, -1), down[:, :, None].expand(-1, -1, width)], dim=-1
    )  # [B, H, W, 2]
    return grid_sample(batch, grid, mode="bilinear", padding_mode="border", align_corners=True).clamp(0, 1)


def _to_hsv(batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return hue (in turns), saturation and value of float `[B, 3, H, W]`, each `[B, H, W]` in 0..1."""
    import torch

    red, green, blue = batch.unbind(1)
    value, least = batch.amax(1), batch.amin(1)
    spread = value - least
    safe = torch.where(spread > 0, spread, torch.ones_like(spread))
    sector = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2.0 + (blue - red) / safe, 4.0 + (red - green) / safe),
    )
    hue = torch.where(spread > 0, (sector / 6.0) % 1.0, torch.zeros_like(sector))
    saturation = torch.where(value > 0, spread / torch.where(value > 0, value, torch.ones_like(value)), 0.0)
    return hue, saturation, value


def _to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Return float `[B, 3, H, W]` of what `_to_hsv` gave."""
    import torch

    # per channel: how far the hue lies from the sector where that channel is absent
    turns = hue * 6.0
    red = (turns - 3.0).abs() - 1.0
    green = 2.0 - (turns - 2.0).abs()
    blue = 2.0 - (turns - 4.0).abs()
    pure = torch.stack([red, green, blue], dim=1).clamp(0, 1)
    return ((pure - 1.0) * saturation[:, None] + 1.0) * value[:, None]
