"""`train.compile=true`: the same losses, from compiled blocks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_base import convert_small, write_small_base

from vlaft.recipe.resolve import resolve
from vlaft.training.events import Listener
from vlaft.training.trainer import train


@pytest.mark.slow
def test_compiled_blocks_train_as_plain_ones(tmp_path: Path) -> None:
    base = write_small_base(tmp_path / "base", "fused")
    data = convert_small(base, tmp_path / "data")
    losses = {}
    for compiled in ("false", "true"):
        words = [f"base='{base}'", f"data.path='{data}'", "data.augment=false", "data.workers=0", "train.steps=3"]
        words += ["train.batch_size=4", "train.log_every=1", "train.evaluate_every=0", f"train.compile={compiled}"]
        out = tmp_path / compiled
        train(resolve("lora8", [], words), out, Listener())
        losses[compiled] = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-4)
