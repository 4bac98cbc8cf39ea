"""Adapters while they train: upstream's losses step by step, what is adapted, which gradients flow."""

from __future__ import annotations

import pytest
import torch
from golden_models import NAMES, Golden, golden

from vlaft.adapt import adapt
from vlaft.adapt.adapter import load_adapter, load_adapter_weights, read_adapter_tensors
from vlaft.adapt.methods import attach_lora, peft_config
from vlaft.errors import ConfigError
from vlaft.recipe.settings import AdaptConfig, LoraConfig


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest) -> Golden:
    return golden(request.param)


def test_trajectory_from_upstreams_initial_adapter(case: Golden) -> None:
    expected = case.expected["lora"]
    adapted = attach_lora(case.load(), LoraConfig(rank=expected["r"], alpha=expected["lora_alpha"]))
    load_adapter_weights(adapted, case.folder / "adapter_init")
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == expected["trainable"]
    optimizer = torch.optim.AdamW(trained, lr=expected["lr"], weight_decay=expected["weight_decay"])
    losses = []
    for _ in expected["losses"]:
        loss = adapted(**case.batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(losses) == 15
    assert losses == pytest.approx(expected["losses"], rel=1e-4)
    assert losses[0] == pytest.approx(case.expected["loss"], rel=1e-5)
    # the loss of the trained adapter, still apart from its base, is that of the merged model
    assert adapted(**case.batch).loss.item() == pytest.approx(expected["merged_loss"], rel=1e-4)

    state = adapted.state_dict()
    for name, tensor in read_adapter_tensors(case.folder / "adapter_trained").items():
        ours = state[name.replace(".weight", ".default.weight")]
        torch.testing.assert_close(ours, tensor, rtol=1e-3, atol=1e-4)


def test_upstreams_trained_adapter_loads_and_predicts_as_merged(case: Golden) -> None:
    adapted = load_adapter(case.load(), case.folder / "adapter_trained")
    assert not any(parameter.requires_grad for parameter in adapted.parameters())
    assert not adapted.training
    inputs = {name: tensor for name, tensor in case.batch.items() if name != "labels"}
    with torch.no_grad():
        logits = adapted(**inputs).logits
    torch.testing.assert_close(logits, case.tensors["merged_logits"], rtol=0, atol=1e-4)


def test_targets_are_those_that_upstream_stored(case: Golden) -> None:
    adapted = attach_lora(case.load(), LoraConfig(rank=4))
    ours = {name.replace(".default", "") for name, p in adapted.named_parameters() if p.requires_grad}
    assert ours == set(read_adapter_tensors(case.folder / "adapter_init"))


def test_gaussian_initialisation_and_scaling(case: Golden) -> None:
    torch.manual_seed(3)
    model = case.load()
    before = model(**case.batch).logits.detach()
    adapted = attach_lora(model, LoraConfig(rank=8))
    firsts = [p.flatten() for name, p in adapted.named_parameters() if ".lora_A." in name]
    assert torch.cat(firsts).std().item() == pytest.approx(1 / 8, rel=0.05)
    assert all((p == 0).all() for name, p in adapted.named_parameters() if ".lora_B." in name)
    assert torch.equal(adapted(**case.batch).logits, before)  # B = 0: nothing changes at the start
    assert peft_config(LoraConfig(rank=8)).lora_alpha == 8
    assert peft_config(LoraConfig(rank=64)).lora_alpha == 16
    assert peft_config(LoraConfig(rank=64, alpha=5)).lora_alpha == 5


def test_gradients_reach_every_adapter_but_the_unreached_ones(case: Golden) -> None:
    adapted = attach_lora(case.load(), LoraConfig(rank=4))
    load_adapter_weights(adapted, case.folder / "adapter_trained")
    adapted(**case.batch).loss.backward()
    reached = {name for name, norm in case.expected["grad_norms"].items() if norm is not None}
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            weight = name.removeprefix("base_model.model.").split(".lora_")[0] + ".weight"
            assert (parameter.grad is not None) == (weight in reached), name
        else:
            assert parameter.grad is None


def test_adapters_are_in_float32_over_half_precision_unless_upstreams_way_is_asked_for(case: Golden) -> None:
    def dtypes(upcast: bool) -> set[torch.dtype]:
        adapted = attach_lora(case.load().to(torch.bfloat16), LoraConfig(rank=4), upcast=upcast)
        assert adapted.get_base_model().projector.fc1.base_layer.weight.dtype == torch.bfloat16
        return {parameter.dtype for parameter in adapted.parameters() if parameter.requires_grad}

    assert dtypes(upcast=True) == {torch.float32}
    assert dtypes(upcast=False) == {torch.bfloat16}


def test_unknown_targets_are_named(case: Golden) -> None:
    with pytest.raises(ConfigError, match=r"called qvk, kqv$"):
        attach_lora(case.load(), LoraConfig(targets=["q_proj", "qvk", "kqv"]))


def test_adapt_freezes_or_wraps() -> None:
    case = golden("single")
    model = case.load()
    assert adapt(model, AdaptConfig(method="last-layer")) is model
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "language_model.lm_head.weight" in trained
    assert "language_model.model.embed_tokens.weight" in trained
    assert "language_model.model.layers.2.mlp.up_proj.weight" in trained
    assert "language_model.model.norm.weight" not in trained
    assert not any(name.startswith(("vision", "projector", "language_model.model.layers.1.")) for name in trained)
    wrapped = adapt(case.load(), AdaptConfig(method="lora", lora=LoraConfig(rank=2)))
    assert all(".lora_" in name for name, p in wrapped.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("method", ["full", "frozen-vision", "sandwich"])
def test_the_other_freezing_stages(method: str) -> None:
    model = golden("fused").load()
    adapt(model, AdaptConfig(method=method))  # type: ignore[arg-type]
    tops: dict[str, set[bool]] = {name.split(".")[0]: set() for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        tops[name.split(".")[0]].add(parameter.requires_grad)
    middle = model.language_model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert tops["projector"] == {True}
    assert tops["vision_backbone"] == {method != "frozen-vision"}
    assert middle is (method != "sandwich")
