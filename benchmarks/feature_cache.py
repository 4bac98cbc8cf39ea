"""Time of a training step with the features of frozen ViTs kept, over one that computes them again, in one run.

    python benchmarks/feature_cache.py --base BASE --data DATA [--recipe last-layer] [--batch-size 8] [WORD...]

BASE is a small base, DATA what `vlaft convert` wrote for it. Both runs do the same steps on the same batches, in turn;
the cache is filled beforehand, as after the first epoch. The limit is the share of the step that is not the ViTs'
forward pass, which is timed in the same rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from vlaft.action.metrics import MetricSums
from vlaft.recipe.resolve import resolve
from vlaft.training.data import to_inputs
from vlaft.training.events import Listener
from vlaft.training.run import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--recipe", default="last-layer")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("settings", nargs="*", help="words of the recipe, such as policy.cameras=[main,wrist]")
    options = parser.parse_args()
    words = [f"base='{options.base}'", f"data.path='{options.data}'", "data.augment=false", "data.workers=0"]
    words += ["train.steps=100000", f"train.batch_size={options.batch_size}", "train.accumulation=1"]
    words += options.settings
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        runs = {}
        for way in ("always", "never"):
            recipe = resolve(options.recipe, [], [*words, f"data.reuse_features={way}"])
            runs[way] = Run(recipe, Path(folder) / way, options.base, Listener())
            runs[way].load()
        kept = runs["always"]
        sums = {way: MetricSums(run.device) for way, run in runs.items()}
        while kept.data.loader.epoch < 1:  # the first epoch fills the cache
            batch = next(kept.data.loader)
            kept._vision_features(batch, to_inputs(batch, kept.device))
        times: dict[str, list[float]] = {"always": [], "never": [], "vision": []}
        for _ in range(options.rounds):
            for way, run in runs.items():
                began = time.perf_counter()
                run.step(sums[way], want_norm=False)
                times[way].append(time.perf_counter() - began)
            inputs = to_inputs(next(kept.data.loader), kept.device)
            began = time.perf_counter()
            kept._compute_features(inputs.images)
            times["vision"].append(time.perf_counter() - began)
        medians = {way: statistics.median(values) for way, values in times.items()}
        assert kept.features is not None and kept.features.misses <= len(kept.data.loader._order(0))
        limit = 1 - medians["vision"] / medians["never"]
        print(
            f"{options.recipe}, batch {options.batch_size}: {medians['always'] / medians['never']:.2f} of the time"
            f" without the cache ({medians['always']:.3f} s over {medians['never']:.3f} s); limit {limit:.2f}:"
            f" the ViTs' forward pass takes {medians['vision']:.3f} s"
        )


if __name__ == "__main__":
    main()
