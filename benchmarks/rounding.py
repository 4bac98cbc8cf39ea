"""What rounding a merged model to bfloat16 costs: to the nearest number, and stochastically.

    python benchmarks/rounding.py RUN [RUN ...] [--draws 5]

Each run has a bfloat16 base and its data at hand. Its weights are merged in float32, which is the reference, then
rounded both ways. Per run and rounding, a row as in `docs/export.md`:

* changed: share of the numbers that training changed which still differ from the base;
* error: norm of (written change - learned change) over the norm of the learned change;
* projection: the written change along the learned one, over its length (1 is unbiased);
* tokens: teacher-forced on the reference's own, how many are the same, and the largest difference of a logit;
* L1: free-running held-out action L1, normalised; that of the reference and the base are printed first.

Stochastic rounding goes up with the probability of the distance from below; its figures are means over draws, and for
L1 the spread (standard deviation).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from vlaft.adapt.rounding import round_to
from vlaft.data.held_out import HeldOut
from vlaft.evaluation.offline import evaluate
from vlaft.files import read_json
from vlaft.model.load import load_model
from vlaft.observation.images import ImagePipeline
from vlaft.release.merge import copy_release_files, merge
from vlaft.release.record import data_paths
from vlaft.release.verify import compare, data_probe
from vlaft.weights.layout import resolve_checkpoint, tensor_table
from vlaft.weights.stream import read_tensor
from vlaft.weights.trained import find_trained


def read(folder: Path) -> dict[str, Tensor]:
    return {name: read_tensor(folder, entry).float() for name, entry in tensor_table(folder).items()}


def write(like: Path, folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    copy_release_files(like, folder)
    for name in ("config.json", "dataset_statistics.json"):
        (folder / name).write_bytes((like / name).read_bytes())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def stochastic(exact: Tensor, generator: torch.Generator) -> Tensor:
    return round_to(exact, torch.empty(exact.shape, dtype=torch.bfloat16), generator)


def figures(base: dict[str, Tensor], exact: dict[str, Tensor], written: dict[str, Tensor]) -> tuple[float, ...]:
    learned_square = along = off = 0.0
    changed = kept = 0
    for name, tensor in exact.items():
        learned, change = tensor - base[name], written[name].float() - base[name]
        learned_square += float(learned.double().square().sum())
        along += float((learned.double() * change.double()).sum())
        off += float((learned - change).double().square().sum())
        changed += int(learned.count_nonzero())
        kept += int((change[learned != 0]).count_nonzero())
    return kept / changed, (off / learned_square) ** 0.5, along / learned_square


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--draws", type=int, default=5)
    options = parser.parse_args()
    print("| run | rounding | changed | error | projection | tokens | largest logit difference | L1 |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for run in options.runs:
        trained = find_trained(run)
        held_out = HeldOut.open(data_paths(trained))
        base_folder = resolve_checkpoint(str(trained.base))

        def l1(folder: Path, held_out: HeldOut = held_out) -> float:
            return evaluate(str(folder), held_out, dtype="float32").free_running.overall.l1_normalized

        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            merge(trained, base_folder, folder / "exact", dtype="float32")
            base, exact = read(base_folder), read(folder / "exact")
            reference = partial(load_model, folder / "exact", dtype=torch.float32)
            pipeline = ImagePipeline.from_checkpoint(read_json(folder / "exact/config.json"))
            inputs = data_probe(data_paths(trained), pipeline, len(held_out.chosen))
            print(f"| {run.name} | none (float32) | 1 | 0 | 1 | | | {l1(folder / 'exact'):.4f} |", flush=True)
            print(f"| {run.name} | (base) | | | | | | {l1(write(folder / 'exact', folder / 'base', base)):.4f} |")
            rounded = {"nearest": [{name: tensor.bfloat16() for name, tensor in exact.items()}]}
            rounded["stochastic"] = [
                {name: stochastic(tensor, torch.Generator().manual_seed(seed)) for name, tensor in exact.items()}
                for seed in range(options.draws)
            ]
            for kind, draws in rounded.items():
                rows = []
                for number, tensors in enumerate(draws):
                    out = write(folder / "exact", folder / f"{kind}-{number}", tensors)
                    found = compare(reference, partial(load_model, out, dtype=torch.float32), inputs, torch.bfloat16)
                    same = found.identical_tokens / found.tokens
                    rows.append(
                        (
                            *figures(base, exact, tensors),
                            same,
                            found.largest_logit_difference / found.logit_range,
                            l1(out),
                        )
                    )
                mean = [statistics.mean(column) for column in zip(*rows, strict=True)]
                spread = f" ± {statistics.stdev(row[-1] for row in rows):.4f}" if len(rows) > 1 else ""
                cells = [f"{mean[0]:.1%}", f"{mean[1]:.3f}", f"{mean[2]:.3f}", f"{mean[3]:.1%}", f"{mean[4]:.1%}"]
                print(f"| {run.name} | {kind} | {' | '.join(cells)} | {mean[5]:.4f}{spread} |", flush=True)


if __name__ == "__main__":
    main()
