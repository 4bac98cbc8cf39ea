"""Which parameters are trained, and how the others are held."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from vlaft.model.openvla import OpenVLAForActionPrediction
    from vlaft.recipe.settings import AdaptConfig


def adapt(model: OpenVLAForActionPrediction, settings: AdaptConfig, *, upcast: bool = True) -> nn.Module:
    """Make `model` trainable as a recipe says: adapters, or a part of its own parameters.

    Args:
        model: the base; changed in place.
        settings: the recipe's `adapt` section.
        upcast: hold adapters in float32 whatever the base's precision.

    Returns:
        The model, wrapped by peft where there are adapters.
    """
    from vlaft.adapt.methods import attach_lora, freeze

    if settings.method == "lora":
        return attach_lora(model, settings.lora, upcast=upcast)
    freeze(model, settings.method)
    return model
