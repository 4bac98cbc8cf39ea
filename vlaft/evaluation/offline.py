"""Compare what models predict for held-out demonstrations with what was demonstrated.

held_out = HeldOut.open([Path("data/")])
evaluation = evaluate("run/", held_out)
evaluation.free_running.overall.token_accuracy
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vlaft.action.metrics import DecodingMetrics, measure
from vlaft.action.statistics import check_statistics
from vlaft.action.tokens import normalize, unnormalize
from vlaft.data.store import ConvertedDataset
from vlaft.errors import ConfigError, DataError, VlaftError
from vlaft.evaluation.held_out import HeldOut
from vlaft.model.generation import decode_both
from vlaft.observation.augmentation import center_crop, pixel_values
from vlaft.policy import Policy, load
from vlaft.weights.layout import resolve_checkpoint
from vlaft.weights.trained import find_trained, is_trained


@dataclass(frozen=True)
class Evaluation:
    """One model on the held-out examples.

    Attributes:
        model: as it was named.
        teacher_forced: each token predicted from the demonstrated ones before it, as in training.
        free_running: each token predicted from the model's own, as on a robot.
        statistics_from: `"model"`, or `"dataset"` where the model has none of the dataset's name: then its
            actions are read in a range that it was not trained on.
        seconds: without loading.
        predicted: float64 `[N, A]`, free-running, in the robot's units.
        error: float64 `[N, A]`, free-running, predicted less demonstrated, decoded tokens in [-1, 1] units.
    """

    model: str
    teacher_forced: DecodingMetrics
    free_running: DecodingMetrics
    statistics_from: str
    seconds: float
    predicted: NDArray[np.float64]
    error: NDArray[np.float64]


def check_models(models: Sequence[str]) -> None:
    """See whether every model is there, before the first of them is evaluated for an hour.

    Raises:
        CheckpointError: one is missing.
        ConfigError: one is named twice.
    """
    for index, model in enumerate(models):
        if model in models[:index]:
            raise ConfigError(f"{model} is named twice; name each model once")
        path = Path(model)
        if path.is_dir() and is_trained(path):
            find_trained(path)
        else:
            resolve_checkpoint(model)


def evaluate(
    model: str,
    held_out: HeldOut,
    *,
    batch_size: int = 16,
    dtype: str | None = None,
    device: str = "auto",
    base: str | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Evaluation:
    """Predict the actions of held-out examples, teacher-forced and free-running, and measure them.

    Frames are taken as they were stored, and cropped where the checkpoint says that it is used on the centre. A
    demonstrated action becomes tokens by the model's own statistics of the dataset: of a model trained on the
    dataset these are the stored tokens.

    Args:
        model: a base, run, checkpoint of a run, adapter, merged or exported checkpoint.
        held_out: the examples.
        batch_size: examples per forward pass.
        dtype: as `vlaft.load` takes it.
        device: likewise.
        base: of a run or adapter, where its base has moved.
        advance: called with the number of examples that each batch has finished.

    Raises:
        CheckpointError: the model is missing, damaged, or does not fit together.
        ConfigError: the batch size is not positive.
        DataError: model and examples do not fit together, or a frame is damaged.
        VlaftError: the GPU's memory is full.
    """
    if batch_size < 1:
        raise ConfigError(f"a batch size of {batch_size} is too small; give at least 1")
    try:
        return _evaluate(model, load(model, base=base, dtype=dtype, device=device), held_out, batch_size, advance)
    except torch.cuda.OutOfMemoryError as error:
        raise VlaftError(f"the GPU's memory is full at --batch-size {batch_size}: halve it") from error
    finally:
        gc.collect()  # the next model needs the place of this one
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _evaluate(
    model: str, policy: Policy, held_out: HeldOut, batch_size: int, advance: Callable[[int], None]
) -> Evaluation:
    for dataset in held_out.datasets:
        _check_fits(model, policy, dataset)
    vocabulary = policy.model.config.text_config.vocab_size
    if not all(0 <= token < vocabulary for row in held_out.chosen for token in held_out.prompts[row]):
        raise DataError(
            f"{held_out.datasets[0].path}: a prompt has tokens that {model} does not have; convert it again"
        )
    statistics, ours = _statistics(model, policy, held_out)
    began = time.monotonic()
    actions = policy.files.actions
    rows = held_out.chosen
    demonstrated, names = held_out.action[rows], held_out.dataset[rows]
    targets = actions.encode(_by_dataset(normalize, demonstrated, names, statistics)).astype(np.int64)
    forced, free = np.empty_like(targets), np.empty_like(targets)
    # Prompts of one length in a batch save the padding; the sort is stable, so neighbours stay neighbours on disk.
    order = np.argsort([len(held_out.prompts[row]) for row in rows], kind="stable")
    for start in range(0, len(rows), batch_size):
        part = order[start : start + batch_size]
        ids, mask = _prompts([held_out.prompts[row] for row in rows[part]], policy)
        forced_ids, free_ids = decode_both(
            policy.model,
            ids,
            mask,
            _pixels(held_out.images(rows[part]), policy),
            torch.from_numpy(targets[part]).to(policy.device),
        )
        forced[part], free[part] = forced_ids.cpu().numpy(), free_ids.cpu().numpy()
        advance(len(part))

    def read(ids: NDArray[np.int64]) -> tuple[NDArray[np.float64], DecodingMetrics]:
        predicted = _by_dataset(unnormalize, actions.decode(ids), names, statistics)
        return predicted, measure(
            ids,
            targets,
            predicted,
            demonstrated,
            actions=actions,
            names=held_out.names,
            gripper=held_out.gripper,
        )

    predicted, free_running = read(free)
    return Evaluation(
        model=model,
        teacher_forced=read(forced)[1],
        free_running=free_running,
        statistics_from="model" if ours else "dataset",
        seconds=time.monotonic() - began,
        predicted=predicted,
        error=actions.decode(free) - actions.decode(targets),
    )


def _by_dataset(
    function: Callable[[Any, Any], NDArray], values: NDArray, names: NDArray[np.str_], statistics: Mapping[str, Any]
) -> NDArray[np.float64]:
    """Apply `normalize` or `unnormalize` to each row of `[N, A]` with the statistics of its dataset."""
    result = np.empty(values.shape, dtype=np.float64)
    for name in np.unique(names):
        result[names == name] = function(values[names == name], statistics[str(name)])
    return result


def _prompts(prompts: Sequence[Sequence[int]], policy: Policy) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), policy.files.tokenizer.pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
        mask[row, : len(prompt)] = 1
    return ids.to(policy.device), mask.to(policy.device)


def _pixels(images: NDArray[np.uint8], policy: Policy) -> torch.Tensor:
    batch = torch.from_numpy(images).to(policy.device)
    if policy.pipeline.center_crop:
        batch = center_crop(batch)
    return pixel_values(batch, policy.pipeline.means, policy.pipeline.stds).to(policy.model.dtype)


def _statistics(model: str, policy: Policy, held_out: HeldOut) -> tuple[dict[str, Any], bool]:
    """Return action statistics by dataset name, and whether all of them are the model's own."""
    chosen: dict[str, Any] = {}
    ours = True
    width = held_out.action.shape[1]
    for name in (str(name) for name in np.unique(held_out.dataset)):
        if name in policy.statistics:
            chosen[name] = check_statistics({name: policy.statistics[name]}, f"statistics of {model}")[name]["action"]
        else:
            ours = False
            found = [dataset.statistics[name] for dataset in held_out.datasets if name in dataset.statistics]
            if not found:
                raise DataError(f"{held_out.datasets[0].path}: it has no statistics of '{name}'; convert it again")
            chosen[name] = found[0]["action"]
        if len(chosen[name]["q01"]) != width:
            raise DataError(
                f"{model} gives {len(chosen[name]['q01'])} action dimensions for '{name}', and the demonstrations have"
                f" {width}; evaluate it on data converted as its training data were"
            )
    return chosen, ours


