"""The training and held-out examples of a run, and whether they fit its base."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vlaft.action.tokens import IGNORED
from vlaft.adapt.policies import check_policy, recorded_policy
from vlaft.data.loader import Batch, ExampleLoader, batches_in_order, data_fingerprint
from vlaft.data.store import ConvertedDataset
from vlaft.data.windows import Windows
from vlaft.errors import CheckpointError, DataError
from vlaft.files import read_json
from vlaft.model.configuration import Policy
from vlaft.observation.batch import Reader, check_fits
from vlaft.observation.images import ImagePipeline
from vlaft.observation.prompts import action_tokenizer_of, preprocessor_of, prompt_style_of
from vlaft.recipe.settings import PolicyConfig, RecipeConfig
from vlaft.training.step import Inputs


def to_inputs(batch: Batch, device: torch.device) -> Inputs:
    """Put a batch on the device, without waiting for it.

    The labels of a row are its last tokens, so their columns follow from the row's length; rows with fewer labels
    than the widest of the batch begin with columns that the loss ignores.
    """
    widest = int((batch.labels != IGNORED).sum(dim=1).max())
    lengths = batch.attention_mask.sum(dim=1, keepdim=True)
    positions = lengths - widest + torch.arange(widest)[None]

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(device, non_blocking=True)

    return Inputs(
        move(batch.input_ids),
        move(batch.labels),
        move(positions),
        move(batch.images),
        None if batch.state is None else move(batch.state),
        move(batch.action),
    )


@dataclass
class TrainingData:
    """What a run learns from and is judged on.

    Attributes:
        datasets: the converted datasets.
        loader: endless shuffled training batches.
        pipeline: how frames were prepared, and the base's pixel statistics.
        statistics: by dataset name, of all datasets together.
        policy: what is read and written, with the sizes that the data give it.
        train_examples: of the training split.
        val_examples: of the held-out split, those that an evaluation looks at.
        fingerprint: of all datasets together, and of how examples are cut from them.
        inference: keys for `config.json` of what is trained on this.
        warnings: sentences about what is left out.
    """

    datasets: list[ConvertedDataset]
    loader: ExampleLoader
    pipeline: ImagePipeline
    statistics: Mapping[str, Any]
    policy: Policy
    train_examples: int
    val_examples: int
    fingerprint: str
    inference: Mapping[str, Any]
    warnings: tuple[str, ...]
    batch_size: int
    rank: int
    world_size: int

    @classmethod
    def open(cls, recipe: RecipeConfig, base: Path, *, rank: int = 0, world_size: int = 1) -> TrainingData:
        """Open the recipe's datasets and hold them against the base.

        Raises:
            DataError: a dataset is missing or damaged, was converted for another base, or lacks what the policy reads.
            ConfigError: the base is a policy already, and another one than the recipe's.
        """
        datasets = [ConvertedDataset(Path(path)) for path in recipe.data.paths]
        check_begins(recipe, datasets, base)
        reader = _reader(base, recipe.base, read_json(base / "config.json", CheckpointError))
        for dataset in datasets:
            check_fits(dataset.path, dataset.info, dataset.pipeline, reader)
        batch_size = int(recipe.train.batch_size)
        loader = ExampleLoader(
            datasets,
            batch_size,
            seed=recipe.train.seed,
            rank=rank,
            world_size=world_size,
            workers=recipe.data.workers,
            limit=recipe.train.overfit or None,
            policy=recipe.policy,
        )
        val_windows = [Windows.of(dataset, "val", recipe.policy) for dataset in datasets]
        held_out = sum(len(windows) for windows in val_windows)
        first = datasets[0]
        statistics: dict[str, Any] = {}
        for dataset in datasets:
            statistics |= dataset.statistics
        pipeline = first.pipeline
        return cls(
            datasets=datasets,
            loader=loader,
            pipeline=pipeline,
            statistics=statistics,
            policy=_policy(recipe.policy, statistics),
            train_examples=sum(len(windows) for windows in loader.windows),
            val_examples=held_out if recipe.data.val_examples is None else min(held_out, recipe.data.val_examples),
            fingerprint=data_fingerprint(datasets, recipe.policy),
            inference={
                "prompt_style": first.info["prompt_style"],
                # A model trained on random crops of 90 % of the area is used on the central 90 %.
                "image_pipeline": pipeline.to_json() | {"center_crop": recipe.data.augment},
                **({} if recipe.policy == PolicyConfig() else {"policy": asdict(_policy(recipe.policy, statistics))}),
            },
            warnings=_left_out(recipe.policy, {"train": loader.windows, "val": val_windows}),
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
        )

    def validation(self) -> Iterator[Batch]:
        """Yield this process's share of the held-out examples, always the same ones in the same order."""
        return batches_in_order(
            self.datasets,
            self.batch_size,
            rank=self.rank,
            world_size=self.world_size,
            limit=self.val_examples,
            policy=self.policy,
        )

    def any_validation_batch(self) -> Batch:
        """Return some held-out batch, for a process that has none of its own."""
        return next(batches_in_order(self.datasets, self.batch_size, limit=self.val_examples, policy=self.policy))


