"""Which parameters a recipe without adapters trains (upstream's freezing stages, `vla-scripts/train.py`)."""

from __future__ import annotations

from torch import nn

from vlaft.model.openvla import OpenVLAForActionPrediction

METHODS = ("full", "frozen-vision", "last-layer", "sandwich")


def trained_modules(model: OpenVLAForActionPrediction, method: str) -> list[nn.Module]:
    """Return the modules whose parameters `method` trains.

    * `full`: everything.
    * `frozen-vision`: the projector and the whole language model.
    * `last-layer`: token embeddings, last decoder block and head; the final norm stays frozen.
    * `sandwich`: vision, projector, and what `last-layer` trains.
    """
    llama = model.language_model
    last_layer: list[nn.Module] = [llama.model.embed_tokens, llama.model.layers[-1], llama.lm_head]
    return {
        "full": [model],
        "frozen-vision": [model.projector, llama],
        "last-layer": last_layer,
        "sandwich": [model.vision_backbone, model.projector, *last_layer],
    }[method]


def freeze(model: OpenVLAForActionPrediction, method: str) -> None:
    """Set `requires_grad` on every parameter as `method` (one of `METHODS`) says, in place."""
    model.requires_grad_(False)
    for module in trained_modules(model, method):
        module.requires_grad_(True)
