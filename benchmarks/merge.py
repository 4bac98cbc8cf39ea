"""Memory and time of `vlaft merge` over peft's `merge_and_unload` and `save_pretrained`, and over `cp`.

    python benchmarks/merge.py [--size-gb 2] [--rounds 3] [--folder DIR]

Makes a checkpoint of random bfloat16 weights in OpenVLA's layout (15 GB: the release's own sizes) and a float32 LoRA
adapter of rank 32 on upstream's modules, in pieces, on disk. Every job is a process of its own. Its time counts from
start to the last byte on the disk (files are synced in all three, peft's and cp's by this script), its memory is
VmHWM, the peak of resident memory. peft runs on vlaft's model class, which stands in for upstream's. `--no-verify`
is given to merge: checking loads the model and is a choice. Rounds are interleaved; the median counts. Exit code 3
when a target is missed: memory <= 0.15 of peft's, time <= 0.6 of peft's and <= 2.0 of cp's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TARGETS = {"memory over peft": 0.15, "time over peft": 0.6, "time over cp": 2.0}
RANK = 32

# Each job is run by `python -c` and prints its peak of resident memory last.
_PEAK = """
import re, pathlib
print(int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024)
"""
_VLAFT = """
import sys
from vlaft.cli.main import main
code = main(["merge", sys.argv[2], "--base", sys.argv[1], "--out", sys.argv[3], "--no-verify"])
if code:
    sys.exit(code)
"""
_PEFT = """
import sys, torch
from peft import PeftModel
from vlaft.model.openvla import OpenVLAForActionPrediction
model = OpenVLAForActionPrediction.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""


def make_files(folder: Path, size_gb: float) -> None:
    """Write `base` and `adapter`; run as a process of its own, so that its memory is not the benchmark's."""
    import torch
    from make_7b_folder import write_weights

    from vlaft.model.configuration import OpenVLAConfig
    from vlaft.model.openvla import OpenVLAForActionPrediction
    from vlaft.recipe.settings import LORA_TARGETS
    from vlaft.weights.stream import ShardWriter

    config: dict = {
        "model_type": "openvla",
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "llm_backbone_id": "llama2-7b-pure",
        "arch_specifier": "no-align+fused-gelu-mlp",
        "image_resize_strategy": "resize-naive",
        "torch_dtype": "bfloat16",
        "text_config": {"model_type": "llama", "pad_token_id": 32000, "vocab_size": 32064},
    }
    if size_gb < 15:  # narrower and shallower; the vocabulary stays
        config["vision_overrides"] = [
            {"patch_size": 14, "embed_dim": 512, "depth": 4, "num_heads": 8, "mlp_ratio": 4.0, "reg_tokens": 4},
            {"patch_size": 14, "embed_dim": 576, "depth": 4, "num_heads": 8, "mlp_ratio": 4.0},
        ]
        width, inner = 2048, 5504
        layer, rest = 2 * (4 * width**2 + 3 * width * inner), 2 * (2 * 32064 * width + 55e6)
        config["text_config"] |= {"hidden_size": width, "intermediate_size": inner, "num_attention_heads": 16}
        config["text_config"]["num_hidden_layers"] = max(1, round((size_gb * 1e9 - rest) / layer))
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(OpenVLAConfig.from_dict(config))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    (base / "config.json").write_text(json.dumps(config))
    write_weights(base, OpenVLAConfig.from_dict(config))

    modules = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if name.endswith(".weight")}
    adapted = {name: shape for name, shape in modules.items() if name.rsplit(".", 1)[-1] in LORA_TARGETS}
    layout = {}
    for name, shape in adapted.items():
        layout[f"base_model.model.{name}.lora_A.weight"] = ("F32", (RANK, *shape[1:]))
        layout[f"base_model.model.{name}.lora_B.weight"] = ("F32", (shape[0], RANK, *[1] * (len(shape) - 2)))
    with ShardWriter(adapter / "adapter_model.safetensors", layout) as writer:
        for name, (_, shape) in layout.items():
            writer.write(name, 0.02 * torch.randn(shape))
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": list(LORA_TARGETS)}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))


def sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def measure(job: str, folder: Path) -> tuple[float, int, float]:
    """Return seconds, bytes of peak memory, and seconds of processor time of one job."""
    out = folder / f"out-{job}"
    time.sleep(
        5
    )  # a virtual machine hands freed memory back within seconds; whoever writes at once would have it cheaper
    before = os.times()
    started = time.perf_counter()
    if job == "cp":
        subprocess.run(["cp", "-r", folder / "base", out], check=True)
        peak = 0
    else:
        program = (_VLAFT if job == "vlaft" else _PEFT) + _PEAK
        words = [sys.executable, "-c", program, folder / "base", folder / "adapter", out]
        result = subprocess.run(words, check=False, capture_output=True, text=True)
        if result.returncode:
            sys.exit(f"{job} failed ({result.returncode}):\n{result.stderr[-3000:]}")
        peak = int(result.stdout.split()[-1])
    sync(out)
    seconds = time.perf_counter() - started
    after = os.times()
    cpu = sum(after[index] - before[index] for index in range(4))  # its own and its children's
    shutil.rmtree(out)
    return seconds, peak, cpu


def free_memory() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size-gb", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; room for twice the size is needed")
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make_files(options.folder, options.size_gb)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        words = [sys.executable, __file__, "--make", "--folder", str(folder), "--size-gb", str(options.size_gb)]
        subprocess.run(words, check=True)
        size = sum(path.stat().st_size for path in (folder / "base").iterdir())
        print(f"checkpoint of {size / 1e9:.2f} GB, adapter of {_size(folder / 'adapter') / 1e9:.2f} GB", flush=True)
        found: dict[str, list[tuple[float, int, float]]] = {"cp": [], "vlaft": [], "peft": []}
        if free_memory() < 1.7 * size:
            print(
                f"peft needs about {1.7 * size / 1e9:.0f} GB of memory and {free_memory() / 1e9:.0f} are free: not run"
            )
            del found["peft"]
        for number in range(options.rounds):
            for job, results in found.items():
                results.append(measure(job, folder))
                seconds, peak, cpu = results[-1]
                line = (
                    f"round {number + 1}: {job:5} {seconds:7.1f} s, {cpu:6.1f} s of CPU, {peak / 1e9:6.2f} GB resident"
                )
                print(line, flush=True)
    seconds = {job: statistics.median(time for time, _, _ in results) for job, results in found.items()}
    memory = {job: statistics.median(peak for _, peak, _ in results) for job, results in found.items()}
    ratios = {"time over cp": seconds["vlaft"] / seconds["cp"]}
    if "peft" in found:
        ratios["memory over peft"] = memory["vlaft"] / memory["peft"]
        ratios["time over peft"] = seconds["vlaft"] / seconds["peft"]
    for what, ratio in ratios.items():
        verdict = "holds" if ratio <= TARGETS[what] else "missed"
        print(f"{what}: {ratio:.3f} (target <= {TARGETS[what]}: {verdict})")
    if any(ratio > TARGETS[what] for what, ratio in ratios.items()):
        sys.exit(3)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


if __name__ == "__main__":
    main()
