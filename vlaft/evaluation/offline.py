"""Compare what models predict for held-out demonstrations with what was demonstrated.

held_out = HeldOut.open([Path("data/")])
evaluation = evaluate("run/", held_out)
evaluation.free_running.overall.token_accuracy
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vlaft.action.metrics import ActionMetrics, measure_actions
from vlaft.action.statistics import check_statistics, tells_of_state
from vlaft.action.tokens import normalize, unnormalize
from vlaft.action.written import Written
from vlaft.adapt.policies import policy_folder
from vlaft.data.held_out import HeldOut
from vlaft.errors import CheckpointError, ConfigError, DataError, VlaftError
from vlaft.evaluation.blind import EXAMPLES, FEWEST, Sight, look
from vlaft.files import read_json
from vlaft.model.configuration import Policy as ModelPolicy
from vlaft.observation.batch import Observation, Reader, check_fits
from vlaft.observation.images import ImagePipeline
from vlaft.observation.prompts import load_base_files
from vlaft.policy import Policy, load
from vlaft.weights.trained import find_trained, is_trained, statistics_of


@dataclass(frozen=True)
class Evaluation:
    """One model on the held-out examples.

    Attributes:
        model: as it was named.
        teacher_forced: each token predicted from the demonstrated ones before it, as in training; None of a model that
            writes all at once.
        free_running: what the model writes alone, as on a robot.
        statistics_from: `"model"`, or `"dataset"` where the model has none of the dataset's name: then its
            actions are read in a range that it was not trained on.
        seconds: without loading.
        predicted: float64 `[N, K, A]`, free-running, in the robot's units.
        error: float64 `[N, K, A]`, free-running: written less demonstrated as the head would write it, normalised.
        sight: whether it looks, by a few of the examples; None where there are too few.
    """

    model: str
    teacher_forced: ActionMetrics | None
    free_running: ActionMetrics
    statistics_from: str
    seconds: float
    predicted: NDArray[np.float64]
    error: NDArray[np.float64]
    sight: Sight | None


def check_models(models: Sequence[str], policy: Mapping[str, Any] | None = None, base: str | None = None) -> int:
    """See whether every model is there, before the first of them is evaluated for an hour.

    Args:
        models: as they are named.
        policy: as `vlaft.load` takes it.
        base: likewise.

    Returns:
        How many actions the models write at once, at most.

    Raises:
        CheckpointError: one is missing.
        ConfigError: one is named twice, or `policy` is not what it is.
    """
    chunks = [1]
    for index, model in enumerate(models):
        if model in models[:index]:
            raise ConfigError(f"{model} is named twice; name each model once")
        path = Path(model)
        if path.is_dir() and is_trained(path):
            config = find_trained(path).inference
        else:
            config = read_json(policy_folder(model, policy, base=base) / "config.json", CheckpointError)
        chunks.append(ModelPolicy.of(config, model).chunk)
    return max(chunks)


def evaluate(
    model: str,
    held_out: HeldOut,
    *,
    batch_size: int = 16,
    dtype: str | None = None,
    device: str = "auto",
    base: str | None = None,
    policy: Mapping[str, Any] | None = None,
    center_crop: bool | None = None,
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
        policy: as `vlaft.load` takes it.
        center_crop: whether the model acts on the centre of frames; None as `vlaft.load` does.
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
        loaded = load(model, base=base, dtype=dtype, device=device, policy=policy, center_crop=center_crop)
        return _evaluate(model, loaded, held_out, batch_size, advance)
    except torch.cuda.OutOfMemoryError as error:
        raise VlaftError(f"the GPU's memory is full at --batch-size {batch_size}: halve it") from error
    finally:
        gc.collect()  # the next model needs the place of this one
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _evaluate(
    model: str, policy: Policy, held_out: HeldOut, batch_size: int, advance: Callable[[int], None]
) -> Evaluation:
    _check_data(model, policy, held_out)
    statistics, own_statistics = _statistics(model, policy, held_out)
    began = time.monotonic()
    examples = _Examples.of(model, policy, held_out, statistics, held_out.chosen)
    rows, head, targets = examples.rows, policy.model.head, examples.targets
    forced: dict[int, Written] = {}
    free: dict[int, Written] = {}
    # Prompts of one length in a batch save the padding; the sort is stable, so neighbours stay neighbours on disk.
    order = np.argsort([len(held_out.prompts[row]) for row in rows], kind="stable")
    for start in range(0, len(rows), batch_size):
        part = order[start : start + batch_size]
        both = head.predict_both(policy.model, examples.observe(part), targets[part])
        for found, written in zip((forced, free), both, strict=True):
            if written is not None:
                found |= {int(row): written[[index]] for index, row in enumerate(part)}
        advance(len(part))

    def measured(found: dict[int, Written]) -> tuple[Written, NDArray[np.float64], ActionMetrics]:
        written = Written.joined([found[row] for row in range(len(rows))])
        predicted = examples.by_dataset(unnormalize, written.actions)
        return (
            written,
            predicted,
            measure_actions(
                written,
                targets,
                predicted,
                examples.demonstrated,
                ends=head.ends,
                names=held_out.names,
                gripper=held_out.gripper,
            ),
        )

    written, predicted, free_running = measured(free)
    seconds = time.monotonic() - began
    return Evaluation(
        model=model,
        teacher_forced=measured(forced)[2] if forced else None,
        free_running=free_running,
        statistics_from="model" if own_statistics else "dataset",
        seconds=seconds,
        predicted=predicted,
        error=written.actions - targets.actions,
        sight=look_at(model, policy, held_out, batch_size),
    )


def _check_data(model: str, policy: Policy, held_out: HeldOut) -> None:
    """Refuse examples that were made for another model."""
    for dataset in held_out.datasets:
        check_fits(dataset.path, dataset.info, dataset.pipeline, _reader(model, policy))
    vocabulary = policy.model.config.text_config.vocab_size
    if not all(0 <= token < vocabulary for row in held_out.chosen for token in held_out.prompts[row]):
        raise DataError(
            f"{held_out.datasets[0].path}: a prompt has tokens that {model} does not have; convert it again"
        )


def look_at(model: str, policy: Policy, held_out: HeldOut, batch_size: int = 16) -> Sight | None:
    """Say whether a policy looks, by a few examples that are spread evenly over those to be evaluated.

    Args:
        model: as it is named.
        policy: loaded.
        held_out: examples that fit it.
        batch_size: examples per forward pass.

    Returns:
        None where there are too few examples.

    Raises:
        DataError: a frame is damaged or missing, or a state that the policy reads.
    """
    few = np.linspace(0, len(held_out) - 1, min(EXAMPLES, len(held_out))).round().astype(np.int64)
    statistics, _ = _statistics(model, policy, held_out)
    examples = _Examples.of(model, policy, held_out, statistics, held_out.chosen[few])
    everything = examples.observe(np.arange(len(few)))
    return look(policy.model, everything, examples.targets.actions, policy.pipeline, batch_size=batch_size)


def look_at_merged(model: Any, folder: Path, data: Sequence[Path], batch_size: int = 4) -> Sight | None:
    """Say whether a merged model looks, by as few examples of its training data as tell it; held-out ones if any.

    Args:
        model: in memory, in eval mode.
        folder: its checkpoint.
        data: converted datasets that it was trained on, as far as they are still there.
        batch_size: examples per forward pass.

    Returns:
        None where the data are gone, changed or damaged, or too few.
    """
    try:
        files = load_base_files(folder)
        statistics = statistics_of(None, folder, files.config)
        pipeline = ImagePipeline.for_acting(files.config, files.preprocessor, statistics)
        policy = Policy(model, files, pipeline, statistics, next(model.parameters()).device)
        try:
            held_out = HeldOut.open(data, "val", FEWEST, model.head.chunk)
        except DataError:  # converted without a held-out split
            held_out = HeldOut.open(data, "train", FEWEST, model.head.chunk)
        _check_data(str(folder), policy, held_out)
        return look_at(str(folder), policy, held_out, batch_size)
    except (DataError, CheckpointError, OSError):
        return None  # merging does not depend on it


@dataclass(frozen=True)
class _Examples:
    """Examples as one policy reads and writes them.

    Attributes:
        policy: the policy.
        held_out: where the examples are.
        statistics: by dataset name.
        rows: int64 `[N]`, of the split.
        demonstrated: float32 `[N, K, A]`, in the robot's units.
        targets: the same as the policy's head would write it.
        state: float32 `[N, S]`, normalised; None of a policy that reads none.
    """

    policy: Policy
    held_out: HeldOut
    statistics: Mapping[str, Any]
    rows: NDArray[np.int64]
    demonstrated: NDArray[np.float32]
    targets: Written
    state: torch.Tensor | None

    @classmethod
    def of(
        cls, model: str, policy: Policy, held_out: HeldOut, statistics: Mapping[str, Any], rows: NDArray[np.int64]
    ) -> _Examples:
        head, reads = policy.model.head, policy.model.policy
        demonstrated = held_out.chunks(rows, head.chunk)
        bare = cls(policy, held_out, statistics, rows, demonstrated, Written(demonstrated.astype(np.float64)), None)
        made = replace(bare, targets=head.as_written(bare.by_dataset(normalize, demonstrated)))
        if not reads.state:
            return made
        if held_out.state is None:
            raise DataError(
                f"{model} reads the robot's state, which the demonstrations lack; convert them again with its arrays as"
                " state='[...]'"
            )
        if silent := [name for name, entry in statistics.items() if not tells_of_state(entry)]:
            raise DataError(f"{model}: its statistics of '{silent[0]}' say nothing of the state, which it reads")
        state = torch.from_numpy(made.by_dataset(normalize, held_out.state[rows], "proprio")).float()
        return replace(made, state=state)

    def observe(self, part: NDArray[np.int64]) -> Observation:
        """Return what the policy reads at some of the examples."""
        rows, cameras = self.rows[part], self.policy.model.policy.cameras
        frames = np.stack([self.held_out.images(rows, camera) for camera in cameras], axis=1)
        observation = self.policy.observe([self.held_out.prompts[row] for row in rows], frames)
        if self.state is None:
            return observation
        return replace(observation, state=self.state[part].to(self.policy.device))

    def by_dataset(
        self, function: Callable[..., NDArray], values: NDArray, part: str = "action"
    ) -> NDArray[np.float64]:
        """Apply `normalize` or `unnormalize` to each row `[K, A]` or `[S]` by that part of its dataset's statistics."""
        normalization, names = self.policy.model.policy.normalization, self.held_out.dataset[self.rows]
        result = np.empty(values.shape, dtype=np.float64)
        for name in np.unique(names):
            entry = self.statistics[str(name)][part]
            result[names == name] = function(values[names == name], entry, normalization=normalization)
        return result


