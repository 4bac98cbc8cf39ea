"""Steps of an environment: in worker processes over one process, and with what a policy looks at drawn over everything.

    python benchmarks/environments.py --env metaworld:reach-v3 [--workers 1 2 4] [--steps 200]

Every environment is stepped with the same still action; what is seen is drawn and sent to this process, as in an
evaluation. Beside each ratio stands its limit: the number of CPUs, or of workers where these are fewer. The memory of a
worker with its environment is what `Task.memory` has to cover.

Drawing is told in steps per CPU-second of this process, the ways taking turns. The limit beside a ratio is how many
times as many frames are drawn where nothing is left out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlaft.environments.episodes import Job, run_episodes
from vlaft.environments.registry import tasks_named
from vlaft.environments.seats import WorkerSeat, opened_seats
from vlaft.environments.task import Task
from vlaft.machine import available_cpus

ROUNDS = 3


def resident(seat: object) -> int:
    """Return the most bytes that a seat's process has held."""
    assert isinstance(seat, WorkerSeat)
    lines = Path(f"/proc/{seat.worker.pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024


def drawing(task: Task, still: NDArray[np.float64]) -> None:
    """Print what it saves to draw only what a policy looks at."""
    both = task.cameras or ("main",)
    ways = {  # what the policy reads, actions of a chunk, times as many frames without sparing
        "everything": (None, 1, 1.0),
        "the main camera": (("main",), 1, float(len(both))),
        f"{' and '.join(both)}, at every 8th step": (both, 8, 8.0),
    }
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    with opened_seats(task, 1, processes=False) as seats:
        for number in range(ROUNDS + 1):  # the first one warms up
            for way, (cameras, chunk, _) in ways.items():
                began = time.process_time()
                chunks = [np.repeat(still, chunk, axis=0)]
                (outcome,) = run_episodes(
                    lambda moments, chunks=chunks: chunks, seats, [Job(task, 0)], cameras=cameras
                ).episodes
                if number:
                    speeds[way].append(outcome.steps / (time.process_time() - began))
    all_drawn = statistics.median(speeds["everything"])
    for way, (_, _, limit) in ways.items():
        speed = statistics.median(speeds[way])
        print(f"drawn {way}: {speed:.0f} steps per CPU-second, {speed / all_drawn:.2f} times as many (limit {limit:g})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="metaworld:reach-v3")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--steps", type=int, default=200, help="of each environment")
    options = parser.parse_args()
    task = replace(tasks_named(options.env)[0], step_limit=options.steps)
    still = np.zeros((1, len(task.actions[0]) if task.actions else 7))

    def rate(count: int) -> tuple[float, float, int]:
        began = time.perf_counter()
        with opened_seats(task, max(count, 1), processes=count > 0) as seats:
            made = time.perf_counter() - began
            jobs = [Job(task, seed) for seed in range(max(count, 1))]
            rollout = run_episodes(lambda moments: [still] * len(moments), seats, jobs)
            held = max(map(resident, seats)) if count else 0
        return sum(each.steps for each in rollout.episodes) / rollout.seconds, made, held

    drawing(task, still)
    alone, made, _ = rate(0)
    print(f"{task.name}: {alone:.1f} steps/s in this process; {made:.1f} s to make the first")
    for count in options.workers:
        speed, made, held = rate(count)
        limit = min(count, available_cpus())
        print(
            f"{count} workers: {speed:.1f} steps/s, {speed / alone:.2f} times as many (limit {limit});"
            f" {held / 2**20:.0f} MiB each, {made:.1f} s to make"
        )


if __name__ == "__main__":
    main()
