"""What recipes cost on a base: parameters, predicted memory, and which GPU they need."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from vlaft.accounting.inference import InferenceMemory, predict_inference
from vlaft.accounting.memory import MemoryPrediction, memory_model, smallest_card
from vlaft.accounting.meta import policy_of
from vlaft.accounting.parameters import ParameterCount
from vlaft.accounting.parts import PartMemory, part_memory
from vlaft.model.configuration import OpenVLAConfig, Policy
from vlaft.recipe.settings import RecipeConfig

PAPER_BASE = "openvla/openvla-v01-7b"
PAPER_BATCH = 16
# Table 1 of the OpenVLA paper (Kim et al. 2024): GB at batch size 16 on the SigLIP-only model, and over how many GPUs
PAPER_GB: dict[str, tuple[float, int]] = {
    "full": (163.3, 2),
    "last-layer": (51.4, 1),
    "frozen-vision": (156.2, 2),
    "sandwich": (64.0, 1),
    "lora32": (59.7, 1),
    "lora64": (60.5, 1),
}


@dataclass(frozen=True)
class Measurement:
    """A measured peak beside the predicted one.

    Attributes:
        peak_bytes: measured.
        predicted_bytes: of the same quantity.
        reserved_bytes: what the allocator took from the GPU; 0 on a CPU.
        how: what was measured.
        device: on which device.
    """

    peak_bytes: int
    predicted_bytes: int
    reserved_bytes: int
    how: str
    device: str

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted_bytes / self.peak_bytes - 1.0


@dataclass(frozen=True)
class RecipeCost:
    """What one recipe costs on one base.

    Attributes:
        name: of the recipe.
        counted: its parameters.
        memory: predicted, at the batch size asked for.
        largest_batch: examples per forward pass that fit the GPU asked for; 0: none.
        smallest_card: GB of the smallest common GPU that holds `memory`; None: none does.
        measurement: of real steps, or None.
        parts: what each part takes in training besides activations; empty where it was not asked for.
        inference: what acting takes once merged, `bfloat16` and `nf4`.
    """

    name: str
    counted: ParameterCount
    memory: MemoryPrediction
    largest_batch: int
    smallest_card: int | None
    measurement: Measurement | None = None
    parts: dict[str, PartMemory] = field(default_factory=dict)
    inference: dict[str, InferenceMemory] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return what `vlaft report --json` prints for one recipe; memory is in bytes."""
        counted = self.counted
        found: dict[str, Any] = {
            "name": self.name,
            "trainable_parameters": counted.trainable,
            "total_parameters": counted.total,
            "reached_by_gradient": counted.reached_by_gradient,
            "parts": {part: asdict(entry) for part, entry in counted.parts.items()},
            "batch_size": self.memory.batch_size,
            "tokens": self.memory.tokens,
            "memory": dict(self.memory.terms),
            "peak_memory": self.memory.peak,
            "peak_allocated": self.memory.allocated,
            "peak_moment": self.memory.moment,
            "largest_batch": self.largest_batch,
            "smallest_card": self.smallest_card,
            "inference": {
                name: {"weights": one.weights, "memory": one.terms, "peak_memory": one.peak}
                for name, one in self.inference.items()
            },
        }
        for part, taken in self.parts.items():
            found["parts"][part] |= {f"{name}_bytes": size for name, size in asdict(taken).items()}
        if self.measurement is not None:
            found["measured"] = asdict(self.measurement) | {"error": self.measurement.error}
        return found


def recipe_cost(
    recipe: RecipeConfig,
    config: OpenVLAConfig,
    *,
    gpu_memory: int,
    tokens: int | None = None,
    batch_size: int | None = None,
    gpus: int = 1,
) -> RecipeCost:
    """Work out what a recipe costs.

    Args:
        recipe: resolved settings.
        config: of the base.
        gpu_memory: bytes of the GPU that `largest_batch` is for.
        tokens: text tokens per example, actions and end of sequence included; None: as usual.
        batch_size: examples per forward pass; None: the recipe's, or the largest that fits where that is `auto`.
        gpus: over how many GPUs FSDP shards.
    """
    model = memory_model(recipe, config, tokens=tokens, gpus=gpus)
    largest = model.largest_batch(gpu_memory, gpus)
    if batch_size is None:
        batch_size = max(1, largest) if recipe.train.batch_size == "auto" else recipe.train.batch_size
    memory = model.predict(batch_size, gpus)
    return RecipeCost(
        recipe.name,
        model.counted,
        memory,
        largest,
        smallest_card(memory.peak),
        parts=part_memory(recipe, config),
        inference=_inference(config, policy_of(recipe), tokens),
    )


_ACTING: dict[tuple[str, str, int | None], dict[str, InferenceMemory]] = {}


def _inference(config: OpenVLAConfig, policy: Policy, tokens: int | None) -> dict[str, InferenceMemory]:
    """Return what acting takes; recipes of one policy on one base share it."""
    key = (config.to_json_string(), repr(policy), tokens)
    if key not in _ACTING:
        _ACTING[key] = {
            name: predict_inference(config, policy, quantized=name == "nf4", tokens=tokens)
            for name in ("bfloat16", "nf4")
        }
    return _ACTING[key]
