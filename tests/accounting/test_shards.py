"""What a process of several holds and gathers, from sizes alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from golden_models import MINI
from torch import nn

from vlaft.accounting.memory import GATHERED, memory_model, predict_memory
from vlaft.accounting.shards import gathering
from vlaft.accounting.step import trainable_without_data
from vlaft.model.load import load_config
from vlaft.recipe.resolve import resolve
from vlaft.recipe.settings import resolve_precision
from vlaft.training.model import base_model, unreached_modules
from vlaft.training.sharding import units

FUSED = Path(MINI / "fused")


@pytest.mark.parametrize("recipe", ["full", "lora8", "oft-film"])
def test_every_weight_is_gathered_once(recipe: str) -> None:
    config, settings = load_config(FUSED), resolve(recipe)
    for on_gpu in (False, True):
        precision = resolve_precision(settings.precision, on_gpu=on_gpu)
        model, _ = trainable_without_data(settings, config, precision)
        found = gathering(model, precision)
        parameters = list(model.parameters())
        buffers = sum(buffer.nbytes for buffer in model.buffers())
        assert found.weights + found.adapters == sum(one.nbytes for one in parameters) + buffers
        trained = sum(one.numel() for one in parameters if one.requires_grad)
        assert found.reduced == 4 * trained  # summed in float32 wherever they were made
        assert found.moments - 8 * trained == 4 * sum(one.requires_grad for one in parameters)  # and a count of each
        if not on_gpu:
            idle = {
                id(one)
                for module in unreached_modules(base_model(model))
                if not isinstance(module, nn.LayerNorm)  # in the rest, which is gathered for others' sake
                for one in module.parameters()
            }
            assert found.gathered == sum(one.nbytes for one in parameters if id(one) not in idle)
            assert found.held == found.traced == 4 * trained
        assert found.unit < found.gathered / 4


def test_what_is_gathered_in_half_is_what_products_read() -> None:
    config, settings = load_config(FUSED), resolve("oft-film")
    model, _ = trainable_without_data(settings, config, resolve_precision(settings.precision, on_gpu=True))
    seen: dict[int, bool] = {}
    for unit, in_half in units(model):
        for parameter in unit.parameters():
            seen.setdefault(id(parameter), in_half)
    names = {name: seen.get(id(parameter)) for name, parameter in model.named_parameters()}
    assert all(in_half is False for name, in_half in names.items() if ".scale." in name or ".shift." in name)
    assert all(in_half is False for name, in_half in names.items() if "embed_tokens" in name)
    assert all(in_half for name, in_half in names.items() if ".self_attn." in name or "lm_head" in name)


def test_more_gpus_hold_less() -> None:
    config = load_config(FUSED)
    words = ["train.gradient_checkpointing=all"]
    found = [predict_memory(resolve("full", (), words), config, batch_size=2, gpus=gpus) for gpus in (1, 2, 4, 8)]
    assert GATHERED not in found[0].terms and found[1].terms[GATHERED] == found[3].terms[GATHERED] > 0
    for term in ("weights", "optimizer state"):
        whole = found[0].terms[term]
        assert [one.terms[term] for one in found] == [-(-whole // gpus) for gpus in (1, 2, 4, 8)]
    assert [one.live for one in found] == sorted((one.live for one in found), reverse=True)


def test_what_cannot_be_cut_is_predicted_as_a_copy() -> None:
    config, recipe = load_config(FUSED), resolve("qlora32")
    assert memory_model(recipe, config, gpus=4).predict(2, 4).terms == memory_model(recipe, config).predict(2).terms
