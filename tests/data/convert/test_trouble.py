"""Kills, signals, full disks, memory: what a conversion does when something comes in between."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import faults
import h5py
import numpy as np
import pytest

from vlaft.data.codec import encode_image
from vlaft.data.store import ConvertedDataset

SLOW = """
import os, sys, time
from pathlib import Path
from vlaft.data.convert import shards as convert_shards
encode = convert_shards.encode_image
def slowly(*arguments):
    time.sleep(0.02)
    while "HELD" in os.environ and any(Path(os.environ["HELD"]).glob("*.parquet.json")):
        time.sleep(0.02)  # a shard is finished: no other will be
    return encode(*arguments)
convert_shards.encode_image = slowly
"""


def script(folder: Path, slow: bool) -> Path:
    """The command line; where slow, workers too run it as their main module, and so encode slowly."""
    path = folder / f"vlaft_{'slow' if slow else 'plain'}.py"
    lines = "from vlaft.cli.main import main\nif __name__ == '__main__':\n    raise SystemExit(main())\n"
    path.write_text((SLOW if slow else "import sys\n") + lines)
    return path


def command(demos: Path, base: str, out: Path, workers: int = 2, slow: bool = False, *more: str) -> list[str]:
    words = [sys.executable, str(script(demos.parent, slow)), "convert", str(demos), "--base", base]
    words += ["--out", str(out), "--workers", str(workers), "--val-fraction", "0.2", "instruction=open it", *more]
    return words


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def long_demos(demos: Path) -> Path:
    """The ten episodes, each ten times as long, so that they fill several shards."""
    for path in demos.glob("*.hdf5"):
        with h5py.File(path, "r+") as file:
            for name in (
                "action",
                "observations/qpos",
                *(f"observations/images/{c}" for c in file["observations/images"]),
            ):
                values = np.tile(file[name][()], (10, 1))
                del file[name]
                file[name] = values
    return demos


def wait_for_shards(staging: Path, process: subprocess.Popen[bytes], count: int) -> None:
    deadline = time.monotonic() + 300  # a busy machine takes long to start workers
    while len(list(staging.glob(".conversion/*.parquet.json"))) < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


def test_killed_with_several_workers_and_run_again(long_demos: Path, base: str, tmp_path: Path) -> None:
    """Byte-identical to an undisturbed run, with a damaged frame in it."""
    with h5py.File(long_demos / "episode_0.hdf5", "r+") as file:
        file["observations/images/cam_high"][4, 100:] = 0
    more = ("--on-error", "skip")
    out = tmp_path / "out"
    process = subprocess.Popen(command(long_demos, base, out, 2, True, *more), stderr=subprocess.DEVNULL)
    wait_for_shards(tmp_path / "out.partial", process, 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    again = subprocess.run(command(long_demos, base, out, 2, False, *more), capture_output=True, text=True, check=True)
    assert "files were there already" in again.stderr
    clean = tmp_path / "undisturbed"
    subprocess.run(command(long_demos, base, clean, 1, False, *more), capture_output=True, check=True)
    assert content(out) == content(clean)
    dataset = ConvertedDataset(out)
    assert dataset.rows("train") + dataset.rows("val") == 540
    assert dataset.statistics["demos"]["num_trajectories"] == 9
    assert [entry["episode"] for entry in dataset.info["skipped"]] == ["episode_0.hdf5"]


def test_parts_that_are_killed_and_run_again_beside_each_other(long_demos: Path, base: str, tmp_path: Path) -> None:
    """Two that overlap, both killed; then two others at once. What a kill leaves is not in the dataset."""
    out, plan = tmp_path / "out", tmp_path / "plan"
    subprocess.run(command(long_demos, base, out, 1, False, "--plan", str(plan)), capture_output=True, check=True)

    def part(number: int, count: int, slow: bool) -> subprocess.Popen[bytes]:
        words = [sys.executable, str(script(tmp_path, slow)), "convert", "--plan", str(plan), "--workers", "1"]
        return subprocess.Popen([*words, "--part", f"{number}/{count}"], stderr=subprocess.DEVNULL)

    killed = [part(1, 1, True), part(2, 2, True)]
    wait_for_shards(tmp_path / "out.partial", killed[0], 2)
    for process in killed:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert list((tmp_path / "out.partial").glob(".*"))
    others = [part(2, 3, False), part(1, 1, False)]
    assert [process.wait() for process in others] == [0, 0]
    words = [sys.executable, "-m", "vlaft", "convert", "--plan", str(plan), "--finish"]
    subprocess.run(words, capture_output=True, check=True)
    subprocess.run(command(long_demos, base, tmp_path / "clean", 2), capture_output=True, check=True)
    assert content(out) == content(tmp_path / "clean")


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 2), (signal.SIGTERM, 1), (signal.SIGTERM, 2)])
def test_interrupted_is_130_and_goes_on_later(
    long_demos: Path, base: str, tmp_path: Path, number: signal.Signals, workers: int
) -> None:
    out = tmp_path / "out"
    held = os.environ | {"HELD": str(tmp_path / "out.partial/.conversion")}  # it cannot be done before the signal comes
    words = command(long_demos, base, out, workers, True)
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=held, preexec_fn=faults.heed_signals)
    wait_for_shards(tmp_path / "out.partial", process, 1)  # type: ignore[arg-type]
    process.send_signal(number)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130
    (sentence,) = [line for line in told.splitlines() if line.startswith("error")]
    assert "interrupted; give the same command again to go on" in sentence
    assert "Traceback" not in told
    assert not out.exists() and (tmp_path / "out.partial").is_dir()
    again = subprocess.run(command(long_demos, base, out, workers), capture_output=True, text=True, check=True)
    assert "files were there already" in again.stderr
    ConvertedDataset(out).verify()


@pytest.mark.parametrize("digit", ["rows", "crc32c"])
def test_a_damaged_note_of_a_finished_shard_is_not_believed(
    long_demos: Path, base: str, tmp_path: Path, digit: str
) -> None:
    out, notes = tmp_path / "out", tmp_path / "out.partial/.conversion"
    script = """
