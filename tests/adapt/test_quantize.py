"""Adapters over a base in 4 or 8 bits, on bitsandbytes' CPU backend."""

from __future__ import annotations

import importlib.util
import logging

import pytest
import torch
from golden_models import NAMES, Golden, golden
from torch import nn

from vlaft.adapt.adapter import load_adapter_weights
from vlaft.adapt.methods import attach_lora, quantization_config
from vlaft.errors import MissingExtra
from vlaft.model.load import load_model
from vlaft.model.openvla import OpenVLAForActionPrediction
from vlaft.recipe.settings import AdaptConfig, LoraConfig

KINDS = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest) -> Golden:
    return golden(request.param)


def load(case: Golden, kind: str) -> OpenVLAForActionPrediction:
    pytest.importorskip("bitsandbytes")
    settings = AdaptConfig(quantize=kind, double_quant=True)  # type: ignore[arg-type]
    return load_model(case.folder, dtype=torch.float32, quantization=quantization_config(settings, torch.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_layer_but_the_head_is_quantised(case: Golden, kind: str) -> None:
    plain = {name for name, module in case.load().named_modules() if type(module) is nn.Linear}
    model = load(case, kind)
    quantised = {name for name, module in model.named_modules() if type(module).__name__ == KINDS[kind]}
    assert plain - quantised == {"language_model.lm_head"}
    assert quantised < plain
    rest = [p.dtype for name, p in model.named_parameters() if name.removesuffix(".weight") not in quantised]
    assert set(rest) == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_near_that_of_the_exact_base(case: Golden, kind: str) -> None:
    with torch.no_grad():
        loss = load(case, kind)(**case.batch).loss.item()
    # the mini models are 24 to 48 wide, where a block of 64 weights spans rows: nf4 is coarse on them
    assert loss == pytest.approx(case.expected["loss"], rel=0.1 if kind == "nf4" else 0.01)
    assert loss != pytest.approx(case.expected["loss"], rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_vision_and_projector_adapters(case: Golden, kind: str) -> None:
    adapted = attach_lora(load(case, kind), LoraConfig(rank=4))
    load_adapter_weights(adapted, case.folder / "adapter_trained")  # B is not zero, so A has gradients as well
    adapted(**case.batch).loss.backward()
    reached = {name for name, norm in case.expected["grad_norms"].items() if norm is not None}
    seen = set()
    for name, parameter in adapted.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
            continue
        weight = name.removeprefix("base_model.model.").split(".lora_")[0] + ".weight"
        assert (parameter.grad is not None) == (weight in reached), name
        if parameter.grad is not None:
            assert torch.isfinite(parameter.grad).all()
            assert parameter.grad.abs().sum() > 0, name
            seen.add(weight)
    for module in (
        "vision_backbone.featurizer.patch_embed.proj",
        "vision_backbone.featurizer.blocks.0.attn.qkv",
        "projector.fc1",
        "language_model.model.layers.0.self_attn.q_proj",
        "language_model.lm_head",
    ):
        assert f"{module}.weight" in seen


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss_and_leaves_the_base_alone(case: Golden, kind: str) -> None:
    adapted = attach_lora(load(case, kind), LoraConfig(rank=4))
    frozen = {name: p.detach().clone() for name, p in adapted.named_parameters() if not p.requires_grad}
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    losses = []
    for _ in range(4):
        loss = adapted(**case.batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]
    for name, parameter in adapted.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name


def test_nothing_is_quantised_unless_asked_for() -> None:
    assert quantization_config(AdaptConfig(), torch.bfloat16) is None


def test_without_bitsandbytes_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'vlaft\[qlora\]'"):
        quantization_config(AdaptConfig(quantize="nf4"), torch.bfloat16)


def test_the_missing_kernel_package_is_not_announced_and_all_else_is() -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")

    def passes(message: str, *values: object) -> bool:
        return bool(logger.filter(logging.LogRecord(logger.name, logging.WARNING, "", 0, message, values, None)))

    assert not passes("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please", "No module")
    assert passes("Something else: %s", "x")
