"""Memory, time and messages of each process of a sharded run beside what is predicted: 1, 2 and 4 on one CPU.

    python benchmarks/shards.py [--layers 8] [--processes 1 2 4] [--styles ddp fsdp] [--limit MB] [--recipe full]

A random base in bfloat16 is written to a temporary folder. Each process then begins as `vlaft train` does, in shards
(fsdp), copies (ddp) or alone, and does three updates on one example each:

* `start`: the most anonymous memory (RssAnon) until the model is there, less what Python and its libraries took.
* `step`: likewise over the updates. The prediction is the one of `vlaft report --gpus N`, made for a CPU's numbers.
  malloc is told to give freed blocks back, since what it keeps is no part of what is predicted.
* `limit`: with `--limit`, the kernel refuses a process more than so many MB of its own (RLIMIT_DATA) beyond the
  libraries': a model whose whole is larger cannot start, or cannot step, where its shards can.
* `messages`: bytes that a process takes part in per update, by kind, as PyTorch's operations are told them, and what
  follows from the sizes alone: every gathered byte comes from somewhere else but for the process's own share.
* `seconds`: of an update. Processes here share one machine's cores and memory, and gloo's messages go through the
  loopback: so this says that nothing waits for anything it should not, and nothing about a network between GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlaft.accounting.memory import GATHERED, LABELS, sharded_terms
from vlaft.accounting.meta import example_inputs, example_normalization
from vlaft.accounting.shards import gathering
from vlaft.accounting.step import trace_step, trainable_without_data
from vlaft.accounting.tracker import KINDS
from vlaft.model import OpenVLAConfig, OpenVLAForActionPrediction
from vlaft.model.load import load_config
from vlaft.recipe.resolve import resolve
from vlaft.recipe.settings import RecipeConfig, resolve_precision
from vlaft.training.interrupts import resident
from vlaft.training.model import load_trainable
from vlaft.training.optimizer import build_optimizer
from vlaft.training.sharded_start import load_sharded
from vlaft.training.sharding import copy_to_all, join_processes, mesh_of, own_rows
from vlaft.training.step import forward

TOKENS, UPDATES, CPU = 34, 3, torch.device("cpu")


def write(folder: Path, layers: int) -> None:
    """Write a base in bfloat16 with the release's vocabulary: 33 MB, and 10 MB for each layer."""
    vit = {"embed_dim": 192, "depth": 3, "num_heads": 3, "mlp_ratio": 4.0}
    config = OpenVLAConfig(
        vision_backbone_id="siglip-vit-so400m",
        arch_specifier="no-align+gelu-mlp",
        vision_overrides=[vit],
        text_config={
            "model_type": "llama",
            "hidden_size": 512,
            "intermediate_size": 2560,
            "num_hidden_layers": layers,
            "num_attention_heads": 8,
            "vocab_size": 8064,
            "pad_token_id": 8000,
        },
    )
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    model.save_pretrained(folder, max_shard_size="50MB")


