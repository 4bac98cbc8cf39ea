"""The two released bases, described without a download: what `report` counts and `doctor` names.

Only sizes and number formats are here; weights, tokenizer and statistics come from the Hub.
"""

from __future__ import annotations

from pathlib import Path

from vlaft.model.checkpoint import load_config, resolve_checkpoint
from vlaft.model.configuration import OpenVLAConfig

_LLAMA_2_7B = {"model_type": "llama", "pad_token_id": 32000, "vocab_size": 32064}

BASES: dict[str, dict] = {
    "openvla/openvla-7b": {
        "dtype": "bfloat16",
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "llm_backbone_id": "llama2-7b-pure",
        "arch_specifier": "no-align+fused-gelu-mlp",
        "image_resize_strategy": "resize-naive",
        "text_config": _LLAMA_2_7B,
    },
    "openvla/openvla-v01-7b": {
        "dtype": "bfloat16",
        "vision_backbone_id": "siglip-vit-so400m",
        "llm_backbone_id": "vicuna-v15-7b",
        "arch_specifier": "no-align+gelu-mlp",
        "image_resize_strategy": "letterbox",
        "text_config": _LLAMA_2_7B,
    },
}


def base_config(base: str) -> OpenVLAConfig:
    """Return the configuration of a base: a local folder, one of `BASES` (no network), or another Hub repository.

    Raises:
        CheckpointError: no such folder or repository, or not an OpenVLA model.
    """
    if base in BASES and not Path(base).is_dir():
        return OpenVLAConfig(**BASES[base])
    return load_config(resolve_checkpoint(base, weights=False))
