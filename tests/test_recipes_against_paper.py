"""The study of recipes against the paper: its commands, its search, and what it says of a made-up comparison."""

from __future__ import annotations

import importlib
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT

from vlaft.demo.steps import EVALUATION_EPISODES, DemoStep, StepFailed, scene_seeds
from vlaft.errors import ConfigError

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(ROOT / "benchmarks"))
    study = importlib.import_module("recipes_against_paper")


def recipe(name: str, *rates: float, rate: float | None = 0.001, searched: dict[str, float] | None = None) -> Any:
    return study.RecipeResult(name, rate, searched or {}, rates, 100, 1_234_567, 61.0)


def evaluation(path: Path, successes: int, episodes: int = 20) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"models": [{"model": "m", "successes": successes, "episodes": episodes}]}))


def test_the_search_takes_the_best_rate_and_the_lowest_of_equals(tmp_path: Path) -> None:
    for rate, successes in zip(study.RATES, (9, 12, 17, 17), strict=True):
        evaluation(study.search_folder(tmp_path, "full", rate) / "validation.json", successes)
    assert study.best_rate(tmp_path, "full") == study.RATES[2]
    assert study.searched(tmp_path, "full")["0.001"] == pytest.approx(0.6)


def test_every_recipe_is_searched_alike(tmp_path: Path) -> None:
    stream = study.comparison_steps(tmp_path, tmp_path / "base", 50, seeds=1)
    lines: dict[str, list[str]] = {recipe: [] for recipe in study.RECIPES}
    count = len(study.RECIPES) * (1 + 2 * len(study.RATES)) + 5
    for step in islice(stream, count):
        if step.words[0] == "train":
            recipe = step.words[step.words.index("--recipe") + 1]
            lines[recipe].append(step.line.replace(recipe, "RECIPE"))
    assert all(each == lines["full"] for each in lines.values())
    assert len(lines["full"]) == len(study.RATES)


def test_nothing_is_reported_on_what_a_rate_was_chosen_by() -> None:
    chosen_by = {number for start in study.VALIDATION for number in range(start, start + 900)}
    for demonstrations, episodes in map(scene_seeds, range(1, 10)):
        assert not chosen_by & {*range(demonstrations, demonstrations + 900)}
        assert not chosen_by & {*range(episodes, episodes + EVALUATION_EPISODES)}


