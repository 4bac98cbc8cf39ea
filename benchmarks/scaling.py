"""How time and memory of a training step grow with the batch and with the model, and what is predicted, in one picture.

    python benchmarks/scaling.py [--sizes small medium large] [--batch-sizes 1 2 4 8] [--rounds 3] [--out FILE.png]

Steps of lora32 with random weights, on the models of `benchmarks/train_step.py`. Points are measured: the best time of
the rounds, and the peak of live tensors, followed storage by storage. Lines are predicted: memory from traces at two
batch sizes on the meta device; time from the step's operations at the rate that the largest measured step reached, so
that one point of the picture is no prediction and the others are.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from train_step import SIZES, config_of, our_step, ready, timed

from benchmarks.flops import step_operations
from vlaft.accounting.memory import LABELS
from vlaft.accounting.meta import example_inputs, example_normalization
from vlaft.accounting.step import follow_steps, trace_step
from vlaft.action.metrics import MetricSums
from vlaft.model.configuration import OpenVLAConfig
from vlaft.recipe.resolve import resolve
from vlaft.recipe.settings import RecipeConfig, resolve_precision
from vlaft.training.model import PRECISIONS

TOKENS = 34
COLOURS = ("#4c6a92", "#c98b4a", "#5b9a72")


def predicted_bytes(recipe: RecipeConfig, config: OpenVLAConfig, batch_sizes: list[int], on_gpu: bool) -> list[int]:
    """Return the peak of live tensors at each batch size, from traces at two."""
    traces, _ = trace_step(recipe, config, batch_sizes=(2, 4), tokens=TOKENS, labels=LABELS, on_gpu=on_gpu)
    low, high = (trace.sizes for trace in traces)
    return [int((low + (size - 2) * (high - low) // 2).cumsum().max()) for size in batch_sizes]


def measure(size: str, batch_sizes: list[int], rounds: int) -> dict[str, Any]:
    """Measure and predict one model at every batch size."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, recipe = config_of(size), resolve("lora32", [], ["data.augment=false"])
    precision = resolve_precision(recipe.precision, on_gpu=device.type == "cuda")
    compute, normalization = PRECISIONS[precision.compute], example_normalization(config)
    model, optimizer = ready(config, recipe, device)
    sums = MetricSums(device)
    seconds, peaks = [], []
    for batch_size in batch_sizes:
        inputs = example_inputs(config, batch_size=batch_size, tokens=TOKENS, labels=LABELS, device=device)
        inputs.labels.copy_(torch.randint(31744, 32000, inputs.labels.shape))  # never learned: see `main`

        def step(inputs: Any = inputs) -> None:
            our_step(model, optimizer, inputs, normalization, compute, sums)

        step()
        seconds.append(min(timed(step, device) for _ in range(rounds)))
        peaks.append(follow_steps(model, optimizer, inputs, normalization, recipe, precision).at_peak()[0])
    return {
        "size": size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "batch_sizes": batch_sizes,
        "seconds": seconds,
        "bytes": peaks,
        "predicted_bytes": predicted_bytes(recipe, config, batch_sizes, on_gpu=device.type == "cuda"),
        "operations_per_example": step_operations(recipe, config, batch_size=1, tokens=TOKENS).total,
    }


def plot(found: list[dict[str, Any]], path: Path, where: str) -> None:
    """Draw time and memory over the batch size, a colour per model: points measured, lines predicted."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    best = max(found, key=lambda row: row["operations_per_example"] * row["batch_sizes"][-1])
    rate = best["operations_per_example"] * best["batch_sizes"][-1] / best["seconds"][-1]
    for row, colour in zip(found, COLOURS, strict=False):
        name = f"{row['parameters'] / 1e6:.0f}M parameters"
        times = [row["operations_per_example"] * size / rate for size in row["batch_sizes"]]
        left.plot(row["batch_sizes"], times, color=colour, linewidth=1)
        left.plot(row["batch_sizes"], row["seconds"], "o", color=colour, label=name)
        right.plot(row["batch_sizes"], [size / 1e9 for size in row["predicted_bytes"]], color=colour, linewidth=1)
        right.plot(row["batch_sizes"], [size / 1e9 for size in row["bytes"]], "o", color=colour, label=name)
    left.set_ylabel("seconds per step")
    right.set_ylabel("GB of live tensors at the peak")
    left.set_title(f"time; lines: operations at {rate / 1e9:.3g} GFLOP/s", fontsize=9)
    right.set_title("memory; lines: predicted on the meta device", fontsize=9)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(found[0]["batch_sizes"], [str(size) for size in found[0]["batch_sizes"]])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
        axes.set_xlabel("examples per step")
        axes.grid(alpha=0.2, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(fontsize=8, frameon=False)
    figure.suptitle(f"A training step of lora32 ({where}): points measured, lines predicted", fontsize=10)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", choices=SIZES, nargs="+", default=list(SIZES))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("scaling.png"))
    options = parser.parse_args()
    torch.set_flush_denormal(True)  # gradients of a loss near 0 are denormal, which a CPU is slow at and a GPU is not
    found = []
    for size in options.sizes:
        found.append(measure(size, options.batch_sizes, options.rounds))
        print(json.dumps(found[-1]), flush=True)
    on_gpu = torch.cuda.is_available()
    where = torch.cuda.get_device_name(0) if on_gpu else f"CPU, torch.get_num_threads() = {torch.get_num_threads()}"
    plot(found, options.out, where)
    options.out.with_suffix(".json").write_text(json.dumps({"device": where, "rows": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
