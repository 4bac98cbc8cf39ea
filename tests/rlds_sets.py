"""Small RLDS sets as tests write them, by the writer among the examples."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import numpy as np
from repository import ROOT


def _load_writer() -> ModuleType:
    path = ROOT / "examples" / "rlds_writer.py"
    spec = importlib.util.spec_from_file_location("rlds_writer", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rlds_writer"] = module
    spec.loader.exec_module(module)
    return module


writer = _load_writer()


def make_episode(steps: int = 4, seed: int = 0, text: str = "pick up the cup") -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {
        "action": random.normal(size=(steps, 7)).astype(np.float32),
        "observation/state": random.normal(size=(steps, 8)).astype(np.float32),
        "observation/image": random.integers(0, 256, (steps, 16, 20, 3), dtype=np.uint8),
        "observation/wrist_image": random.integers(0, 256, (steps, 8, 8, 3), dtype=np.uint8),
        "language_instruction": [text] * steps,
    }
