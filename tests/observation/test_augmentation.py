from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlaft.observation import augmentation
from vlaft.observation.augmentation import augment, center_crop, pixel_values


def noise(batch: int = 2, size: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (batch, size, size, 3), dtype=np.uint8))


def reference_crop(image: np.ndarray, offset: float, side: float) -> np.ndarray:
    """`tf.image.crop_and_resize` written out: sample positions in units of H - 1, bilinear."""
    height, width, _ = image.shape
    y = offset * (height - 1) + np.arange(height) * side * (height - 1) / (height - 1)
    x = offset * (width - 1) + np.arange(width) * side * (width - 1) / (width - 1)
    top, left = np.floor(y).astype(int), np.floor(x).astype(int)
    down, right = np.minimum(top + 1, height - 1), np.minimum(left + 1, width - 1)
    fy, fx = (y - top)[:, None, None], (x - left)[None, :, None]
    upper = image[top][:, left] * (1 - fx) + image[top][:, right] * fx
    lower = image[down][:, left] * (1 - fx) + image[down][:, right] * fx
    return upper * (1 - fy) + lower * fy


def test_center_crop_is_crop_and_resize() -> None:
    images = noise()
    side = 0.9**0.5
    for image, cropped in zip(images.numpy(), center_crop(images).numpy(), strict=True):
        expected = (reference_crop(image / 255.0, (1 - side) / 2, side) * 255.5).astype(np.uint8)
        difference = np.abs(cropped.astype(int) - expected)
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01  # where float32 falls on the other side


def test_pixel_values_stack_the_backbones() -> None:
    images = noise()
    values = pixel_values(images, [[0.1, 0.2, 0.3], [0.5, 0.5, 0.5]], [[1, 2, 3], [0.5, 0.5, 0.5]])
    assert values.shape == (2, 6, 24, 24) and values.dtype == torch.float32
    torch.testing.assert_close(values[:, 1], (images[..., 1] / 255.0 - 0.2) / 2)
    torch.testing.assert_close(values[:, 5], images[..., 2] / 127.5 - 1, atol=1e-6, rtol=0)


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(0, 255)] * 3))
def test_hsv_is_that_of_colorsys_and_comes_back(colour: tuple[int, int, int]) -> None:
    pixel = torch.tensor(colour, dtype=torch.float32).reshape(1, 3, 1, 1) / 255
    hsv = augmentation._to_hsv(pixel)
    expected = colorsys.rgb_to_hsv(*(level / 255 for level in colour))
    assert [float(part) for part in hsv] == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(augmentation._to_rgb(*hsv), pixel, atol=1e-5, rtol=0)


def test_augmentation_repeats_with_its_generator_and_differs_per_image() -> None:
    images = noise(1).expand(4, -1, -1, -1)
    first = augment(images, torch.Generator().manual_seed(7))
    assert torch.equal(first, augment(images, torch.Generator().manual_seed(7)))
    assert not torch.equal(first, augment(images, torch.Generator().manual_seed(8)))
    assert first.dtype == torch.uint8 and first.shape == images.shape
    assert all(not torch.equal(first[0], other) for other in first[1:])


def test_each_camera_has_its_own_parameters_and_a_single_one_those_of_today() -> None:
    images = noise(3)
    alone = augment(images, torch.Generator().manual_seed(7))
    assert torch.equal(augment(images[:, None], torch.Generator().manual_seed(7)), alone[:, None])
    both = augment(images[:, None].expand(-1, 2, -1, -1, -1), torch.Generator().manual_seed(7))
    assert both.shape == (3, 2, 24, 24, 3) and both.dtype == torch.uint8
    assert all(not torch.equal(first, second) for first, second in both)
    flat = images.repeat_interleave(2, dim=0)
    assert torch.equal(both.flatten(0, 1), augment(flat, torch.Generator().manual_seed(7)))


def test_pixel_values_go_camera_by_camera() -> None:
    images = noise(6).unflatten(0, (3, 2))
    means, stds = [[0.1, 0.2, 0.3], [0.5, 0.5, 0.5]], [[1, 2, 3], [0.5, 0.5, 0.5]]
    values = pixel_values(images, means, stds)
    assert values.shape == (3, 12, 24, 24)
    for camera in range(2):
        assert torch.equal(values[:, 6 * camera : 6 * camera + 6], pixel_values(images[:, camera], means, stds))


def test_parameters_stay_in_their_ranges() -> None:
    grey = torch.full((400, 4, 4, 3), 128, dtype=torch.uint8)
    levels = augment(grey, torch.Generator().manual_seed(0)).float() / 255
    # grey has no contrast, saturation or hue, so that only brightness is left
    shift = levels.mean(dim=(1, 2, 3)) - 128 / 255
    assert shift.abs().max() <= 0.2 + 2 / 255
    assert shift.min() < -0.18 and shift.max() > 0.18
    assert levels.std(dim=(1, 2, 3)).max() == 0


def test_crops_lie_on_the_diagonal_and_span_its_whole_length() -> None:
    ramp = torch.arange(200, dtype=torch.float32) / 200
    images = torch.stack([ramp[:, None].expand(200, 200), ramp[None, :].expand(200, 200)])[None].repeat(50, 1, 1, 1)
    offset = torch.rand(50) * (1 - 0.9**0.5)
    cropped = augmentation._crop_and_resize(images, offset)
    torch.testing.assert_close(cropped[:, 0, 0, 0], offset * 199 / 200, atol=1e-5, rtol=0)
    torch.testing.assert_close(cropped[:, 0], cropped[:, 1].transpose(1, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(cropped[:, 0, -1, 0] - cropped[:, 0, 0, 0], torch.full((50,), 0.9**0.5 * 199 / 200))


def test_black_and_white_stay_within_the_scale() -> None:
    images = torch.stack([torch.zeros(8, 8, 3), torch.full((8, 8, 3), 255.0)]).to(torch.uint8)
    for seed in range(20):
        black, white = augment(images, torch.Generator().manual_seed(seed)).int()
        assert black.max() <= 52 and white.min() >= 203
