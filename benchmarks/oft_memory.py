"""The memory model against what OpenVLA-OFT publishes of its own training on openvla-7b, on the meta device.

    python benchmarks/oft_memory.py

Upstream's figures stand in the FAQ of its repository: LIBERO with 7 action and 8 state dimensions in chunks of 8, ALOHA
with 14 and 14 in chunks of 25. Ours are predictions for one GPU, not measurements: weights, what is trained in float32
and computed in bfloat16, recomputation as each recipe has it.
"""

from __future__ import annotations

import argparse

from vlaft.accounting.memory import memory_model
from vlaft.accounting.meta import policy_of
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="openvla/openvla-7b")
    config = base_config(parser.parse_args().base)
    print("| recipe | batch | upstream GB | predicted GB | ratio | weights alone GB |")
    print("|---|---|---|---|---|---|")
    for name, words, action_size, state_size, published in PUBLISHED:
        recipe = resolve(name, (), words)
        model = memory_model(recipe, config, policy=policy_of(recipe, action_size, state_size))
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


if __name__ == "__main__":
    main()
