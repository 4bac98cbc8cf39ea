"""Fixtures: small bases with demonstrations converted for them."""

from __future__ import annotations

import pytest
import torch
from small_base import convert_small, write_small_base
from small_run import Small


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    folder = tmp_path_factory.mktemp("small")
    base = write_small_base(folder / "base")
    return Small(base, convert_small(base, folder / "data"))


@pytest.fixture(scope="session")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """The same with DINOv2 and SigLIP."""
    folder = tmp_path_factory.mktemp("fused")
    base = write_small_base(folder / "base", "fused")
    return Small(base, convert_small(base, folder / "data"))
