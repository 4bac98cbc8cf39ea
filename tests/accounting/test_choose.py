"""Recipe, recomputation and batch chosen for a card, and the sizes that openvla-7b must fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from golden_models import MINI

from benchmarks.flops import step_operations
from vlaft.accounting.choose import RESERVE, choose, relative_time
from vlaft.accounting.memory import memory_model, predict_memory
from vlaft.cli.main import main
from vlaft.errors import VlaftError
from vlaft.model.load import base_config, load_config
from vlaft.recipe.resolve import resolve
from vlaft.recipe.settings import RecipeConfig

GB = 10**9
SEVEN = "openvla/openvla-7b"


def made(name: str, words: list[str]) -> RecipeConfig:
    return resolve(name, [], words)


@pytest.mark.parametrize(
    "words, batch_size, allocated, total",
    [
        # the recipes as they are shipped
        ("qlora32", 1, 6.0, 7.0),
        ("lora32 train.gradient_checkpointing=all", 1, 17.0, 18.0),
        # upstream's number format for adapters, and moments in 8 bits: both change rounding
        ("qlora32 precision.trained=bfloat16", 1, 5.4, 6.2),
        ("lora32 train.gradient_checkpointing=all precision.trained=bfloat16", 1, 16.2, 17.0),
        ("lora32 train.gradient_checkpointing=4", 16, 37.0, 40.0),
    ],
)
def test_openvla_7b_is_predicted_to_fit(words: str, batch_size: int, allocated: float, total: float) -> None:
    name, *settings = words.split()
    prediction = predict_memory(resolve(name, [], settings), base_config(SEVEN), batch_size=batch_size)
    assert prediction.allocated < allocated * GB
    assert prediction.peak < total * GB
    assert sum(prediction.terms.values()) == prediction.peak


@pytest.mark.slow
def test_an_8_gb_card_gets_qlora_and_hears_why() -> None:
    choice = choose(made, base_config(SEVEN), 8 * GB)
    train = choice.recipe.train
    assert choice.recipe.name == "qlora32"
    assert (train.gradient_checkpointing, train.optimizer) == ("all", "paged-adamw-8bit")
    assert int(train.batch_size) * train.accumulation == 16
    assert train.batch_size == 4  # unpacking weights costs the same for four examples as for one
    assert choice.memory.peak <= (1 - RESERVE) * 8 * GB
    assert len(choice.reasons) == 2
    assert "lora32 needs 17" in choice.reasons[0]
    assert "qlora32, 4 x 4 examples per update, every block recomputed: 7." in choice.reasons[1]


def of_base(name: str, words: list[str]) -> RecipeConfig:
    return resolve(name, [], [*words, f"base='{MINI / 'fused'}'"])


def needs(name: str, batch_size: int, *words: str) -> int:
    return predict_memory(of_base(name, list(words)), load_config(MINI / "fused"), batch_size=batch_size).peak


def test_a_large_card_recomputes_nothing_and_takes_all_examples_at_once() -> None:
    choice = choose(of_base, load_config(MINI / "fused"), 80 * GB)
    train = choice.recipe.train
    assert choice.recipe.name == "lora32"
    assert (train.batch_size, train.accumulation, train.gradient_checkpointing) == (16, 1, "none")
    assert choice.memory == predict_memory(choice.recipe, load_config(MINI / "fused"))
    assert len(choice.reasons) == 1


def test_what_the_user_fixed_stays() -> None:
    def fixed(name: str, words: list[str]) -> RecipeConfig:
        return of_base(name, [*words, "train.batch_size=2", "train.accumulation=3", "train.gradient_checkpointing=2"])

    train = choose(fixed, load_config(MINI / "fused"), 80 * GB).recipe.train
    assert (train.batch_size, train.accumulation, train.gradient_checkpointing) == (2, 3, 2)


def test_a_card_on_which_nothing_fits_is_told_what_is_needed() -> None:
    with pytest.raises(VlaftError, match=r"no recipe fits 0\.1 GB: .* lora32 needs 0\.\d GB, qlora32 needs 0\.\d GB"):
        choose(of_base, load_config(MINI / "fused"), GB // 10)


def test_time_is_ordered_as_arithmetic_has_it() -> None:
    config = base_config(SEVEN)

    def time(name: str, level: str, batch_size: int) -> float:
        recipe = resolve(name, [], [f"train.gradient_checkpointing={level}", f"train.batch_size={batch_size}"])
        return relative_time(recipe, config)

    levels = ["none", "vision", "4", "2", "all"]
    times = [time("lora32", level, 4) for level in levels]
    assert times == sorted(times) and len(set(times)) == 5
    assert time("lora32", "none", 16) < time("lora32", "none", 1)
    assert time("qlora32", "none", 1) > 1.5 * time("lora32", "none", 1)
    assert time("qlora32", "none", 16) < 1.2 * time("lora32", "none", 16)
    # recomputing everything adds half of what a frozen base's forward and backward pass take
    assert times[-1] / times[0] == pytest.approx(1.5, abs=0.01)


def test_each_level_of_recomputation_holds_less_and_computes_more() -> None:
    config = load_config(MINI / "fused")
    recipes = [
        resolve("lora32", [], [f"train.gradient_checkpointing={level}"]) for level in ("none", "vision", "2", "all")
    ]
    activations = [memory_model(recipe, config).live_peak(16) for recipe in recipes]
    operations = [step_operations(recipe, config, batch_size=1) for recipe in recipes]
    assert activations == sorted(activations, reverse=True) and len(set(activations)) == len(activations)
    assert len({each.forward for each in operations}) == 1
    backward = [each.backward for each in operations]
    assert backward == sorted(backward) and len(set(backward)) == len(backward)
    # what is repeated lies in vision: its blocks, not the patch convolutions, which weigh much in so small a model
    again = backward[1] - backward[0]
    assert 0.5 * operations[0].parts["vision"] < again <= operations[0].parts["vision"]


def test_operations_grow_with_the_batch_and_have_parts() -> None:
    config = load_config(MINI / "single")
    one, three = (step_operations(resolve("lora8"), config, batch_size=size) for size in (1, 3))
    assert three.total == 3 * one.total
    assert sum(one.parts.values()) == one.forward
    assert all(count > 0 for count in one.parts.values())


def test_the_command_needs_to_know_the_card(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", "--recipe", "auto", "--out", str(tmp_path / "run")]) == 2
    assert "--gpu-memory, such as 24GB" in capsys.readouterr().err
