"""Fixtures: a run's folder around a golden adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from golden_models import ADAPTER
from small_base import convert_small, write_small_base

from vlaft.weights.layout import fingerprint


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder around the golden adapter, with converted data."""
    root = tmp_path_factory.mktemp("run")
    base = write_small_base(root / "base")
    data = convert_small(base, root / "data")
    folder = root / "run"
    shutil.copytree(ADAPTER, folder / "checkpoints" / "step-000020")
    status = {"base": str(base), "base_fingerprint": fingerprint(base), "recipe": "lora32", "last": "step-000020"}
    pipeline = json.loads((data / "dataset.json").read_text())["image"]["pipeline"]
    status |= {"inference": {"prompt_style": "openvla", "image_pipeline": pipeline}}
    (folder / "run.json").write_text(json.dumps(status))
    shutil.copyfile(data / "dataset_statistics.json", folder / "dataset_statistics.json")
    recipe = {"adapt": {"method": "lora", "lora": {"rank": 4}, "quantize": "nf4"}, "data": {"path": [str(data)]}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    lines = [
        {"step": 10, "val_loss": 3.0},
        {"step": 20, "val_loss": 2.0, "val_action_l1": 0.25},
        {"step": 30, "val_loss": 1},
    ]
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + "{broken")
    return folder
