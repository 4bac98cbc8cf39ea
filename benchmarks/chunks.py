"""Actions per second of a chunk written at once over actions written token by token, on the same weights.

    python benchmarks/chunks.py [--dtype float32] [--chunk 8] [--rounds 5] [--threads 1] [--json FILE]
    python benchmarks/chunks.py --limits                 # the release's sizes on named cards, by arithmetic alone

A model of random weights (about 360 million) answers one observation of 224 pixels and a prompt of 24 tokens, as
`vlaft.load(...).predict` runs it. Three ways are timed in turn within each round:

* `serial tokens`: one action of seven tokens, one after the other (the released OpenVLA);
* `parallel tokens`: a chunk of eight actions as 56 tokens in one forward pass;
* `parallel L1`: a chunk of eight from the L1 head in one forward pass (OpenVLA-OFT).

The limit of a way is the time that the arithmetic of its pass takes at the best measured rate of matrix products, plus
for each later token the time that its weights take to be read at the measured bandwidth; a ratio's is that of the
limits. With `--threads 1` the time is the thread's own, so that other work on the machine counts less. Ratios are
medians over rounds. Exit code 3 where the L1 chunk is not 8 times as fast. OpenVLA-OFT publishes 26 on an A100.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from generate import _MIDDLE, PROMPT, TOKENS, bandwidth, build, matmul_rate, seconds, token_bytes
from torch.utils.flop_counter import FlopCounterMode

from vlaft.accounting.gpu import DeviceEmulation
from vlaft.accounting.meta import META, WithoutValues, meta_model
from vlaft.model.configuration import OpenVLAConfig, Policy
from vlaft.model.load import base_config
from vlaft.model.packed_linear import pack_linears
from vlaft.observation.batch import Observation

AIM = 8.0
# the makers' rates of dense bfloat16 products and of memory, operations and bytes per second (docs/performance.md)
CARDS = {"A100 80 GB": (312e12, 2.0e12), "H200": (989e12, 4.8e12), "RTX 4090": (165e12, 1.0e12)}


def policies(chunk: int) -> dict[str, Policy]:
    return {
        "serial tokens": Policy(),
        "parallel tokens": Policy(decoding="parallel", chunk=chunk, action_size=TOKENS),
        "parallel L1": Policy(head="l1", chunk=chunk, action_size=TOKENS),
    }


def observation_of(config: OpenVLAConfig, policy: Policy, device: torch.device, dtype: torch.dtype) -> Observation:
    """Return what a policy reads at one moment, of a usual prompt; the values change no time."""
    assert config.image_sizes and config.timm_model_ids
    side, channels = config.image_sizes[0], 3 * len(policy.cameras) * len(config.timm_model_ids)
    return Observation(
        torch.ones(1, PROMPT, dtype=torch.int64, device=device),
        None,
        torch.zeros(1, channels, side, side, dtype=dtype, device=device),
        torch.zeros(1, policy.state_size or 0, device=device) if policy.state else None,
    )


def operations(config: OpenVLAConfig, policy: Policy) -> int:
    """Count the products and attention of an answer, on the meta device; of serial tokens the later ones too."""
    model, size = meta_model(config, torch.bfloat16), policy.action_size or TOKENS
    with WithoutValues():
        if policy != Policy():
            model.attach(policy)
    model.eval().requires_grad_(False)
    counter = FlopCounterMode(display=False)
    with counter, DeviceEmulation(on_gpu=True):
        try:
            model.head.predict(model, observation_of(config, policy, META, torch.bfloat16), size)
        except NotImplementedError as error:
            if "meta tensor" not in str(error):  # but for the answer itself, which cannot leave the device
                raise
    return counter.get_total_flops()


def limits(config: OpenVLAConfig, chunk: int, rate: float, speed: float, per_token: int, held: int) -> dict[str, float]:
    """Return the least seconds of each way.

    Args:
        config: of the base.
        chunk: K.
        rate: operations per second.
        speed: bytes per second.
        per_token: bytes of the weights that a token needs.
        held: bytes of all weights, read once by any pass.
    """
    found = {}
    for name, policy in policies(chunk).items():
        serial = name == "serial tokens"
        found[name] = max(operations(config, policy) / rate, held / speed)
        found[name] += (TOKENS - 1) * per_token / speed if serial else 0.0
    return found


def ratios(seconds_of: dict[str, float], chunk: int) -> dict[str, float]:
    """Return actions per second over those of serial tokens."""
    return {
        name: chunk * seconds_of["serial tokens"] / value
        for name, value in seconds_of.items()
        if name != "serial tokens"
    }


def measure(
    config: OpenVLAConfig, dtype: torch.dtype, chunk: int, rounds: int, device: torch.device, threads: int
) -> dict[str, Any]:
    """Time the three ways in turn."""
    model = build(config, dtype, device)
    rate, speed = matmul_rate(model, 1, device, threads), bandwidth(model, device, threads)
    per_token, held = token_bytes(model), sum(p.nbytes for p in model.parameters())
    parameters = sum(p.numel() for p in model.parameters())
    model.attach(policies(chunk)["parallel L1"])
    model.requires_grad_(False)
    if device.type == "cpu":
        pack_linears(model)
    observation = observation_of(config, Policy(), device, dtype)

    def way(policy: Policy) -> Callable[[], Any]:
        def run() -> Any:
            model.policy = policy  # the head of an L1 policy stays, unused, when another one answers
            return model.head.predict(model, observation, TOKENS)

        return run

    ways = {name: way(policy) for name, policy in policies(chunk).items()}
    shapes = {name: run().actions.shape for name, run in ways.items()}  # also a warm-up
    assert shapes == {name: (1, policy.chunk, TOKENS) for name, policy in policies(chunk).items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            times[name].append(seconds(run, device, threads))
    median = {name: statistics.median(values) for name, values in times.items()}
    paired = {
        name: statistics.median(
            chunk * serial / one for serial, one in zip(times["serial tokens"], times[name], strict=True)
        )
        for name in ways
        if name != "serial tokens"
    }
    least = limits(config, chunk, rate, speed, per_token, held)
    return {
        "parameters": parameters,
        "chunk": chunk,
        "seconds": median,
        "actions_per_second": {
            name: (1 if name == "serial tokens" else chunk) / value for name, value in median.items()
        },
        "over_serial": paired,
        "limit_seconds": least,
        "limit_over_serial": ratios(least, chunk),
        "flop": {name: operations(config, policy) for name, policy in policies(chunk).items()},
        "flop_per_second": rate,
        "bytes_per_token": per_token,
        "bytes_per_second": speed,
    }


def show(result: dict[str, Any], what: str) -> None:
    print(what)
    for name, value in result["actions_per_second"].items():
        over = result["over_serial"].get(name)
        ratio = f", {over:.2f} times serial (limit {result['limit_over_serial'][name]:.2f})" if over else ""
        print(
            f"  {name:<16}{value:8.3f} actions/s, {1000 * result['seconds'][name]:.0f} ms for"
            f" {result['flop'][name] / 1e9:,.1f} GFLOP, at least {1000 * result['limit_seconds'][name]:.0f} ms{ratio}"
        )
    print(
        f"  limits at {result['flop_per_second'] / 1e9:,.0f} GFLOP/s and {result['bytes_per_second'] / 1e9:,.1f} GB/s;"
        f" a later token reads {result['bytes_per_token'] / 1e6:,.0f} MB",
        flush=True,
    )


def show_limits(config: OpenVLAConfig, chunk: int) -> None:
    """Print what the makers' rates allow for the release's sizes in bfloat16."""
    model = meta_model(config, torch.bfloat16)
    per_token, held = token_bytes(model), sum(p.nbytes for p in model.parameters())
    for name, policy in policies(chunk).items():
        print(f"{name}: {operations(config, policy) / 1e12:.2f} TFLOP")
    print(f"weights {held / 1e9:.2f} GB, of which a later token reads {per_token / 1e9:.2f} GB")
    for card, (rate, speed) in CARDS.items():
        least = limits(config, chunk, rate, speed, per_token, held)
        told = ", ".join(f"{name} {1000 * value:.1f} ms" for name, value in least.items())
        over = ", ".join(f"{name} {value:.1f}" for name, value in ratios(least, chunk).items())
        print(f"{card}: at least {told}; actions per second over serial: {over}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunk", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--limits", action="store_true")
    parser.add_argument("--json", type=Path)
    words = parser.parse_args()
    if words.limits:
        show_limits(base_config("openvla/openvla-7b"), words.chunk)
        return 0
    torch.set_num_threads(words.threads)
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, torch {torch.__version__}, transformers {transformers.__version__},"
        f" Python {platform.python_version()}, {words.threads} thread(s)"
    )
    config, dtype = OpenVLAConfig(**_MIDDLE), getattr(torch, words.dtype)
    result = measure(config, dtype, words.chunk, words.rounds, torch.device("cpu"), words.threads)
    show(result, f"{result['parameters'] / 1e6:.0f}M random weights, {words.dtype}, CPU, chunk of {words.chunk}")
    if words.json:
        words.json.write_text(json.dumps(result, indent=2) + "\n")
    over = result["over_serial"]["parallel L1"]
    if over < AIM:
        print(f"missed: {over:.2f}, aim {AIM:.0f}")
    return 3 if over < AIM else 0


if __name__ == "__main__":
    sys.exit(main())
