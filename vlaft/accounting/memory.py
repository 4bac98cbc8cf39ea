"""How much memory a recipe needs, predicted from a trace of its training step on the meta device.

On a GPU, the bytes of a step at any batch size follow from traces at two: the same storages live and die in the same
order, and each one's size is a constant plus a constant per example. The peak is the maximum over all moments, so it
may move from one moment to another as the batch grows, which a line through two peaks would miss.

On a CPU, numbers are float32 unless the recipe says otherwise, the optimizer is PyTorch's own, and weights that are
stored as they are needed are never copied: the base's files are mapped, so the kernel can take their pages back at any
time. Left out there: Python and its libraries (measured when a run begins), what loading and the kernels of products
use in between, batches that are read ahead, and what malloc keeps of memory that was freed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from vlaft.accounting.allocator import BLOCK, peak_reserved
from vlaft.accounting.parameters import ParameterCount, base_name
from vlaft.accounting.shards import Gathering, can_be_sharded, gathering
from vlaft.accounting.step import ForwardPass, trace_step, trainable_without_data
from vlaft.accounting.tracker import ADAPTERS, GRADIENTS, KINDS, OPTIMIZER, WEIGHTS, Trace
from vlaft.model.configuration import OpenVLAConfig, Policy
from vlaft.recipe.settings import RecipeConfig, resolve_precision
from vlaft.training.step import forward
from vlaft.weights.layout import tensor_table
from vlaft.weights.stream import DTYPES

# Text tokens of an example with an instruction of six words, actions and end of sequence included, by prompt style
TOKENS = {"openvla": 32, "vicuna": 64}
LABELS = 8  # seven actions and the end of sequence
CONTEXT_BYTES = 512 * 2**20  # CUDA context, kernels and libraries of one process
WORKSPACE_BYTES = 32 * 2**20  # cuBLAS, as PyTorch sizes it on Hopper; 8 MiB before
CARDS = (8, 12, 16, 24, 32, 40, 48, 80, 141)  # GB (1e9 bytes) of common GPUs
GATHERED = "gathered"  # what shards make whole for a while
_LARGEST = 4096  # examples; above this no batch size is looked for


@dataclass(frozen=True)
class MemoryPrediction:
    """What a training step needs on one GPU.

    Attributes:
        batch_size: examples per forward pass.
        tokens: text tokens per example.
        terms: bytes by term at the moment of the peak, in order; their sum is `peak`. The first six are live storage
            (`live`); then what the allocator rounds (`block rounding`) and keeps besides (`fragmentation`), cuBLAS's
            `workspace`, and the `CUDA context`. In shards also what is `gathered` then, which is live.
        moment: phase and module of the peak: `forward language_model.model.layers.31.mlp.down_proj`.
        gpus: over how many GPUs weights, gradients and optimizer state are sharded (FSDP).
    """

    batch_size: int
    tokens: int
    terms: dict[str, int]
    moment: str
    gpus: int = 1

    @property
    def peak(self) -> int:
        """Bytes that the GPU must have."""
        return sum(self.terms.values())

    @property
    def live(self) -> int:
        """Bytes of live tensors."""
        return sum(size for term, size in self.terms.items() if term in (*KINDS, GATHERED))

    @property
    def allocated(self) -> int:
        """Bytes that `torch.cuda.max_memory_allocated` reports."""
        return self.live + self.terms["block rounding"] + self.terms["workspace"]


@dataclass(frozen=True)
class MemoryModel:
    """A training step whose memory is known at every batch size.

    Attributes:
        traces: at `batch_sizes`, events in the same order.
        batch_sizes: one or two; with one, that batch size is all there is.
        tokens: text tokens per example.
        gathering: what shards gather, where the traces are of a step in shards; else None.
        counted: the recipe's parameters.
    """

    traces: tuple[Trace, ...]
    batch_sizes: tuple[int, ...]
    tokens: int
    gathering: Gathering | None
    counted: ParameterCount

    def sizes(self, batch_size: int) -> np.ndarray:
        """Return the bytes of each event at a batch size, int64 `[E]`."""
        first = self.traces[0].sizes
        if len(self.traces) == 1:
            if batch_size != self.batch_sizes[0]:
                raise ValueError(f"traced at batch size {self.batch_sizes[0]} only")
            return first
        span = self.batch_sizes[1] - self.batch_sizes[0]
        return first + (batch_size - self.batch_sizes[0]) * (self.traces[1].sizes - first) // span

    def live_peak(self, batch_size: int) -> int:
        """Return the most bytes alive at once, in whole blocks."""
        return int(np.cumsum(_in_blocks(self.sizes(batch_size))).max())

    def predict(self, batch_size: int, gpus: int = 1) -> MemoryPrediction:
        """Return the prediction for a batch size on one of `gpus`, which share the model where it is in shards."""
        trace, sizes = self.traces[0], self.sizes(batch_size)
        if self.gathering is None:
            terms, event = peak_terms(trace, sizes)
        else:
            terms, event = sharded_terms(trace, sizes, self.gathering, gpus)
        return MemoryPrediction(batch_size, self.tokens, terms, trace.names[trace.places[event]], gpus)

    def largest_batch(self, memory: int, gpus: int = 1) -> int:
        """Return the largest batch size, up to 4096, that fits `memory` bytes; 0 where not even one example does."""
        low, high = 0, 1
        while low < _LARGEST and self._bound(high, gpus) <= memory:
            low, high = high, 2 * high
        if low >= _LARGEST:
            return _LARGEST
        while high - low > 1:  # the bound leaves fragmentation out: at most too large
            middle = (low + high) // 2
            low, high = (middle, high) if self._bound(middle, gpus) <= memory else (low, middle)
        while low and self.predict(low, gpus).peak > memory:
            low -= max(1, low // 32)
        return low

    def _bound(self, batch_size: int, gpus: int) -> int:
        if self.gathering is not None:
            return self.predict(batch_size, gpus).peak
        return self.live_peak(batch_size) + WORKSPACE_BYTES + CONTEXT_BYTES


def peak_terms(trace: Trace, sizes: np.ndarray, more: np.ndarray | int = 0) -> tuple[dict[str, int], int]:
    """Return the bytes of each term of `MemoryPrediction` at the moment of the peak on a GPU, and that event.

    Args:
        trace: what was born and died.
        sizes: `[E]` int64, bytes of its events at the batch size asked for.
        more: `[E]` int64, what lives besides after each event; it moves the peak and is no term.
    """
    blocks = _in_blocks(sizes)
    event = int((np.cumsum(blocks) + more).argmax())
    totals = {
        kind: int(sizes[: event + 1][trace.kinds[: event + 1] == number].sum()) for number, kind in enumerate(KINDS)
    }
    in_blocks = int(blocks[: event + 1].sum())
    moves = (trace.keys >= 0) & (sizes != 0)
    reserved = peak_reserved(zip(trace.keys[moves].tolist(), sizes[moves].tolist(), strict=True))
    terms = {
        **totals,
        "block rounding": in_blocks - sum(totals.values()),
        "fragmentation": max(0, reserved - in_blocks),
        "workspace": WORKSPACE_BYTES,
        "CUDA context": CONTEXT_BYTES,
    }
    return terms, event


def sharded_terms(trace: Trace, sizes: np.ndarray, gathered: Gathering, gpus: int) -> tuple[dict[str, int], int]:
    """Do what `peak_terms` does for one of several GPUs that share a model in shards.

    Args:
        trace: of a step in shards, as one process computes it.
        sizes: as `peak_terms` takes them.
        gathered: what shards hold and gather.
        gpus: that share the model.
    """
    sizes = np.where(np.isin(trace.kinds, (WEIGHTS, ADAPTERS, OPTIMIZER)), 0, sizes)
    kept = gathered.held / (max(gathered.traced, 1) * gpus)  # of a gradient, once it is summed
    sizes = np.where(trace.kinds == GRADIENTS, np.trunc(sizes * kept).astype(np.int64), sizes)
    # all that an optimizer holds is counted below, and the end of the backward pass holds more than its step
    phases = {"forward": gathered.forward, "backward": gathered.backward, "optimizer": -(2**60)}
    more = np.array([phases[name.split(" ")[0]] for name in trace.names], dtype=np.int64)[trace.places]
    terms, event = peak_terms(trace, sizes, more)
    shares = {"weights": gathered.weights, "adapters": gathered.adapters, "optimizer state": gathered.moments}
    terms |= {term: -(-size // gpus) for term, size in shares.items()}
    return terms | {GATHERED: int(more[event])}, event


def _in_blocks(sizes: np.ndarray) -> np.ndarray:
    return np.sign(sizes) * -(-np.abs(sizes) // BLOCK) * BLOCK


def usual_tokens(config: OpenVLAConfig) -> int:
    """Return the text tokens of a usual example on a base, which its prompt style decides."""
    vicuna = str(config.llm_backbone_id).startswith("vicuna")
    return TOKENS[config.prompt_style or ("vicuna" if vicuna else "openvla")]


def smallest_card(peak: int) -> int | None:
    """Return the smallest common GPU, in GB, that holds `peak` bytes; None where none does.

    >>> smallest_card(23_900_000_000), smallest_card(200_000_000_000)
    (24, None)
    """
    return next((card for card in CARDS if card * 10**9 >= peak), None)


def memory_model(
    recipe: RecipeConfig,
    config: OpenVLAConfig,
    *,
    batch_sizes: Sequence[int] = (2, 4),
    tokens: int | None = None,
    labels: int = LABELS,
    forward_pass: ForwardPass = forward,
    policy: Policy | None = None,
    gpus: int = 1,
) -> MemoryModel:
    """Trace a recipe's training step on a base as it runs on a GPU.

    Args:
        recipe: resolved settings.
        config: of the base.
        batch_sizes: one batch size, or two from which all others follow.
        tokens: text tokens per example, actions and end of sequence included; None: as usual for the base.
        labels: of those, the ones with a label: actions and end of sequence.
        forward_pass: the trainer's, or another to compare it with.
        policy: what is read and written; None takes the recipe's on usual data.
        gpus: where they are several, they share the model in shards, if the recipe can do that; else each has a copy.

    Raises:
        ConfigError: LoRA targets that the base does not have.
    """
    tokens = tokens or usual_tokens(config)
    shards = gpus > 1 and can_be_sharded(recipe)
    traces, counted = trace_step(
        recipe,
        config,
        batch_sizes=batch_sizes,
        tokens=tokens,
        labels=labels,
        forward_pass=forward_pass,
        policy=policy,
        sharded=shards,
    )
    if len({tuple(trace.keys) for trace in traces}) > 1:
        raise AssertionError("two batch sizes took different steps")
    gathered = None
    if shards:
        precision = resolve_precision(recipe.precision, on_gpu=True)
        gathered = gathering(trainable_without_data(recipe, config, precision, policy)[0], precision)
    return MemoryModel(tuple(traces), tuple(batch_sizes), tokens, gathered, counted)


def predict_memory(
    recipe: RecipeConfig,
    config: OpenVLAConfig,
    *,
    batch_size: int | None = None,
    tokens: int | None = None,
    labels: int = LABELS,
    gpus: int = 1,
    policy: Policy | None = None,
) -> MemoryPrediction:
    """Predict the memory of a recipe's training step on a GPU, at one batch size.

    Args:
        recipe: resolved settings.
        config: of the base.
        batch_size: examples per forward pass; None takes `train.batch_size`, which must be a number then.
        tokens: text tokens per example, actions and end of sequence included; None: as usual for the base.
        labels: of those, the ones with a label: actions and end of sequence.
        gpus: over how many GPUs FSDP shards weights, gradients and optimizer state.
        policy: what is read and written; None takes the recipe's on usual data.
    """
    size = int(recipe.train.batch_size) if batch_size is None else batch_size
    model = memory_model(recipe, config, batch_sizes=[size], tokens=tokens, labels=labels, policy=policy, gpus=gpus)
    return model.predict(size, gpus)


@dataclass(frozen=True)
class MainMemory:
    """What the tensors of a training step take of a CPU's main memory at their peak.

    Attributes:
        own: bytes that the process has to hold.
        mapped: bytes of frozen weights that are used where they lie in the base's files.
        moment: phase and module of the peak: `backward language_model.model.layers.31`.
    """

    own: int
    mapped: int
    moment: str


def predict_main_memory(recipe: RecipeConfig, config: OpenVLAConfig, policy: Policy | None = None) -> MainMemory:
    """Predict the main memory of a recipe's training step on a CPU, at its batch size, in one process.

    Args:
        recipe: resolved settings, `train.batch_size` a number.
        config: of the base.
        policy: what is read and written; None takes the recipe's on usual data.

    Raises:
        CheckpointError: the files of a local base are missing or damaged.
    """
    (trace,), _ = trace_step(
        recipe,
        config,
        batch_sizes=[int(recipe.train.batch_size)],
        tokens=usual_tokens(config),
        labels=LABELS,
        on_gpu=False,
        policy=policy,
    )
    live, event = trace.at_peak()
    model, _ = trainable_without_data(recipe, config, resolve_precision(recipe.precision, on_gpu=False), policy)
    mapped = _mapped_bytes(model, recipe.base, config)
    return MainMemory(live - mapped, mapped, trace.names[trace.places[event]])


def _mapped_bytes(model: nn.Module, base: str, config: OpenVLAConfig) -> int:
    """Return the bytes of frozen parameters whose type is the stored one; packed ones are no parameters here.

    The types of a base that does not lie here are as its configuration says.
    """
    table = tensor_table(Path(base)) if Path(base).is_dir() else None
    size = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or ".lora_" in name:  # adapters that no loss reaches are frozen, and made here
            continue
        plain = base_name(name)
        stored = config.dtype if table is None else DTYPES.get(table[plain].dtype) if plain in table else None
        size += parameter.nbytes if parameter.dtype == stored else 0
    return size
