"""Time of a frame of the simulator over the time in which a model predicts for it.

    python benchmarks/simulator.py --base BASE [--batch-size 16] [--rounds 5]

BASE knows seven action dimensions, as the demo's base does. Frames are drawn, environments stepped (which draws too),
and actions predicted in turn, in one thread; medians of the rounds count. As long as the ratio is far below 1, a
rollout's time is the model's.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch

from vlaft.environments.tabletop.drawing import draw
from vlaft.environments.tabletop.environment import TabletopEnv
from vlaft.environments.tabletop.recording import expert_action
from vlaft.environments.tabletop.scene import SETUP_B
from vlaft.policy import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--frames", type=int, default=500, help="drawn, and stepped, in each round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    policy = load(options.base)
    key = next(iter(policy.statistics))
    environments = [TabletopEnv(SETUP_B) for _ in range(options.batch_size)]
    times: dict[str, list[float]] = {"draw": [], "step": [], "predict": []}
    for number in range(options.rounds + 1):  # the first one warms up
        answers = [env.reset(seed=number * options.batch_size + index) for index, env in enumerate(environments)]
        scenes = [env.scene for env in environments if env.scene is not None]
        began = time.perf_counter()
        for index in range(options.frames):
            draw(scenes[index % len(scenes)])
        drawn = time.perf_counter()
        for index in range(options.frames):
            environments[index % len(scenes)].step(expert_action(scenes[index % len(scenes)]))
        stepped = time.perf_counter()
        frames = [np.asarray(observation["image"]) for observation, _ in answers]
        policy.predict(frames, [info["instruction"] for _, info in answers], unnorm_key=key)
        predicted = time.perf_counter()
        if number:
            times["draw"].append((drawn - began) / options.frames)
            times["step"].append((stepped - drawn) / options.frames)
            times["predict"].append((predicted - stepped) / options.batch_size)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"draw: {1 / medians['draw']:.0f} frames/s; env.step with the expert: {1 / medians['step']:.0f} steps/s")
    print(f"predict, batch {options.batch_size}: {1 / medians['predict']:.0f} actions/s ({policy.device})")
    for name in ("draw", "step"):
        print(f"{name} / predict, seconds per frame: {medians[name] / medians['predict']:.3f}")


if __name__ == "__main__":
    main()