def _policy(policy: PolicyConfig, statistics: Mapping[str, Any]) -> Policy:
    """Return the policy with those sizes that its modules need and only the data know."""
    first = next(iter(statistics.values()))  # all are of the same width: the loader has seen to it
    return Policy(
        **asdict(policy),
        action_size=len(first["action"]["mean"]) if policy.head == "l1" else None,
        state_size=len(first["proprio"]["mean"]) if policy.state else None,
    )


def check_begins(recipe: RecipeConfig, datasets: Sequence[ConvertedDataset], base: Path | None = None) -> None:
    """Hold recipe and data against a base that is a policy already: its modules are of its robot's sizes.

    Args:
        recipe: resolved settings.
        datasets: what is trained on.
        base: the base's local folder; None takes the recipe's.

    Raises:
        ConfigError: the recipe's policy is another.
        DataError: actions or states are of another width.
    """
    begun = recorded_policy(base or Path(recipe.base))
    if begun is None:
        return
    check_policy(begun, asdict(recipe.policy), recipe.base)
    for dataset in datasets:
        entry = next(iter(dataset.statistics.values()))
        parts = {"action": ("actions", begun.action_size), "proprio": ("states", begun.state_size)}
        for key, (word, size) in parts.items():
            count = len(entry[key]["mean"]) if key in entry else 0
            if size is not None and count != size:
                raise DataError(
                    f"{dataset.path}: its {word} have {count} dimensions, and the policy {recipe.base}, which training"
                    f" is to begin from, has {size}: train on the base that it was made from"
                )


def _left_out(policy: PolicyConfig, windows: Mapping[str, Sequence[Windows]]) -> tuple[str, ...]:
    """Tell how many episodes are shorter than the chunk."""
    if policy.tail == "repeat":
        return ()
    short = {split: sum(each.short for each in cut) for split, cut in windows.items()}
    episodes = {split: sum(len(each.lengths) for each in cut) for split, cut in windows.items()}
    return tuple(
        f"{short[split]:,} of {episodes[split]:,} episodes in split '{split}' are shorter than policy.chunk="
        f"{policy.chunk} and give no example; policy.tail=repeat takes them, with the last action repeated"
        for split in windows
        if short[split]
    )


def _reader(base: Path, name: str, config: Mapping[str, Any]) -> Reader:
    """Describe what a base reads when it is trained, from its files alone."""
    tokenizer = base / "tokenizer.json"
    pipeline = ImagePipeline.for_training(config, preprocessor_of(base))
    return Reader(
        name=name,
        actions=action_tokenizer_of(config),
        prompt_style=prompt_style_of(config),
        tokenizer=hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer.is_file() else None,
        size=pipeline.size,
        pixel_statistics=(pipeline.means, pipeline.stds),
    )