def _statistics(model: str, policy: Policy, held_out: HeldOut) -> tuple[dict[str, Any], bool]:
    """Return statistics by dataset name, and whether all of them are the model's own."""
    chosen: dict[str, Any] = {}
    ours = True
    width = held_out.action.shape[1]
    for name in (str(name) for name in np.unique(held_out.dataset)):
        if name in policy.statistics:
            chosen[name] = check_statistics({name: policy.statistics[name]}, f"statistics of {model}")[name]
        else:
            ours = False
            found = [dataset.statistics[name] for dataset in held_out.datasets if name in dataset.statistics]
            if not found:
                raise DataError(f"{held_out.datasets[0].path}: it has no statistics of '{name}'; convert it again")
            chosen[name] = found[0]
        given = len(chosen[name]["action"]["q01"])
        if given != width:
            raise DataError(
                f"{model} gives {given} action dimensions for '{name}', and the demonstrations have"
                f" {width}; evaluate it on data converted as its training data were"
            )
    return chosen, ours


def _reader(model: str, policy: Policy) -> Reader:
    files, pipeline = policy.files, policy.pipeline
    recorded = "image_pipeline" in files.config  # what a release says of serving differs from how it was trained
    return Reader(
        name=model,
        actions=files.actions,
        prompt_style=files.prompt_style,
        tokenizer=files.tokenizer.fingerprint,
        size=pipeline.size,
        resized_by=(pipeline.resize, pipeline.strategy) if recorded else None,
    )
