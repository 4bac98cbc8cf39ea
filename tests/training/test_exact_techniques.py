"""What saves memory and time without changing numbers goes down upstream's losses, alone and all together."""

from __future__ import annotations

import itertools

import pytest
import torch
from golden_models import NAMES, Golden, golden
from peft.tuners.lora import LoraLayer
from torch import nn

from vlaft.adapt.adapter import load_adapter_weights
from vlaft.recipe.resolve import resolve
from vlaft.recipe.settings import RecipeConfig, resolve_precision
from vlaft.training.model import make_trainable
from vlaft.training.optimizer import build_optimizer
from vlaft.training.step import autocast

IGNORED = -100


def ready(case: Golden, recipe: RecipeConfig) -> nn.Module:
    model = make_trainable(case.load(), recipe, resolve_precision(recipe.precision, on_gpu=False))
    load_adapter_weights(model, case.folder / "adapter_init")  # type: ignore[arg-type]
    return model.train()


def recipe_of(case: Golden, *words: str) -> RecipeConfig:
    lora = case.expected["lora"]
    fixed = [
        f"adapt.lora.rank={lora['r']}",
        f"adapt.lora.alpha={lora['lora_alpha']}",
        f"train.learning_rate={lora['lr']}",
    ]
    return resolve("lora8", [], [*fixed, f"train.weight_decay={lora['weight_decay']}", *words])


def positions(labels: torch.Tensor) -> torch.Tensor:
    """Columns of the labels, `[B, K]`; every row of the golden batch has as many."""
    rows = [(row != IGNORED).nonzero()[:, 0] for row in labels]
    return torch.stack(rows)


@pytest.mark.parametrize("level, at_labels", itertools.product(["none", "vision", "2", "all"], [True, False]))
@pytest.mark.parametrize("name", NAMES)
def test_upstreams_losses_with_every_exact_technique(name: str, level: str, at_labels: bool) -> None:
    """Recomputation, and with `at_labels` the last block and the head at label positions alone."""
    case = golden(name)
    recipe = recipe_of(case, f"train.gradient_checkpointing={level}")
    model, batch = ready(case, recipe), case.batch
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) <= case.expected["lora"]["trainable"]
    chosen = {"label_positions": positions(batch["labels"])} if at_labels else {}
    optimizer = build_optimizer(model, recipe.train)
    losses = []
    for _ in case.expected["lora"]["losses"]:
        loss = model(**batch, **chosen).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses == pytest.approx(case.expected["lora"]["losses"], rel=1e-5)


def gradients(case: Golden, recipe: RecipeConfig, *, cast: bool) -> tuple[list[torch.Tensor], int]:
    """Gradients of one step under bfloat16 autocast with float32 adapters, and the bytes that it saved for them."""
    model = ready(case, recipe)
    load_adapter_weights(model, case.folder / "adapter_trained")  # type: ignore[arg-type]
    for module in model.modules():
        if isinstance(module, LoraLayer):
            assert not module.cast_input_dtype_enabled
            module.cast_input_dtype_enabled = cast
    saved: dict[int, int] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)  # so that no address is used twice
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    batch = case.batch
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with autocast(torch.device("cpu"), torch.bfloat16), hooks:
        loss = model(**batch, label_positions=positions(batch["labels"])).loss
    loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None], sum(saved.values())


@pytest.mark.parametrize("name", NAMES)
def test_adapters_read_the_input_that_is_there(name: str) -> None:
    """Without peft's cast to float32 and autocast's back, gradients are the same bit for bit, and less is kept."""
    case = golden(name)
    recipe = recipe_of(case, "precision.compute=bfloat16", "precision.frozen=bfloat16")
    plain, more = gradients(case, recipe, cast=True)
    lean, less = gradients(case, recipe, cast=False)
    assert len(plain) == len(lean) > 20
    assert all(torch.equal(a, b) for a, b in zip(plain, lean, strict=True))
    assert less < 0.95 * more


def test_what_changes_rounding_and_by_how_much() -> None:
    """bfloat16 adapters, upstream's format, drift from float32 ones: losses by less than 1 %, but not by nothing."""
    case = golden("fused")

    def losses(*words: str) -> list[float]:
        recipe = recipe_of(case, "precision.compute=bfloat16", "precision.frozen=bfloat16", *words)
        model, batch = ready(case, recipe), case.batch
        optimizer = build_optimizer(model, recipe.train)
        found = []
        for _ in case.expected["lora"]["losses"]:
            with autocast(torch.device("cpu"), torch.bfloat16):
                loss = model(**batch, label_positions=positions(batch["labels"])).loss
            found.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return found

    exact = case.expected["lora"]["losses"]
    single, half = losses("precision.trained=float32"), losses("precision.trained=bfloat16")
    assert single == pytest.approx(exact, rel=0.01)
    assert half == pytest.approx(exact, rel=0.02)
    assert half != single
