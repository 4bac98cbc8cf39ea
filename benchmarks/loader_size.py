"""Memory and time of the training loader by the number of rows: what grows with a dataset, and what does not.

    python benchmarks/loader_size.py [--rows 10000 100000 1000000] [--chunk 1] [--seconds 5]

Converted datasets of so many rows are made up, in shards of 4,000 rows and episodes of 100 steps whose tiny frames are
all the same, and read as `vlaft train` reads them, each in processes of its own: one that meets the dataset for the
first time, and one that meets it again. Printed are the seconds until the first batch, the resident memory that
belongs to the process alone beyond what it has before (pages of mapped files do not count: the system takes them back
when it needs them), the bytes kept in the cache, and the milliseconds per batch of 16 beside those of decoding its
frames alone. Then the order of examples alone, up to 10^9 of them. Exit code 3 when own memory is more than `BOUND`, or
the time per batch with most rows more than `FLAT` times that with fewest.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlaft.action.statistics import compute_statistics
from vlaft.action.tokens import ActionTokenizer, normalize
from vlaft.checksums import checksum
from vlaft.data.codec import decode_image, encode_image
from vlaft.data.loader import ExampleLoader
from vlaft.data.order import Order, Runs
from vlaft.data.store import ROW_GROUP, ConvertedDataset, Shard, example_schema, shard_entry
from vlaft.files import write_json
from vlaft.observation.images import ImagePipeline
from vlaft.recipe.settings import PolicyConfig

FLAT = 2.0
BOUND = 100e6  # bytes
STEPS, EPISODES = 100, 40  # of an episode, of a shard
BATCH, SIZE = 16, 32
PLACEHOLDER = 0x5A5A0000  # of an episode's number in the first shard, which all others are copies of
TOKENIZER = {"base": "b", "eos_id": 2, "pad_id": 3, "fingerprint": "f", "action_vocab_size": 600, "n_action_bins": 256}


def template(path: Path) -> None:
    """Write the shard that all are copies of."""
    rng = np.random.default_rng(0)
    rows = STEPS * EPISODES
    actions = rng.normal(size=(rows, 7)).astype(np.float32)
    normalized = normalize(actions, compute_statistics([actions])["action"])
    frame = rng.integers(0, 255, (4, 4, 3), np.uint8).repeat(SIZE // 4, 0).repeat(SIZE // 4, 1)
    image = {"bytes": encode_image(frame, "jpeg"), "path": None}
    columns = {
        "episode_index": PLACEHOLDER + np.arange(rows, dtype=np.int32) // STEPS,
        "frame_index": np.arange(rows, dtype=np.int32) % STEPS,
        "dataset": ["made up"] * rows,
        "source": [f"episode {row // STEPS}" for row in range(rows)],
        "instruction": [f"do {row // STEPS}" for row in range(rows)],
        "image": [image] * rows,
        "state": list(rng.normal(size=(rows, 8)).astype(np.float32)),
        "action": list(actions),
        "normalized_action": list(normalized),
        "prompt_token_ids": [[1, *range(10, 25), row // STEPS + 30] for row in range(rows)],
        "action_token_ids": list(ActionTokenizer(600).encode(normalized)),
    }
    schema = example_schema(["image"])
    table = pa.table([pa.array(columns[name], schema.field(name).type) for name in schema.names], schema=schema)
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=["dataset"], write_statistics=False) as file:
        for start in range(0, rows, ROW_GROUP):
            file.write_table(table.slice(start, ROW_GROUP))


def make(folder: Path, rows: int) -> None:
    """Make a converted dataset of about so many rows."""
    folder.mkdir(parents=True)
    template(folder / "template")
    content = np.fromfile(folder / "template", np.uint8)
    (folder / "template").unlink()
    numbers = [(PLACEHOLDER + episode).to_bytes(4, "little") for episode in range(EPISODES)]
    raw = content.tobytes()
    places = []
    for episode, number in enumerate(numbers):
        place = raw.find(number)
        while place >= 0:
            places.append((place, episode))
            place = raw.find(number, place + 4)
    assert len(places) == STEPS * EPISODES
    at, episode = (np.array(values) for values in zip(*places, strict=True))
    shards = []
    for number in range(max(1, rows // (STEPS * EPISODES))):
        written = (episode + number * EPISODES).astype("<i4").view(np.uint8).reshape(-1, 4)
        content[at[:, None] + np.arange(4)] = written
        path = folder / f"train-{number:05d}.parquet"
        content.tofile(path)
        shards.append(Shard(path.name, "train", STEPS * EPISODES, path.stat().st_size, checksum(path)))
    pipeline = ImagePipeline(SIZE, "lanczos", "resize-naive", (0, 0, 0), False, ((0.5,) * 3,), ((0.5,) * 3,))
    values = np.random.default_rng(0).normal(size=(100, 15)).astype(np.float32)
    statistics = {"made up": compute_statistics([values[:, :7]], (), [values[:, 7:]])}
    write_json(folder / "dataset_statistics.json", statistics)
    document = {
        "format_version": 1,
        "sources": [{"name": "made up", "weight": 1.0}],
        "image": {"cameras": ["image"], "pipeline": pipeline.to_json()},
        "prompt_style": "openvla",
        "tokenizer": TOKENIZER,
        "counts": {"episodes": {"train": len(shards) * EPISODES}, "rows": {"train": len(shards) * STEPS * EPISODES}},
        "shards": [shard_entry(shard) for shard in shards],
    }
    write_json(folder / "dataset.json", document)


def own_memory() -> int:
    """Return the bytes of resident memory that belong to this process alone."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system does not tell a process's own memory (RssAnon in /proc/self/status)")


