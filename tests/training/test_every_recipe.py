"""Every shipped recipe trains, and changes what it should and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_models import base_tensors, golden
from safetensors.torch import load_file
from small_run import Small, run
from torch import Tensor

from vlaft.accounting.parameters import count_parameters
from vlaft.action.metrics import MetricSums
from vlaft.model.load import load_config
from vlaft.recipe.resolve import recipe_names, resolve
from vlaft.recipe.settings import RecipeConfig
from vlaft.release.merge import merge
from vlaft.training.events import Listener
from vlaft.training.run import Run
from vlaft.weights.trained import find_trained

pytestmark = pytest.mark.filterwarnings("error::vlaft.errors.Unchecked")  # what is written today carries checksums


def changed_tensors(small: Small, out: Path, merged: Path) -> set[str]:
    """Merge the run and return the tensors that differ from the base by a single bit."""
    merge(find_trained(out), small.base, merged)
    before, after = base_tensors(small.base), base_tensors(merged)
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def reached(name: str = "single") -> set[str]:
    """Parameters that upstream's own backward pass reaches."""
    return {parameter for parameter, norm in golden(name).expected["grad_norms"].items() if norm is not None}


# Those that look through several cameras have data of their own: test_policies.py.
ONE_CAMERA = [name for name in recipe_names() if len(resolve(name).policy.cameras) == 1]


@pytest.mark.parametrize("name", ONE_CAMERA)
def test_recipe_trains_and_merges(fused: Small, tmp_path: Path, name: str) -> None:
    recipe = fused.recipe(name)
    told = run(recipe, tmp_path / "run")
    assert len(told.losses) == 3 and told.evaluations[-1].step == 3
    assert told.summary is not None and told.summary.best == told.summary.last == "step-000003"
    assert told.banner is not None
    counted = count_parameters(recipe, load_config(fused.base))
    assert (told.banner.trainable, told.banner.total) == (counted.trainable, counted.total)
    assert changed_tensors(fused, tmp_path / "run", tmp_path / "merged") <= reached("fused")


LAST_LAYER = ("language_model.model.embed_tokens.", "language_model.model.layers.2.", "language_model.lm_head.")


@pytest.mark.parametrize(
    ("name", "prefixes"),
    [
        ("full", ("",)),
        ("frozen-vision", ("projector.", "language_model.")),
        ("last-layer", LAST_LAYER),
        ("sandwich", ("vision_backbone.", "projector.", *LAST_LAYER)),
    ],
)
def test_exactly_the_stated_tensors_change(small: Small, tmp_path: Path, name: str, prefixes: tuple[str, ...]) -> None:
    run(small.recipe(name), tmp_path / "run")
    expected = {parameter for parameter in reached() if parameter.startswith(prefixes)}
    assert changed_tensors(small, tmp_path / "run", tmp_path / "merged") == expected
    stored = load_file(tmp_path / "run" / "checkpoints" / "step-000003" / "trained.safetensors")
    assert stored.keys() == expected


def test_lora_changes_every_adapted_weight_that_a_loss_reaches(small: Small, tmp_path: Path) -> None:
    run(small.recipe("lora8"), tmp_path / "run")
    changed = changed_tensors(small, tmp_path / "run", tmp_path / "merged")
    matrices = {n for n in reached() if n.endswith(".weight") and not n.split(".")[-2].startswith(("norm", "ls"))}
    skipped = {n for n in matrices if "layernorm" in n or "embed_tokens" in n}
    assert changed == matrices - skipped


@pytest.mark.parametrize("words", [[], ["adapt.lora.dora=true"], ["adapt.lora.rslora=true"]])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_pissa_starts_where_the_base_is_and_merges_into_it(
    small: Small, tmp_path: Path, words: list[str], precision: str
) -> None:
    words = [*words, "adapt.lora.rank=4", "adapt.lora.init=pissa", "train.learning_rate=1e-6", "data.augment=false"]
    words += [f"precision.trained={precision}"]
    plain = run(small.recipe("lora8", *words[:-4], "data.augment=false", "adapt.lora.rank=4"), tmp_path / "plain")
    told = run(small.recipe("lora8", *words), tmp_path / "run")
    # The base and its adapter add up to the base; bfloat16 has 8 bits for what passes through the adapter.
    assert told.losses[0] == pytest.approx(plain.losses[0], rel=1e-5 if precision == "float32" else 1e-3)
    merge(find_trained(tmp_path / "run"), small.base, tmp_path / "merged")
    before, after = base_tensors(small.base), base_tensors(tmp_path / "merged")
    # Steps of 1e-6 hardly move anything; DoRA's magnitudes in bfloat16 are rounded to 2^-8 of themselves.
    tolerance = {"atol": 2e-3, "rtol": 2**-8} if precision == "bfloat16" else {"atol": 1e-4, "rtol": 0}
    for tensor_name, tensor in before.items():
        torch.testing.assert_close(after[tensor_name], tensor, **tolerance)


def test_pissa_begins_with_the_largest_directions(small: Small, tmp_path: Path) -> None:
    recipe = small.recipe("lora8", "adapt.lora.rank=4", "adapt.lora.init=pissa")
    started = started_run(recipe, tmp_path / "run", small)
    name = "language_model.model.layers.0.mlp.up_proj"
    layer = started.model.get_submodule(f"base_model.model.{name}")
    original = base_tensors(small.base)[f"{name}.weight"]
    left, values, right = torch.linalg.svd(original, full_matrices=False)
    best = left[:, :4] @ torch.diag(values[:4]) @ right[:4]
    product = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(product, best, atol=1e-4, rtol=0)
    torch.testing.assert_close(layer.base_layer.weight, original - best, atol=1e-4, rtol=0)


