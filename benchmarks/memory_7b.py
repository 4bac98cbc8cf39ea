"""Predicted memory against measured, for every recipe: real steps on random weights, nothing is downloaded.

    python benchmarks/memory_7b.py [--base openvla/openvla-7b] [--batch-sizes 1 16] [--recipes NAME ...] [--out FOLDER]
    python benchmarks/memory_7b.py --base FOLDER --batch-sizes 1 4      a small base, on a CPU too

On a GPU the measure is `torch.cuda.max_memory_allocated` over three steps, and each recipe runs in its own process.
A recipe whose prediction does not fit the GPU is listed with its prediction alone. Without a GPU, live tensors are
followed on the CPU and the prediction is one for a CPU; a base of 7B is refused there.
Writes `memory.md` and `memory.json`; exit code 3 where a prediction is off by more than 5 %.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from vlaft.accounting.costs import recipe_cost
from vlaft.accounting.measure import measure
from vlaft.errors import VlaftError
from vlaft.model.load import base_config
from vlaft.recipe.resolve import recipe_names, resolve

TOLERANCE = 0.05
CPU_LIMIT = 500_000_000  # parameters


def run_one(base: str, name: str, batch_size: int) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = resolve(name, (), [f"base='{base}'"])
    config = base_config(base)
    memory = torch.cuda.get_device_properties(0).total_memory if device.type == "cuda" else 24 * 10**9
    cost = recipe_cost(recipe, config, gpu_memory=memory, batch_size=batch_size)
    row = {"recipe": name, "batch_size": batch_size, "predicted_total": cost.memory.peak, "moment": cost.memory.moment}
    if device.type == "cuda" and cost.memory.peak > memory:
        return row | {"note": "does not fit, by prediction"}
    if device.type == "cpu" and cost.counted.total > CPU_LIMIT:
        raise SystemExit(f"{base} is too large for a CPU; give a small base with --base")
    began = time.monotonic()
    try:
        found = measure(recipe, config, cost, device)
    except VlaftError as error:
        return row | {"note": str(error)}
    return row | {
        "predicted": found.predicted_bytes,
        "measured": found.peak_bytes,
        "reserved": found.reserved_bytes,
        "error": found.error,
        "how": found.how,
        "seconds": time.monotonic() - began,
    }


def in_own_process(base: str, name: str, batch_size: int) -> dict[str, Any]:
    words = [sys.executable, __file__, "--base", base, "--one", name, str(batch_size)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"recipe": name, "batch_size": batch_size, "note": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def markdown(rows: list[dict[str, Any]], where: dict[str, str]) -> str:
    lines = [f"{key}: {value}  " for key, value in where.items()]
    lines += [
        "",
        "| recipe | batch | predicted | measured | error | reserved | peak at |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "measured" in row:
            unit = 1e9 if row["measured"] > 1e9 else 1e6
            word = "GB" if unit == 1e9 else "MB"
            cells = [f"{row[key] / unit:.2f} {word}" for key in ("predicted", "measured")]
            cells += [f"{100 * row['error']:+.2f} %", f"{row['reserved'] / unit:.2f} {word}" if row["reserved"] else ""]
        else:
            cells = [f"{row['predicted_total'] / 1e9:.2f} GB" if "predicted_total" in row else "", row["note"], "", ""]
        lines.append("| " + " | ".join([row["recipe"], str(row["batch_size"]), *cells, row.get("moment", "")]) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="openvla/openvla-7b")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--recipes", nargs="+", default=recipe_names())
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(options.base, options.one[0], int(options.one[1]))))
        return 0
    on_gpu = torch.cuda.is_available()
    where = {
        "base": options.base,
        "device": torch.cuda.get_device_name(0) if on_gpu else f"CPU ({platform.machine()})",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    run = in_own_process if on_gpu else run_one
    rows = []
    for batch_size in options.batch_sizes:
        for name in options.recipes:
            rows.append(run(options.base, name, batch_size))
            print(json.dumps(rows[-1]), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "memory.json").write_text(json.dumps({**where, "rows": rows}, indent=2) + "\n")
    (options.out / "memory.md").write_text(markdown(rows, where))
    print((options.out / "memory.md").read_text())
    return 3 if any(abs(row.get("error", 0.0)) > TOLERANCE for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
