"""Time and memory of a training step: vlaft over a plain one, as upstream's script does it, in one run.

    python benchmarks/train_step.py [--size small|medium|large] [--batch-size 4] [--recipe lora32] [--checkpointing]
    python benchmarks/train_step.py --recipe oft-state               chunks, against OpenVLA-OFT's step
    python benchmarks/train_step.py --gpu-7b [--batch-size 16]       on a GPU: openvla-7b with random weights

Both train the same adapters on the same weights and the same batch. The plain step does what upstream's does and
vlaft leaves out: the last ViT block, a padding mask, logits and loss over all positions in float32, and metrics that
wait for the device after every forward pass; of chunks also what `plain_step.py` says. Rounds alternate, so that a busy
machine slows both.

Memory is the peak of live tensors, followed storage by storage in a real step. The limit printed beside it is the
time that the step's matrix products alone would take at this machine's measured float32 (GPU: bfloat16) matrix rate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from plain_step import plain_chunk_forward, plain_forward
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vlaft.accounting.meta import ACTION_SIZE, example_inputs, example_normalization, policy_of
from vlaft.accounting.step import follow_steps
from vlaft.action.metrics import MetricSums
from vlaft.action.tokens import IGNORED, ActionTokenizer
from vlaft.model import OpenVLAConfig, OpenVLAForActionPrediction
from vlaft.model.load import base_config
from vlaft.recipe.resolve import resolve
from vlaft.recipe.settings import RecipeConfig, resolve_precision
from vlaft.training.model import PRECISIONS, make_trainable
from vlaft.training.optimizer import build_optimizer
from vlaft.training.step import Inputs, forward

SIZES = {  # language width, layers; ViT width, depth
    "small": (256, 6, 192, 6),
    "medium": (512, 8, 384, 8),
    "large": (768, 12, 512, 12),
}
LABELS, TOKENS = 8, 34


def config_of(size: str) -> OpenVLAConfig:
    """Return a fused OpenVLA of a CPU's size, with the release's vocabulary and image size."""
    width, layers, vit_width, depth = SIZES[size]
    vit = {"embed_dim": vit_width, "depth": depth, "num_heads": vit_width // 64}
    return OpenVLAConfig(
        vision_backbone_id="dinosiglip-vit-so-224px",
        arch_specifier="no-align+fused-gelu-mlp",
        vision_overrides=[vit | {"mlp_ratio": 4.0, "reg_tokens": 4}, vit | {"mlp_ratio": 3.7362}],
        text_config={
            "model_type": "llama",
            "hidden_size": width,
            "intermediate_size": width * 43 // 16,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 64,
            "vocab_size": 32064,
            "pad_token_id": 32000,
        },
    )


def ready(config: OpenVLAConfig, recipe: RecipeConfig, device: torch.device) -> tuple[nn.Module, Any]:
    """Return a model with random weights that is ready to train, and its optimizer."""
    precision = resolve_precision(recipe.precision, on_gpu=device.type == "cuda")
    torch.manual_seed(0)
    with device:
        torch.set_default_dtype(PRECISIONS[precision.frozen])
        model = OpenVLAForActionPrediction(config)
        torch.set_default_dtype(torch.float32)
    trainable = make_trainable(model, recipe, precision, policy_of(recipe))
    return trainable.train(), build_optimizer(trainable, recipe.train)


def run_dead_blocks(model: nn.Module) -> None:
    """Compute the last ViT block and drop its result, as upstream does."""
    base = model.get_base_model()  # type: ignore[operator]
    for vit in base.vision_backbone.featurizers:

        def drop(module: nn.Module, inputs: Any, output: Any, last: nn.Module = vit.blocks[-1]) -> None:
            last(output, *inputs[1:])  # with FiLM, the words too

        vit.blocks[-2].register_forward_hook(drop)


def plain_step(model: nn.Module, optimizer: Any, inputs: Inputs, normalization: Any, compute: torch.dtype) -> None:
    """Do one update as upstream's loop does."""
    if inputs.actions is not None:
        output = plain_chunk_forward(model, inputs, normalization, compute)
        assert output.loss is not None and output.actions is not None and output.demonstrated is not None
        output.loss.backward()
        error = (output.actions - output.demonstrated).detach().abs()
        for told in (output.loss, error[:, 0].mean(), error[:, 1:].mean()):
            told.item()
        optimizer.step()
        optimizer.zero_grad()
        return
    output = plain_forward(model, inputs, normalization, compute)
    assert output.loss is not None and output.logits is not None
    output.loss.backward()
    labels = output.label_ids.view(len(inputs.labels), -1)
    predicted = output.logits[:, :-1].argmax(dim=2)
    mask = labels > 31743
    ((predicted == labels) & mask).sum().float().div(mask.sum().float()).item()  # accuracy, waited for
    actions = ActionTokenizer()
    decoded = [actions.decode(ids[mask].cpu().numpy()) for ids in (predicted, labels)]
    float(abs(decoded[0] - decoded[1]).mean())
    output.loss.item()
    optimizer.step()
    optimizer.zero_grad()