def test_pissa_merged_is_the_model_that_was_trained(small: Small, tmp_path: Path) -> None:
    words = ["adapt.lora.rank=4", "adapt.lora.init=pissa", "train.learning_rate=0.01"]
    recipe = small.recipe("lora8", *words)
    told = run(recipe, tmp_path / "run")
    merge(find_trained(tmp_path / "run", "last"), small.base, tmp_path / "merged")
    merged = Run(replace(recipe, base=str(tmp_path / "merged")), tmp_path / "other", tmp_path / "merged", Listener())
    merged.load()
    again = merged.evaluate()
    assert told.evaluations[-1].step == 3 and again is not None
    assert again.loss == pytest.approx(told.evaluations[-1].val_loss, rel=1e-4)
    assert again.loss != pytest.approx(told.losses[0], rel=1e-3)


def test_dora_trains_its_magnitudes(small: Small, tmp_path: Path) -> None:
    run(small.recipe("lora8", "adapt.lora.dora=true"), tmp_path / "run")
    tensors = load_file(tmp_path / "run" / "checkpoints" / "step-000003" / "adapter_model.safetensors")
    magnitudes = {name: tensor for name, tensor in tensors.items() if name.endswith("lora_magnitude_vector")}
    before = base_tensors(small.base)
    moved = 0
    for name, magnitude in magnitudes.items():
        module = name.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector")
        norms = torch.linalg.vector_norm(before[f"{module}.weight"].flatten(1), dim=1)
        moved += not torch.equal(magnitude.flatten(), norms)
    assert len(magnitudes) > 30 and moved > 25


def test_lora_plus_trains_b_faster(small: Small, tmp_path: Path) -> None:
    plain, fast = (
        started_run(small.recipe("lora8", *words), tmp_path / str(number), small)
        for number, words in enumerate([[], ["adapt.lora.plus_ratio=16"]])
    )
    sums = MetricSums(torch.device("cpu"))
    moves: list[dict[str, Tensor]] = []
    for started in (plain, fast):
        before = {name: p.detach().clone() for name, p in started.model.named_parameters() if p.requires_grad}
        started.step(sums, want_norm=False)
        moves.append(
            {name: (p.detach() - before[name]) for name, p in started.model.named_parameters() if name in before}
        )
    slow_b, fast_b = (move["base_model.model.language_model.lm_head.lora_B.default.weight"] for move in moves)
    # Adam's first step is the learning rate times the gradient's sign, and weights of 0 do not decay
    torch.testing.assert_close(fast_b, 16 * slow_b, rtol=1e-4, atol=1e-8)
    slow_a, fast_a = (move["base_model.model.language_model.lm_head.lora_A.default.weight"] for move in moves)
    assert torch.equal(slow_a, fast_a)


@pytest.mark.parametrize(
    ("words", "frozen", "trained"),
    [
        (["precision.frozen=bfloat16", "precision.compute=bfloat16"], torch.bfloat16, torch.float32),
        (["precision.frozen=bfloat16", "precision.trained=bfloat16"], torch.bfloat16, torch.bfloat16),
        (["adapt.quantize=nf4", "precision.compute=bfloat16"], torch.uint8, torch.float32),
        (["adapt.quantize=int8"], torch.int8, torch.float32),
        (
            ["adapt.quantize=nf4", "precision.trained=bfloat16", "precision.compute=bfloat16"],
            torch.uint8,
            torch.bfloat16,
        ),
    ],
)
def test_precision_and_gradients_reach_every_part(
    fused: Small, tmp_path: Path, words: list[str], frozen: torch.dtype, trained: torch.dtype
) -> None:
    started = started_run(fused.recipe("lora8", "train.gradient_checkpointing=all", *words), tmp_path / "run", fused)
    parameters = dict(started.model.named_parameters())
    layers = [
        "vision_backbone.featurizer.blocks.0.attn.qkv",
        "vision_backbone.fused_featurizer.blocks.1.mlp.fc1",
        "projector.fc2",
        "language_model.model.layers.0.self_attn.q_proj",
    ]
    for layer in layers:
        assert parameters[f"base_model.model.{layer}.base_layer.weight"].dtype == frozen
    norms = []
    original = started.optimizer.step

    def remember() -> None:
        norms.extend(
            float(parameters[f"base_model.model.{layer}.lora_B.default.weight"].grad.norm()) for layer in layers
        )
        original()

    started.optimizer.step = remember  # type: ignore[method-assign, assignment]
    started.step(MetricSums(torch.device("cpu")), want_norm=False)
    assert all(norm > 0 for norm in norms) and len(norms) == len(layers)
    assert {p.dtype for p in parameters.values() if p.requires_grad} == {trained}
    moments = [value for state in started.optimizer.state.values() for key, value in state.items() if key != "step"]
    assert {value.dtype for value in moments} == {trained}


def started_run(recipe: RecipeConfig, out: Path, small: Small) -> Run:
    """Load a run without its loop."""
    started = Run(recipe, out, small.base, Listener())
    started.load()
    return started
