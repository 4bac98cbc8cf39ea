"""Policies of the mini model with heads of their own: trained for a few steps, and merged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from small_base import INSTRUCTION, convert_small, write_small_base
from small_run import Small, run

from vlaft.cli.main import main
from vlaft.policy import Policy

CHUNK = "policy.chunk=3"
RECIPES = {"oft": (CHUNK,), "oft-state": (CHUNK,), "oft-film": (CHUNK, "policy.cameras=[main,wrist]")}


def write_rich(folder: Path) -> Small:
    """Six episodes of eight steps with two cameras and a state, for two ViTs."""
    base = write_small_base(folder / "base", "fused")
    return Small(base, convert_small(base, folder / "data", rich=True))


def merged_policy(rich: Small, name: str, folder: Path, *words: str) -> Path:
    """Train a recipe for three steps in `folder / "run"`, and return what it is merged into."""
    run(rich.recipe(name, *RECIPES.get(name, ()), "train.save_every=3", *words), folder / "run")
    assert main(["merge", str(folder / "run"), "--out", str(folder / "merged"), "--no-verify"]) == 0
    return folder / "merged"


def ask(policy: Policy, edge: int = 64) -> np.ndarray:
    """Return the actions `[K, A]` that a policy writes for always the same frames, of `edge` pixels, and state."""
    reads = policy.model.policy
    generator = np.random.default_rng(3)
    seen = {camera: generator.integers(0, 256, (edge, edge, 3), dtype=np.uint8) for camera in reads.cameras}
    state = [0.5, 0.1, 0.5] if reads.state else None
    actions: np.ndarray = policy.predict(seen, INSTRUCTION, state=state).actions
    return actions
