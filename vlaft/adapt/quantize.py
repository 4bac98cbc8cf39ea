"""Frozen weights in 4 or 8 bits, through bitsandbytes as transformers drives it."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from vlaft.config import AdaptConfig
from vlaft.errors import MissingExtra

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
