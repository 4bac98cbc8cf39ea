"""Ctrl-C and SIGTERM at any moment of a command: exit code 130, one sentence, no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import faults
import pytest
import typer

from vlaft.cli import console, interrupts
from vlaft.cli import main as frame
from vlaft.cli.main import main

AT_IMPORT = """
import importlib.abc, os, runpy, sys
class Stop(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Stop())
sys.argv = ["vlaft", *{words!r}]
runpy.run_module("vlaft", run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def heeded() -> Iterator[None]:
    """Undo what a shell does to jobs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("module", ["vlaft.cli.main", "typer", "vlaft.release.merge", "safetensors", "torch"])
def test_while_it_starts(tmp_path: Path, module: str, number: signal.Signals) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"last": "step-000001", "base": "."}')
    (tmp_path / "run" / "checkpoints" / "step-000001").mkdir(parents=True)
    words = ["merge", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    code = AT_IMPORT.format(module=module, number=int(number), words=words)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, preexec_fn=faults.heed_signals
    )
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def install(monkeypatch: pytest.MonkeyPatch, verb: object) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    app.command("probe")(verb)  # type: ignore[arg-type]
    monkeypatch.setattr(frame, "app", app)


def test_an_interrupt_that_got_lost_comes_back(
    heeded: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)  # pytest's own would warn of it

    class Dropped:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    went_on = []

    def probe() -> None:
        Dropped()  # Python drops exceptions of destructors
        went_on.append(1)
        with console.progress("working", total=2) as advance:
            advance()
            went_on.append(2)

    install(monkeypatch, probe)
    assert main(["probe"]) == 130
    assert went_on == [1]
    assert capsys.readouterr().err == "error: interrupted\n"
    assert not interrupts.was_interrupted()


def test_an_interrupt_that_became_another_error(
    heeded: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def probe() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            raise ImportError("KeyboardInterrupt: <EMPTY MESSAGE>") from None

    install(monkeypatch, probe)
    assert main(["probe"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_an_ignored_signal_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        install(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert main(["probe"]) == 0
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
