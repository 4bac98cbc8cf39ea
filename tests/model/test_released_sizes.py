"""The released models on the meta device: names, shapes and counts, without a weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vlaft.adapt.methods import METHODS, SKIPPED, attach_lora, freeze
from vlaft.model.load import BASES, base_config
from vlaft.model.openvla import OpenVLAForActionPrediction
from vlaft.recipe.settings import LoraConfig

FUSED, SINGLE = "openvla/openvla-7b", "openvla/openvla-v01-7b"


def build(base: str) -> OpenVLAForActionPrediction:
    with torch.device("meta"):
        return OpenVLAForActionPrediction(base_config(base))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def trained(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def test_both_bases_are_there() -> None:
    assert set(BASES) == {FUSED, SINGLE}


@pytest.mark.parametrize(("base", "tensors", "layer_scales"), [(FUSED, 982, 48), (SINGLE, 637, 0)])
def test_state_dict_keys(base: str, tensors: int, layer_scales: int) -> None:
    state = build(base).state_dict()
    assert len(state) == tensors
    scales = [name for name in state if name.endswith(".scale_factor")]
    assert len(scales) == layer_scales
    assert not any("gamma" in name for name in state)


def test_shapes_of_the_fused_release() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in build(FUSED).state_dict().items()}
    dino, siglip = "vision_backbone.featurizer", "vision_backbone.fused_featurizer"
    expected = {
        f"{dino}.cls_token": (1, 1, 1024),
        f"{dino}.reg_token": (1, 4, 1024),
        f"{dino}.pos_embed": (1, 256, 1024),
        f"{dino}.patch_embed.proj.weight": (1024, 3, 14, 14),
        f"{dino}.blocks.23.attn.qkv.weight": (3072, 1024),
        f"{dino}.blocks.23.ls1.scale_factor": (1024,),
        f"{dino}.blocks.23.ls2.scale_factor": (1024,),
        f"{dino}.blocks.23.mlp.fc1.weight": (4096, 1024),
        f"{dino}.norm.bias": (1024,),
        f"{siglip}.pos_embed": (1, 256, 1152),
        f"{siglip}.patch_embed.proj.bias": (1152,),
        f"{siglip}.blocks.26.attn.qkv.weight": (3456, 1152),
        f"{siglip}.blocks.26.mlp.fc2.weight": (1152, 4304),
        f"{siglip}.attn_pool.latent": (1, 1, 1152),
        f"{siglip}.attn_pool.q.bias": (1152,),
        f"{siglip}.attn_pool.kv.weight": (2304, 1152),
        f"{siglip}.attn_pool.mlp.fc1.weight": (4304, 1152),
        "projector.fc1.weight": (8704, 2176),
        "projector.fc2.weight": (4096, 8704),
        "projector.fc3.bias": (4096,),
        "language_model.model.embed_tokens.weight": (32064, 4096),
        "language_model.model.layers.31.mlp.down_proj.weight": (4096, 11008),
        "language_model.model.norm.weight": (4096,),
        "language_model.lm_head.weight": (32064, 4096),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    assert not {f"{dino}.blocks.24.norm1.weight", f"{siglip}.cls_token", f"{siglip}.reg_token"} & set(shapes)


def test_shapes_of_the_single_release() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in build(SINGLE).state_dict().items()}
    assert shapes["vision_backbone.featurizer.pos_embed"] == (1, 256, 1152)
    assert shapes["projector.fc1.weight"] == (4096, 1152)
    assert shapes["projector.fc2.weight"] == (4096, 4096)
    assert not any(name.startswith(("vision_backbone.fused_featurizer", "projector.fc3")) for name in shapes)


def test_parameter_counts_of_the_fused_release() -> None:
    model = build(FUSED)
    llama = model.language_model
    assert count(model.vision_backbone.featurizer) == 303_230_976
    assert model.vision_backbone.fused_featurizer is not None
    assert count(model.vision_backbone.fused_featurizer) == 427_680_704
    assert count(model.vision_backbone) == 730_911_680
    assert count(model.projector) == 71_385_600
    assert count(llama) == 6_738_939_904
    assert count(llama.lm_head) == count(llama.model.embed_tokens) == 131_334_144
    assert count(llama.model.layers[0]) == 202_383_360
    assert count(model) == 7_541_237_184


def test_parameter_counts_of_the_single_release() -> None:
    model = build(SINGLE)
    assert count(model.vision_backbone) == 427_680_704
    assert count(model.projector) == 21_504_000
    assert count(model.language_model) == 6_738_939_904
    assert count(model) == 7_188_124_608


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        (FUSED, [7_541_237_184, 6_810_325_504, 465_051_648, 1_267_348_928]),
        (SINGLE, [7_188_124_608, 6_760_443_904, 465_051_648, 914_236_352]),
    ],
)
def test_trained_parameters_without_adapters(base: str, expected: list[int]) -> None:
    model = build(base)
    found = []
    for method in METHODS:
        freeze(model, method)
        found.append(trained(model))
    assert found == expected
    freeze(model, "last-layer")
    assert not model.language_model.model.norm.weight.requires_grad


@pytest.mark.parametrize(("base", "targets", "at_rank_32"), [(FUSED, 439, 110_828_288), (SINGLE, 341, 97_603_968)])
def test_lora_targets(base: str, targets: int, at_rank_32: int) -> None:
    adapted = attach_lora(build(base), LoraConfig(rank=32))
    names = [name for name, _ in adapted.named_parameters()]
    pairs = {name.split(".lora_A.")[0] for name in names if ".lora_A." in name}
    assert pairs == {name.split(".lora_B.")[0] for name in names if ".lora_B." in name}
    assert len(pairs) == targets
    assert trained(adapted) == at_rank_32
    assert any(name.endswith("patch_embed.proj") for name in pairs)
    assert any(name.endswith("lm_head") for name in pairs)


@pytest.mark.parametrize(("rank", "expected"), [(8, 27_707_072), (16, 55_414_144), (64, 221_656_576)])
def test_lora_counts_of_other_ranks(rank: int, expected: int) -> None:
    assert trained(attach_lora(build(FUSED), LoraConfig(rank=rank))) == expected


def test_linear_weights_that_quantisation_holds_in_few_bits() -> None:
    # docs/upstream.md, Memory: 7,275,659,264 quantised, the remainder (embeddings and head among it) is 265,577,920
    linear = [(name, module) for name, module in build(FUSED).named_modules() if isinstance(module, nn.Linear)]
    kept = [name for name, _ in linear if any(name.endswith(skipped) for skipped in SKIPPED)]
    assert kept == ["language_model.lm_head"]
    assert sum(module.weight.numel() for name, module in linear if name not in kept) == 7_275_659_264
