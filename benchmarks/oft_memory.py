"""The memory model against what OpenVLA-OFT publishes of openvla-7b, and what would bring `qoft` to 8 GB.

    python benchmarks/oft_memory.py [training] [inference] [8gb]

Upstream's figures stand in the FAQ of its repository: LIBERO with 7 action and 8 state dimensions in chunks of 8, ALOHA
with 14 and 14 in chunks of 25. Ours are predictions for one GPU, made on the meta device, not measurements: in training
weights, what is trained in float32 and computed in bfloat16, recomputation as each recipe has it; at inference the
merged checkpoint in bfloat16, heads and FiLM in float32 (upstream casts them to bfloat16).

Exit code 3 where `oft-state` at eight examples is not a third below upstream, or `qoft` at one not within 12 GB.
"""

from __future__ import annotations

import argparse
import sys

from vlaft.accounting.inference import predict_inference
from vlaft.accounting.memory import MemoryModel, memory_model
from vlaft.accounting.meta import policy_of
from vlaft.model.configuration import OpenVLAConfig
from vlaft.model.load import base_config
from vlaft.recipe.resolve import resolve

ALL = "train.gradient_checkpointing=all"
# recipe, words, action and state dimensions, {examples per step: upstream's GB, None where it has no such recipe}
PUBLISHED: list[tuple[str, list[str], int, int, dict[int, float | None]]] = [
    ("oft", [], 7, 8, {1: 25.6, 8: 44.1}),
    ("oft", [ALL], 7, 8, {1: 25.6, 8: 44.1}),
    ("oft-state", [], 7, 8, {1: 25.7, 8: 62.5}),
    ("oft-state", [ALL], 7, 8, {1: 25.7, 8: 62.5}),
    ("oft-film", [], 14, 14, {1: 38.6, 4: 73.5}),
    ("oft-film", [ALL], 14, 14, {1: 38.6, 4: 73.5}),
    ("qoft", [], 7, 8, {1: None, 8: None}),
]
ACTING: list[tuple[str, int, int, float]] = [  # recipe, action and state dimensions, upstream's GB
    ("oft", 7, 8, 15.9),
    ("oft-state", 7, 8, 16.2),
    ("oft-film", 14, 14, 18.0),
]
SMALLER: list[tuple[str, list[str]]] = [  # from `qoft` on, each with those before it
    ("as shipped: two cameras, one example", []),
    ("gradients not kept between passes", ["train.accumulation=1"]),
    ("adapters of rank 16", ["adapt.lora.rank=16"]),
    ("adapters in bfloat16", ["precision.trained=bfloat16"]),
    ("adapters of rank 8", ["adapt.lora.rank=8"]),
    ("one camera", ["policy.cameras=[main]"]),
]
AIMS = {("oft-state", 8): 62.5 * 2 / 3, ("qoft", 1): 12.0}  # GB


def training(config: OpenVLAConfig) -> list[str]:
    """Print upstream's recipes, and return what missed its aim."""
    missed = []
    print("| recipe | batch | upstream GB | predicted GB | ratio | weights alone GB |")
    print("|---|---|---|---|---|---|")
    for name, words, action_size, state_size, published in PUBLISHED:
        model = memory_of(config, name, words, action_size, state_size)
        for batch_size, theirs in published.items():
            found = model.predict(batch_size)
            ratio = "" if theirs is None else f"{found.peak / 1e9 / theirs:.2f}"
            weights = sum(size for term, size in found.terms.items() if term in ("weights", "adapters"))
            cells = [
                " ".join([name, *words]),
                str(batch_size),
                str(theirs or ""),
                f"{found.peak / 1e9:.1f}",
                ratio,
                f"{weights / 1e9:.1f}",
            ]
            print("| " + " | ".join(cells) + " |", flush=True)
            aim = AIMS.get((name, batch_size))
            if aim is not None and found.peak / 1e9 > aim:
                missed.append(f"{cells[0]} at {batch_size}: {found.peak / 1e9:.1f} GB, aim {aim:.1f}")
    return missed


def memory_of(config: OpenVLAConfig, name: str, words: list[str], action_size: int, state_size: int) -> MemoryModel:
    recipe = resolve(name, (), words)
    return memory_model(recipe, config, policy=policy_of(recipe, action_size, state_size))


def inference(config: OpenVLAConfig) -> None:
    """Print what acting takes, part by part, beside upstream's figures."""
    print("| recipe | upstream GB | predicted GB | ratio | released model | head | state | FiLM | besides | in nf4 |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, action_size, state_size, theirs in ACTING:
        policy = policy_of(resolve(name), action_size, state_size)
        found, packed = (predict_inference(config, policy, quantized=quantized) for quantized in (False, True))
        own = [found.weights.get(part, 0) for part in ("action_head", "proprio_projector", "film")]
        weights = sum(found.weights.values())
        sizes = [found.peak, weights - sum(own), *own, found.peak - weights, packed.peak]
        total, *parts = (f"{size / 1e9:.2f}" if size else "" for size in sizes)
        print(f"| {name} | {theirs} | {total} | {found.peak / 1e9 / theirs:.2f} | {' | '.join(parts)} |", flush=True)


def towards_8gb(config: OpenVLAConfig) -> None:
    """Print how `qoft` shrinks, setting by setting, and what its bytes are."""
    terms = ("weights", "adapters", "gradients", "optimizer state", "activations", "fragmentation")
    print(f"| `qoft`, and then | predicted GB | {' | '.join(terms)} | workspace and CUDA | most at |")
    print("|---" * (len(terms) + 4) + "|")
    words: list[str] = []
    for what, more in SMALLER:
        words += more
        found = memory_of(config, "qoft", words, 7, 8).predict(1)
        sizes = [found.terms[term] for term in terms]
        cells = [f"{size / 1e9:.2f}" for size in (found.peak, *sizes, found.peak - sum(sizes))]
        print(f"| {what} (`{' '.join(more)}`) | {' | '.join(cells)} | {found.moment} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", choices=["training", "inference", "8gb", []], default=[])
    parser.add_argument("--base", default="openvla/openvla-7b")
    options = parser.parse_args()
    config, missed = base_config(options.base), []
    tables = options.tables or ["training", "inference", "8gb"]
    if "training" in tables:
        missed = training(config)
    if "inference" in tables:
        inference(config)
    if "8gb" in tables:
        towards_8gb(config)
    for sentence in missed:
        print(f"missed: {sentence}")
    return 3 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
