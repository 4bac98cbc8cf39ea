"""Which settings lie out of their range, and which contradict each other."""

from __future__ import annotations

import math
from collections.abc import Iterator

from vlaft.errors import did_you_mean
from vlaft.recipe.settings import LoraConfig, RecipeConfig

TRACKERS = ("tensorboard", "trackio", "wandb")

# key -> lowest and highest value allowed, both inclusive; null is always allowed where the type has it.
_BOUNDS: dict[str, tuple[float, float]] = {
    "policy.chunk": (1, math.inf),
    "adapt.lora.rank": (1, 4096),
    "adapt.lora.alpha": (1, math.inf),
    "adapt.lora.plus_ratio": (1, math.inf),
    "data.val_examples": (1, math.inf),
    "data.workers": (0, 1024),
    "train.steps": (1, math.inf),
    "train.batch_size": (1, math.inf),
    "train.accumulation": (1, math.inf),
    "train.weight_decay": (0, math.inf),
    "train.schedule.warmup_steps": (0, math.inf),
    "train.schedule.step_size": (1, math.inf),
    "train.schedule.min_ratio": (0, 1),
    "train.gradient_checkpointing": (1, math.inf),
    "train.seed": (0, 2**32 - 1),
    "train.log_every": (1, math.inf),
    "train.save_every": (1, math.inf),
    "train.evaluate_every": (0, math.inf),
    "train.evaluate_env_every": (1, math.inf),
    "train.evaluate_env_episodes": (1, math.inf),
    "train.keep_checkpoints": (1, math.inf),
    "train.early_stopping": (1, math.inf),
    "train.overfit": (0, math.inf),
}
_POSITIVE = ("train.learning_rate", "train.eps", "train.max_grad_norm", "train.schedule.gamma")


def find_problems(config: RecipeConfig) -> list[str]:
    """Return a sentence for every value out of range and every contradiction; empty where all is well."""
    return [*out_of_range(config), *_contradictions(config)]


def _value(config: RecipeConfig, key: str) -> object:
    value: object = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def out_of_range(config: RecipeConfig) -> Iterator[str]:
    """Yield a sentence for every value out of range, whatever the others say."""
    for key, (low, high) in _BOUNDS.items():
        value = _value(config, key)
        if isinstance(value, int | float) and not (low <= value <= high and math.isfinite(value)):
            limit = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            yield f"{key} must be {limit}, not {value}"
    for key in _POSITIVE:
        value = _value(config, key)
        if isinstance(value, int | float) and not (value > 0 and math.isfinite(value)):
            yield f"{key} must be above 0, not {value}"
    if config.train.schedule.gamma > 1:
        yield f"train.schedule.gamma must be at most 1, not {config.train.schedule.gamma}"
    if not 0 <= config.adapt.lora.dropout < 1:
        yield f"adapt.lora.dropout must be at least 0 and below 1, not {config.adapt.lora.dropout}"
    if not all(0 <= beta < 1 for beta in config.train.betas):
        yield f"train.betas must be at least 0 and below 1, not {list(config.train.betas)}"
    if not config.base.strip():
        yield "base is empty; name a checkpoint folder or Hub id, such as openvla/openvla-7b"
    cameras = config.policy.cameras
    if not cameras or not all(camera.strip() for camera in cameras):
        yield "policy.cameras must name at least one camera, such as [main], and no empty one"
    if len(set(cameras)) < len(cameras):
        twice = next(camera for camera in cameras if cameras.count(camera) > 1)
        yield f"policy.cameras names '{twice}' twice"
    if not all(path.strip() for path in config.data.paths):
        yield "data.path holds an empty path"
    for tracker in config.train.trackers:
        if tracker not in TRACKERS:
            yield (
                f"train.trackers: unknown tracker '{tracker}'{did_you_mean(tracker, list(TRACKERS))}"
                f" (there are: {', '.join(TRACKERS)})"
            )


def _contradictions(config: RecipeConfig) -> Iterator[str]:
    adapt, train, policy = config.adapt, config.train, config.policy
    if not policy.parallel:
        asked = {"state=true": policy.state, "film=true": policy.film, f"chunk={policy.chunk}": policy.chunk > 1}
        for key in (key for key, wanted in asked.items() if wanted):
            yield f"policy.{key} needs all actions written at once: policy.decoding=parallel, or policy.head=l1"
    if adapt.method != "lora":
        if adapt.quantize != "none":
            yield (
                f"adapt.quantize={adapt.quantize} needs adapt.method=lora, not {adapt.method}:"
                " quantised weights cannot be trained"
            )
        if adapt.lora != LoraConfig():
            yield f"adapt.lora has settings, but adapt.method={adapt.method} has no adapters; use adapt.method=lora"
    if train.parallel in ("fsdp", "hsdp"):
        yield from _unsharded(config)
    if adapt.double_quant and adapt.quantize != "nf4":
        yield f"adapt.double_quant=true needs adapt.quantize=nf4, not {adapt.quantize}"
    if adapt.lora.init == "pissa" and adapt.quantize != "none":
        # PiSSA subtracts the adapter's product from the base weight, which quantised weights do not allow in PEFT.
        yield f"adapt.lora.init=pissa needs adapt.quantize=none, not {adapt.quantize}"
    precision = config.precision
    for key, value in (("frozen", precision.frozen), ("trained", precision.trained)):
        if precision.compute == "float32" and value == "bfloat16":
            yield f"precision.compute=float32 needs precision.{key}=float32, not bfloat16"
    if not adapt.lora.targets:
        yield "adapt.lora.targets is empty, so nothing would be trained"
    if train.schedule.name == "step" and train.schedule.step_size is None:
        yield "train.schedule.name=step needs train.schedule.step_size"
    if train.schedule.name != "step" and train.schedule.step_size is not None:
        yield f"train.schedule.step_size needs train.schedule.name=step, not {train.schedule.name}"
    if train.schedule.warmup_steps > 0 and train.schedule.warmup_steps >= train.steps:
        yield f"train.schedule.warmup_steps={train.schedule.warmup_steps} must be below train.steps={train.steps}"
    if train.best_by == "success" and not train.evaluate_env:
        yield "train.best_by=success needs an environment to succeed in: train.evaluate_env=tabletop"
    if train.early_stopping is not None and train.evaluate_every == 0 and train.best_by == "l1":
        yield "train.early_stopping needs evaluations, but train.evaluate_every=0 means none"


def _unsharded(config: RecipeConfig) -> Iterator[str]:
    """Yield what cannot be done with shards."""
    adapt, parallel = config.adapt, config.train.parallel
    otherwise = "take train.parallel=ddp, with a copy in every process"
    if adapt.quantize != "none":
        yield (
            f"train.parallel={parallel} needs adapt.quantize=none, not {adapt.quantize}: packed weights and their"
            f" scales cannot be cut into rows; {otherwise}"
        )
    for key, wanted in (("dora=true", adapt.lora.dora), ("init=pissa", adapt.lora.init == "pissa")):
        if adapt.method == "lora" and wanted:
            yield f"adapt.lora.{key} begins from whole weights, which train.parallel={parallel} never has; {otherwise}"
