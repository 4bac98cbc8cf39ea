"""What a run is predicted to cost, and the batch that is settled for a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from small_base import convert_small, write_small_base

from vlaft.accounting.choose import divisors, with_batch
from vlaft.accounting.plan import plan_run, settle_batch
from vlaft.cli.main import main
from vlaft.recipe.resolve import resolve
from vlaft.recipe.settings import RecipeConfig


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_base(tmp_path_factory.mktemp("plan") / "base", "fused")


@pytest.fixture(scope="module")
def data(base: Path) -> Path:
    return convert_small(base, base.parent / "data")


def recipe(base: Path, data: Path, *words: str) -> RecipeConfig:
    return resolve("lora8", [], [f"base='{base}'", f"data.path='{data}'", *words])


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_number_of_examples_per_step_stays(accumulation: int) -> None:
    settings = resolve("lora8", [], ["train.batch_size=auto", f"train.accumulation={accumulation}"])
    for size in divisors(16 * accumulation):
        train = with_batch(settings, size).train
        assert train.batch_size == size
        assert size * train.accumulation == 16 * accumulation


def test_a_smaller_gpu_gets_a_smaller_batch(base: Path, data: Path) -> None:
    settings = recipe(base, data, "train.batch_size=auto")
    assert settle_batch(settings, None).train.batch_size == 16
    assert settle_batch(settings, 80 * 10**9).train.batch_size == 16
    fixed = plan_run(with_batch(settings, 4)).prediction.peak
    chosen = settle_batch(settings, fixed + 200_000).train
    assert 4 <= int(chosen.batch_size) < 16
    assert int(chosen.batch_size) * chosen.accumulation == 16
    assert settle_batch(settings, 1).train.batch_size == 1  # the run itself says when even that does not fit
    number = replace(settings, train=replace(settings.train, batch_size=5))
    assert settle_batch(number, 1) == number


def test_a_plan_says_what_there_is(base: Path, data: Path) -> None:
    plan = plan_run(recipe(base, data), 10**9)
    (described,) = plan.data
    assert described["examples"] == {"train": 40, "val": 8}
    assert described["action dimensions"] == [7]
    assert plan.counted.trainable > plan.counted.reached_by_gradient > 0
    assert plan.fits
    assert not plan_run(recipe(base, data), 10**6).fits


def test_a_dry_run_that_does_not_fit_exits_with_1(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--recipe", "lora8", "--base", str(base), "--data", str(data), "--out", str(tmp_path / "run")]
    assert main([*words, "--dry-run", "--gpu-memory", "8GB"]) == 0
    shown = capsys.readouterr().out
    assert "train_" not in shown and "predicted" in shown and "40 train" in shown
    assert main([*words, "--dry-run", "--gpu-memory", "100MB"]) == 1
    assert "does not fit" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
