"""The study in Meta-World: its commands, its search, its seeds, and what it says of made-up results; no simulator."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT

from vlaft.demo.steps import StepFailed
from vlaft.environments.metaworld.tasks import EPISODE_STEPS, INSTRUCTIONS
from vlaft.errors import ConfigError
from vlaft.recipe.resolve import resolve
from vlaft.recipe.settings import PolicyConfig

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(ROOT / "benchmarks"))
    study = importlib.import_module("closed_loop")


def asked(out: Path, **other: Any) -> Any:
    return study.Study(**{"out": out, "demonstrations": 4, "seeds": 2, "steps": 50, "batch_size": 4, "episodes": 5,
                          "searched": 3, **other})  # fmt: skip


def results(folder: Path, episodes: int, *found: int) -> None:
    tasks = [
        {"task": f"metaworld:{task}", "successes": count, "episodes": episodes}
        for task, count in zip(study.TASKS, found, strict=True)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    model = {"tasks": tasks, "successes": sum(found), "episodes": 3 * episodes}
    (folder / "results.json").write_text(json.dumps({"models": [model]}))


def result(name: str, *all_tasks: tuple[int, ...]) -> Any:
    found = dict(zip(study.TASKS, all_tasks, strict=True)) | {
        "all": [sum(each) for each in zip(*all_tasks, strict=True)]
    }
    return study.KindResult(name, f"how {name} acts", 0.001, {"0.0005": 0.5, "0.001": 0.75}, found, 20, 61.0)


def plain(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ")


def test_kinds_differ_in_what_they_read_and_write_alone() -> None:
    tokens, chunks = (resolve("full", words=(*study.SHARED, *kind.words)) for kind in study.KINDS)
    assert tokens.policy == PolicyConfig()
    assert chunks.policy == PolicyConfig("l1", chunk=8, cameras=["main", "wrist"], state=True, tail="repeat")
    assert (tokens.adapt, tokens.train, tokens.data) == (chunks.adapt, chunks.train, chunks.data)
    assert set(study.TASKS) <= set(INSTRUCTIONS) and study.STEP_LIMIT < EPISODE_STEPS


def test_nothing_is_reported_on_what_was_recorded_or_chosen_by() -> None:
    """With a thousand episodes to each; an expert's failures shift the seeds that are recorded."""
    firsts = [
        study.DEMONSTRATIONS,
        study.VALIDATION,
        *(study.EPISODES + study.PER_SEED * seed for seed in range(1, 10)),
    ]
    seeds = [number for first in firsts for number in range(first, first + study.PER_SEED)]
    assert len(seeds) == len(set(seeds))


def test_the_lowest_of_equal_rates_is_taken(tmp_path: Path) -> None:
    low, high = study.RATES
    tokens, chunks = study.KINDS
    for kind, rate, found in ((tokens, low, 2), (tokens, high, 3), (chunks, low, 3), (chunks, high, 3)):
        results(study.search_folder(tmp_path, kind, rate) / "validation", 3, found, 0, 1)
    chosen = asked(tmp_path)
    assert (study.best_rate(chosen, tokens), study.best_rate(chosen, chunks)) == (high, low)


def test_a_single_rate_is_taken_without_a_search(tmp_path: Path) -> None:
    only = asked(tmp_path, rates=(0.002,))
    assert study.best_rate(only, study.KINDS[0]) == 0.002
    steps = [step.line for step in study.study_steps(only, tmp_path / "base")]
    assert len(steps) == 2 + 2 * 2 * 2 and not any("search" in line for line in steps)
    assert sum("train.learning_rate=0.002" in line for line in steps) == 4


def test_what_is_said_goes_no_further_than_the_intervals() -> None:
    comparison = [
        result("tokens", (2, 4, 3), (10, 11, 10), (20, 20, 20)),
        result("chunks", (12, 13, 12), (3, 18, 9), (20, 20, 20)),
    ]
    text = plain(study.markdown(asked(Path("out"), seeds=3, episodes=20), comparison))
    for said in (
        "4 demonstrations of each task, one policy for all three; training seeds: 3, of 50 steps of 4 examples; 20"
        " episodes of each task and seed, of 150 steps at most.",
        "- chunks: how chunks acts",
        "| reach-v3 | tokens | 15.0 % (2.6 to 27.4 %) | 10.0 %, 20.0 %, 15.0 % | 9 of 60 (8.1 to 26.1 %) | 0.001 |",
        "| drawer-close-v3 | tokens | 100.0 % (100.0 to 100.0 %) | 100.0 %, 100.0 %, 100.0 % | 60 of 60 (94.0 to",
        "| all | chunks | 70.6 % (37.1 to 100.0 %) ",
        "- reach-v3: chunks succeeds more often than tokens: their intervals do not overlap.",
        "- button-press-v3: tokens and chunks: their intervals overlap, so that nothing is decided.",
        "- drawer-close-v3: tokens and chunks: their intervals overlap, so that nothing is decided.",
        "Success on validation episodes (3 of each task), by learning rate: tokens: 0.0005: 50.0 %, 0.001: 75.0 %;",
    ):
        assert said in text, said
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_the_whole_study_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With commands that leave what the real ones do."""
    out, ran = tmp_path / "out", []

    def command(words: list[str]) -> int:
        ran.append(" ".join(words))
        folder = Path(words[words.index("--out") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        if len(ran) == 6:
            return 130
        if words[0] == "evaluate":
            results(folder, int(words[words.index("--episodes") + 1]), 1, 2, 3)
        elif words[0] != "record":
            (folder / ("report.json" if words[0] == "train" else "dataset.json")).write_text('{"seconds": 2.0}')
        return 0

    monkeypatch.setattr(study, "vlaft", command)
    with pytest.raises(StepFailed):
        study.compare(asked(out))
    text = study.compare(asked(out))
    assert text == (out / "comparison.md").read_text() and "| all | tokens | " in text
    kinds = [line.split()[0] for line in ran]
    assert kinds == ["record", "convert", "train", "evaluate", "train", *["evaluate"] * 2, *["train", "evaluate"] * 6]
    assert ran[6] == f"{ran[5]} --resume"  # the interrupted one
    assert all(line.endswith("train.steps=50 train.batch_size=4") for line in ran if line.startswith("train "))
    tried = [line for line in ran if line.startswith("evaluate ")]
    assert all("step-000050 --env metaworld:reach-v3 --env metaworld:button" in line for line in tried)
    assert all("--step-limit 150" in line for line in tried)
    done = len(ran)
    study.compare(asked(out))
    assert len(ran) == done
    with pytest.raises(
        ConfigError,
        match=r"begun with --demos 4 --steps 50 --batch-size 4 --episodes 5 --searched 3 --rates 0\.0005 0\.001:",
    ):
        study.compare(asked(out, episodes=6))
    with pytest.raises(ConfigError, match="something else"):
        study.compare(asked(tmp_path))
