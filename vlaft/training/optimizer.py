"""The optimizer, its parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import importlib.util
import math

import torch
from torch import nn

from vlaft.errors import MissingExtra
from vlaft.recipe.settings import ScheduleConfig, TrainConfig


def parameter_groups(model: nn.Module, learning_rate: float, plus_ratio: float | None = None) -> list[dict]:
    """Return the trainable parameters as optimizer groups.

    With `plus_ratio`, LoRA's B matrices are a group of their own whose learning rate is `plus_ratio` times A's
    (LoRA+, Hayou et al. 2024). Each group carries `scale`, its learning rate over the recipe's.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if plus_ratio is None:
        return [{"params": [parameter for _, parameter in named], "lr": learning_rate, "scale": 1.0}]
    fast = [parameter for name, parameter in named if ".lora_B." in name or ".lora_embedding_B" in name]
    chosen = {id(parameter) for parameter in fast}
    slow = [parameter for _, parameter in named if id(parameter) not in chosen]
    return [
        {"params": slow, "lr": learning_rate, "scale": 1.0},
        {"params": fast, "lr": learning_rate * plus_ratio, "scale": plus_ratio},
    ]


def check_installed(train: TrainConfig) -> None:
    """See whether the recipe's optimizer can be had, before a model is loaded for it.

    Raises:
        MissingExtra: the 8-bit optimizer without bitsandbytes.
    """
    if train.optimizer == "paged-adamw-8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtra("train.optimizer=paged-adamw-8bit", "bitsandbytes", "qlora")


def build_optimizer(model: nn.Module, train: TrainConfig, plus_ratio: float | None = None) -> torch.optim.Optimizer:
    """Build the recipe's optimizer over the trainable parameters of `model`.

    Raises:
        MissingExtra: the 8-bit optimizer without bitsandbytes.
    """
    groups = parameter_groups(model, train.learning_rate, plus_ratio)
    on_gpu = all(parameter.is_cuda for group in groups for parameter in group["params"])
    if train.optimizer == "paged-adamw-8bit":
        check_installed(train)
        from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

        # On a CPU there is nothing to page to; the arithmetic is the same.
        kind = PagedAdamW8bit if on_gpu else AdamW8bit
        return kind(groups, lr=train.learning_rate, betas=train.betas, eps=train.eps, weight_decay=train.weight_decay)
    return torch.optim.AdamW(
        groups,
        lr=train.learning_rate,
        betas=train.betas,
        eps=train.eps,
        weight_decay=train.weight_decay,
        fused=on_gpu or None,  # one kernel for all parameters; on a CPU PyTorch's own choice
    )


def learning_rate_factor(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """Return the learning rate of update `step` (from 0) of `steps`, over the peak.

    >>> learning_rate_factor(ScheduleConfig(), 0, 10)
    1.0
    >>> learning_rate_factor(ScheduleConfig(name="linear", warmup_steps=4), 1, 10)
    0.5
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.name == "step":
        return schedule.gamma ** ((step - schedule.warmup_steps) // (schedule.step_size or steps))
    if schedule.name == "constant":
        return 1.0
    progress = (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps)
    decay = 1.0 - progress if schedule.name == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return schedule.min_ratio + (1.0 - schedule.min_ratio) * decay


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every group its share of `learning_rate`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["scale"]
