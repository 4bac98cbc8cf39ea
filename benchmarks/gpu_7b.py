"""openvla-7b on one GPU: memory, time, an 8 GB card, prediction, and chunks, in one command.

    python benchmarks/gpu_7b.py [--out FOLDER] [--batch-sizes 1 8 16] [--steps 5] [--only released|chunks]
    python benchmarks/gpu_7b.py --base FOLDER --batch-sizes 1 2      a small base, on a CPU too: runs, finds nothing

Weights are random and made on the device; nothing is downloaded. Each part runs in a process of its own:

* **steps**: per recipe and batch size, predicted and measured peak, time, samples per second, and the share of the
  GPU's matrix rate (measured in the same process). Beside it a plain step as upstream's script does it: bfloat16
  adapters, padding mask, logits of all positions, the dead ViT block, metrics that wait for the device. `lora32` runs
  as shipped and with the recomputation that keeps batch 16 under 40 GB.
* **8 GB**: PyTorch may take 8e9 bytes less the CUDA context and less what the paged optimizer keeps outside of it.
  Three steps of qlora32 with augmentation must survive that, and a step within a tenth less than they took must not.
* **prediction**: latency of a prompt and of each token in bfloat16, 8 and 4 bits, beside the time that reading the
  weights once takes at the bandwidth measured in the same process.
* **chunks**: steps of `oft`, `oft-state`, `oft-film` and `qoft` at as many examples as upstream's at most (half as many
  where they do not fit), beside plain ones as OpenVLA-OFT's script does them and what it publishes of their memory; and
  answers of these policies beside one of seven serial tokens: actions per second, their limit by operations and bytes
  at the rates measured in the same process, and memory beside the prediction and upstream's figure.

The first three are `--only released`, the last `--only chunks`. All of it has run on small bases on a CPU, and not yet
on a GPU.

Writes `gpu_7b.json` and `gpu_7b.md`. Without a GPU, peaks are those of live tensors, the limit is not enforced, and
rates say nothing about a GPU. Exit code 3 where a part failed.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from chunks import observation_of
from chunks import operations as answer_operations
from generate import token_bytes
from oft_memory import ACTING, PUBLISHED
from plain_step import plain_chunk_forward, plain_forward
from torch import nn
from train_step import matrix_rate, our_step, plain_step, run_dead_blocks, timed

from benchmarks.flops import step_operations
from vlaft.accounting.inference import predict_inference
from vlaft.accounting.measure import random_base
from vlaft.accounting.memory import CONTEXT_BYTES, LABELS, memory_model, usual_tokens
from vlaft.accounting.meta import ACTION_SIZE, STATE_SIZE, example_inputs, example_normalization, policy_of
from vlaft.accounting.step import follow_steps, held, trace_step
from vlaft.accounting.tracker import KINDS, WEIGHTS, StorageTracker
from vlaft.action.metrics import MetricSums
from vlaft.model.configuration import OpenVLAConfig, Policy
from vlaft.model.cuda_graphs import CudaGraphs
from vlaft.model.generation import generate_action_ids
from vlaft.model.load import base_config
from vlaft.recipe.resolve import resolve
from vlaft.recipe.settings import RecipeConfig, resolve_precision
from vlaft.training.model import PRECISIONS, make_trainable
from vlaft.training.optimizer import build_optimizer
from vlaft.training.step import Inputs, forward

ACTIONS = 7
CARD = 8 * 10**9
# upstream's number format for adapters, its optimizer, and nothing recomputed
PLAIN = ["precision.trained=bfloat16", "train.gradient_checkpointing=none", "train.optimizer=adamw"]
PARTS: list[tuple[str, str, list[str]]] = [  # kind of step, recipe, settings
    ("vlaft", "lora32", []),
    ("vlaft", "lora32", ["train.gradient_checkpointing=4"]),
    ("plain", "lora32", PLAIN),
    ("vlaft", "qlora32", []),
    ("plain", "qlora32", PLAIN),
]
CHUNKS: list[tuple[str, str, list[str]]] = [
    ("vlaft", "oft", []),
    ("plain", "oft", PLAIN),
    ("vlaft", "oft-state", []),
    ("plain", "oft-state", PLAIN),
    ("vlaft", "oft-film", []),
    ("plain", "oft-film", PLAIN),
    ("vlaft", "qoft", []),
]
MOST = {"oft": 8, "oft-state": 8, "oft-film": 4, "qoft": 8}  # examples per step, as upstream trains
SIZES = {"oft-film": (14, 14)}  # action and state dimensions of upstream's figures, where they are not the usual ones
SERIAL = "lora32"  # writes one action of seven tokens


def device_here() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def bandwidth(device: torch.device) -> float:
    """Return bytes per second that a copy reads and writes, the best of five."""
    size = 2**30 if device.type == "cuda" else 2**26
    a, b = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))

    def copy() -> None:
        b.copy_(a)

    return 2 * size / min(timed(copy, device) for _ in range(5))


def trainable(recipe: RecipeConfig, config: OpenVLAConfig, device: torch.device) -> tuple[nn.Module, Any]:
    precision = resolve_precision(recipe.precision, on_gpu=device.type == "cuda")
    torch.manual_seed(0)
    base = random_base(config, recipe, PRECISIONS[precision.frozen], device)
    model = make_trainable(base, recipe, precision, policy_in(recipe))
    return model.train(), build_optimizer(model, recipe.train, recipe.adapt.lora.plus_ratio)


def policy_in(recipe: RecipeConfig) -> Policy:
    """Return a recipe's policy on data as upstream's."""
    return policy_of(recipe, *SIZES.get(recipe.name, (ACTION_SIZE, STATE_SIZE)))


def batch_of(config: OpenVLAConfig, batch_size: int, device: torch.device, policy: Policy) -> Inputs:
    labels = policy.chunk * (policy.action_size or ACTION_SIZE) + 1
    tokens = usual_tokens(config) - LABELS + labels
    inputs = example_inputs(config, batch_size=batch_size, tokens=tokens, labels=labels, device=device, policy=policy)
    first = config.action_vocab_size - config.n_action_bins
    inputs.labels.fill_(-100)
    inputs.labels[:, -labels:] = first
    return inputs


def steps_of(kind: str, name: str, words: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time and measure one recipe at every batch size."""
    device, config = device_here(), base_config(options.base)
    on_gpu = device.type == "cuda"
    recipe = resolve(name, [], ["data.augment=false", "train.accumulation=1", "train.batch_size=1", *words])
    precision = resolve_precision(recipe.precision, on_gpu)
    compute, normalization = PRECISIONS[precision.compute], example_normalization(config)
    policy = policy_in(recipe)
    chunked = policy != Policy()
    plain_pass = plain_chunk_forward if chunked else plain_forward
    forward_pass: Any = forward if kind == "vlaft" else plain_pass
    rate = matrix_rate(device, compute)
    operations = step_operations(recipe, config, batch_size=1, policy=policy)
    shortest = resolve(name if chunked else "lora32", [], ["data.augment=false", "train.gradient_checkpointing=none"])
    useful = step_operations(shortest, config, batch_size=1, policy=policy).total
    predicted = memory_model(recipe, config, forward_pass=forward_pass, policy=policy) if on_gpu else None
    model, optimizer = trainable(recipe, config, device)
    if kind == "plain":
        run_dead_blocks(model)
    sums = MetricSums(device)
    rows = []
    sizes = list(dict.fromkeys(min(size, MOST.get(name, size)) for size in options.batch_sizes))
    while sizes:
        batch_size = sizes.pop(0)
        inputs = batch_of(config, batch_size, device, policy)
        row: dict[str, Any] = {"kind": kind, "recipe": name, "settings": words, "batch_size": batch_size}

        def step(inputs: Inputs = inputs) -> None:
            if kind == "plain":
                plain_step(model, optimizer, inputs, normalization, compute)
            else:
                our_step(model, optimizer, inputs, normalization, compute, sums)

        try:
            for _ in range(2):  # kernels are chosen and the optimizer's state is made
                step()
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            seconds = statistics.median(timed(step, device) for _ in range(options.steps))
        except torch.cuda.OutOfMemoryError:
            rows.append(row | {"note": "does not fit"})
            if chunked and batch_size > 1 and batch_size // 2 not in options.batch_sizes:
                sizes.insert(0, batch_size // 2)
            optimizer.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()
            continue
        if predicted is not None:
            prediction = predicted.predict(batch_size)
            peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            expected = prediction.allocated
            if recipe.train.optimizer == "paged-adamw-8bit":
                expected -= prediction.terms["optimizer state"]  # managed memory, which PyTorch does not count
            torch.cuda.empty_cache()
        else:
            followed = follow_steps(
                model, optimizer, inputs, normalization, recipe, precision, forward_pass=forward_pass
            )
            traced, _ = trace_step(
                recipe,
                config,
                batch_sizes=[batch_size],
                tokens=usual_tokens(config),
                labels=LABELS,
                on_gpu=False,
                forward_pass=forward_pass,
                policy=policy,
            )
            peak, reserved, expected = followed.at_peak()[0], 0, traced[0].at_peak()[0]
        rows.append(
            row
            | {
                "predicted_bytes": expected,
                "measured_bytes": peak,
                "reserved_bytes": reserved,
                "seconds": seconds,
                "samples_per_second": batch_size / seconds,
                "matrix_rate": rate,
                # of what a step needs, and of what was computed, recomputation included
                "share_of_rate": useful * batch_size / seconds / rate,
                "share_of_rate_computed": operations.total * batch_size / seconds / rate,
            }
        )
    return rows


def on_a_small_card(options: argparse.Namespace) -> dict[str, Any]:
    """Train qlora32 at batch 1 with augmentation within 8 GB, and fail within less."""
    device, config = device_here(), base_config(options.base)
    recipe = resolve("qlora32")
    precision = resolve_precision(recipe.precision, on_gpu=device.type == "cuda")
    prediction = memory_model(recipe, config).predict(1)
    outside = CONTEXT_BYTES + prediction.terms["optimizer state"]
    found: dict[str, Any] = {"card_bytes": CARD, "outside_bytes": outside, "enforced": device.type == "cuda"}
    found |= {"predicted_bytes": prediction.peak, "limit_bytes": CARD - outside}
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((CARD - outside) / total)
    model, optimizer = trainable(recipe, config, device)
    inputs, normalization = batch_of(config, 1, device, Policy()), example_normalization(config)

    def run(steps: int) -> list[float]:
        losses = []
        for number in range(steps):
            generator = torch.Generator().manual_seed(number)
            output = forward(model, inputs, normalization, PRECISIONS[precision.compute], generator)
            assert output.loss is not None
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(output.loss.item())
        return losses

    try:
        found |= {"losses": run(3), "survived": True}
    except torch.cuda.OutOfMemoryError:
        return found | {"survived": False}
    if device.type == "cuda":
        found |= {
            "allocated_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
        }
        # the limit must bite, or surviving it says nothing
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(0.9 * found["allocated_bytes"] / total)
        try:
            run(1)
            found["fails_with_less"] = False
        except torch.cuda.OutOfMemoryError:
            found["fails_with_less"] = True
    return found


def prediction_in(precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time a prompt and each token after it."""
    device, config = device_here(), base_config(options.base)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    words = [] if precision == "bf16" else [f"adapt.quantize={precision}"]
    model = random_base(config, resolve("lora32", [], words), dtype, device).eval()
    if device.type == "cpu":
        for module in model.modules():  # see vlaft.weights.layout.load_model
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    language = sum(t.nbytes for name in ("language model", "head") for t in model.parts()[name].parameters())
    language -= model.get_input_embeddings().weight.nbytes  # a token reads one row
    assert config.image_sizes and config.timm_model_ids
    side, vits = config.image_sizes[0], len(config.timm_model_ids)
    ids = torch.ones(1, usual_tokens(config) - LABELS, dtype=torch.int64, device=device)
    pixels = torch.zeros(1, 3 * vits, side, side, dtype=dtype, device=device)

    def latency(tokens: int, graphs: CudaGraphs | None) -> float:
        def run() -> None:
            generate_action_ids(model, ids, pixels, num_tokens=tokens, graphs=graphs)

        for _ in range(3):  # a graph is recorded at the second call
            run()
        return statistics.median(timed(run, device) for _ in range(options.steps))

    found: dict[str, Any] = {"precision": precision, "weight_bytes": held}
    for name in ["launched", *(["recorded"] if device.type == "cuda" else [])]:
        graphs = CudaGraphs() if name == "recorded" else None
        first, all_of_them = latency(1, graphs), latency(ACTIONS, graphs)
        found |= {
            f"prompt_seconds_{name}": first,
            f"token_seconds_{name}": (all_of_them - first) / (ACTIONS - 1),
            f"actions_per_second_{name}": 1 / all_of_them,
        }
    return found | {"token_floor_seconds": language / bandwidth(device)}


def answers_of(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time and measure the answers of a merged policy to one observation, in bfloat16."""
    device, config = device_here(), base_config(options.base)
    on_gpu = device.type == "cuda"
    recipe = resolve(name)
    policy = policy_in(recipe)
    rate, speed = matrix_rate(device, torch.bfloat16), bandwidth(device)
    model = random_base(config, resolve("lora32"), torch.bfloat16, device)
    per_token, weights = token_bytes(model), sum(parameter.nbytes for parameter in model.parameters())
    if policy != Policy():
        model.attach(policy)
    model.eval().requires_grad_(False)
    observation = observation_of(config, policy, device, torch.bfloat16)
    size = policy.action_size or ACTION_SIZE

    def answer(graphs: CudaGraphs | None = None) -> None:
        model.head.predict(model, observation, size, graphs=graphs)

    prediction = predict_inference(config, policy)
    answer()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        answer()
        peak, expected = torch.cuda.max_memory_allocated(), prediction.allocated
    else:
        tracker = StorageTracker()
        for _, tensor in held(model):
            tracker.add(tensor, WEIGHTS)
        with tracker:
            answer()
        tracker.close()
        peak = tracker.trace().at_peak()[0]
        expected = sum(taken for term, taken in prediction.terms.items() if term in KINDS)
    serial = policy == Policy()
    times = [timed(answer, device) for _ in range(options.steps)]
    found = {"launched": statistics.median(times)}
    if on_gpu and serial:  # a chunk is one pass, and is not recorded
        graphs = CudaGraphs()
        for _ in range(2):
            answer(graphs)
        found["recorded"] = statistics.median(timed(lambda: answer(graphs), device) for _ in range(options.steps))
    seconds = min(found.values())
    operations = answer_operations(config, policy)
    limit = max(operations / rate, weights / speed) + (ACTIONS - 1) * per_token / speed * serial
    return {
        "recipe": name,
        "policy": "seven serial tokens" if serial else name,
        "chunk": policy.chunk,
        "seconds": found,
        "actions_per_second": policy.chunk / seconds,
        "limit_actions_per_second": policy.chunk / limit,
        "operations": operations,
        "predicted_bytes": expected,
        "measured_bytes": peak,
        "upstream_gb": next((published for each, _, _, published in ACTING if each == name), None),
    }


def in_own_process(options: argparse.Namespace, *part: str) -> Any:
    words = [sys.executable, __file__, "--base", options.base, "--steps", str(options.steps)]
    words += ["--batch-sizes", *map(str, options.batch_sizes), "--part", json.dumps(part)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def in_their_processes(parts: list[tuple[str, str, list[str]]], options: argparse.Namespace) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for kind, name, words in parts:
        rows = in_own_process(options, "steps", kind, name, *words)
        found += rows if isinstance(rows, list) else [rows]
        print(json.dumps(rows), flush=True)
    return found


def run_part(part: list[str], options: argparse.Namespace) -> Any:
    if part[0] == "steps":
        return steps_of(part[1], part[2], part[3:], options)
    if part[0] == "answers":
        return answers_of(part[1], options)
    return on_a_small_card(options) if part[0] == "card" else prediction_in(part[1], options)


def size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count > 5e8 else f"{count / 1e6:.2f} MB"


def steps_table(rows: list[dict[str, Any]]) -> list[str]:
    """Return a line per step, with what OpenVLA-OFT publishes of it."""
    lines = [
        "",
        "| step | batch | predicted | measured | error | s/step | samples/s | share of matrix rate | over plain"
        " | upstream GB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    published = {(name, batch): theirs for name, words, _, _, each in PUBLISHED for batch, theirs in each.items()}
    plain = {
        (row["recipe"], row["batch_size"]): row["samples_per_second"]
        for row in rows
        if row.get("kind") == "plain" and "seconds" in row
    }
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['failed']} |" + " |" * 9)
            continue
        title = " ".join([row["kind"], row["recipe"], *(row["settings"] if row["kind"] == "vlaft" else [])])
        if "note" in row:
            lines.append(f"| {title} | {row['batch_size']} | {row['note']} |" + " |" * 7)
            continue
        base = plain.get((row["recipe"], row["batch_size"]))
        ratio = f"{row['samples_per_second'] / base:.2f}" if base else ""
        lines.append(
            f"| {title} | {row['batch_size']} | {size(row['predicted_bytes'])} | {size(row['measured_bytes'])}"
            f" | {100 * (row['predicted_bytes'] / row['measured_bytes'] - 1):+.1f} % | {row['seconds']:.3f}"
            f" | {row['samples_per_second']:.2f} | {100 * row['share_of_rate']:.0f} %"
            f" ({100 * row['share_of_rate_computed']:.0f} % with recomputation) | {ratio}"
            f" | {published.get((row['recipe'], row['batch_size'])) or ''} |"
        )
    return lines


def answers_table(rows: list[dict[str, Any]]) -> list[str]:
    """Return a line per policy: actions per second over seven serial tokens, and memory beside upstream's."""
    lines = [
        "",
        "| answers | actions/s | over serial | limit | limit over serial | predicted | measured | upstream GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    serial = next((row for row in rows if row.get("recipe") == SERIAL), None)
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['failed']} |" + " |" * 7)
            continue
        over = [
            f"{row[key] / serial[key]:.1f}" if serial else ""
            for key in ("actions_per_second", "limit_actions_per_second")
        ]
        lines.append(
            f"| {row['policy']}, chunk of {row['chunk']} | {row['actions_per_second']:.2f} | {over[0]}"
            f" | {row['limit_actions_per_second']:.2f} | {over[1]} | {size(row['predicted_bytes'])}"
            f" | {size(row['measured_bytes'])} | {row['upstream_gb'] or ''} |"
        )
    return lines


def markdown(found: dict[str, Any]) -> str:
    """Return the findings as tables."""
    lines = [f"{key}: {found[key]}  " for key in ("device", "base", "torch", "date", "seconds")]
    if "steps" in found:
        lines += released_tables(found)
    if "chunks" in found:
        lines += steps_table(found["chunks"]) + answers_table(found["answers"])
    return "\n".join(lines) + "\n"


def released_tables(found: dict[str, Any]) -> list[str]:
    """Return the steps of the released model's recipes, the small card, and prediction."""
    lines, card = steps_table(found["steps"]), found["card"]
    lines += ["", "**qlora32, batch 1, augmentation, within 8 GB**: " + ", ".join(f"{k} {v}" for k, v in card.items())]
    lines += [
        "",
        "| prediction | weights | prompt | per token | floor per token | actions/s | recorded: prompt | per token |",
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in found["prediction"]:
        if "failed" in row:
            lines.append(f"| {row['failed']} |" + " |" * 7)
            continue
        times = [row["prompt_seconds_launched"], row["token_seconds_launched"], row["token_floor_seconds"]]
        recorded = [row.get(f"{what}_seconds_recorded") for what in ("prompt", "token")]
        lines.append(
            f"| {row['precision']} | {size(row['weight_bytes'])} | "
            + " | ".join(f"{1000 * each:.2f} ms" for each in times)
            + f" | {row['actions_per_second_launched']:.2f} | "
            + " | ".join(f"{1000 * each:.2f} ms" if each is not None else "" for each in recorded)
            + " |"
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="openvla/openvla-7b")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after two that are not")
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--only", choices=("released", "chunks"), help="one half of the measurements")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(run_part(json.loads(options.part), options)))
        return 0
    if not torch.cuda.is_available() and options.base == "openvla/openvla-7b":
        raise SystemExit("there is no GPU here, and 7B is too large for a CPU; give a small base with --base")
    began = time.monotonic()
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU: says nothing about a GPU",
        "base": options.base,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    if options.only != "chunks":
        found["steps"] = in_their_processes(PARTS, options)
        found["card"] = in_own_process(options, "card")
        found["prediction"] = [in_own_process(options, "prediction", name) for name in ("bf16", "int8", "nf4")]
    if options.only != "released":
        found["chunks"] = in_their_processes(CHUNKS, options)
        names = (SERIAL, *(name for name, *_ in ACTING))
        found["answers"] = [in_own_process(options, "answers", name) for name in names]
    found["seconds"] = round(time.monotonic() - began)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu_7b.json").write_text(json.dumps(found, indent=2) + "\n")
    (options.out / "gpu_7b.md").write_text(markdown(found))
    print(markdown(found))
    rows = [row for key in ("steps", "prediction", "chunks", "answers") for row in found.get(key, [])]
    card = found.get("card", {"survived": True})
    return 3 if any("failed" in row for row in (*rows, card)) or not card["survived"] else 0


if __name__ == "__main__":
    sys.exit(main())