import os, sys
from vlaft.data.convert import shards
from vlaft.cli.main import main
remember = shards.remember_shard
def remember_and_end(*arguments):
    remember(*arguments)
    os._exit(9)
shards.remember_shard = remember_and_end
main(sys.argv[1:])
"""
    words = command(long_demos, base, out, 1)
    assert subprocess.run([sys.executable, "-c", script, *words[2:]], capture_output=True).returncode == 9
    (note,) = notes.glob("*.parquet.json")
    content = json.loads(note.read_text())
    if digit == "rows":
        content["shard"]["rows"] += 1
    else:
        del content[digit]
    note.write_text(json.dumps(content))
    again = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "files were there already" not in again.stderr
    ConvertedDataset(out).verify()


def test_interrupted_while_the_workers_start_it_does_not_wait_for_them(
    long_demos: Path, base: str, tmp_path: Path
) -> None:
    """They would write shards for ever: Ctrl-C that comes while they are given their work ends them."""
    words = command(long_demos, base, tmp_path / "out", 2, True)
    path = Path(words[1])
    patch = """
import signal
from concurrent.futures import ProcessPoolExecutor
submit = ProcessPoolExecutor.submit
def submit_and_stop(self, *arguments):
    ProcessPoolExecutor.submit = submit
    os.kill(os.getpid(), signal.SIGINT)
    return submit(self, *arguments)
ProcessPoolExecutor.submit = submit_and_stop
"""
    path.write_text(path.read_text().replace("from vlaft.cli.main", f"{patch}from vlaft.cli.main", 1))
    (tmp_path / "held").mkdir()
    (tmp_path / "held/0.parquet.json").touch()
    held = os.environ | {"HELD": str(tmp_path / "held")}
    done = subprocess.run(words, capture_output=True, text=True, env=held, preexec_fn=faults.heed_signals, timeout=120)
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_sentence(long_demos: Path, base: str, tmp_path: Path) -> None:
    """On a real file system that is full; afterwards the same command goes on."""
    place = tmp_path / "small"
    place.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("mounting a small file system needs root")
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        for workers in (1, 2):
            words = command(
                long_demos, base, place / "out", workers, False, "--image-codec", "png", "--image-size", "64"
            )
            failed = subprocess.run(words, capture_output=True, text=True)
            told = [line for line in failed.stderr.splitlines() if line.startswith("error")]
            assert failed.returncode == 1 and "Traceback" not in failed.stderr
            assert len(told) == 1 and "the disk is full while writing" in told[0]
            assert not (place / "out").exists()
        subprocess.run([mount, "-o", "remount,size=64m", str(place)], check=True, capture_output=True)
        subprocess.run(words, capture_output=True, check=True)
        ConvertedDataset(place / "out").verify()
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_memory_does_not_grow_with_the_number_of_episodes(base: str, tmp_path: Path) -> None:
    """60 episodes of 1.5 MB of frames each take at most 12 MB more than 10: the actions, not the frames, stay."""
    rng = np.random.default_rng(0)
    data = [encode_image(rng.integers(0, 255, (96, 96, 3), dtype=np.uint8), "jpeg") for _ in range(8)]
    width = max(map(len, data))
    peaks = []
    measure = (
        "import resource, sys; from vlaft.cli.main import main; code = main(sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); raise SystemExit(code)"
    )
    for count in (10, 60):
        folder = tmp_path / f"demos{count}"
        folder.mkdir()
        for number in range(count):
            with h5py.File(folder / f"episode_{number}.hdf5", "w") as file:
                file["action"] = rng.normal(size=(80, 14)).astype(np.float32)
                rows = [np.frombuffer(data[step % 8].ljust(width, b"\0"), np.uint8) for step in range(80)]
                file["observations/images/cam_high"] = np.stack(rows)
        words = ["convert", str(folder), "--base", base, "--out", str(tmp_path / f"out{count}"), "--workers", "1"]
        words += ["--image-size", "96", "instruction=open it"]
        done = subprocess.run([sys.executable, "-c", measure, *words], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    size = sum(path.stat().st_size for path in (tmp_path / "out60").glob("*.parquet")) / 2**20
    assert size > 50  # MiB
    assert peaks[1] - peaks[0] < 12, peaks
