"""What a run says of its memory: the process's own apart from pages of files, beside what this device was predicted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_run import Small, run

from vlaft.cli.main import main
from vlaft.training import interrupts as memory
from vlaft.training.events import PredictedMemory
from vlaft.training.interrupts import MemoryWatch

MB = 10**6
CPU = torch.device("cpu")
linux_only = pytest.mark.skipif(memory.resident() is None, reason="only Linux tells the two kinds apart")


PAGES = """
import mmap, sys
import torch
from vlaft.training.interrupts import MemoryWatch

MB = 10**6
with MemoryWatch(torch.device("cpu")) as watch:
    start = watch.peak()
    with open(sys.argv[1], "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        assert sum(pages[::4096]) == 0
        mapped = watch.peak()
        held = bytearray(96 * MB)
        held[::4096] = b"1" * len(held[::4096])
        own = watch.peak()
assert start.before_bytes is not None and start.mapped_bytes is not None and mapped.mapped_bytes is not None
assert mapped.mapped_bytes - start.mapped_bytes >= 60 * MB, (start, mapped)
assert mapped.bytes - start.bytes < 30 * MB, (start, mapped)
assert own.bytes - mapped.bytes >= 90 * MB, (mapped, own)
assert own.before_bytes == start.before_bytes <= start.bytes, (start, own)
"""


@linux_only
def test_pages_of_files_and_memory_of_its_own_are_told_apart(tmp_path: Path) -> None:
    """In a process of its own: one that ran other tests gives memory back in between."""
    path = tmp_path / "file"
    path.write_bytes(bytes(64 * MB))
    done = subprocess.run([sys.executable, "-c", PAGES, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@linux_only
def test_memory_that_was_given_back_before_the_end_counts() -> None:
    with MemoryWatch(CPU) as watch:
        before = watch.peak().bytes
        held = torch.ones(64 * MB, dtype=torch.uint8)
        while watch._own < before + 50 * MB:  # until the thread has looked
            held += 1
        del held
    assert watch.peak().bytes >= before + 50 * MB


def test_where_the_kinds_cannot_be_told_apart_all_resident_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_STATUS", Path("/nowhere/status"))
    with MemoryWatch(CPU) as watch:
        peak = watch.peak()
    assert peak.bytes > 50 * MB and peak.mapped_bytes is None and peak.before_bytes is None
    assert peak.measured_as == "resident memory of the process"


def test_the_report_has_prediction_and_measurement_of_this_device(small: Small, tmp_path: Path) -> None:
    told = run(small.recipe("lora8"), tmp_path / "run", predicted=PredictedMemory(1, 2, 3))
    found = json.loads((tmp_path / "run" / "report.json").read_text())["memory"]
    assert told.summary is not None and told.banner is not None
    assert found["device"] == "cpu" and not told.banner.on_gpu
    assert found["measured_peak_bytes"] == told.summary.peak.bytes > 50 * MB
    assert found["measured_mapped_bytes"] == told.summary.peak.mapped_bytes
    assert [found[f"predicted_{what}_bytes"] for what in ("gpu_peak", "cpu_peak", "mapped")] == [1, 2, 3]


@linux_only
def test_the_command_says_both_and_what_was_predicted_for_a_cpu(
    small: Small, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    words = ["train", "--recipe", "lora8", "--out", str(tmp_path / "run"), *small.words()]
    assert main([*words, "--dry-run"]) == 0
    assert "GB of main memory and 0.00 GB of the base's files, mapped" in " ".join(capfd.readouterr().out.split())
    assert main(words) == 0
    said = " ".join(capfd.readouterr().err.split())
    assert "for the tensors of a step on this CPU, predicted" in said
    assert "were predicted for the tensors of a step;" in said
    assert "GB of pages of mapped files, which the kernel takes back when it needs them; written to" in said
    assert "predicted for a GPU" not in said
    found = json.loads((tmp_path / "run" / "report.json").read_text())["memory"]
    assert found["predicted_cpu_peak_bytes"] > found["predicted_mapped_bytes"] > 0