def measure(folder: Path, chunk: int, seconds: float) -> dict[str, float]:
    """Return what reading a dataset takes, in this process."""
    import torch

    torch.zeros(1)
    policy = PolicyConfig() if chunk == 1 else PolicyConfig(head="l1", chunk=chunk, state=True)
    before = own_memory()
    begun = time.perf_counter()
    dataset = ConvertedDataset(folder)
    loader = ExampleLoader(dataset, BATCH, policy=policy)
    next(loader)
    first = time.perf_counter() - begun
    batches, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        next(loader)
        batches += 1
    spent = (time.perf_counter() - begun) / batches
    taken = own_memory() - before
    image = dataset.image("train", 0) or b""
    begun = time.perf_counter()
    for _ in range(100 * BATCH):
        decode_image(image, "", accurate_dct=True)
    decoding = (time.perf_counter() - begun) / 100
    rows = dataset.rows("train")
    return {"rows": rows, "first": first, "bytes": taken, "batch": 1000 * spent, "decoding": 1000 * decoding}


def main() -> int:
    """Measure, print a table, and say whether it is flat."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--chunk", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.chunk, arguments.seconds)))
        return 0
    print(
        f"{'rows':>12} {'start':>6} {'s to first batch':>17} {'own MB':>8} {'ms per batch':>13} {'ms decoding':>12}"
        f" {'cached B per row':>17}"
    )
    known: list[dict[str, float]] = []
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory() as name:
            folder, cache = Path(name) / "data", Path(name) / "cache"
            make(folder, rows)
            words = [sys.executable, __file__, "--one", str(folder), "--chunk", str(arguments.chunk)]
            environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
            for start in ("first", "again"):
                command = [*words, "--seconds", str(arguments.seconds)]
                told = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
                found = json.loads(told)
                kept = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
                per_row = kept / found["rows"]
                print(
                    f"{found['rows']:12,} {start:>6} {found['first']:17.1f} {found['bytes'] / 1e6:8.1f}"
                    f" {found['batch']:13.2f} {found['decoding']:12.2f} {per_row:17.0f}",
                    flush=True,
                )
            known.append(found)
            shutil.rmtree(folder)
    order()
    ratios = {key: known[-1][key] / known[0][key] for key in ("bytes", "batch")}
    print(f"most rows over fewest: own memory {ratios['bytes']:.2f}, time per batch {ratios['batch']:.2f}")
    return 0 if ratios["batch"] <= FLAT and max(each["bytes"] for each in known) <= BOUND else 3


def order() -> None:
    """Print what the order of examples takes, listed and computed."""
    print(f"{'examples':>15} {'order':>9} {'own MB':>8} {'ms per batch':>13}")
    for examples in (10**6, 10**7, 10**8, 10**9):
        before = own_memory()
        of = Order([(1.0, Runs.of([0], [examples]))], 0)
        of.examples(0, BATCH)
        begun = time.perf_counter()
        for step in range(1000):
            of.examples(step * BATCH, BATCH)
        kind = "listed" if of.listed else "computed"
        spent = time.perf_counter() - begun
        print(f"{examples:15,} {kind:>9} {(own_memory() - before) / 1e6:8.1f} {spent:13.3f}")


if __name__ == "__main__":
    raise SystemExit(main())
