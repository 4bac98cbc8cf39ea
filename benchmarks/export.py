"""Size and agreement of quantised exports of a trained small model with its bfloat16 checkpoint.

    make demo && python benchmarks/export.py demo-out [--examples 96]

Exports the demo's merged model in bfloat16, nf4 and int8, and lets each act on the same held-out examples of the robot
that it was adapted to. Agreement is teacher-forced on the tokens of the bfloat16 model: how many are the
same. Prints the table of `docs/export.md`.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path

import torch

from vlaft.files import read_json
from vlaft.model.load import load_model
from vlaft.observation.images import ImagePipeline
from vlaft.release.export import ExportResult, export_huggingface, stored_bytes
from vlaft.release.quantized import export_quantized, linear_weights
from vlaft.release.verify import compare, data_probe
from vlaft.weights.layout import tensor_table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("demo", type=Path, help="what `make demo` wrote")
    parser.add_argument("--examples", type=int, default=96)
    options = parser.parse_args()
    model = options.demo / "model"
    pipeline = ImagePipeline.from_checkpoint(read_json(model / "config.json"))
    inputs = data_probe([options.demo / "data"], pipeline, options.examples)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results: dict[str, ExportResult] = {
            "bfloat16": export_huggingface(model, folder / "bfloat16", dtype="bfloat16"),
            "int8": export_quantized(model, folder / "int8", "int8"),
            "nf4": export_quantized(model, folder / "nf4", "nf4"),
        }
        reference = partial(load_model, folder / "bfloat16")
        table = tensor_table(folder / "bfloat16")
        linear = stored_bytes(table[key] for key in linear_weights(folder / "bfloat16"))
        print(f"{linear / results['bfloat16'].bytes:.0%} of the weights are in layers that are quantised")
        print("| export | MB | of bfloat16 | tokens as in bfloat16 | largest logit difference |")
        print("| --- | --- | --- | --- | --- |")
        for kind, result in results.items():
            found = compare(reference, partial(load_model, result.folder), inputs, torch.bfloat16)
            share = found.identical_tokens / found.tokens
            print(
                f"| {kind} | {result.bytes / 1e6:.2f} | {result.bytes / results['bfloat16'].bytes:.2f} |"
                f" {share:.1%} of {found.tokens} | {found.largest_logit_difference:.2f} of {found.logit_range:.1f} |"
            )


if __name__ == "__main__":
    main()
