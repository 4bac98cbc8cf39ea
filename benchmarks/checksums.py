"""What checking files costs over what is done with them anyway.

    python benchmarks/checksums.py [--rows 4000] [--size-gb 1] [--rounds 5] [--folder DIR]

Three ratios, each the time of the check over the time of a baseline that reads the same bytes, all from the page cache:

* shards: CRC-32C of a converted dataset's shards, over one epoch of the training loader in one thread (reading Parquet,
  decoding, collating), and over reading the shards' columns with pyarrow alone;
* base: CRC-32C of every tensor of a checkpoint, over loading it with safetensors into memory of one's own;
* again: the same check of the same checkpoint once it has a stamp, over the first one.

`cat FILE > /dev/null` of the same bytes is printed beside them, and zlib's CRC-32, which earlier versions used. Rounds
are interleaved; the median of their ratios counts. Exit code 3 when a target is missed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import torch
from convert import write_base, write_demos
from safetensors import safe_open
from safetensors.torch import save_file

from vlaft import checksums
from vlaft.checksums import checksum
from vlaft.data.convert.run import ConvertRequest, SourceRequest, convert
from vlaft.data.loader import ExampleLoader
from vlaft.data.store import ConvertedDataset
from vlaft.weights.layout import tensor_checksums

TARGETS = {"shards over an epoch": 0.02, "base over loading": 0.5, "again over the first time": 0.05}
_TENSOR = 64 * 2**20  # bytes of one tensor of the checkpoint


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(jobs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each job by round, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, job in jobs.items():
            taken = seconds(job)
            if number:
                times[name].append(taken)
    return times


def report(what: str, times: dict[str, list[float]], size: int) -> None:
    for name, taken in times.items():
        middle = statistics.median(taken)
        print(f"{what}: {name}: {middle:.4f} s, {size / middle / 1e9:.2f} GB/s")


def ratio(times: dict[str, list[float]], one: str, other: str) -> float:
    return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))


def crc32(path: Path) -> int:
    value = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(2**20):
            value = zlib.crc32(block, value)
    return value


def shards(folder: Path, rows: int, rounds: int) -> float:
    """Print and return the check's share of an epoch."""
    (folder / "demos").mkdir()
    (folder / "words").mkdir()
    write_demos(folder / "demos", max(2, rows // 100), 100)
    write_base(folder / "words")
    source = SourceRequest(path=folder / "demos", layout={"instruction": "open"})
    convert(ConvertRequest(sources=[source], base=str(folder / "words"), out=folder / "data"))
    paths = sorted((folder / "data").glob("train-*.parquet"))
    loader = ExampleLoader(ConvertedDataset(folder / "data"), 16)

    def epoch() -> None:
        for _ in range(loader.epoch_length // 16):
            next(loader)

    jobs: dict[str, Callable[[], object]] = {
        "crc32c": lambda: [checksum(path) for path in paths],
        "zlib's crc32": lambda: [crc32(path) for path in paths],
        "cat": lambda: subprocess.run(["cat", *paths], stdout=subprocess.DEVNULL, check=True),
        "pyarrow": lambda: [pq.read_table(path, use_threads=False) for path in paths],
        "an epoch": epoch,
    }
    times = measure(jobs, rounds)
    report("shards", times, sum(path.stat().st_size for path in paths))
    print(f"shards: crc32c takes {ratio(times, 'crc32c', 'pyarrow'):.3f} of reading with pyarrow")
    return ratio(times, "crc32c", "an epoch")


def base(folder: Path, size_gb: float, rounds: int) -> tuple[float, float]:
    """Print and return the check's share of loading, and a second check's share of the first."""
    model = folder / "model"
    model.mkdir()
    count = max(2, int(size_gb * 1e9 / _TENSOR))
    tensors = {f"tensor{number:04d}": torch.randn(_TENSOR // 2).bfloat16() for number in range(count)}
    save_file(tensors, model / "model.safetensors")
    del tensors
    time.sleep(checksums._SETTLED / 1e9 + 1)  # a file that was just written is not remembered

    def load() -> None:
        with safe_open(model / "model.safetensors", framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping, though it looks like one)
                file.get_tensor(name).clone()

    jobs: dict[str, Callable[[], object]] = {
        "crc32c of every tensor": lambda: tensor_checksums(model, fresh=True),
        "again": lambda: tensor_checksums(model),
        "cat": lambda: subprocess.run(["cat", model / "model.safetensors"], stdout=subprocess.DEVNULL, check=True),
        "loading": load,
    }
    times = measure(jobs, rounds)
    report("base", times, (model / "model.safetensors").stat().st_size)
    first = "crc32c of every tensor"
    return ratio(times, first, "loading"), ratio(times, "again", first)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--size-gb", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; by default a temporary folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        os.environ["XDG_CACHE_HOME"] = str(Path(name) / "cache")
        found = [shards(Path(name), arguments.rows, arguments.rounds)]
        found += base(Path(name), arguments.size_gb, arguments.rounds)
    missed = 0
    for (what, target), value in zip(TARGETS.items(), found, strict=True):
        print(f"{what}: ratio {value:.4f} (target: at most {target})")
        missed += value > target
    return 3 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