def plain(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ")


def said_of_order(*comparison: Any) -> str:
    return plain("\n".join(study.order(comparison)))


def test_where_the_order_differs_from_the_papers() -> None:
    full, lora, last = (
        recipe("full", 0.5, 0.52, 0.54),
        recipe("lora32", 0.53, 0.55, 0.57),
        recipe("last-layer", 0.8, 0.81, 0.8),
    )
    found = study.pairs([last, lora, recipe("zero-shot", 0.1), full])
    names = [(pair.above.recipe, pair.below.recipe) for pair in found]
    assert names == [("full", "lora32"), ("full", "last-layer"), ("lora32", "last-layer")]
    assert [pair.reversed for pair in found] == [True, True, True]
    assert [pair.overlap for pair in found] == [True, False, False]
    assert [pair.paper_overlap for pair in found] == [True, False, False]
    text = said_of_order(last, lora, recipe("zero-shot", 0.1), full)
    assert text.startswith("3 of 3 pairs of recipes stand in the other order than in the paper:")
    assert (
        "full is below lora32 here (52.0 % against 55.0 %) and above it in the paper (69.7 % against 68.2 %):"
        " our intervals overlap, and so do the paper's."
    ) in text
    assert "lora32 is below last-layer here" in text and "our intervals do not overlap, nor do the paper's." in text
    assert "2 of these 3 are beyond the intervals of both sides." in text
    assert (
        "the intervals of 1 of 3 pairs overlap, so that the order within them may be chance: full and lora32;" in text
    )
    assert "those of 1 of 3." in text


def test_one_reversal_that_may_be_chance() -> None:
    text = said_of_order(recipe("lora32", 0.9), recipe("full", 0.85), recipe("last-layer", 0.3))
    assert text.startswith("1 of 3 pairs of recipes stands in the other order than in the paper:")
    assert "None of these reversals is beyond doubt" in text


def test_the_same_order_ties_and_nothing_to_compare() -> None:
    ranked = sorted(study.PAPER_SUCCESS, key=lambda name: -study.PAPER_SUCCESS[name][0])
    same = [recipe(name, 0.9 - 0.1 * place) for place, name in enumerate(ranked)]
    assert said_of_order(*same).startswith("Our order of recipes is the paper's (10 pairs of recipes).")
    tied = said_of_order(recipe("full", 0.5), recipe("lora32", 0.5), recipe("last-layer", 0.1))
    assert tied.startswith("Of 3 pairs of recipes, none stands in the other order than in the paper; 1 is equal here.")
    assert "no order to compare" in said_of_order(recipe("full", 0.5), recipe("zero-shot", 0.1, rate=None))


COMPARED = (
    ("zero-shot", (0.1, 0.12), None, None),
    ("lora32", (0.8, 0.9), 0.005, {"0.01": 0.6, "0.002": 0.7, "0.005": 0.82}),
    ("last-layer", (0.3, 0.3), 0.002, {"0.001": 0.2, "0.002": 0.34}),
)


def test_the_comparison_shows_the_paper_and_the_search() -> None:
    comparison = [recipe(name, *rates, rate=rate, searched=searched) for name, rates, rate, searched in COMPARED]
    text = plain(study.markdown(comparison))
    for said in (
        "2 training seeds per recipe, 100 episodes each",
        "| lora32 | 85.0 % | 21.5 to 100.0 % | 80.0 %, 90.0 % | 68.2 ± 7.5 % | 1,234,567 | 1 min 01 s |",
        "| zero-shot | 11.0 % | 0.0 to 23.7 % | 10.0 %, 12.0 % | – |",
        "| lora32 | 0.005 | 0.002: 70.0 %, **0.005: 82.0 %**, 0.01: 60.0 % |",
        "0.001: 20.0 %, **0.002: 34.0 %** (chosen at an end of the search)",
        "An interval of no width says that the seeds came out alike",
    ):
        assert said in text, said
    assert "Wilson's interval" not in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count(" | ") for line in tables[:5]} == {6} and {line.count(" | ") for line in tables[5:]} == {2}
    assert len(study.draw(comparison).axes) == 1


def test_the_whole_study_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With commands that leave what the real ones do; the real ones are the demo's."""
    out, ran = tmp_path / "out", []

    def command(words: list[str]) -> int:
        ran.append(" ".join(words))
        if len(ran) == 20:
            return 1
        if words[0] == "report":
            measured = {"predicted_bytes": 1, "peak_bytes": 1}
            cost = {"trainable_parameters": 5, "total_parameters": 9, "measured": measured}
            print(json.dumps({"recipes": [cost]}))
        elif words[0] == "evaluate":
            print(json.dumps({"models": [{"model": words[1], "successes": 3, "episodes": 4}]}))
        else:
            folder = Path(words[words.index("--out") + 1])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ("report.json" if words[0] == "train" else "dataset.json")).write_text('{"seconds": 2.0}')
        return 0

    def recorded(folder: Path, demonstrations: int, seed: int) -> DemoStep:
        return DemoStep(("record", "--out", str(folder / "demos"), str(seed)), folder / "demos")

    monkeypatch.setattr(study, "vlaft", command)
    monkeypatch.setattr(study, "recording", recorded)
    with pytest.raises(StepFailed):
        study.compare(out, 2, 1)
    again = ran[-1]
    text = plain(study.compare(out, 2, 1))
    assert text == plain((out / "comparison.md").read_text()) and "| full | 75.0 % | 30.1 to 95.4 % | 75.0 % |" in text
    assert ran[20].replace(" --resume", "") == again and len(ran) == len(set(ran)) + (ran[20] == again)
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((out / "comparison.json").read_text())
    assert [each["recipe"] for each in found] == ["zero-shot", *study.RECIPES]
    done = len(ran)
    study.compare(out, 2, 1)
    assert len(ran) == done
    with pytest.raises(ConfigError, match="begun with --demos 2"):
        study.compare(out, 3, 1)
    with pytest.raises(ConfigError, match="something else"):
        study.compare(tmp_path, 2, 1)
