"""What one update does: accumulation, clipping, schedules, and the smallest test that training works at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_base import write_examples
from small_run import Small, log_lines, run

from vlaft.action.metrics import MetricSums
from vlaft.data import loader
from vlaft.recipe.settings import RecipeConfig
from vlaft.training.events import Listener
from vlaft.training.run import Run

AT_ONCE = ("train.batch_size=6", "train.accumulation=1")
PIECEWISE = ("train.batch_size=2", "train.accumulation=3")


@pytest.fixture
def ragged(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    """Six examples with 2 to 7 action tokens; stored they are all as long, or they would be refused."""
    lengths = (7, 2, 5, 3, 6, 4)
    whole = loader._Examples.actions

    def cut(self: loader._Examples, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        actions, tokens = whole(self, rows)
        return actions, tokens[:, : lengths[rows[0]]]

    monkeypatch.setattr(loader._Examples, "actions", cut)
    generator = np.random.default_rng(0)
    images = list(generator.integers(0, 256, size=(6, 56, 56, 3), dtype=np.uint8))
    prompts = [[1, *generator.integers(5, 19, size=length)] for length in (3, 9, 5, 4, 8, 6)]
    tokens = [generator.integers(256, 512, size=7).tolist() for _ in lengths]
    ids = [[int(token) for token in prompt] for prompt in prompts]
    return Small(small.base, write_examples(tmp_path / "ragged", small.data, images, ids, tokens).path)


def updated(recipe: RecipeConfig, small: Small, out: Path, steps: int = 3) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """Return the trained tensors after some steps, and each step's loss and gradient norm."""
    started = Run(recipe, out, small.base, Listener())
    started.load()
    sums = MetricSums(torch.device("cpu"))
    told = []
    for _ in range(steps):
        norm, _ = started.step(sums, want_norm=True)
        assert norm is not None
        told.append((sums.read().loss, float(norm)))
    return {name: p.detach().clone() for name, p in started.model.named_parameters() if p.requires_grad}, told


@pytest.mark.parametrize("words", [[], ["train.max_grad_norm=0.5", "adapt.lora.plus_ratio=4"]])
def test_accumulation_is_the_large_batch(ragged: Small, tmp_path: Path, words: list[str]) -> None:
    """Micro-batches have 9, 8 and 10 labels and more: a mean of their means would be another loss."""
    words = ["data.augment=false", "train.eps=1e-3", *words]  # Adam's sign of tiny gradients amplifies rounding
    once, told_once = updated(ragged.recipe("lora8", *AT_ONCE, *words), ragged, tmp_path / "once")
    thrice, told_thrice = updated(ragged.recipe("lora8", *PIECEWISE, *words), ragged, tmp_path / "thrice")
    np.testing.assert_allclose(told_thrice, told_once, rtol=1e-5)
    for name, tensor in once.items():
        torch.testing.assert_close(thrice[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_mean_of_means_would_differ(ragged: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above can tell the difference."""
    words = ["data.augment=false", *PIECEWISE]
    _, right = updated(ragged.recipe("lora8", *words), ragged, tmp_path / "right", steps=1)
    monkeypatch.setattr(Run, "_shares", lambda self, batches: [1 / 3] * 3)
    _, wrong = updated(ragged.recipe("lora8", *words), ragged, tmp_path / "wrong", steps=1)
    assert abs(wrong[0][1] / right[0][1] - 1) > 1e-3


def test_clipping_bounds_the_gradient_and_tells_the_norm_before(small: Small, tmp_path: Path) -> None:
    seen: list[float] = []
    started = Run(small.recipe("lora8", "train.max_grad_norm=0.25"), tmp_path / "run", small.base, Listener())
    started.load()
    original = started.optimizer.step

    def remember() -> None:
        grads = [p.grad for p in started.model.parameters() if p.grad is not None]
        seen.append(float(torch.nn.utils.get_total_norm(grads)))
        original()

    started.optimizer.step = remember  # type: ignore[method-assign, assignment]
    norm, _ = started.step(MetricSums(torch.device("cpu")), want_norm=False)
    assert norm is not None and float(norm) > 1.0
    assert seen == [pytest.approx(0.25, rel=1e-4)]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], [1, 1, 1, 1, 1, 1]),
        (["train.schedule.name=linear", "train.schedule.warmup_steps=2"], [0.5, 1, 1, 0.75, 0.5, 0.25]),
        (["train.schedule.name=cosine"], [1, 0.93301, 0.75, 0.5, 0.25, 0.06699]),
        (["train.schedule.name=step", "train.schedule.step_size=2"], [1, 1, 0.1, 0.1, 0.01, 0.01]),
        (["train.schedule.name=linear", "train.schedule.min_ratio=0.4"], [1, 0.9, 0.8, 0.7, 0.6, 0.5]),
    ],
)
def test_the_learning_rate_that_is_logged_is_the_one_used(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], expected: list[float]
) -> None:
    used: list[float] = []
    original = torch.optim.AdamW.step

    def remember(self: torch.optim.AdamW, *arguments: Any, **keywords: Any) -> Any:
        used.append(self.param_groups[0]["lr"])
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(torch.optim.AdamW, "step", remember)
    told = run(small.recipe("lora8", "train.steps=6", *words), tmp_path / "run")
    assert used == [line.learning_rate for line in told.lines]
    assert used == pytest.approx([5e-4 * factor for factor in expected], rel=1e-4)


@pytest.mark.parametrize(
    ("recipe", "rate"), [("lora32", 5e-3), ("qlora32", 5e-3), ("last-layer", 1e-2), ("full", 1e-3)]
)
def test_one_example_is_learnt_by_heart(small: Small, tmp_path: Path, recipe: str, rate: float) -> None:
    words = ["train.overfit=1", "train.batch_size=1", "train.steps=150", f"train.learning_rate={rate}"]
    words += ["train.evaluate_every=0", "data.augment=false", "train.log_every=10"]
    told = run(small.recipe(recipe, *words), tmp_path / "run")
    assert told.losses[0] > 5
    assert told.lines[-1].loss < 0.05 and told.lines[-1].action_accuracy == 1.0 and told.lines[-1].action_l1 == 0.0


def test_early_stopping(small: Small, tmp_path: Path) -> None:
    words = ["train.steps=50", "train.evaluate_every=1", "train.early_stopping=2", "train.learning_rate=1e-9"]
    recipe = small.recipe("lora8", *words)
    told = run(recipe, tmp_path / "run")  # nothing is learnt, so nothing gets better
    assert told.summary is not None and told.summary.stopped_early
    assert (told.summary.steps, told.summary.best) == (3, "step-000001")
    lines = log_lines(tmp_path / "run")
    again = run(recipe, tmp_path / "run", resume=True)
    assert again.losses == [] and log_lines(tmp_path / "run") == lines
