"""Every recipe on the demo's new robot: the same search over learning rates, then fresh seeds.

OUT/comparison/
  validation/                  demonstrations that learning rates are chosen on
  seed-1/ ...                  demonstrations of each training seed
  RECIPE/search-RATE/          a run on the validation demonstrations, and validation.json: its successes
  RECIPE/seed-1/ ...           runs with the best rate, and report.json: their successes on seeds used for nothing else
  zero-shot/seed-1/ ...        the base as it is

What is the same for every recipe: demonstrations, base, number of steps, batch, augmentation, schedule, the candidates
for the learning rate, the episodes that choose among them and the episodes that are reported. A tie goes to the
lower rate.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vlaft.demo.results import Cost, RecipeResult, Success
from vlaft.demo.steps import (
    BATCH_WORD,
    Step,
    acting,
    converting,
    recording,
    report_seeds,
    train_seconds,
    trained,
    training,
    validation_seeds,
)

RECIPES = ("last-layer", "frozen-vision", "sandwich", "lora32", "qlora32", "full")
ZERO_SHOT = "zero-shot"
RATES = (5e-4, 1e-3, 2e-3, 5e-3)


def comparison_steps(out: Path, base: Path, demonstrations: int, seeds: int) -> Iterator[Step]:
    """Yield the commands in their order; each is to be done before the next is asked for.

    Args:
        out: the demo's folder.
        base: the demo's base.
        demonstrations: per seed.
        seeds: number of training seeds.
    """
    root = out / "comparison"
    demonstrations_from, episodes_from = validation_seeds()
    yield recording(root / "validation", demonstrations, demonstrations_from)
    yield converting(root / "validation", base)
    for seed in range(1, seeds + 1):
        folder = root / f"seed-{seed}"
        yield recording(folder, demonstrations, report_seeds(seed)[0])
        yield converting(folder, base)
        yield acting(base, root / ZERO_SHOT / f"seed-{seed}", "report", report_seeds(seed)[1])
    for recipe in RECIPES:
        cost = root / recipe / "cost.json"
        words = ("report", "--base", str(base), "--recipe", recipe, "--measure", "--json", BATCH_WORD)
        yield Step(words, cost, cost)
        for rate in RATES:
            folder = search_folder(out, recipe, rate)
            yield training(recipe, rate, 0, base, root / "validation" / "data", folder / "run")
            yield acting(trained(folder), folder, "validation", episodes_from)
    for seed in range(1, seeds + 1):  # seed by seed, so that whatever there is compares all recipes
        for recipe in RECIPES:
            folder = root / recipe / f"seed-{seed}"
            data = root / f"seed-{seed}" / "data"
            yield training(recipe, best_rate(out, recipe), seed, base, data, folder / "run")
            yield acting(trained(folder), folder, "report", report_seeds(seed)[1])


def search_folder(out: Path, recipe: str, rate: float) -> Path:
    """Return where a candidate of the search lies."""
    return out / "comparison" / recipe / f"search-{rate:g}"


def searched(out: Path, recipe: str) -> dict[str, float]:
    """Return learning rate, as text, to success on the validation episodes."""
    return {f"{rate:g}": Success.from_file(search_folder(out, recipe, rate) / "validation.json").rate for rate in RATES}


def best_rate(out: Path, recipe: str) -> float:
    """Return the learning rate that did best on the validation episodes; the lowest of several."""
    found = searched(out, recipe)
    return max(RATES, key=lambda rate: (found[f"{rate:g}"], -rate))


def read_comparison(out: Path, seeds: int) -> list[RecipeResult]:
    """Gather what the commands left on disk, the base as it is first."""
    root = out / "comparison"

    def successes(name: str) -> list[Success]:
        return [Success.from_file(root / name / f"seed-{seed}" / "report.json") for seed in range(1, seeds + 1)]

    base = successes(ZERO_SHOT)
    results = [RecipeResult(ZERO_SHOT, None, {}, [each.rate for each in base], base[0].episodes, 0, 0.0)]
    for recipe in RECIPES:
        found = successes(recipe)
        times = [train_seconds(root / recipe / f"seed-{seed}" / "run") for seed in range(1, seeds + 1)]
        results.append(
            RecipeResult(
                recipe=recipe,
                learning_rate=best_rate(out, recipe),
                searched=searched(out, recipe),
                rates=[each.rate for each in found],
                episodes=found[0].episodes,
                trainable=Cost.from_file(root / recipe / "cost.json").trainable,
                train_seconds=sum(times) / len(times),
            )
        )
    return results
