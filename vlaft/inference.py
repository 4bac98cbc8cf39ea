"""From images and an instruction to an action: a checkpoint with everything that it records about its input.

policy = vlaft.load("model/")
prediction = policy.predict(image, "pick up the red block")
prediction.action  # float64 [A], in the robot's units
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vlaft.data.actions import unnormalize
from vlaft.data.augmentation import center_crop, pixel_values
from vlaft.data.episode import Image
from vlaft.data.images import ImagePipeline
from vlaft.data.prompts import BaseFiles, load_base_files, prompt_style_of
from vlaft.data.statistics import choose_key
from vlaft.errors import CheckpointError, DataError
from vlaft.model.checkpoint import load_model, read_json, resolve_checkpoint
from vlaft.model.generation import generate_action_ids
from vlaft.trained import STATISTICS_FILE, find_trained, is_trained


@dataclass(frozen=True)
class Prediction:
    """One action.

    Attributes:
        action: float64 `[A]`, in the robot's units.
        normalized_action: float64 `[A]`, in [-1, 1].
        action_token_ids: A token ids, as generated.
        unnorm_key: name of the statistics that turned one into the other.
        non_action_tokens: how many of the ids stand for no action; each was read as a full move, so a robot should
            not act on a prediction that has any.
    """

    action: NDArray[np.float64]
    normalized_action: NDArray[np.float64]
    action_token_ids: tuple[int, ...]
    unnorm_key: str
    non_action_tokens: int


@dataclass(frozen=True)
class Policy:
    """A loaded checkpoint; `load` makes one.

    Attributes:
        model: in eval mode, with its adapter where it has one.
        files: tokenizer, prompt style and action tokens.
        pipeline: how frames become input.
        statistics: dataset name to statistics.
        device: where the model is.
    """

    model: Any
    files: BaseFiles
    pipeline: ImagePipeline
    statistics: Mapping[str, Any]
    device: torch.device

    def predict(
        self,
        images: Image | Sequence[Image],
        instruction: str | Sequence[str],
        *,
        unnorm_key: str | None = None,
        action_ids_only: bool = False,
    ) -> Any:
        """Predict an action for one image, or for each of several in one batch.

        Args:
            images: uint8 `[H, W, 3]` RGB of any size, or a list of them.
            instruction: one for all, or one for each image.
            unnorm_key: name of the statistics to use; needed only where the checkpoint has several.
            action_ids_only: choose among action tokens only.

        Returns:
            A `Prediction`, or a list of them for a list of images.

        Raises:
            DataError: an image is not uint8 RGB, the numbers of images and instructions differ, or the key is
                missing or unknown.
        """
        several = not isinstance(images, np.ndarray) or images.ndim == 4
        frames: list[Any] = list(images) if several else [images]
        texts = [instruction] * len(frames) if isinstance(instruction, str) else list(instruction)
        if len(texts) != len(frames):
            raise DataError(
                f"{len(frames)} images and {len(texts)} instructions: give one instruction, or one for each"
            )
        key = choose_key(self.statistics, unnorm_key)
        statistics = self.statistics[key]["action"]
        input_ids, mask = self._prompts(texts)
        ids = generate_action_ids(
            self.model,
            input_ids.to(self.device),
            self._pixels(frames),
            mask.to(self.device),
            num_tokens=len(statistics["q01"]),
            action_ids_only=action_ids_only,
        )
        predictions = [self._prediction(row, statistics, key) for row in ids.cpu().numpy()]
        return predictions if several else predictions[0]

    def _prediction(self, ids: NDArray[np.int64], statistics: Mapping[str, Any], key: str) -> Prediction:
        actions = self.files.actions
        normalized = actions.decode(ids)
        return Prediction(
            action=unnormalize(normalized, statistics),
            normalized_action=normalized,
            action_token_ids=tuple(int(token) for token in ids),
            unnorm_key=key,
            non_action_tokens=int((~actions.is_action(ids)).sum()),
        )

    def _prompts(self, instructions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [self.files.prompt_token_ids(text) for text in instructions]
        longest = max(len(row) for row in rows)
        ids = torch.full((len(rows), longest), self.files.tokenizer.pad_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = 1
        return ids, mask

    def _pixels(self, frames: Sequence[Image]) -> torch.Tensor:
        for index, frame in enumerate(frames):
            if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
                shape = getattr(frame, "shape", type(frame).__name__)
                raise DataError(f"image {index} must be uint8 [height, width, 3] in RGB, not {shape}")
        batch = torch.from_numpy(np.stack([self.pipeline.prepare(frame) for frame in frames])).to(self.device)
        if self.pipeline.center_crop:
            batch = center_crop(batch)
        return pixel_values(batch, self.pipeline.means, self.pipeline.stds).to(self.model.dtype)


def load(
    source: str | Path,
    *,
    base: str | None = None,
    checkpoint: str | None = None,
    dtype: str | None = None,
    device: str = "auto",
) -> Policy:
    """Load a checkpoint for prediction.

    Args:
        source: a merged or exported checkpoint, a base (folder or Hub id), a run, or an adapter.
        base: of a run or adapter: the base, where it is no longer where training found it.
        checkpoint: of a run: `best`, `last` or `step-000500`.
        dtype: `float32`, `bfloat16` or `float16`; None takes bfloat16 on a GPU and float32 on a CPU.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        CheckpointError: something is missing, damaged, or does not fit together.
    """
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    name = dtype or ("bfloat16" if place.type == "cuda" else "float32")
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(name)
    if kind is None:
        raise CheckpointError(f"dtype '{name}' is not known: give float32, bfloat16 or float16")
    path = Path(source)
    if path.is_dir() and is_trained(path):
        return _load_trained(path, base, checkpoint, kind, place)
    folder = resolve_checkpoint(str(source))
    files = load_base_files(str(folder))
    model = load_model(folder, dtype=kind, device=place)
    return Policy(model, files, _pipeline(files), _statistics(folder, files.config), place)


def _load_trained(
    path: Path, base: str | None, checkpoint: str | None, dtype: torch.dtype, device: torch.device
) -> Policy:
    from vlaft.adapt.adapter_files import load_adapter
    from vlaft.model.checkpoint import fingerprint
    from vlaft.training.checkpoints import load_trained

    trained = find_trained(path, checkpoint)
    name = base or trained.base
    if name is None:
        raise CheckpointError(f"{path} does not say on which base it was trained; give it with --base")
    folder = resolve_checkpoint(name)
    if trained.base_fingerprint and trained.base_fingerprint != fingerprint(folder):
        raise CheckpointError(f"{path} was trained on another base than {name}; give the right one with --base")
    files = load_base_files(str(folder))
    files = replace(files, config={**files.config, **trained.inference})
    files = replace(files, prompt_style=prompt_style_of(files.config))
    model = load_model(folder, dtype=dtype, device=device)
    if trained.is_adapter:
        model = load_adapter(model, trained.weights)
    else:
        load_trained(model, trained.weights)
    statistics = trained.statistics or _statistics(folder, files.config)
    return Policy(model, files, _pipeline(files), statistics, device)


def _pipeline(files: BaseFiles) -> ImagePipeline:
    return ImagePipeline.from_checkpoint(files.config, files.preprocessor)


def _statistics(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The file beside the weights wins: upstream's fine-tuning leaves the base's statistics in `config.json`."""
    if (folder / STATISTICS_FILE).is_file():
        return read_json(folder / STATISTICS_FILE)
    return config.get("norm_stats") or {}
