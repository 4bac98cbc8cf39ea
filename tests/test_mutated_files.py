"""Whatever a binary file holds, its reader says a sentence or takes it: never a traceback, a crash, a hang or a flood.

    VLAFT_MUTATIONS=100000 pytest tests/test_mutated_files.py     # as many of each kind, or what VLAFT_SECONDS allow

Files are read in a fork, for what C code makes of damage may end the process.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from faults import tell
from lerobot_sets import CAMERA, LENGTHS, make_v2, make_v3
from mutations import damage, json_mutations
from PIL import Image
from rlds_sets import make_episode, writer
from safetensors.torch import save_file

from vlaft.data.codec import decode_image, encode_image
from vlaft.data.readers.reader import Reader
from vlaft.data.source import SourceRequest, open_request
from vlaft.errors import VlaftError
from vlaft.model.configuration import Policy
from vlaft.serving import json_numpy
from vlaft.serving.observation import read_question
from vlaft.serving.settings import Refused, ServeSettings
from vlaft.weights.layout import tensor_table
from vlaft.weights.stream import read_tensor

COUNT = int(os.environ.get("VLAFT_MUTATIONS", "60"))
ALLOWED = float(os.environ.get("VLAFT_SECONDS", "inf"))  # for one kind
SECONDS = 60  # for one file; all take milliseconds
MEMORY = 3 * 2**30  # bytes that one file may make the reader take, beyond what the process has

Try = Callable[[int], None]  # reads the file damaged with a seed


def spoiled(data: bytes, seed: int) -> bytes:
    """Return a file with one to three places of damage, a third of them single bits."""
    generator = random.Random(seed)
    if seed % 3 == 0:
        at = generator.randrange(len(data))
        return data[:at] + bytes([data[at] ^ 1 << generator.randrange(8)]) + data[at + 1 :]
    for _ in range(generator.choice((1, 1, 2, 3))):
        data = _changed(data, generator) or b"\0"
    return data


def _changed(data: bytes, generator: random.Random) -> bytes:
    if generator.random() < 0.4:
        return damage(data, generator)
    at, size = generator.randrange(len(data)), generator.choice((1, 2, 4, 8))
    number = generator.choice((0, 1, 2**7, 2**8 - 1, 2**15, 2**16, 2**31, 2**32 - 1, 2**63, 2**64 - 1))
    return data[:at] + struct.pack("<Q", number)[:size] + data[at + size :]


def read_first(path: Path) -> None:
    """Read an episode and its frames, as a conversion would."""
    reader: Reader = open_request(SourceRequest(path=path)).reader
    episode = reader.read(reader.episodes()[0])
    for values in episode.arrays.values():
        np.asarray(values)
    for frames in episode.cameras.values():
        list(frames.read(range(min(episode.length, 3))))


def of_safetensors(place: Path) -> Try:
    file = place / "model.safetensors"
    tensors = {f"layers.{n}.weight": torch.arange(6.0).reshape(2, 3) + n for n in range(3)}
    save_file(tensors | {"scalar": torch.tensor(1.0), "half": torch.ones(4, dtype=torch.bfloat16)}, file)
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]

    def attempt(seed: int) -> None:
        if seed % 2:
            text = json_mutations(header, seed // 2)
            file.write_bytes(struct.pack("<Q", len(text)) + text + rest)
        else:
            file.write_bytes(spoiled(data, seed // 2))
        for entry in tensor_table(place).values():
            read_tensor(place, entry)

    return attempt


def of_hdf5(place: Path) -> Try:
    file = place / "demos.hdf5"
    with h5py.File(file, "w") as root:
        root.create_group("data").attrs["env_args"] = json.dumps({"env_name": "Lift", "type": 1})
        demo = root["data"].create_group("demo_0")
        demo.attrs["num_samples"] = 3
        demo["actions"] = np.linspace(-1, 1, 21).reshape(3, 7)
        demo["obs/robot0_eef_pos"] = np.ones((3, 3))
        demo["obs/robot0_eef_quat"] = np.ones((3, 4))
        demo["obs/robot0_gripper_qpos"] = np.ones((3, 2))
        frames = np.arange(3 * 8 * 8 * 3, dtype=np.uint8).reshape(3, 8, 8, 3)
        demo.create_dataset("obs/agentview_image", data=frames, chunks=(1, 8, 8, 3), compression=4)
    return of_file(file)


def of_file(file: Path, root: Path | None = None) -> Try:
    """Damage `file`, and read it, or the set in `root` that it belongs to."""
    data = file.read_bytes()

    def attempt(seed: int) -> None:
        file.write_bytes(spoiled(data, seed))
        read_first(root or file)

    return attempt


def of_records(place: Path) -> Try:
    """A TFRecord shard; where the seed is odd, the damage is inside a record whose checksum holds."""
    (shard,) = _rlds(place).glob("*.tfrecord*")
    data = shard.read_bytes()
    payload = data[12 : 12 + struct.unpack("<Q", data[:8])[0]]

    def attempt(seed: int) -> None:
        shard.write_bytes(writer.frame_record(spoiled(payload, seed // 2)) if seed % 2 else spoiled(data, seed // 2))
        read_first(shard.parent)

    return attempt


def of_features(place: Path) -> Try:
    folder = _rlds(place)
    files = [folder / "features.json", folder / "dataset_info.json"]
    documents = [json.loads(file.read_text()) for file in files]

    def attempt(seed: int) -> None:
        for number, (file, document) in enumerate(zip(files, documents, strict=True)):
            damaged = seed % 2 == number
            file.write_bytes(json_mutations(document, seed // 2) if damaged else json.dumps(document).encode())
        read_first(folder)

    return attempt


def _rlds(place: Path) -> Path:
    made = writer.write_rlds(place / "set", "set", {"train": [make_episode(3)]})
    return next(path.parent for path in Path(made or place).rglob("features.json"))


def of_parquet(place: Path) -> Try:
    make_v2(place, videos=False)
    return of_file(place / "data/chunk-000/episode_000000.parquet", place)


def of_episodes(place: Path) -> Try:
    """The table of episodes of a LeRobot v3.0 set."""
    make_v3(place)
    return of_file(place / "meta/episodes/chunk-000/file-000.parquet", place)


def of_lines(place: Path) -> Try:
    make_v2(place, videos=False)
    files = [place / "meta/episodes.jsonl", place / "meta/tasks.jsonl"]
    lines = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]

    def attempt(seed: int) -> None:
        for number, (file, rows) in enumerate(zip(files, lines, strict=True)):
            written = [json.dumps(row).encode() for row in rows]
            if seed % 2 == number:
                written[seed // 2 % len(rows)] = json_mutations(rows[seed // 2 % len(rows)], seed // 2)
            file.write_bytes(b"\n".join(written))
        read_first(place)

    return attempt


def of_video(place: Path) -> Try:
    make_v2(place)
    assert LENGTHS[0] > 3
    return of_file(place / f"videos/chunk-000/{CAMERA}/episode_000000.mp4", place)


def of_pictures(place: Path) -> Try:
    pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    pictures = [encode_image(pixels, codec) for codec in ("jpeg", "png", "webp-lossless")]
    for kind in ("GIF", "BMP"):
        Image.fromarray(pixels).save(place / "picture", kind)
        pictures.append((place / "picture").read_bytes())

    def attempt(seed: int) -> None:
        decode_image(spoiled(pictures[seed % len(pictures)], seed // len(pictures)), "frame 0")

    return attempt


def of_requests(place: Path) -> Try:
    statistics = {"small": {"action": {"q01": [0.0] * 7, "q99": [1.0] * 7}}}
    image = json_numpy.encode(np.zeros((8, 8, 3), np.uint8))
    request = {"image": image, "instruction": "push", "unnorm_key": "small"}
    several = request | {"image_wrist": image, "state": [0.0, 1.0, 2.0]}
    robot = {"full_image": image, "wrist_image": image, "state": [0.0, 1.0, 2.0], "instruction": "push"}
    reads = Policy(cameras=("main", "wrist"), state=True, state_size=3)
    forms = [(request, Policy()), (several, reads), (robot, reads)]

    def attempt(seed: int) -> None:
        form, policy = forms[seed // 2 % 3]
        body = json_mutations(form, seed // 6)
        if seed % 2:
            body = json.dumps({"encoded": body.decode(errors="replace")}).encode()
        read_question(body, policy, statistics, ServeSettings())

    return attempt


@dataclass(frozen=True)
class Kind:
    """How files of one kind are damaged and read; `sentences` is the least share that has to be refused."""

    prepare: Callable[[Path], Try]
    share: float = 1.0  # of the files that are tried, less where each takes longer
    sentences: float = 0.05


KINDS = {
    "safetensors": Kind(of_safetensors),
    "hdf5": Kind(of_hdf5, sentences=0.02),
    "tfrecord": Kind(of_records),
    "features.json": Kind(of_features),
    "parquet": Kind(of_parquet),
    "episodes.parquet": Kind(of_episodes),
    "jsonl": Kind(of_lines),
    "mp4": Kind(of_video),
    "picture": Kind(of_pictures),
    "request": Kind(of_requests),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_a_sentence(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    count = COUNT if COUNT >= 1000 else round(COUNT * KINDS[name].share)
    place = tmp_path / "place"
    place.mkdir()
    attempt = KINDS[name].prepare(place)
    progress = mmap.mmap(-1, 24)  # the seed under way, how many sentences there were, and how many were tried
    report = tmp_path / "report"
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = _read_all(attempt, count, progress, report)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    seed, sentences, tried = struct.unpack("<QQQ", progress[:])
    told = report.read_text() if report.is_file() else "the process ended"
    assert os.waitstatus_to_exitcode(status) == 0, f"{name}, seed {seed}: {told}"
    assert sentences >= KINDS[name].sentences * tried, (sentences, tried)
    if COUNT >= 1000:
        seconds = time.monotonic() - began
        tell(request.config, f"{name:24}{tried:10,} tried {sentences:10,} sentences {seconds:8.0f} s")
    shutil.rmtree(place)


def _read_all(attempt: Try, count: int, progress: mmap.mmap, report: Path) -> int:
    sentences, began = 0, time.monotonic()
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    signal.signal(signal.SIGALRM, _hangs)
    for seed in range(count):
        if seed % 64 == 0 and time.monotonic() - began > ALLOWED:
            break
        progress[:] = struct.pack("<QQQ", seed, sentences, seed)
        signal.alarm(SECONDS)
        try:
            attempt(seed)
        except (VlaftError, Refused) as error:
            if not str(error).strip():
                report.write_text("an empty sentence")
                return 1
            sentences += 1
        except BaseException:
            import traceback

            report.write_text(traceback.format_exc())
            return 1
        progress[:] = struct.pack("<QQQ", seed, sentences, seed + 1)
    return 0


def _hangs(number: int, frame: Any) -> None:
    raise TimeoutError
