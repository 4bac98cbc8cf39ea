"""Frames per second of `vlaft convert` over a bare loop that only decodes, resizes and encodes the same frames.

    python benchmarks/convert.py [--episodes 48] [--steps 100] [--rounds 3] [--workers N]

Both use the same number of processes and the same three functions; the bare loop has its frames in memory already, and
its processes are started and warm before the clock runs. So the ratio is what reading, statistics, tokens, Parquet,
checksums, syncing to disk and starting processes cost. Rounds are interleaved; the median counts. The ratio of CPU
seconds is printed as well: it says the same on a machine that is busy with other things. Exit code 3 when the ratio of
frames per second is below 0.8.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import h5py
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from vlaft.data.codec import decode_image, encode_image
from vlaft.data.convert.run import ConvertRequest, SourceRequest, convert
from vlaft.machine import available_cpus
from vlaft.observation.images import ImagePipeline

TARGET = 0.8
HEIGHT, WIDTH = 240, 320

_frames: list[bytes] = []


def scene(rng: np.random.Generator) -> np.ndarray:
    """A picture with as much detail as a camera's: smooth shapes and a little noise."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    waves = [np.sin(rows / rng.uniform(5, 40) + columns / rng.uniform(5, 40) + rng.uniform(0, 6)) for _ in range(3)]
    noise = rng.normal(0, 1.5, (HEIGHT, WIDTH, 3))
    return np.clip(np.stack(waves, axis=2) * 90 + 128 + noise, 0, 255).astype(np.uint8)


def write_demos(folder: Path, episodes: int, steps: int) -> list[bytes]:
    """Write ALOHA files with one JPEG camera and return the pictures that repeat in them."""
    rng = np.random.default_rng(0)
    pictures = [encode_image(scene(rng), "jpeg") for _ in range(50)]
    width = max(map(len, pictures))
    for number in range(episodes):
        with h5py.File(folder / f"episode_{number}.hdf5", "w") as file:
            file.attrs.update(sim=True, compress=True)
            file["action"] = rng.normal(size=(steps, 14)).astype(np.float32)
            file["observations/qpos"] = rng.normal(size=(steps, 14)).astype(np.float32)
            rows = [np.frombuffer(pictures[step % 50].ljust(width, b"\0"), np.uint8) for step in range(steps)]
            file.create_dataset("observations/images/cam_high", data=np.stack(rows), chunks=(1, width))
    return pictures


def write_base(folder: Path) -> None:
    """Write what a conversion reads of a base: configuration and tokenizer, no weights."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "open": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": "<s>"}))
    config = {"text_config": {"vocab_size": 400}, "vision_backbone_id": "siglip-vit-so400m", "image_sizes": [224]}
    (folder / "config.json").write_text(json.dumps(config))


def keep(frames: list[bytes]) -> None:
    """Give a process of the bare loop its frames."""
    _frames.extend(frames)


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def bare_loop(count: int, pipeline: ImagePipeline) -> float:
    """Decode (exchanging red and blue, as ALOHA's frames need), resize and encode frames; return CPU seconds."""
    start = time.process_time()
    for index in range(count):
        image = decode_image(_frames[index % len(_frames)], "", swap_rb=True)
        encode_image(pipeline.prepare(image), "jpeg")
    return time.process_time() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=48)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=available_cpus())
    arguments = parser.parse_args()
    total = arguments.episodes * arguments.steps
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "demos").mkdir()
        (folder / "base").mkdir()
        pictures = write_demos(folder / "demos", arguments.episodes, arguments.steps)
        write_base(folder / "base")
        pipeline = ImagePipeline.for_training(json.loads((folder / "base/config.json").read_text()))
        source = SourceRequest(path=folder / "demos", layout={"instruction": "open"})
        bare: list[float] = []
        whole: list[float] = []
        cpu: list[float] = []
        with ProcessPoolExecutor(arguments.workers, get_context("spawn"), keep, (pictures,)) as pool:
            shares = [len(part) for part in np.array_split(np.arange(total), arguments.workers)]
            list(pool.map(bare_loop, [200] * arguments.workers, [pipeline] * arguments.workers))
            for number in range(arguments.rounds):
                start = time.perf_counter()
                bare_cpu = sum(pool.map(bare_loop, shares, [pipeline] * arguments.workers))
                bare.append(total / (time.perf_counter() - start))
                request = ConvertRequest(
                    sources=[source], base=str(folder / "base"), out=folder / f"out{number}", workers=arguments.workers
                )
                start, cpu_start = time.perf_counter(), cpu_seconds()
                convert(request)
                cpu.append(bare_cpu / (cpu_seconds() - cpu_start))
                whole.append(total / (time.perf_counter() - start))
    ratio = statistics.median(one / other for one, other in zip(whole, bare, strict=True))
    print(f"limit (decode + resize + encode, {arguments.workers} processes): {statistics.median(bare):.0f} frames/s")
    print(f"vlaft convert: {statistics.median(whole):.0f} frames/s")
    print(f"ratio of CPU seconds: {statistics.median(cpu):.2f}")
    print(f"ratio: {ratio:.2f} (target: at least {TARGET})")
    return 0 if ratio >= TARGET else 3


if __name__ == "__main__":
    sys.exit(main())