def _check_fits(model: str, policy: Policy, dataset: ConvertedDataset) -> None:
    """Hold a dataset against the model's tokenizer, prompts and images.

    Raises:
        DataError: the first thing that differs, in one sentence.
    """
    files, pipeline = policy.files, policy.pipeline
    again = f"convert the demonstrations for it with vlaft convert --base {model}"
    try:
        tokenizer = dataset.info["tokenizer"]
        bins = (tokenizer["action_vocab_size"], tokenizer["n_action_bins"])
        same_tokenizer = tokenizer["fingerprint"] == files.tokenizer.fingerprint
        style = dataset.info["prompt_style"]
    except (KeyError, TypeError) as error:
        raise DataError(f"{dataset.path}: dataset.json lacks {error}; convert the source again") from error
    if bins != (files.actions.vocab_size, files.actions.n_bins):
        raise DataError(f"{dataset.path}: its action tokens are not those of {model}; {again}")
    if not same_tokenizer:
        raise DataError(f"{dataset.path}: it was converted with another tokenizer than that of {model}; {again}")
    if style != files.prompt_style:
        raise DataError(
            f"{dataset.path}: its prompts are in style '{style}', and {model} takes '{files.prompt_style}'; {again}"
        )
    if dataset.pipeline.size != pipeline.size:
        raise DataError(
            f"{dataset.path}: its frames are {dataset.pipeline.size} pixels wide, and {model} takes {pipeline.size};"
            f" {again}"
        )
    recorded = "image_pipeline" in files.config  # what a release says of serving differs from how it was trained
    ours, theirs = ((each.resize, each.strategy) for each in (pipeline, dataset.pipeline))
    if recorded and ours != theirs:
        raise DataError(
            f"{dataset.path}: its frames were resized by {' and '.join(theirs)}, those that {model} was trained on by"
            f" {' and '.join(ours)}; {again}"
        )
