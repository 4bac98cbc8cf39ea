"""Memory of a conversion's plan by the number of episodes: what grows with them, and what does not.

    python benchmarks/plan_memory.py [--episodes 1000 10000 100000] [--steps 100]

Invented actions and states of 7 and 8 dimensions are surveyed and planned as `vlaft convert --plan` does it, each
number of episodes in a process of its own; nothing is read and no frame is there. Printed are the resident memory that
belongs to the process alone, at its highest beyond what it has before the first episode, and what all actions and
states would take in memory. Pages of files that are mapped do not count: the system takes them back when it needs
them. Exit code 3 when what grows is more than `BOUND` bytes per episode and `STEP` per step.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vlaft.data.convert.plan import Prompts, SurveyRules, plan_shards, survey
from vlaft.data.convert.reading import Reading, Readings
from vlaft.data.layout import Layout
from vlaft.data.readers.reader import EpisodeRef
from vlaft.data.source import OpenedSource, SourceRequest, silent

BOUND = 2000  # bytes per episode: its name and place, its split, its shard
STEP = 16  # bytes per step: one dimension's column, twice over
ACTION, STATE = 7, 8


class _Reader:
    path, name, format, layout = Path("invented"), "invented", "invented", Layout()

    def __init__(self) -> None:
        self.warnings: list[str] = []


def own_memory() -> int:
    """Return the bytes of resident memory that belong to this process alone."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system does not tell a process's own memory (RssAnon in /proc/self/status)")


def measure(episodes: int, steps: int) -> tuple[int, float]:
    """Return the highest own memory beyond the start in bytes, and the seconds that it took."""
    refs = [EpisodeRef(number, f"train[{number}]", "train", ("shard", number)) for number in range(episodes)]
    rng = np.random.default_rng(0)
    block = rng.normal(size=(64, steps, ACTION + STATE)).astype(np.float32)

    def readings() -> Readings:
        for number, ref in enumerate(refs):
            values = block[number % 64] + np.float32(number % 1000) / 1000
            yield 0, ref, Reading(action=values[:, :ACTION], state=values[:, ACTION:], cameras=("main",), texts=("go",))

    source = OpenedSource(SourceRequest(path=Path("invented")), _Reader(), Layout())  # type: ignore[arg-type]
    start, highest, done = own_memory(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            highest[0] = max(highest[0], own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.perf_counter()
    rules = SurveyRules(on_error="stop", limit=None, val_fraction=0.05, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        prompts = Prompts({"go": [1, 2, 3]}, 2048)
        _, planned = survey([source], [refs], readings(), prompts, rules, silent, Path(folder))
        assert sum(shard.rows for shard in plan_shards(planned)) == episodes * steps
    seconds = time.perf_counter() - begun
    done.set()
    watcher.join()
    return highest[0] - start, seconds


def rows(episodes: list[int], steps: int) -> Iterator[tuple[int, int, float]]:
    """Yield episodes, bytes and seconds, each measured in a process of its own."""
    for count in episodes:
        words = [sys.executable, __file__, "--one", "--episodes", str(count), "--steps", str(steps)]
        told = subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()
        yield count, int(told[0]), float(told[1])


def main() -> int:
    """Measure, print a table, and say whether the bound holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(*measure(arguments.episodes[0], arguments.steps))
        return 0
    fine = True
    print(
        f"{'episodes':>10} {'rows':>12} {'own MB':>8} {'actions and states MB':>22} {'bytes per episode':>18} {'s':>6}"
    )
    for count, taken, seconds in rows(arguments.episodes, arguments.steps):
        total = count * arguments.steps
        held = 4 * (ACTION + STATE) * total
        print(f"{count:10,} {total:12,} {taken / 1e6:8.1f} {held / 1e6:22.1f} {taken / count:18.0f} {seconds:6.1f}")
        # small numbers of episodes are lost in what a block takes
        fine &= taken <= BOUND * count + STEP * total + 64e6
    return 0 if fine else 3


if __name__ == "__main__":
    raise SystemExit(main())