class Messages(TorchDispatchMode):
    """Counts the bytes of collective operations."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves(list(args)) if isinstance(leaf, torch.Tensor)]
            # gathering and scattering have a whole and a part among them: the whole says how much
            self.bytes[func.__name__.split(".")[0].strip("_")] += max((one.nbytes for one in tensors), default=0)
        return func(*args, **(kwargs or {}))


@contextmanager
def watched() -> Iterator[list[int]]:
    """Keep the most anonymous memory in the list, looked at every 3 ms."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.003):
            peak[0] = max(peak[0], (resident() or (0, 0))[0])

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def data_size() -> int:
    """Return the bytes that RLIMIT_DATA is held against."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmData"))


def work(folder: Path, style: str, recipe: RecipeConfig, limit: int | None) -> dict[str, Any]:
    """Begin and do updates in one process."""
    torch.set_num_threads(1)
    precision = resolve_precision(recipe.precision, on_gpu=False)
    config = load_config(folder)
    inputs = example_inputs(config, batch_size=1, tokens=TOKENS, labels=LABELS, device=CPU)
    inputs.labels.copy_(torch.randint(7700, 7900, inputs.labels.shape))
    normalization = example_normalization(config)
    torch.ones(64, 64) @ torch.ones(64, 64)  # libraries load their own
    if style != "alone":
        join_processes()
        dist.barrier()
    before = (resident() or (0, 0))[0]
    if limit is not None:
        size = data_size() + limit
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))
    torch.manual_seed(0)
    row: dict[str, Any] = {"rank": int(os.environ.get("RANK", "0"))}
    with watched() as peak:
        if style in ("fsdp", "hsdp"):
            model, _ = load_sharded(recipe, precision, folder, CPU, mesh_of(style, CPU))  # type: ignore[arg-type]
        else:
            model, _ = load_trainable(recipe, precision, folder, CPU)
    row["start_bytes"] = peak[0] - before
    row["shard_bytes"] = sum(
        parameter.nbytes // max(1, len(parameter)) * len(own_rows(parameter)) for parameter in model.parameters()
    )
    if style == "ddp":
        model = copy_to_all(model, CPU)
    optimizer, messages, seconds = build_optimizer(model, recipe.train), Messages(), []
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with watched() as peak:
        for _ in range(UPDATES):
            began = time.perf_counter()
            messages.bytes.clear()
            with messages:
                forward(model, inputs, normalization, torch.float32).loss.backward()  # type: ignore[union-attr]
            torch.nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds.append(time.perf_counter() - began)
    if style != "alone":
        dist.barrier()
    return row | {"step_bytes": peak[0] - before, "seconds": min(seconds[1:]), "messages": dict(messages.bytes)}


def predicted(folder: Path, recipe: RecipeConfig, style: str, count: int) -> dict[str, Any]:
    """Return what a process is predicted to hold in a step, and the messages that follow from sizes."""
    config = load_config(folder)
    precision = resolve_precision(recipe.precision, on_gpu=False)
    model, _ = trainable_without_data(recipe, config, precision)
    sharded = style == "fsdp" and count > 1
    (trace,), _ = trace_step(
        recipe, config, batch_sizes=[1], tokens=TOKENS, labels=LABELS, on_gpu=False, sharded=sharded
    )
    whole = gathering(model, precision)
    if not sharded:  # copies: DDP's buckets are what gradients are views of
        return {"step_bytes": trace.at_peak()[0], "messages": {"allreduce": whole.held if count > 1 else 0}}
    terms, _ = sharded_terms(trace, trace.sizes, whole, count)
    again = whole.gathered - whole.rest  # in the backward pass
    return {
        "step_bytes": sum(size for term, size in terms.items() if term in (*KINDS, GATHERED)),
        "terms": {term: terms[term] for term in (*KINDS, GATHERED)},
        "messages": {"allgather_base": whole.gathered + again, "reduce_scatter_base": whole.reduced},
    }


def run(folder: Path, style: str, count: int, options: argparse.Namespace) -> list[dict[str, Any]] | str:
    """Run the processes; return a row of each, or what the first that failed said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(count):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
        several = {name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"}
        words = [sys.executable, __file__, "--one", str(folder), style, "--recipe", options.recipe]
        words += ["--limit", str(options.limit)] if options.limit else []
        # so that malloc gives freed blocks back at once: what it keeps is no part of what is predicted
        settled = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        environment = os.environ | settled | (several if count > 1 else {})
        started.append(
            subprocess.Popen(words, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    rows, failure = [], ""
    for process in started:
        out, error = process.communicate()
        if process.returncode:
            failure = failure or next((line for line in reversed(error.splitlines()) if "rror" in line), str(process))
        else:
            rows.append(json.loads(out.splitlines()[-1]))
    return failure or rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--styles", nargs="+", choices=["ddp", "fsdp"], default=["fsdp"])
    parser.add_argument("--recipe", default="full")
    parser.add_argument("--limit", type=int, help="MB of its own that each process may take")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    recipe = resolve(options.recipe, [], ["data.augment=false", "train.batch_size=1", "train.accumulation=1"])
    if options.one:
        limit = options.limit * 10**6 if options.limit else None
        print(json.dumps(work(Path(options.one[0]), options.one[1], recipe, limit)))
        return
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        write(base, options.layers)
        stored = sum(path.stat().st_size for path in base.glob("*.safetensors"))
        print(f"base {stored / 1e6:.0f} MB in bfloat16, {2 * stored / 1e6:.0f} MB held in float32; {options.recipe}")
        print("style  processes  shard MB  start MB  step MB  predicted  seconds  messages MB (predicted)")
        for style in options.styles:
            for count in options.processes:
                name = style if count > 1 else "alone"
                found = run(base, name, count, options)
                if isinstance(found, str):
                    print(f"{name:5}  {count:9}  {found[:140]}", flush=True)
                    continue
                expected = predicted(base, recipe, style, count)
                most = {key: max(row[key] for row in found) for key in ("shard_bytes", "start_bytes", "step_bytes")}
                told = ", ".join(
                    f"{kind} {size / 1e6:.1f} ({expected['messages'].get(kind, 0) / 1e6:.1f})"
                    for kind, size in sorted(found[0]["messages"].items())
                )
                sizes = (most["shard_bytes"], most["start_bytes"], most["step_bytes"], expected["step_bytes"])
                columns = "  ".join(f"{size / 1e6:8.1f}" for size in sizes)
                print(
                    f"{name:5}  {count:9}  {columns}  {max(row['seconds'] for row in found):7.2f}  {told}", flush=True
                )


if __name__ == "__main__":
    main()