def our_step(
    model: nn.Module, optimizer: Any, inputs: Inputs, normalization: Any, compute: torch.dtype, sums: MetricSums
) -> None:
    """Do one update as vlaft's trainer does between two logged steps."""
    output = forward(model, inputs, normalization, compute)
    assert output.loss is not None
    output.loss.backward()
    sums.add(output.loss, model.head.compared(output, len(inputs.labels)))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def timed(step: Callable[[], None], device: torch.device) -> float:
    """Return the seconds of one step, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return floating-point operations per second of a large matrix product, the best of five."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: a @ b, device) for _ in range(5))


def measure(config: OpenVLAConfig, recipe: RecipeConfig, batch_size: int, rounds: int, device: torch.device) -> dict:
    """Time both steps in turn and follow the memory of one of each."""
    precision = resolve_precision(recipe.precision, on_gpu=device.type == "cuda")
    compute = PRECISIONS[precision.compute]
    normalization = example_normalization(config)
    policy = policy_of(recipe)
    more = policy.chunk * (policy.action_size or ACTION_SIZE) - ACTION_SIZE
    with device:
        inputs = example_inputs(
            config, batch_size=batch_size, tokens=TOKENS + more, labels=LABELS + more, device=device, policy=policy
        )
    inputs.labels.fill_(IGNORED)
    inputs.labels[:, -LABELS - more :] = 31800
    plain_pass = plain_forward if inputs.actions is None else plain_chunk_forward
    sums = MetricSums(device)
    ours, our_optimizer = ready(config, recipe, device)
    counter = FlopCounterMode(display=False)
    with counter:
        our_step(ours, our_optimizer, inputs, normalization, compute, sums)
    plain_recipe = resolve(recipe.name, [], ["train.gradient_checkpointing=none"])
    plain, plain_optimizer = ready(config, plain_recipe, device)
    run_dead_blocks(plain)
    plain_step(plain, plain_optimizer, inputs, normalization, compute)
    times: dict[str, list[float]] = {"vlaft": [], "plain": []}
    for _ in range(rounds):
        times["plain"].append(timed(lambda: plain_step(plain, plain_optimizer, inputs, normalization, compute), device))
        times["vlaft"].append(
            timed(lambda: our_step(ours, our_optimizer, inputs, normalization, compute, sums), device)
        )
    traces = {
        "vlaft": follow_steps(ours, our_optimizer, inputs, normalization, recipe, precision),
        "plain": follow_steps(
            plain, plain_optimizer, inputs, normalization, plain_recipe, precision, forward_pass=plain_pass
        ),
    }
    live = {name: trace.at_peak()[0] for name, trace in traces.items()}
    medians = {name: statistics.median(values) for name, values in times.items()}
    floor = counter.get_total_flops() / matrix_rate(device, compute)
    return {
        "parameters": sum(p.numel() for p in ours.parameters()),
        "batch_size": batch_size,
        "checkpointing": recipe.train.gradient_checkpointing,
        "seconds": medians,
        "time_ratio": medians["vlaft"] / medians["plain"],
        "ratios": [a / b for a, b in zip(times["vlaft"], times["plain"], strict=True)],
        "live_peak_bytes": live,
        "memory_ratio": live["vlaft"] / live["plain"],
        "floor_seconds": floor,
        "over_floor": medians["vlaft"] / floor,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, action="append")
    parser.add_argument("--recipe", default="lora32")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--checkpointing", action="store_true", help="vlaft recomputes all blocks")
    parser.add_argument("--gpu-7b", action="store_true")
    options = parser.parse_args()
    words = ["data.augment=false"] + (["train.gradient_checkpointing=all"] if options.checkpointing else [])
    recipe = resolve(options.recipe, [], words)
    device = torch.device("cuda" if options.gpu_7b else "cpu")
    for size in ["7B"] if options.gpu_7b else options.size or ["medium"]:
        config = base_config("openvla/openvla-7b") if options.gpu_7b else config_of(size)
        result = measure(config, recipe, options.batch_size, options.rounds, device)
        print(
            f"{size} ({result['parameters'] / 1e6:.0f}M parameters), batch {options.batch_size}, {options.recipe}:"
            f" time {result['time_ratio']:.2f} of plain ({result['seconds']['vlaft']:.3f} s"
            f" over {result['seconds']['plain']:.3f} s; {result['over_floor']:.2f} of the matrix-rate floor),"
            f" live peak {result['memory_ratio']:.2f} ({result['live_peak_bytes']['vlaft'] / 1e9:.2f} GB"
            f" over {result['live_peak_bytes']['plain'] / 1e9:.2f} GB)"
        )
        print(json.dumps({"size": size, **result}))


if __name__ == "__main__":
    main()
