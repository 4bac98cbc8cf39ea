"""What a policy reads, as tensors on its device: prompts of one length, pixels; and whether examples fit a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vlaft.action.tokens import ActionTokenizer
from vlaft.errors import DataError
from vlaft.observation.images import ImagePipeline
from vlaft.observation.prompts import PromptStyle

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Observation:
    """What a policy reads at B moments.

    Attributes:
        prompt_ids: int64 `[B, T]`, beginning with BOS, padded on the right.
        prompt_mask: int64 `[B, T]`, 1 where there is a token; None where no row is padded.
        pixel_values: `[B, N * 3 * number of ViTs, H, W]`, normalised, of the model's dtype; N cameras in order.
        state: float32 `[B, S]`, normalised; None where the policy does not read it.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor | None
    pixel_values: Tensor
    state: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @classmethod
    def of(
        cls,
        prompts: Sequence[Sequence[int]],
        frames: NDArray[np.uint8],
        pipeline: ImagePipeline,
        *,
        pad_id: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        state: NDArray[np.float32] | None = None,
    ) -> Observation:
        """Collate observations.

        Args:
            prompts: B lists of token ids.
            frames: uint8 `[B, size, size, 3]`, or `[B, N, size, size, 3]` of several cameras in order; prepared by the
                pipeline but for its crop.
            pipeline: crops where the model is used on the centre of frames, and normalises.
            pad_id: token that fills short prompts.
            device: where to.
            dtype: of the pixels; None: float32.
            state: float32 `[B, S]`, normalised, of a policy that reads it.
        """
        import torch

        from vlaft.observation.augmentation import center_crop, pixel_values

        ids, mask = pad_prompts(prompts, pad_id)
        images = torch.from_numpy(frames).to(device).flatten(0, -4)  # [B * N, size, size, 3]
        if pipeline.center_crop:
            images = center_crop(images)
        pixels = pixel_values(images, pipeline.means, pipeline.stds)
        pixels = pixels.reshape(len(prompts), -1, *pixels.shape[2:])  # camera by camera along the channels
        return cls(
            prompt_ids=ids.to(device),
            prompt_mask=None if bool(mask.all()) else mask.to(device),
            pixel_values=pixels if dtype is None else pixels.to(dtype),
            state=None if state is None else torch.from_numpy(state).to(device),
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> Observation:
        """Return the observation on another device, with pixels of another type."""
        mask, state = (None if each is None else each.to(device) for each in (self.prompt_mask, self.state))
        return Observation(self.prompt_ids.to(device), mask, self.pixel_values.to(device=device, dtype=dtype), state)


def pad_prompts(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return prompts padded on the right to the longest, and where their tokens are: int64 `[B, T]` each."""
    import torch

    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
        mask[row, : len(prompt)] = 1
    return ids, mask


@dataclass(frozen=True)
class Reader:
    """What a model reads, as far as examples have to be made for it.

    Attributes:
        name: of the model, for sentences.
        actions: its action tokens.
        prompt_style: its prompts.
        tokenizer: fingerprint of its text tokenizer; None where it has none.
        size: edge of its frames in pixels.
        pixel_statistics: means and stds that its frames are normalised with, where the examples' own are used.
        resized_by: filter and strategy that its frames were resized with, where it is known.
    """

    name: str
    actions: ActionTokenizer
    prompt_style: PromptStyle
    tokenizer: str | None
    size: int
    pixel_statistics: tuple[Any, Any] | None = None
    resized_by: tuple[str, str] | None = None


def check_fits(path: Path, info: Mapping[str, Any], pipeline: ImagePipeline, model: Reader) -> None:
    """Hold converted examples against the model that is to read them.

    Args:
        path: their folder.
        info: its `dataset.json`.
        pipeline: how its frames were prepared.
        model: what it reads.

    Raises:
        DataError: the first thing that differs, in one sentence.
    """
    again = f"convert the demonstrations again with --base {model.name}"
    try:
        tokenizer, style = info["tokenizer"], info["prompt_style"]
        bins = (tokenizer["action_vocab_size"], tokenizer["n_action_bins"])
        same_tokenizer = model.tokenizer in (None, tokenizer["fingerprint"])
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: dataset.json lacks {error}; convert the source again") from error
    if bins != (model.actions.vocab_size, model.actions.n_bins):
        raise DataError(f"{path}: its action tokens are not those of {model.name}; {again}")
    if not same_tokenizer:
        raise DataError(f"{path}: it was converted with another tokenizer than that of {model.name}; {again}")
    if style != model.prompt_style:
        raise DataError(
            f"{path}: its prompts are in style '{style}', and {model.name} takes '{model.prompt_style}'; {again}"
        )
    if pipeline.size != model.size:
        raise DataError(
            f"{path}: its frames are {pipeline.size} pixels wide, and {model.name} takes {model.size}; {again}"
        )
    if model.pixel_statistics not in (None, (pipeline.means, pipeline.stds)):
        raise DataError(f"{path}: its pixel statistics are not those of {model.name}; {again}")
    resized_by = (pipeline.resize, pipeline.strategy)
    if model.resized_by not in (None, resized_by):
        raise DataError(
            f"{path}: its frames were resized by {' and '.join(resized_by)}, those that {model.name} was trained on by"
            f" {' and '.join(model.resized_by)}; {again}"
        )
