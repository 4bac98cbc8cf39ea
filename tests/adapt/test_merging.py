"""The arithmetic of merging against peft's own, on tiny modules of every kind."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft import get_peft_model_state_dict
from torch import Tensor, nn

from vlaft.adapt.merging import ModuleAdapter, module_adapters
from vlaft.errors import CheckpointError


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.inner = nn.ModuleDict({"conv": nn.Conv2d(3, 8, 4, 4), "linear": nn.Linear(8, 6)})

    def forward(self, ids: Tensor, images: Tensor) -> Tensor:
        return self.inner["linear"](self.embedding(ids).mean(1) + self.inner["conv"](images).flatten(2).mean(-1))


SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora-rslora": {"use_dora": True, "use_rslora": True},
    "patterns": {"alpha_pattern": {"linear": 3, "inner.conv": 7}, "rank_pattern": {"conv": 5, "embedding": 2}},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_merged_weights_are_those_of_peft(settings: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Tiny().to(dtype)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["embedding", "conv", "linear"], **settings)
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn_like(parameter)
            parameter.data = parameter.data * 1.3 + 0.1 if "magnitude" in name else noise
    adapters = module_adapters(config, get_peft_model_state_dict(adapted))
    assert set(adapters) == {"embedding.weight", "inner.conv.weight", "inner.linear.weight"}
    # peft adds in the weight's type, so its sum in float32 is the reference, rounded once
    reference = adapted.float().merge_and_unload().state_dict()
    for name, adapter in adapters.items():
        merged = adapter.merged(base[name])
        assert merged.dtype == dtype
        assert merged.shape == base[name].shape
        if dtype == torch.float32:
            torch.testing.assert_close(merged, reference[name], rtol=1e-5, atol=1e-5)
        else:
            torch.testing.assert_close(merged.float(), reference[name], rtol=2**-8, atol=1e-5)
        assert (merged.float() - base[name].float()).abs().max() > 0.01


def test_an_update_of_zero_changes_no_bit() -> None:
    weight = torch.randn(6, 8).bfloat16()
    adapter = ModuleAdapter(torch.randn(2, 8), torch.zeros(6, 2), scaling=4.0)
    assert torch.equal(adapter.merged(weight), weight)


def test_the_sum_is_rounded_once() -> None:
    # half a unit in the last place of bfloat16, twice: adding in bfloat16 would lose both
    weight = torch.tensor([[1.0]]).bfloat16()
    adapter = ModuleAdapter(torch.tensor([[1.0], [1.0]]), torch.tensor([[2**-8 * 0.75, 2**-8 * 0.75]]), scaling=1.0)
    assert adapter.merged(weight).item() == 1.0 + 2**-7


NAME = "base_model.model.inner.linear.lora_{}.weight"


@pytest.mark.parametrize(
    ("tensors", "word"),
    [
        ({NAME.format("A"): torch.zeros(3, 8)}, "inner.linear"),
        ({NAME.format("B"): torch.zeros(6, 3)}, "inner.linear"),
        ({"base_model.model.inner.linear.bias": torch.zeros(6)}, "inner.linear.bias"),
        ({"inner.linear.lora_A.weight": torch.zeros(3, 8)}, "inner.linear"),
        ({"base_model.model.inner.linear.lora_B.bias": torch.zeros(6)}, "lora_B.bias"),
        (
            {
                NAME.format("A"): torch.zeros(3, 8),
                NAME.format("B"): torch.zeros(6, 3),
                "base_model.model.embedding.modules_to_save.weight": torch.zeros(1),
            },
            "modules_to_save",
        ),
    ],
)
def test_what_cannot_be_merged_is_refused(tensors: dict[str, Tensor], word: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        module_adapters(peft.LoraConfig(r=3), tensors)
    assert word in str(caught.value)


@pytest.mark.parametrize(
    ("a", "b", "magnitude"),
    [
        (torch.zeros(3, 8), torch.zeros(6, 4), None),
        (torch.zeros(8), torch.zeros(6), None),
        (torch.zeros(3, 8, 4, 4), torch.zeros(6, 3), None),
        (torch.zeros(3, 8, 4, 4), torch.zeros(6, 3, 2, 2), None),
        (torch.zeros(3, 8), torch.zeros(6, 3), torch.ones(8)),
    ],
)
def test_tensors_that_do_not_fit_together(a: Tensor, b: Tensor, magnitude: Tensor | None) -> None:
    tensors = {NAME.format("A"): a, NAME.format("B"): b}
    if magnitude is not None:
        tensors["base_model.model.inner.linear.lora_magnitude_vector"] = magnitude
    with pytest.raises(CheckpointError, match=r"inner\.linear"):
        module_adapters(peft.LoraConfig(r=3), tensors)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_adapters_whose_initialisation_changed_the_base_are_refused(init: str) -> None:
    tensors = {NAME.format("A"): torch.zeros(3, 8), NAME.format("B"): torch.zeros(6, 3)}
    with pytest.raises(CheckpointError, match=init):
        module_adapters(peft.LoraConfig(r=3, init_lora_weights=init), tensors)
    assert len(module_adapters(peft.LoraConfig(r=3, init_lora_weights="gaussian"), tensors)) == 1
