"""The parameter table of design.md, on the meta device."""

import pytest

from vlaft.accounting.meta import policy_of
from vlaft.accounting.parameters import PARTS, count_parameters, folded_module, part_of
from vlaft.model.load import base_config
from vlaft.recipe.resolve import recipe_names, resolve

FUSED, SIGLIP = "openvla/openvla-7b", "openvla/openvla-v01-7b"
TRAINABLE = {  # design.md
    "full": (7_541_237_184, 7_188_124_608),
    "frozen-vision": (6_810_325_504, 6_760_443_904),
    "last-layer": (465_051_648, 465_051_648),
    "sandwich": (1_267_348_928, 914_236_352),
    "lora8": (27_707_072, 24_400_992),
    "lora16": (55_414_144, 48_801_984),
    "lora32": (110_828_288, 97_603_968),
    "lora64": (221_656_576, 195_207_936),
    "qlora32": (110_828_288, 97_603_968),
    "rslora64": (221_656_576, 195_207_936),
}
# OpenVLA-OFT's: recipe, action and state dimensions, what is trained on openvla-7b.
POLICIES = [
    ("oft", 7, 8, 261_946_119),
    ("oft-state", 7, 8, 278_764_295),
    ("qoft", 7, 8, 278_764_295),
    ("oft-film", 14, 14, 852_557_326),
]
UNREACHED_HEAD = 1_157_120  # the adapter on the language model's head: an L1 head writes the actions
TOTAL = (7_541_237_184, 7_188_124_608)
# What no loss reaches: the last ViT blocks, the final norms and the pooling head (or the adapters on them).
UNREACHED_WEIGHTS = (43_080_480, 30_480_160)
UNREACHED_RANK_32 = (1_701_888, 1_177_600)


def test_the_table_is_about_the_shipped_recipes():
    assert {*TRAINABLE, *(name for name, *_ in POLICIES)} == set(recipe_names())


@pytest.mark.parametrize("column, base", enumerate([FUSED, SIGLIP]))
@pytest.mark.parametrize("name", TRAINABLE)
def test_counts_are_those_of_the_design(name, base, column):
    counted = count_parameters(resolve(name), base_config(base))
    trainable, adapters = TRAINABLE[name][column], "lora" in name
    assert counted.trainable == trainable
    assert counted.total == TOTAL[column] + (trainable if adapters else 0)
    if adapters:
        unreached = UNREACHED_RANK_32[column] * int(name[-2:].lstrip("a")) // 32
    else:
        unreached = UNREACHED_WEIGHTS[column] if name in ("full", "sandwich") else 0
    assert counted.reached_by_gradient == trainable - unreached
    assert tuple(counted.parts) == tuple(PARTS)
    for groups in (counted.parts, counted.modules):
        assert sum(part.total for part in groups.values()) == counted.total
        assert sum(part.trainable for part in groups.values()) == counted.trainable


@pytest.mark.parametrize("name, action_size, state_size, trainable", POLICIES)
def test_policies_count_the_modules_of_their_own(name, action_size, state_size, trainable):
    recipe = resolve(name)
    counted = count_parameters(recipe, base_config(FUSED), policy_of(recipe, action_size, state_size))
    assert counted.trainable == trainable and counted.total == TOTAL[0] + trainable
    assert counted.reached_by_gradient == trainable - UNREACHED_RANK_32[0] - UNREACHED_HEAD - film_of_last_blocks(name)
    own = {part: entry.trainable for part, entry in counted.parts.items() if part not in PARTS}
    assert sum(own.values()) == trainable - TRAINABLE["lora32"][0]
    assert sum(part.trainable for part in counted.parts.values()) == trainable


def film_of_last_blocks(name):
    """Scale and shift of the ViTs' last blocks, whose output no loss reads."""
    return sum(2 * (4096 * width + width) for width in (1024, 1152)) if name == "oft-film" else 0


def test_parts_are_those_of_the_reference():
    counted = count_parameters(resolve("lora32"), base_config(FUSED))
    base = {part: entry.total - entry.trainable for part, entry in counted.parts.items()}
    assert base == {
        "vision": 730_911_680,
        "projector": 71_385_600,
        "language model": 6_738_939_904 - 131_334_144,
        "head": 131_334_144,
    }
    assert counted.parts["head"].trainable == 1_157_120
    assert counted.parts["projector"].trainable == 1_019_904
    assert counted.parts["language model"].trainable == 79_953_920


def test_folding():
    assert (
        folded_module("vision_backbone.featurizer.blocks.3.ls1.scale_factor")
        == "vision_backbone.featurizer.blocks.N.ls1"
    )
    assert folded_module("base_model.model.projector.fc1.base_layer.bias") == "projector.fc1"
    assert part_of("language_model.model.embed_tokens.weight") == "language model"
