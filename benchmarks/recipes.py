"""Held-out action L1 before and after training, for every shipped recipe: the table in docs/recipes.md.

    python benchmarks/recipes.py --base BASE --data DATA [--data DATA ...] --out FOLDER [--steps 200] [--markdown FILE]

BASE is a small base (a 7B model would take days on a CPU), DATA are folders that `vlaft convert` wrote for it. All
recipes get the same steps and batch; learning rates are those below, which suit a base of a few million random
parameters and say nothing about a 7B model. One seed; the spread over seeds is not measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

from vlaft.data.loader import batches_in_order
from vlaft.recipe.resolve import recipe_names, resolve
from vlaft.training.events import Listener
from vlaft.training.run import Run
from vlaft.training.trainer import train

RATES = {"full": 1e-3, "frozen-vision": 1e-3, "sandwich": 1e-3, "last-layer": 3e-3}
LORA_RATE = 2e-3


def settings(name: str, options: argparse.Namespace, data: Path) -> list[str]:
    """Return the words that are laid over a recipe."""
    return [
        f"base='{options.base}'",
        f"data.path='{data}'",
        "data.augment=false",
        "data.workers=0",
        f"data.val_examples={options.val_examples}",
        f"train.steps={options.steps}",
        f"train.batch_size={options.batch_size}",
        "train.accumulation=1",
        f"train.learning_rate={RATES.get(name, LORA_RATE)}",
        "train.schedule.name=linear",
        f"train.evaluate_every={options.steps}",
        f"train.save_every={options.steps}",
    ]


def measure(name: str, options: argparse.Namespace, data: Path) -> dict:
    """Train one recipe and return what came of it."""
    recipe = resolve(name, [], settings(name, options, data))
    out = options.out / f"{data.name}-{name}"
    before = Run(recipe, options.out / "before", Path(options.base), Listener())
    before.load()
    untrained = before.evaluate()
    assert untrained is not None, f"{data} has no held-out examples"
    began = time.monotonic()
    summary = train(recipe, out, Listener())
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    after = next(line for line in reversed(lines) if "val_action_l1" in line)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return {
        "recipe": name,
        "data": data.name,
        "trainable": before.trainable,
        "l1_before": untrained.action_l1,
        "l1_after": after["val_action_l1"],
        "accuracy_before": untrained.action_accuracy,
        "accuracy_after": after["val_action_accuracy"],
        "steps": summary.steps,
        "seconds": round(time.monotonic() - began, 1),
    }


def majority_l1(data: Path, options: argparse.Namespace) -> float:
    """Return the L1 of always predicting each dimension's median: what a model must beat to have looked at anything."""
    import numpy as np

    from vlaft.data.store import ConvertedDataset

    dataset = ConvertedDataset(data)
    train_actions = np.stack(dataset.table("train", ["normalized_action"])["normalized_action"].to_pylist())
    held_out = batches_in_order(dataset, 64, limit=options.val_examples)
    actions = np.concatenate([batch.action.numpy() for batch in held_out])
    return float(np.abs(actions - np.median(train_actions, axis=0)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", type=Path, action="append", required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--recipe", action="append", help="only this one; may be given again")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--val-examples", type=int, default=64)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    rows, text = [], []
    for data in options.data:
        median = majority_l1(data, options)
        text += [f"\n{data.name} (always the median action: L1 {median:.3f})\n"]
        text += ["| recipe | trained | L1 before | L1 after | accuracy after | seconds |", "|---|---|---|---|---|---|"]
        for name in options.recipe or recipe_names():
            row = measure(name, options, data)
            rows.append(row)
            text.append(
                f"| {name} | {row['trainable']:,} | {row['l1_before']:.3f} | {row['l1_after']:.3f}"
                f" | {row['accuracy_after']:.3f} | {row['seconds']:.0f} |"
            )
            print(text[-1], file=sys.stderr, flush=True)
    print("\n".join(text))
    if options.markdown:
        options.markdown.write_text("\n".join(text) + "\n")
    (options.out / "recipes.json").write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
