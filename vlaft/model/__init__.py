"""The OpenVLA model.

The names here are loaded when they are asked for, which also registers the model with transformers' Auto classes:
reading a checkpoint's files (`checkpoint`, `tensor_stream`) needs neither transformers nor the memory it takes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlaft.model.configuration import OpenVLAConfig
    from vlaft.model.openvla import OpenVLAForActionPrediction

__all__ = ["OpenVLAConfig", "OpenVLAForActionPrediction"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vlaft.model import openvla

    return getattr(openvla, name)
