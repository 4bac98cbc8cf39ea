"""Features of frozen ViTs: the same training with and without the cache, and no cache where they change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_base import convert_small, write_small_base

from vlaft.action.metrics import MetricSums
from vlaft.errors import ConfigError
from vlaft.recipe.resolve import resolve
from vlaft.recipe.settings import RecipeConfig
from vlaft.training.events import Listener
from vlaft.training.feature_cache import FeatureCache, pays
from vlaft.training.run import Run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_base(tmp_path_factory.mktemp("base") / "base", "fused")


@pytest.fixture(scope="module")
def data(base: Path) -> Path:
    return convert_small(base, base.parent / "data")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def recipe(base: Path, data: Path, name: str, *words: str) -> RecipeConfig:
    usual = [f"base='{base}'", f"data.path='{data}'", "data.augment=false", "data.workers=0", "train.steps=30"]
    return resolve(name, [], [*usual, "train.batch_size=8", "train.accumulation=1", *words])


def train(settings: RecipeConfig, base: Path, out: Path, steps: int = 12) -> Run:
    run = Run(settings, out, base, Listener())
    run.load()
    sums = MetricSums(run.device)
    for _ in range(steps):
        run.step(sums, want_norm=False)
    return run


TWO = ("adapt.lora.targets=[q_proj, v_proj]", "policy.chunk=3", "policy.cameras=[main, wrist]")


def test_policies_with_several_cameras_keep_the_features_of_all(base: Path, tmp_path: Path) -> None:
    data = convert_small(base, tmp_path / "data", rich=True)
    runs = {
        way: train(recipe(base, data, "oft-state", *TWO, f"data.reuse_features={way}"), base, tmp_path / way)
        for way in ("always", "never")
    }
    assert runs["always"].features is not None and runs["always"].features.hits > 0
    for ours, theirs in zip(*(run.model.state_dict().values() for run in runs.values()), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("word", ["policy.cameras=[wrist, main]", "policy.chunk=4", "policy.tail=repeat"])
def test_another_order_of_cameras_has_features_of_its_own(base: Path, tmp_path: Path, word: str) -> None:
    data = convert_small(base, tmp_path / "data", rich=True)
    places = []
    for number, words in enumerate((TWO, (*TWO, word))):
        run = train(
            recipe(base, data, "oft-state", *words, "data.reuse_features=always"), base, tmp_path / str(number), steps=0
        )
        assert run.features is not None
        places.append(run.features.path)
    assert places[0] != places[1]


@pytest.mark.parametrize("name", ["last-layer", "frozen-vision"])
def test_training_is_the_same_with_the_cache(base: Path, data: Path, tmp_path: Path, name: str) -> None:
    with_cache = train(recipe(base, data, name, "data.reuse_features=always"), base, tmp_path / "a")
    without = train(recipe(base, data, name, "data.reuse_features=never"), base, tmp_path / "b")
    assert with_cache.features is not None and without.features is None
    assert with_cache.features.hits > 0  # 96 examples of 40 rows: rows come again
    for (key, ours), theirs in zip(
        with_cache.model.state_dict().items(), without.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5, msg=key)


def test_a_second_run_finds_the_features_of_the_first(base: Path, data: Path, tmp_path: Path) -> None:
    settings = recipe(base, data, "last-layer")
    first = train(settings, base, tmp_path / "a", steps=15)
    second = train(settings, base, tmp_path / "b", steps=5)
    assert first.features is not None and second.features is not None
    assert second.features.path == first.features.path
    assert second.features.misses == 0


@pytest.mark.parametrize(("name", "words"), [("lora8", []), ("sandwich", []), ("last-layer", ["data.augment=true"])])
def test_no_cache_where_features_change(base: Path, data: Path, tmp_path: Path, name: str, words: list[str]) -> None:
    run = Run(recipe(base, data, name, *words), tmp_path / "run", base, Listener())
    run.load()
    assert run.features is None
    with pytest.raises(ConfigError, match="not trained"):
        again = Run(recipe(base, data, name, "data.reuse_features=always", *words), tmp_path / "run", base, Listener())
        again.load()


def test_adapters_on_the_language_model_alone_use_it(base: Path, data: Path, tmp_path: Path) -> None:
    settings = recipe(base, data, "lora8", "adapt.lora.targets=[q_proj, v_proj]")
    run = train(settings, base, tmp_path / "run", steps=10)
    assert run.features is not None and run.features.hits > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_come_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    cache = FeatureCache(tmp_path, {"base": "x"}, (6, 3, 5), dtype)
    values = torch.randn(6, 3, 5).to(dtype)
    rows = torch.tensor([4, 1])
    device = torch.device("cpu")
    torch.testing.assert_close(cache.features(rows, lambda: values[rows], device), values[rows], atol=0, rtol=0)

    def never() -> torch.Tensor:
        raise AssertionError("computed again")

    again = FeatureCache(tmp_path, {"base": "x"}, (6, 3, 5), dtype)
    found = again.features(rows, never, device)
    assert found.dtype == dtype
    torch.testing.assert_close(found, values[rows], atol=0, rtol=0)
    other = FeatureCache(tmp_path, {"base": "y"}, (6, 3, 5), dtype)
    assert other.path != cache.path


def test_a_killed_writer_leaves_rows_that_are_computed_again(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, {}, (2, 1, 2), torch.float32)
    cache._features[0] = np.ones((1, 2))  # written, but its mark was not
    given = cache.features(torch.tensor([0]), lambda: torch.full((1, 1, 2), 7.0), torch.device("cpu"))
    assert given.eq(7).all()


def test_it_pays_only_for_rows_that_come_again(tmp_path: Path) -> None:
    assert pays(rows=100, examples=101, bytes_per_row=10, folder=tmp_path / "not" / "there")
    assert not pays(rows=100, examples=100, bytes_per_row=10, folder=tmp_path)
    assert not pays(rows=10**9, examples=10**12, bytes_per_row=10**9, folder=tmp_path)
