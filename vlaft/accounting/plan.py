"""What a run will cost, before it begins: `train --dry-run`, the banner, and `train.batch_size=auto`.

The trainer knows nothing of predictions and the memory model nothing of runs; here they meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlaft.accounting.choose import EFFECTIVE_BATCH, divisors, with_batch
from vlaft.accounting.memory import (
    MainMemory,
    MemoryPrediction,
    memory_model,
    predict_main_memory,
    predict_memory,
)
from vlaft.accounting.meta import STATE_SIZE, policy_of
from vlaft.accounting.parameters import ParameterCount, count_parameters
from vlaft.adapt.policies import base_folder
from vlaft.data.loader import RELEASED
from vlaft.data.store import SPLITS, ConvertedDataset
from vlaft.data.windows import Windows
from vlaft.model.configuration import Policy
from vlaft.model.load import base_config
from vlaft.recipe.settings import PolicyConfig, RecipeConfig
from vlaft.training.data import check_begins
from vlaft.training.events import check_trackers
from vlaft.training.optimizer import check_installed


@dataclass(frozen=True)
class Plan:
    """A recipe with its batch size settled, and what it is predicted to cost.

    Attributes:
        recipe: without `auto`.
        counted: its parameters.
        prediction: of a step's memory on a GPU.
        gpu_memory: bytes of the GPU that it is meant for, or None.
        main_memory: what a step takes of a CPU's memory, where it is planned for the CPU that is here; else None.
        data: per dataset: name, episodes and examples per split, action dimensions, cameras.
    """

    recipe: RecipeConfig
    counted: ParameterCount
    prediction: MemoryPrediction
    gpu_memory: int | None
    main_memory: MainMemory | None
    data: list[dict[str, Any]]

    @property
    def fits(self) -> bool:
        """Whether the prediction fits the GPU; True where none is known."""
        return self.gpu_memory is None or self.prediction.peak <= self.gpu_memory


def plan_run(recipe: RecipeConfig, gpu_memory: int | None = None, *, on_cpu: bool = False) -> Plan:
    """Settle the batch size and predict the cost.

    Args:
        recipe: resolved settings.
        gpu_memory: bytes of the GPU; None means none is known, so that `auto` takes the whole batch at once.
        on_cpu: predict the main memory of a step on a CPU, too.

    Raises:
        MissingExtra: the recipe needs a package that is not installed.
        CheckpointError: the base is no OpenVLA model, or cannot be found.
        ConfigError: the base is a policy already, and another one than the recipe's.
        DataError: a dataset is missing or damaged, or of another width than the base.
    """
    check_installed(recipe.train)
    check_trackers(recipe.train.trackers)
    datasets = [ConvertedDataset(Path(path)) for path in recipe.data.paths]
    data = [describe(dataset, recipe.policy) for dataset in datasets]
    local = on_local_base(recipe)
    if Path(local.base).is_dir():
        check_begins(local, datasets)
    config = base_config(local.base)
    policy = policy_on(recipe, datasets)
    local = settle_batch(local, gpu_memory, policy)
    counted, prediction = count_parameters(local, config, policy), predict_memory(local, config, policy=policy)
    main_memory = predict_main_memory(local, config, policy) if on_cpu else None
    return Plan(replace(local, base=recipe.base), counted, prediction, gpu_memory, main_memory, data)


def on_local_base(recipe: RecipeConfig) -> RecipeConfig:
    """Return a recipe on the folder in our own layout where its base is here and in OpenVLA-OFT's."""
    here = Path(recipe.base).is_dir()
    return replace(recipe, base=str(base_folder(recipe.base, recipe.policy))) if here else recipe


def policy_on(recipe: RecipeConfig, datasets: Sequence[ConvertedDataset]) -> Policy:
    """Return what a recipe's policy reads and writes, with the sizes of the data: all are of one width, or refused."""
    first = next(iter(datasets[0].statistics.values()))
    state = first.get("proprio", {}).get("mean", ())
    return policy_of(recipe, len(first["action"]["mean"]), len(state) or STATE_SIZE)


def settle_batch(recipe: RecipeConfig, gpu_memory: int | None, policy: Policy | None = None) -> RecipeConfig:
    """Return `recipe` with a number in place of `train.batch_size=auto`: the largest that is predicted to fit.

    Examples per step stay `EFFECTIVE_BATCH * train.accumulation`. Where not even one is predicted to fit, it is one:
    the prediction may err on the safe side, and the run says so if it does not.

    Args:
        recipe: resolved settings.
        gpu_memory: bytes of the GPU; None means none is known.
        policy: what is read and written; None takes the recipe's on usual data.
    """
    if recipe.train.batch_size != "auto":
        return recipe
    effective = EFFECTIVE_BATCH * recipe.train.accumulation
    if gpu_memory is None:
        return with_batch(recipe, effective)
    # traced with accumulation, so that the gradients which wait for the next pass are counted
    model = memory_model(with_batch(recipe, 1), base_config(recipe.base), policy=policy)
    largest = model.largest_batch(gpu_memory)
    return with_batch(recipe, next((size for size in divisors(effective) if size <= largest), 1))


def runs_on_cpu() -> bool:
    """Say whether a run that begins here would take the CPU."""
    import torch

    return not torch.accelerator.is_available()


def present_gpu() -> int | None:
    """Return the memory of the GPU that a run would take, in bytes, or None where there is none."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def describe(dataset: ConvertedDataset, policy: PolicyConfig = RELEASED) -> dict[str, Any]:
    """Return a converted dataset, and the examples that a policy finds in it, in a few words and numbers."""
    return {
        "path": str(dataset.path),
        "names": list(dataset.statistics),
        "episodes": dataset.info["counts"]["episodes"],
        "examples": {split: len(Windows.of(dataset, split, policy)) for split in SPLITS},
        "action dimensions": sorted({len(entry["action"]["mean"]) for entry in dataset.statistics.values()}),
        "cameras": list(dataset.cameras),
    }
