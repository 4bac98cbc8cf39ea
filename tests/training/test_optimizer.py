"""Parameter groups, and the learning rate as a function of the step."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from golden_models import golden
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vlaft.adapt.methods import attach_lora, freeze
from vlaft.errors import MissingExtra
from vlaft.recipe.settings import LoraConfig, ScheduleConfig, TrainConfig
from vlaft.training.optimizer import build_optimizer, learning_rate_factor, parameter_groups, set_learning_rate

SCHEDULES = st.builds(
    ScheduleConfig,
    name=st.sampled_from(["constant", "cosine", "linear", "step"]),
    warmup_steps=st.integers(0, 30),
    step_size=st.none() | st.integers(1, 20),
    gamma=st.floats(0.0, 1.0),
    min_ratio=st.floats(0.0, 1.0),
)


@settings(max_examples=100)
@given(schedule=SCHEDULES, steps=st.integers(1, 60))
def test_factor_lies_between_0_and_1_and_rises_only_in_the_warm_up(schedule: ScheduleConfig, steps: int) -> None:
    factors = [learning_rate_factor(schedule, step, steps) for step in range(steps)]
    assert all(0.0 <= factor <= 1.0 for factor in factors)
    warm, after = factors[: schedule.warmup_steps], factors[schedule.warmup_steps :]
    assert warm == sorted(set(warm))  # strictly rising
    assert all(factor > 0 for factor in warm)
    assert after == sorted(after, reverse=True)
    if after:
        assert after[0] == pytest.approx(1.0)
    if schedule.warmup_steps and len(factors) >= schedule.warmup_steps:
        assert warm[-1] == 1.0


@settings(max_examples=100)
@given(schedule=SCHEDULES, steps=st.integers(1, 60))
def test_decays_stay_above_their_floor(schedule: ScheduleConfig, steps: int) -> None:
    factors = [learning_rate_factor(schedule, step, steps) for step in range(schedule.warmup_steps, steps)]
    if schedule.name == "constant":
        assert set(factors) <= {1.0}
    elif schedule.name == "step":
        size = schedule.step_size or steps
        assert factors == [schedule.gamma ** (index // size) for index in range(len(factors))]
    else:
        assert all(factor >= schedule.min_ratio - 1e-12 for factor in factors)


def test_shapes_of_the_decays() -> None:
    linear = ScheduleConfig(name="linear", min_ratio=0.2)
    assert [learning_rate_factor(linear, step, 4) for step in range(4)] == pytest.approx([1.0, 0.8, 0.6, 0.4])
    cosine = ScheduleConfig(name="cosine", warmup_steps=2)
    expected = [0.5, 1.0, *(0.5 * (1 + math.cos(math.pi * share)) for share in (0.0, 0.25, 0.5, 0.75))]
    assert [learning_rate_factor(cosine, step, 6) for step in range(6)] == pytest.approx(expected)


def test_lora_plus_puts_the_second_matrices_in_a_faster_group() -> None:
    adapted = attach_lora(golden("fused").load(), LoraConfig(rank=2, dora=True, targets=["q_proj", "fc1", "proj"]))
    names = {id(p): name for name, p in adapted.named_parameters() if p.requires_grad}
    slow, fast = parameter_groups(adapted, 1e-3, plus_ratio=16.0)
    assert {id(p) for p in [*slow["params"], *fast["params"]]} == set(names)
    assert len(slow["params"]) + len(fast["params"]) == len(names)
    assert all(".lora_B." in names[id(p)] for p in fast["params"])
    assert not any(".lora_B." in names[id(p)] for p in slow["params"])
    assert any("magnitude" in names[id(p)] for p in slow["params"])
    assert (slow["lr"], fast["lr"]) == (1e-3, 1.6e-2)

    optimizer = build_optimizer(adapted, TrainConfig(learning_rate=1e-3), plus_ratio=16.0)
    set_learning_rate(optimizer, 2e-3)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([2e-3, 3.2e-2])


def test_second_matrices_of_embeddings_are_fast_too() -> None:
    import peft

    model = peft.get_peft_model(
        nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)), peft.LoraConfig(r=2, target_modules=["0", "1"])
    )
    slow, fast = parameter_groups(model, 1.0, plus_ratio=2.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert sorted(names[id(p)].split(".")[3] for p in fast["params"]) == ["lora_B", "lora_embedding_B"]
    assert sorted(names[id(p)].split(".")[3] for p in slow["params"]) == ["lora_A", "lora_embedding_A"]


def test_only_trained_parameters_and_the_recipes_settings() -> None:
    model = golden("single").load()
    freeze(model, "last-layer")
    train = TrainConfig(learning_rate=3e-4, weight_decay=0.05, betas=(0.8, 0.95), eps=1e-6)
    optimizer = build_optimizer(model, train)
    assert isinstance(optimizer, torch.optim.AdamW)
    (group,) = optimizer.param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters() if p.requires_grad}
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (3e-4, 0.05, (0.8, 0.95), 1e-6)
    set_learning_rate(optimizer, 1e-5)
    assert group["lr"] == 1e-5


def test_8_bit_optimizer_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="bitsandbytes"):
        build_optimizer(nn.Linear(2, 2), TrainConfig(optimizer="paged-adamw-8bit"))
