"""The OpenVLA model. Importing this package registers it with transformers' Auto classes."""

from vlaft.model.configuration import OpenVLAConfig
from vlaft.model.openvla import OpenVLAForActionPrediction, OpenVLAOutput

__all__ = ["OpenVLAConfig", "OpenVLAForActionPrediction", "OpenVLAOutput"]
