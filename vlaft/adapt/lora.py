"""Low-rank adapters through peft, on upstream's targets and with upstream's defaults."""

from __future__ import annotations

import warnings

import peft
from peft import PeftModel

from vlaft.config import LoraConfig
from vlaft.errors import ConfigError
from vlaft.model.openvla import OpenVLAForActionPrediction

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
