"""Every verb that writes, small: what it starts from, what it is told, and what lies there when it is done.

Each is run in a fork of a process that has imported everything, so that hundreds of disturbed runs take minutes.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faults
import numpy as np
import torch
from PIL import Image
from small_base import INSTRUCTION, convert_small, write_demonstrations, write_small_base

from vlaft.cli.main import main

SECONDS = 300  # for one run; all take a few
RECORDING = "vlaft.environments.tabletop.recording"
# What a clock or the allocator says, and sums of documents that say it. Safetensors writes its metadata in any order.
_VOLATILE = {"seconds", "samples_per_second", "data_seconds", "seconds_left", "crc32c", "files", "memory", "created"}


@dataclass(frozen=True)
class Case:
    """A command that writes.

    Attributes:
        verb: as users type it.
        what: this case of it, in a word or two.
        words: of the command; `{made}` stands for the folder of what it reads, `{place}` for that of what it writes.
        again: given after a kill, where it differs.
        before: folders and files of `made` that are copied to `place` first, under these names.
        kept: names in `place` that an unfinished command leaves to go on from.
        parts: the output may be a mixture of old and new files, each of them whole: a run under way, pictures.
        ignored: endings of files in which a clock is written.
        growing: endings of files that change while the command runs.
    """

    verb: str
    what: str
    words: tuple[str, ...]
    again: tuple[str, ...] = ()
    before: tuple[tuple[str, str], ...] = ()
    kept: tuple[str, ...] = ()
    parts: bool = False
    ignored: tuple[str, ...] = ()
    growing: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.verb} {self.what}".strip()

    @property
    def overwrites(self) -> bool:
        """Whether the command may be given again when it was done."""
        return "--overwrite" in self.words or "--plot" in self.words

    def run(self, made: Path, place: Path, *, again: bool = False) -> int:
        """Run the command in this process and return its exit code."""
        words = [word.format(made=made, place=place) for word in (self.again if again and self.again else self.words)]
        if words[0] == RECORDING:
            from vlaft.environments.tabletop import recording

            signal.signal(signal.SIGTERM, signal.default_int_handler)
            return recording.main(words[1:])
        return main(words)

    def prepare(self, made: Path, place: Path) -> None:
        """Make `place` as it is before the command."""
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for source, name in self.before:
            if (made / source).is_dir():
                shutil.copytree(made / source, place / name)
            else:
                shutil.copy2(made / source, place / name)


_TRAIN = ("train", "--recipe", "lora8", "--data", "{made}/data", "--base", "{made}/base", "--out", "{place}/run")
_LITTLE = ("train.batch_size=2", "train.accumulation=1", "data.workers=0", "train.save_every=1", "train.log_every=1")
_LITTLE = (*_LITTLE, "train.evaluate_every=0", "train.keep_checkpoints=9", "train.steps=3", "adapt.lora.rank=2")
_CONVERT = ("convert", "{made}/data.hdf5", "--base", "{made}/base", "--out", "{place}/out", "--workers", "1")
_CONVERT = (*_CONVERT, f"instruction={INSTRUCTION}", "action=actions", "cameras.primary=obs/agentview_image")
_CONVERT = (*_CONVERT, "steps=[]", "action_mask=[true, true, true, true, true, true, false]", "--val-fraction", "0.25")
_MERGE = ("merge", "{made}/run", "--out", "{place}/out", "--no-verify")
_EXPORT = ("export", "{made}/model", "--out", "{place}/out")
_HELD_OUT = ("evaluate", "{made}/run", "--data", "{made}/data", "--device", "cpu", "--limit", "2")
_RECORD = ("record", "tabletop", "--episodes", "2", "--seed", "7", "--out", "{place}/out")
_ACTING = ("evaluate", "{made}/model", "--env", "two_steps:TwoSteps", "--episodes", "2", "--device", "cpu")

CASES = (
    Case("convert", "", _CONVERT, kept=("out.partial",)),
    Case("convert", "--overwrite", (*_CONVERT, "--overwrite"), before=(("data", "out"),), kept=("out.partial",)),
    Case(
        "train",
        "",
        (*_TRAIN, *_LITTLE),
        (*_TRAIN, *_LITTLE, "--resume"),
        parts=True,
        ignored=("report.json",),
        growing=("run.json", "log.jsonl"),
    ),
    Case(
        "train",
        "--overwrite",
        (*_TRAIN, *_LITTLE, "--overwrite"),
        (*_TRAIN, *_LITTLE, "--resume"),
        before=(("begun", "run"),),
        parts=True,
        ignored=("report.json",),
        growing=("run.json", "log.jsonl"),
    ),
    Case(
        "train",
        "--resume",
        (*_TRAIN, *_LITTLE, "--resume"),
        before=(("begun", "run"),),
        parts=True,
        ignored=("report.json",),
        growing=("run.json", "log.jsonl"),
    ),
    Case("merge", "", _MERGE),
    Case("merge", "--overwrite", (*_MERGE, "--overwrite"), before=(("older", "out"),)),
    Case("export", "--to huggingface", (*_EXPORT, "--to", "huggingface")),
    Case("export", "--to nf4 --overwrite", (*_EXPORT, "--to", "nf4", "--overwrite"), before=(("older", "out"),)),
    Case("export", "--to adapter", ("export", "{made}/run", "--out", "{place}/out", "--to", "adapter")),
    Case("report", "--plot", ("report", "--base", "{made}/base", "--recipe", "lora8", "--plot", "{place}/costs.png")),
    Case(
        "report",
        "--plot, again",
        ("report", "--base", "{made}/base", "--recipe", "lora16", "--plot", "{place}/costs.png"),
        before=(("costs.png", "costs.png"),),
    ),
    Case("recipes copy", "", ("recipes", "copy", "lora8", "{place}/mine.yaml")),
    Case("evaluate", "--plots", (*_HELD_OUT, "--plots", "{place}/plots"), parts=True),
    Case(
        "evaluate",
        "--plots --overwrite",
        (*_HELD_OUT, "--plots", "{place}/plots", "--overwrite"),
        before=(("plots", "plots"),),
        parts=True,
    ),
    Case(
        "evaluate",
        "--env --plots",
        (*_ACTING, "--plots", "{place}/films", "--overwrite"),
        before=(("plots", "films"),),
        parts=True,
    ),
    Case(
        "evaluate",
        "--env --out",
        (*_ACTING, "--out", "{place}/out"),
        (*_ACTING, "--out", "{place}/out", "--resume"),
        parts=True,
        growing=("episodes.jsonl",),
    ),
    Case("inspect", "--html", ("inspect", "{made}/data", "--html", "{place}/page.html")),
    Case(
        "inspect",
        "--html --overwrite",
        ("inspect", "{made}/data.hdf5", "--html", "{place}/page.html", "--overwrite", f"instruction={INSTRUCTION}"),
        before=(("page.html", "page.html"),),
    ),
    Case("plot", "", ("plot", "{made}/run", "--out", "{place}/curves.png")),
    Case(
        "plot",
        "--overwrite",
        ("plot", "{made}/begun", "--out", "{place}/curves.png", "--overwrite"),
        before=(("costs.png", "curves.png"),),
    ),
    Case("record", "", _RECORD, kept=("out.partial",)),
    Case("record", "--overwrite", (*_RECORD, "--overwrite"), before=(("older", "out"),), kept=("out.partial",)),
    Case("recording", "", (RECORDING, "--out", "{place}/demos.hdf5", "--episodes", "2", "--seed", "7")),
)
VERBS = tuple(dict.fromkeys(case.verb for case in CASES))


def make(made: Path) -> None:
    """Write what the commands read: a base, data, a run and one with a step less, a model, an older one, pictures."""
    convert_small(write_small_base(made / "base"), made / "data", episodes=4, steps=4)
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(made / "frame.png")
    write_demonstrations(made / "others.hdf5", episodes=2, steps=3, seed=5)
    run = [word.format(made=made, place=made) for word in (*_TRAIN, *_LITTLE)]
    assert _quietly(run) == 0
    begun = [*run, "train.steps=2"]
    begun[begun.index("--out") + 1] = str(made / "begun")
    assert _quietly(begun) == 0
    assert _quietly(["merge", str(made / "run"), "--out", str(made / "model"), "--no-verify"]) == 0
    older = ["merge", str(made / "begun"), "--checkpoint", "step-000001", "--out", str(made / "older"), "--no-verify"]
    assert _quietly(older) == 0
    words = ["report", "--base", str(made / "base"), "--recipe", "lora64", "--plot", str(made / "costs.png")]
    assert _quietly(words) == 0
    assert (
        _quietly(["inspect", str(made / "others.hdf5"), f"instruction={INSTRUCTION}", "--html", f"{made}/page.html"])
        == 0
    )
    words = [word.format(made=made) for word in _HELD_OUT]
    words[words.index("--limit") + 1] = "1"
    assert _quietly([*words, "--plots", str(made / "plots")]) == 0


def _quietly(words: Sequence[str]) -> int:
    """Run a command in a fork, so that this process keeps to one thread; return its exit code."""
    return forked(lambda: main(list(words))).code


@dataclass(frozen=True)
class End:
    """How a fork ended: its exit code or the negative signal, what it printed, how many moments there were."""

    code: int
    told: str
    moments: int
    seconds: float

    @property
    def errors(self) -> list[str]:
        return [line for line in self.told.splitlines() if line.startswith("error: ")]


def forked(
    work: Callable[[], int], root: Path | None = None, fault: str = "none", at: int = 0, after: float | None = None
) -> End:
    """Do `work`, whose result is the exit code, in a fork.

    Args:
        work: what to do.
        root: where moments are counted, and the fault happens.
        fault: see `faults`; `none` only counts.
        at: number of the moment.
        after: seconds after which the fork is killed.
    """
    started = time.monotonic()
    counts, child = _start(work, root, fault, at)
    return _finish(child, counts, started, after)


def together(*works: Callable[[], int]) -> list[End]:
    """Do things in forks that begin at the same time."""
    reader, writer = os.pipe()

    def held(work: Callable[[], int]) -> Callable[[], int]:
        def wait() -> int:
            os.close(writer)
            os.read(reader, 1)
            return work()

        return wait

    forks = [(_start(held(work)), time.monotonic()) for work in works]
    os.close(writer)  # now
    ends = [_finish(child, counts, started) for (counts, child), started in forks]
    os.close(reader)
    return ends


def _start(work: Callable[[], int], root: Path | None = None, fault: str = "none", at: int = 0) -> tuple[Any, int]:
    printed = os.memfd_create("printed")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.close(reader)
            os.dup2(printed, 1)
            os.dup2(printed, 2)
            sys.stdout = os.fdopen(1, "w", closefd=False)
            sys.stderr = os.fdopen(2, "w", closefd=False, buffering=1)
            faults.heed_signals()
            torch.set_num_threads(1)
            if root is not None:
                faults.install(root, fault, at, lambda event, path: os.write(writer, b".") and None)
            code = work()
            sys.stdout.flush()
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stderr.flush()
            os._exit(code)
    os.close(writer)
    return (reader, printed), child


def _finish(child: int, counts: Any, started: float, after: float | None = None) -> End:
    reader, printed = counts
    limit, killed = started + SECONDS, False
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        now = time.monotonic()
        if (after is not None and now > started + after and not killed) or now > limit:
            os.kill(child, signal.SIGKILL)
            killed = True
        time.sleep(0.001)
    seconds = time.monotonic() - started
    with os.fdopen(reader, "rb") as file:
        moments = len(file.read())
    with os.fdopen(printed, "rb") as file:
        file.seek(0)
        told = file.read().decode(errors="replace")
    return End(os.waitstatus_to_exitcode(status), told, moments, seconds)


def import_all(work: Callable[[], int]) -> None:
    """Import here what `work` imports in a fork, so that the forks after it need not."""
    reader, writer = os.pipe()

    def list_modules() -> int:
        try:
            return work()
        finally:
            with os.fdopen(writer, "w") as file:
                file.write("\n".join(sys.modules))

    counts, child = _start(list_modules)
    os.close(writer)
    with os.fdopen(reader) as file:
        names = file.read().splitlines()
    end = _finish(child, counts, time.monotonic())
    assert end.code == 0, end.told
    for name in names:
        if name not in sys.modules and not name.startswith("__"):
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def content(place: Path, ignored: Sequence[str] = ()) -> dict[str, Any]:
    """Return what lies in a folder, as far as it is the same in every run: hidden files too."""
    found: dict[str, Any] = {}
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        if path.is_dir():
            found[name] = "a folder"
        else:
            found[name] = "ignored" if name.endswith(tuple(ignored)) else _content(path)
    return found


def _content(path: Path) -> Any:
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        return _tensors(data)
    if path.suffix in (".json", ".jsonl"):
        with contextlib.suppress(ValueError):
            return [_steady(json.loads(line)) for line in ([data] if path.suffix == ".json" else data.splitlines())]
    return data


def _tensors(data: bytes) -> Any:
    try:
        length = struct.unpack("<Q", data[:8])[0]
        table = json.loads(data[8 : 8 + length])
        ends = max((entry["data_offsets"][1] for key, entry in table.items() if key != "__metadata__"), default=0)
        if len(data) != 8 + length + ends:
            return data
        return {
            key: entry
            if key == "__metadata__"
            else (
                entry["dtype"],
                tuple(entry["shape"]),
                data[8 + length + entry["data_offsets"][0] : 8 + length + entry["data_offsets"][1]],
            )
            for key, entry in table.items()
        }
    except (ValueError, KeyError, TypeError, struct.error):
        return data


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _steady(inner) for key, inner in value.items() if key not in _VOLATILE}
    if isinstance(value, list):
        return [_steady(inner) for inner in value]
    return value


def spread(count: int, moments: int) -> Iterator[int]:
    """Yield `count` moments, evenly spread over 1 to `moments`; all of them where there are no more."""
    if moments <= count:
        yield from range(1, moments + 1)
    else:
        for number in range(count):
            yield 1 + round(number * (moments - 1) / (count - 1))
