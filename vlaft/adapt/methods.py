"""Low-rank adapters through peft, on upstream's targets and with upstream's defaults."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import peft
import torch
from peft import PeftModel
from torch import nn

from vlaft.errors import ConfigError, MissingExtra
from vlaft.model.openvla import OpenVLAForActionPrediction
from vlaft.recipe.settings import AdaptConfig, LoraConfig

# PiSSA's start is computed in `pissa`: peft's own stops at the patch convolutions, which it cannot decompose.
_INIT = {"gaussian": "gaussian", "pissa": "gaussian", "default": True}


def peft_config(lora: LoraConfig) -> peft.LoraConfig:
    """Translate a recipe's `adapt.lora` for peft.

    Gaussian initialisation draws A with standard deviation 1/r and sets B to 0, as upstream; the update is scaled
    by alpha/r (rsLoRA: alpha/sqrt(r)).
    """
    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.effective_alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        init_lora_weights=_INIT[lora.init],
        use_dora=lora.dora,
        use_rslora=lora.rslora,
    )


def attach_lora(model: OpenVLAForActionPrediction, lora: LoraConfig, *, upcast: bool = True) -> PeftModel:
    """Freeze `model` and add adapters, in place.

    Args:
        model: the base, possibly quantised or on the meta device.
        lora: the recipe's settings.
        upcast: hold adapters in float32 where the base is in half precision; False gives upstream's bfloat16.

    Raises:
        ConfigError: a target that names no module of this model.
    """
    last_names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    # Names that only one of the two architectures has (`fc3`) are no mistake; names that neither has are.
    unknown = [target for target in lora.targets if target not in last_names and target not in ("fc3", "q", "kv")]
    if unknown:
        raise ConfigError(f"adapt.lora.targets: no module of this model is called {', '.join(unknown)}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(is_gradient_checkpointing|tie_word_embeddings).*")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # peft's own call, not the user's
        return peft.get_peft_model(model, peft_config(lora), autocast_adapter_dtype=upcast)


METHODS = ("full", "frozen-vision", "last-layer", "sandwich")


def trained_modules(model: OpenVLAForActionPrediction, method: str) -> list[nn.Module]:
    """Return the modules whose parameters `method` trains.

    * `full`: everything.
    * `frozen-vision`: the projector and the whole language model.
    * `last-layer`: token embeddings, last decoder block and head; the final norm stays frozen.
    * `sandwich`: vision, projector, and what `last-layer` trains.
    """
    parts = model.parts()
    last_layer: list[nn.Module] = [model.get_input_embeddings(), model.stacks()[-1][-1], parts["head"]]
    trained: dict[str, list[nn.Module]] = {
        "full": [model],
        "frozen-vision": [parts["projector"], parts["language model"], parts["head"]],
        "last-layer": last_layer,
        "sandwich": [parts["vision"], parts["projector"], *last_layer],
    }
    return trained[method]


def freeze(model: OpenVLAForActionPrediction, method: str) -> None:
    """Set `requires_grad` on every parameter as `method` (one of `METHODS`) says, in place."""
    model.requires_grad_(False)
    for module in trained_modules(model, method):
        module.requires_grad_(True)


# Kept in full precision: the head, whose logits decide the action.
SKIPPED = ("lm_head",)


def quantization_config(adapt: AdaptConfig, compute_dtype: torch.dtype) -> Any:
    """Return transformers' `BitsAndBytesConfig` for a recipe, or None where nothing is quantised.

    Args:
        adapt: the recipe's `adapt` section.
        compute_dtype: number format of the matrix products on dequantised weights.

    Raises:
        MissingExtra: bitsandbytes is not installed.
    """
    if adapt.quantize == "none":
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtra(f"adapt.quantize={adapt.quantize}", "bitsandbytes", "qlora")
    from transformers import BitsAndBytesConfig

    if adapt.quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(SKIPPED))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=adapt.double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=list(SKIPPED),
    )
