"""The writer of RLDS sets that the examples have."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

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
