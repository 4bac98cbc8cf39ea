"""Host memory of loading a checkpoint, quantised or not: a random one is written, then loaded by a process of its own.

    python benchmarks/host_memory.py [--layers 13] [--kinds none nf4 int8]

`own` is memory that only the process can give back (RssAnon). Pages of mapped files are told apart (RssFile): the
kernel takes them back when it needs them. Without a GPU the model lies in host memory and is part of `own`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from vlaft.adapt.methods import quantization_config
from vlaft.model import OpenVLAConfig, OpenVLAForActionPrediction
from vlaft.model.load import load_model
from vlaft.recipe.settings import AdaptConfig


def write(folder: Path, layers: int) -> None:
    """Write a checkpoint in bfloat16: 0.4 GB and 0.1 GB for each layer."""
    config = OpenVLAConfig(
        vision_backbone_id="siglip-vit-so400m",
        arch_specifier="no-align+gelu-mlp",
        vision_overrides=[{"embed_dim": 384, "depth": 4, "num_heads": 6, "mlp_ratio": 4.0}],
        text_config={
            "model_type": "llama",
            "hidden_size": 2048,
            "intermediate_size": 5504,
            "num_hidden_layers": layers,
            "num_attention_heads": 16,
            "vocab_size": 32064,
            "pad_token_id": 32000,
        },
    )
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    model.save_pretrained(folder, max_shard_size="400MB")


def resident() -> dict[str, int]:
    """Return the process's resident bytes, its own and mapped ones."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if words[0] in ("RssAnon:", "RssFile:")}


def load(folder: Path, kind: str) -> dict[str, object]:
    """Load and watch."""
    quantization = quantization_config(AdaptConfig(quantize=kind, double_quant=kind == "nf4"), torch.bfloat16)  # type: ignore[arg-type]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.zeros(1, device=device)
    before = resident()
    peak, done = dict(before), threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            for name, size in resident().items():
                peak[name] = max(peak[name], size)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.monotonic()
    model = load_model(folder, dtype=torch.bfloat16, device=device, quantization=quantization)
    seconds = time.monotonic() - began
    done.set()
    watcher.join()
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    on_gpu = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return {
        "kind": kind,
        "seconds": seconds,
        "model_bytes": held,
        "own_before": before["RssAnon"],
        "own_peak": peak["RssAnon"],
        "own_after": resident()["RssAnon"],
        "mapped_peak": peak["RssFile"],
        "device_peak": on_gpu,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=13)
    parser.add_argument("--kinds", nargs="+", default=["none", "nf4", "int8"])
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(load(Path(options.one[0]), options.one[1])))
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), options.layers)
        for kind in options.kinds:
            words = [sys.executable, __file__, "--one", folder, kind]
            print(subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
