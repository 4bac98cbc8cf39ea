"""A small base in the layout of openvla/openvla-7b, made from nothing: for the quick demo and for tests.

The same architecture (DINOv2 and SigLIP side by side, projector, Llama), 84 px, about 1.5 million parameters, with a
word-level tokenizer of its own and random weights. It knows nothing until it is trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch

from vlaft.model import OpenVLAConfig, OpenVLAForActionPrediction
from vlaft.release import preprocessor_config

BINS = 256
PADDING = 64  # rows of the vocabulary behind the action tokens, as the release has them
IMAGE_SIZE = 84
PROMPT_WORDS = "In : What action should the robot take to ? Out"


def make_small_base(folder: Path, sentences: Iterable[str], *, seed: int = 0, width: int = 128) -> Path:
    """Write a base that knows the words of `sentences`.

    Args:
        folder: a new folder.
        sentences: instructions whose words the tokenizer shall know.
        seed: of the weights.
        width: of the language model; the ViTs are three quarters as wide.

    Returns:
        The folder.
    """
    words = sorted(set(re.findall(r"\w+|[^\w\s]", f"{PROMPT_WORDS} {' '.join(sentences)}".lower())) | set("?:"))
    special = ["<unk>", "<s>", "</s>", "<PAD>", "\u2581"]
    names = [*special, *words, *PROMPT_WORDS.split()]
    names = list(dict.fromkeys(names))
    size = -(-(len(names) + BINS) // 64) * 64  # the action tokens are the last ids below a multiple of 64
    folder.mkdir(parents=True)
    write_tokenizer(folder, names)
    override = {"patch_size": 14, "embed_dim": width * 3 // 4, "depth": 3, "num_heads": 3}
    config = {
        "model_type": "openvla",
        "architectures": ["OpenVLAForActionPrediction"],
        "arch_specifier": "no-align+fused-gelu-mlp",
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "llm_backbone_id": "llama2-7b-pure",
        "use_fused_vision_backbone": True,
        "image_resize_strategy": "resize-naive",
        "image_sizes": [IMAGE_SIZE, IMAGE_SIZE],
        "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
        "timm_override_act_layers": [None, None],
        "vision_overrides": [
            override | {"mlp_ratio": 4.0, "reg_tokens": 4},
            override | {"mlp_ratio": 3.7362},
        ],
        "text_config": {
            "model_type": "llama",
            "hidden_size": width,
            "intermediate_size": width * 11 // 4,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": size + PADDING,
            "pad_token_id": special.index("<PAD>"),
        },
        "pad_token_id": special.index("<PAD>"),
        "pad_to_multiple_of": PADDING,
        "n_action_bins": BINS,
        "norm_stats": {},
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor_config(config), indent=2))
    torch.manual_seed(seed)
    model = OpenVLAForActionPrediction(OpenVLAConfig.from_dict(dict(config)))
    model.save_pretrained(folder / ".weights")
    for path in (folder / ".weights").glob("*.safetensors*"):
        path.rename(folder / path.name)
    for path in (folder / ".weights").iterdir():
        path.unlink()
    (folder / ".weights").rmdir()
    return folder


def write_tokenizer(folder: Path, names: list[str]) -> None:
    """Write a word-level tokenizer whose ids are the positions in `names`."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), behavior="removed", invert=True)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>", "<PAD>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<PAD>"}
    settings = tokens | {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens, indent=2))
