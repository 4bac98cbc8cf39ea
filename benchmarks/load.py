"""Samples per second of the training loader over a bare loop that only decodes the same frames.

    python benchmarks/load.py [--rows 4000] [--rounds 5] [--batch-size 16]

The loader shuffles over all rows, reads them from Parquet, decodes, and collates prompts, tokens, actions and frames
into tensors; the bare loop has the encoded frames in memory and decodes them in the same order with the same decoder.
Once in the caller's thread, and once with as many threads as there are CPUs. Rounds are interleaved; the median of
their ratios counts. Exit code 3 when one of the two ratios is below 0.7.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from convert import write_base, write_demos

from vlaft.data.codec import decode_image
from vlaft.data.convert.run import ConvertRequest, SourceRequest, convert
from vlaft.data.loader import ExampleLoader
from vlaft.data.store import ConvertedDataset
from vlaft.machine import available_cpus

TARGET = 0.7


def bare_loop(frames: list[bytes], workers: int) -> None:
    """Decode the frames, in this thread or in several."""
    if not workers:
        for frame in frames:
            decode_image(frame, "", accurate_dct=True)
        return
    with ThreadPoolExecutor(workers) as pool:
        parts = [frames[number::workers] for number in range(workers)]
        list(pool.map(lambda part: bare_loop(part, 0), parts))


def measure(dataset: ConvertedDataset, workers: int, batch_size: int, rounds: int) -> float:
    """Print and return the ratio."""
    count = dataset.rows("train") // batch_size * batch_size
    order = np.random.default_rng(0).permutation(dataset.rows("train"))[:count]
    frames = [dataset.image("train", int(row)) or b"" for row in order]
    loader = ExampleLoader(dataset, batch_size, workers=workers)
    next(loader)
    bare: list[float] = []
    loaded: list[float] = []
    for _ in range(rounds):
        start = time.perf_counter()
        bare_loop(frames, workers)
        bare.append(count / (time.perf_counter() - start))
        start = time.perf_counter()
        for _ in range(count // batch_size):
            next(loader)
        loaded.append(count / (time.perf_counter() - start))
    loader.close()
    ratio = statistics.median(one / other for one, other in zip(loaded, bare, strict=True))
    print(f"{workers or 'no'} threads: limit (decoding alone) {statistics.median(bare):.0f} samples/s, ", end="")
    print(f"loader {statistics.median(loaded):.0f} samples/s, ratio {ratio:.2f} (target: at least {TARGET})")
    return ratio


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "demos").mkdir()
        (folder / "base").mkdir()
        write_demos(folder / "demos", max(2, arguments.rows // 100), 100)
        write_base(folder / "base")
        source = SourceRequest(path=folder / "demos", layout={"instruction": "open"})
        convert(ConvertRequest(sources=[source], base=str(folder / "base"), out=folder / "out"))
        dataset = ConvertedDataset(folder / "out")
        ratios = [
            measure(dataset, workers, arguments.batch_size, arguments.rounds) for workers in (0, available_cpus())
        ]
    return 0 if min(ratios) >= TARGET else 3


if __name__ == "__main__":
    sys.exit(main())
