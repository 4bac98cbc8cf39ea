"""The memory model against the OpenVLA paper's Table 1 (SigLIP-only base, batch size 16), on the meta device.

    python benchmarks/paper_memory.py

LoRA rows: weights, adapters and moments in bfloat16 as upstream's fine-tuning script has them, upstream's plain step
(`plain_step.py`), and vlaft's own beside it. `settled` replays PyTorch's allocator over thirty batches that are padded
to different lengths, as upstream's are: what a GPU's monitor shows after a while is this, not the live tensors.
Other rows: the paper's other stack, trained weights and moments in float32 and the plain step; full and frozen-vision
are sharded over two GPUs by FSDP with recomputed blocks, sandwich and last-layer run on one with frozen weights in
bfloat16 and nothing recomputed. The paper says neither how it set nor how it measured these: of the settings that make
sense, this is the one that comes nearest.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from vlaft.accounting.allocator import peak_reserved
from vlaft.accounting.costs import PAPER_BASE, PAPER_BATCH, PAPER_GB
from vlaft.accounting.memory import CONTEXT_BYTES, LABELS, WORKSPACE_BYTES, memory_model
from vlaft.accounting.step import trace_step
from vlaft.accounting.tracker import ADAPTERS, OPTIMIZER, WEIGHTS, Trace
from vlaft.model.load import base_config
from vlaft.recipe.resolve import resolve

sys.path.insert(0, str(Path(__file__).parent))
from plain_step import plain_forward

BF16 = ["precision.trained=bfloat16", "precision.frozen=bfloat16", "precision.compute=bfloat16"]
SHARDED = ["precision.trained=float32", "precision.frozen=float32", "train.gradient_checkpointing=all"]
ONE_GPU = ["precision.trained=float32", "precision.frozen=bfloat16", "train.gradient_checkpointing=none"]
LENGTHS = (62, 63, 64, 66, 70, 73)  # text tokens of the longest example in a batch, Vicuna prompt


def events(trace: Trace, offset: int, first: bool) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """A step's allocations, and how to free what it leaves behind."""
    moves = trace.keys >= 0
    freed = set(trace.keys[moves & (trace.sizes < 0)].tolist())
    found, left = [], []
    for key, size, kind in zip(trace.keys.tolist(), trace.sizes.tolist(), trace.kinds.tolist(), strict=True):
        if key < 0:
            continue
        if key not in freed and kind in (WEIGHTS, ADAPTERS, OPTIMIZER):
            if first:
                found.append((key, size))
            continue
        found.append((key + offset, size))
        if key not in freed:
            left.append((key + offset, -size))
    return found, left


def settled(name: str, steps: int = 30) -> int:
    recipe, config = resolve(name, (), BF16), base_config(PAPER_BASE)
    traces = [
        trace_step(recipe, config, batch_sizes=[PAPER_BATCH], tokens=tokens, labels=LABELS, forward_pass=plain_forward)[
            0
        ][0]
        for tokens in LENGTHS
    ]
    order = random.Random(0)
    everything: list[tuple[int, int]] = []
    left: list[tuple[int, int]] = []
    for step in range(steps):
        found, rest = events(order.choice(traces), (step + 1) * 10**8, first=step == 0)
        everything += found + left
        left = rest
    return peak_reserved(everything) + WORKSPACE_BYTES + CONTEXT_BYTES


def main() -> None:
    config = base_config(PAPER_BASE)
    print("| recipe | paper GB | modelled GB | error | live GB | vlaft's own step | settled over 30 lengths |")
    print("|---|---|---|---|---|---|---|")
    for name in ("lora32", "lora64"):
        recipe = resolve(name, (), BF16)
        plain = memory_model(recipe, config, batch_sizes=[PAPER_BATCH], forward_pass=plain_forward)
        own = memory_model(recipe, config, batch_sizes=[PAPER_BATCH]).predict(PAPER_BATCH)
        found, paper = plain.predict(PAPER_BATCH), PAPER_GB[name][0]
        cells = [f"{paper}", f"{found.peak / 1e9:.1f}", f"{100 * (found.peak / 1e9 / paper - 1):+.1f} %"]
        cells += [f"{found.live / 1e9:.1f}", f"{own.peak / 1e9:.1f}", f"{settled(name) / 1e9:.1f}"]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    for name in ("full", "frozen-vision", "sandwich", "last-layer"):
        paper, gpus = PAPER_GB[name]
        recipe = resolve(name, (), SHARDED if gpus > 1 else ONE_GPU)
        model = memory_model(recipe, config, batch_sizes=[PAPER_BATCH], forward_pass=plain_forward)
        found = model.predict(PAPER_BATCH, gpus)
        total = found.peak * gpus
        error = f"{100 * (total / 1e9 / paper - 1):+.1f} %"
        where = f" over {gpus}" if gpus > 1 else ""
        print(f"| {name} | {paper}{where} | {total / 1e9:.1f} | {error} | {found.live * gpus / 1e9:.1f} | | |")


if __name__ == "__main__":
    main()
