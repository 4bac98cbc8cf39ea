"""The study of policies on the tabletop: its commands, its search, how it times, and what it says of made-up ones."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT

from vlaft.demo.steps import CHUNK, EVALUATION_EPISODES, DemoStep, StepFailed, scene_seeds
from vlaft.errors import ConfigError
from vlaft.recipe.resolve import resolve

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(ROOT / "benchmarks"))
    study = importlib.import_module("tabletop_policies")


def result(name: str, *rates: float, speed: float = 10.0) -> Any:
    return study.PolicyResult(name, f"how {name} acts", 0.002, (0.1, 0.2, 0.1), rates, 100, 61.0, speed)


def plain(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ")


def searched(out: Path, name: str, *successes: int) -> None:
    for rate, count in zip(study.RATES, successes, strict=True):
        file = study.search_folder(out, name, rate) / "validation.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"models": [{"model": "m", "successes": count, "episodes": 20}]}))


def test_policies_differ_in_what_they_read_and_write_alone(tmp_path: Path) -> None:
    searched(tmp_path, "oft", 9, 9)
    searched(tmp_path, "lora32", 9, 12)
    recipes = {each.name: resolve(each.recipe, words=each.words) for each in study.CONTENDERS}
    read = {
        name: (recipe.policy.head, recipe.policy.parallel, recipe.policy.chunk, len(recipe.policy.cameras))
        for name, recipe in recipes.items()
    }
    assert read == {
        "lora32": ("tokens", False, 1, 1),
        "parallel": ("tokens", True, CHUNK, 1),
        "oft": ("l1", True, CHUNK, 1),
        "oft-state": ("l1", True, CHUNK, 2),
    }
    assert [name for name, recipe in recipes.items() if recipe.policy.state] == ["oft-state"]
    assert len({str(recipe.adapt) for recipe in recipes.values()}) == 1
    rates = {each.name: study.rate_of(tmp_path, each) for each in study.CONTENDERS}
    low, high = study.RATES  # of equals the lowest
    assert rates == {"lora32": high, "parallel": high, "oft": low, "oft-state": low}


def test_nothing_is_reported_on_what_a_rate_was_chosen_by() -> None:
    chosen_by = {number for start in study.VALIDATION for number in range(start, start + 900)}
    for demonstrations, episodes in map(scene_seeds, range(1, 10)):
        assert not chosen_by & {*range(demonstrations, demonstrations + 900)}
        assert not chosen_by & {*range(episodes, episodes + EVALUATION_EPISODES)}


def test_what_is_said_goes_no_further_than_the_intervals() -> None:
    comparison = [
        result("lora32", 0.8, 0.82, 0.81),
        result("oft", 0.4, 0.5, 0.45, speed=42.0),
        result("oft-state", 0.4, 0.9, 0.5, speed=31.0),
    ]
    text = plain(study.markdown(comparison, {"oft": {0.002: 0.6, 0.005: 0.3}}, "300 steps of 8 examples"))
    for said in (
        "Training seeds: 3, of 300 steps of 8 examples; 100 episodes each.",
        "| lora32 | how lora32 acts | 81.0 % (78.5 to 83.5 %) | 80.0 %, 82.0 %, 81.0 % |",
        "| 13.3 % (0.0 to 27.7 %) | 10.0 %, 20.0 %, 10.0 % | 0.002 | 1 min 01 s | 10.0 (x 1.0) |",
        "31.0 (x 3.1)",
        "- lora32 succeeds more often than oft: their intervals do not overlap.",
        "- lora32 and oft-state: their intervals overlap, so that nothing is decided.",
        "by learning rate: oft: 0.002: 60.0 %, 0.005: 30.0 %.",
    ):
        assert said in text, said
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_the_whole_study_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With commands that leave what the real ones do; the real ones are the demo's."""
    out, ran = tmp_path / "out", []

    def command(words: list[str]) -> int:
        ran.append(" ".join(words))
        if len(ran) == 7:
            return 1
        if words[0] == "evaluate":
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
    monkeypatch.setattr(study, "actions_per_second", lambda models: [10.0, 40.0, 50.0, 30.0])
    with pytest.raises(StepFailed):
        study.compare(out, 2, 1, 50, 4)
    text = plain(study.compare(out, 2, 1, 50, 4))
    assert text == plain((out / "comparison.md").read_text()) and "40.0 (x 4.0)" in text
    trained = [line for line in ran if line.startswith("train ")]
    assert all(line.endswith("train.steps=50 train.batch_size=4") for line in trained)
    assert all("step-000050" in line for line in ran if line.startswith("evaluate "))
    done = len(ran)
    study.compare(out, 2, 1, 50, 4)
    assert len(ran) == done
    with pytest.raises(ConfigError, match="begun with --demos 2 --steps 50 --batch-size 4"):
        study.compare(out, 2, 1, 60, 4)
    with pytest.raises(ConfigError, match="something else"):
        study.compare(tmp_path, 2, 1, 50, 4)


def test_actions_are_timed_by_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlaft.environments.tabletop import drawing

    base = str(Path(drawing.__file__).parent / "base")
    monkeypatch.setattr(study, "ROUNDS", 2)
    first, again = study.actions_per_second([base, base])
    assert first > 0 and again > 0
