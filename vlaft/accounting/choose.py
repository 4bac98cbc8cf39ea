"""`--recipe auto`: which recipe, how much recomputation and which micro-batch suit a card.

Memory decides what is possible, and a roofline which of that is fastest: the time of a pass is its matrix products at
the card's rate plus the bytes of its weights at the card's bandwidth. Only their ratio matters here, and it is alike on
the cards that people train on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from vlaft.accounting.memory import MemoryPrediction, memory_model, predict_memory, usual_tokens
from vlaft.errors import VlaftError
from vlaft.model.configuration import OpenVLAConfig
from vlaft.model.vision import vit_config
from vlaft.recipe.settings import RecipeConfig

PREFERRED = ("lora32", "qlora32")  # unquantised where it fits: exact base weights, and no time lost to unpacking them
LEVELS = ("all", "2", "4", "vision", "none")  # of recomputation, by growing memory
# bfloat16 operations in the time of one byte (datasheets, dense): A100 80 GB 153, RTX 4090 164, H200 206, H100 SXM 295
OPERATIONS_PER_BYTE = 200
EFFECTIVE_BATCH = 16  # examples per device and step, upstream's batch size; times train.accumulation
RESERVE = 0.03  # of the card stays free: predictions have not been held against a GPU yet
# Bytes moved per weight and pass: read in bfloat16; or 4 bits and scales read, bfloat16 written and read again
WEIGHT_BYTES = {"none": 2.0, "int8": 5.0, "nf4": 4.53}

Make = Callable[[str, list[str]], RecipeConfig]


@dataclass(frozen=True)
class Choice:
    """A recipe for a card.

    Attributes:
        recipe: resolved, with a number as `train.batch_size`.
        memory: predicted for it.
        reasons: one or two sentences that say why it was chosen.
    """

    recipe: RecipeConfig
    memory: MemoryPrediction
    reasons: tuple[str, ...]


def choose(make: Make, config: OpenVLAConfig, memory: int) -> Choice:
    """Choose recipe, recomputation and micro-batch for a card, at an unchanged number of examples per update.

    Args:
        make: resolves the recipe of a name with `key=value` words laid between it and the user's own settings, so
            that these win: what the user fixed stays.
        config: of the base.
        memory: bytes of the card.

    Raises:
        VlaftError: nothing fits.
    """
    turned_down = []
    for name in PREFERRED:
        fitting, least = _fitting(name, make, config, memory)
        if not fitting:
            turned_down.append(f"{name} needs {_gb(least.peak)}")
            continue
        recipe, prediction = min(fitting, key=lambda pair: relative_time(pair[0], config))
        if recipe.train.accumulation == 1:
            prediction = predict_memory(recipe, config)
        return Choice(recipe, prediction, _reasons(recipe, prediction, memory, turned_down))
    raise VlaftError(
        f"no recipe fits {_gb(memory)}: with every block recomputed and one example at a time, {', '.join(turned_down)}"
    )


def _fitting(
    name: str, make: Make, config: OpenVLAConfig, memory: int
) -> tuple[list[tuple[RecipeConfig, MemoryPrediction]], MemoryPrediction]:
    """Return the variants of a recipe that fit, and the prediction of the smallest one."""
    found: list[tuple[RecipeConfig, MemoryPrediction]] = []
    least: MemoryPrediction | None = None
    seen: set[int | str] = set()
    for level in LEVELS:
        recipe = make(name, [f"train.gradient_checkpointing={level}", "train.batch_size=auto", "train.accumulation=1"])
        if recipe.train.gradient_checkpointing in seen:  # the user said which
            break
        seen.add(recipe.train.gradient_checkpointing)
        variants = list(_batches(recipe))
        # traced with gradients in place, as all variants but the largest batch have them: too much for that one at most
        model = memory_model(variants[-1], config)
        if least is None:
            least = model.predict(int(variants[-1].train.batch_size))
        predictions = [(variant, model.predict(int(variant.train.batch_size))) for variant in variants]
        fits = [
            (variant, prediction) for variant, prediction in predictions if prediction.peak <= (1 - RESERVE) * memory
        ]
        if not fits:
            break
        found += fits
    assert least is not None
    return found, least


def _batches(recipe: RecipeConfig) -> Iterator[RecipeConfig]:
    """Yield the recipe with every micro-batch that its examples per update allow, largest first."""
    if recipe.train.batch_size != "auto":
        yield recipe
        return
    for size in divisors(EFFECTIVE_BATCH * recipe.train.accumulation):
        yield with_batch(recipe, size)


def relative_time(recipe: RecipeConfig, config: OpenVLAConfig) -> float:
    """Return the time per example that a roofline gives, in operations: good for comparing, nothing else.

    A frozen weight is used once forwards, once backwards (for the input's gradient alone), and once more where its
    block is recomputed. Each time, its bytes are moved once for the whole micro-batch.
    """
    names, sizes = config.timm_model_ids or [], config.image_sizes or []
    overrides = config.vision_overrides or [None] * len(names)
    vits = [vit_config(name, override) for name, override in zip(names, overrides, strict=True)]
    vision = sum((vit.depth - 1) * (4 + 2 * vit.mlp_ratio) * vit.embed_dim**2 for vit in vits)
    text = config.text_config
    language = text.num_hidden_layers * (4 * text.hidden_size**2 + 3 * text.hidden_size * text.intermediate_size)
    patches = (sizes[0] // vits[0].patch_size) ** 2
    policy = recipe.train.gradient_checkpointing
    again = {"none": 0.0, "vision": 0.0, "all": 1.0}.get(str(policy))
    if again is None:
        again = math.ceil(text.num_hidden_layers / int(policy)) / text.num_hidden_layers
    moved = WEIGHT_BYTES[recipe.adapt.quantize] * OPERATIONS_PER_BYTE / int(recipe.train.batch_size)

    def time(weights: float, positions: int, passes: float) -> float:
        return passes * weights * (2 * positions + moved)

    return time(vision, patches, 2.0 + (policy != "none")) + time(language, patches + usual_tokens(config), 2.0 + again)


def _reasons(recipe: RecipeConfig, memory: MemoryPrediction, card: int, turned_down: list[str]) -> tuple[str, ...]:
    train = recipe.train
    policy = {
        "none": "nothing recomputed",
        "vision": "vision blocks recomputed",
        "all": "every block recomputed",
    }.get(
        str(train.gradient_checkpointing), f"vision and every {train.gradient_checkpointing}. decoder block recomputed"
    )
    chosen = (
        f"{recipe.name}, {train.batch_size} x {train.accumulation} examples per update, {policy}:"
        f" {_gb(memory.peak)} predicted of {_gb(card)}; the fastest variant that fits, by operations and bytes moved"
    )
    if turned_down:
        return (f"{', '.join(turned_down)} even with every block recomputed and one example at a time", chosen)
    return (chosen,)


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def divisors(number: int) -> list[int]:
    """Return the divisors of `number`, largest first.

    >>> divisors(12)
    [12, 6, 4, 3, 2, 1]
    """
    return [size for size in range(number, 0, -1) if number % size == 0]


def with_batch(recipe: RecipeConfig, micro: int) -> RecipeConfig:
    """Return `recipe` with micro-batches of `micro` examples and as many examples per step as `auto` stands for."""
    effective = EFFECTIVE_BATCH * recipe.train.accumulation
    return replace(recipe, train=replace(recipe.train, batch_size=micro, accumulation=effective // micro))
