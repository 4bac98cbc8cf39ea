"""Fixtures that every test may use."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from golden_models import unpack

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep caches of the tests out of the user's."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c() -> None:
    """Undo what a shell does to jobs in the background: every process started from here would ignore Ctrl-C too."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def samples() -> Path:
    """Folder of real demonstrations in every format, and of facts about them (see its README.md)."""
    return HERE / "data"


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    """Folder of what upstream's own code computes (see its README.md)."""
    return HERE / "golden"


@pytest.fixture(scope="session")
def tiny(golden_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`golden/openvla-tiny` with its weights unpacked: a small release in `checkpoint/`, and what upstream computes."""
    return unpack(golden_folder / "openvla-tiny", tmp_path_factory.mktemp("tiny") / "openvla-tiny")
