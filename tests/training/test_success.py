"""A model that acts while it is trained: what is counted, what is chosen by it, and that training does not notice."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_run import Small, Stopped, checkpoint_content, log_lines, run, stop_after

from vlaft.cli.main import main
from vlaft.environments.episodes import EpisodeOutcome, Rollout
from vlaft.errors import VlaftError
from vlaft.evaluation.rollout import TRAINING_SEED, acting
from vlaft.pages.curves import draw_curves, read_curves

ACTS = ("train.evaluate_env=two_steps:TwoSteps", "train.evaluate_env_every=2", "train.evaluate_env_episodes=4")
STEPS = ("train.steps=6", "train.save_every=2", "train.evaluate_every=2", "train.keep_checkpoints=3")


def planned(rates: Sequence[float]) -> Any:
    """Let a model succeed as often as planned, at one look after the other, and draw random numbers meanwhile."""
    left = list(rates)

    def act(*_: Any) -> Rollout:
        torch.rand(3), random.random(), np.random.rand()
        rate = left.pop(0)
        return Rollout(tuple(EpisodeOutcome(seed, "push", success=seed < 4 * rate) for seed in range(4)), 0.0)

    return act


def test_the_model_acts_and_training_does_not_notice(small: Small, tmp_path: Path) -> None:
    words = [*STEPS, "adapt.lora.dropout=0.1"]
    alone = run(small.recipe("lora8", *words), tmp_path / "alone")
    really = acting("two_steps:TwoSteps", 4)
    looks = []

    def act(model: Any, *arguments: Any) -> Rollout:
        assert not model.training
        torch.rand(3), random.random(), np.random.rand()
        looks.append(really(model, *arguments))
        return looks[-1]

    recipe = small.recipe("lora8", *words, *ACTS)
    beside = run(recipe, tmp_path / "beside", acting=act)
    assert beside.losses == alone.losses
    ours, theirs = (checkpoint_content(tmp_path / name, "step-000006") for name in ("beside", "alone"))
    assert ours.keys() == theirs.keys() and {key for key in ours if ours[key] != theirs[key]} <= {"state"}
    assert [[each.seed for each in look.episodes] for look in looks] == [[TRAINING_SEED + n for n in range(4)]] * 3
    assert all(look.success_rate == 0.5 for look in looks)
    counted = [line for line in log_lines(tmp_path / "beside") if "success_rate" in line]
    assert [line["step"] for line in counted] == [2, 4, 6]
    assert counted[0]["success_rate"] == 0.5 and counted[0]["success_low"] < 0.5 < counted[0]["success_high"]
    assert not any(line["best"] for line in counted)  # the best is chosen by the held-out L1


def test_the_best_may_be_chosen_by_success_and_a_resume_knows_it(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small.recipe("lora8", *STEPS, *ACTS, "train.best_by=success")
    whole = run(recipe, tmp_path / "whole", acting=planned([0.25, 0.75, 0.75]))
    assert whole.summary and whole.summary.best == "step-000004" and whole.summary.best_success == 0.75
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Stopped):
            run(recipe, tmp_path / "resumed", acting=planned([0.25, 0.75]))
    resumed = run(recipe, tmp_path / "resumed", acting=planned([0.75]), resume=True)
    assert resumed.summary and replace(resumed.summary, folder=Path(), seconds=0, peak=None) == replace(  # type: ignore[arg-type]
        whole.summary,
        folder=Path(),
        seconds=0,
        peak=None,  # type: ignore[arg-type]
    )
    assert log_lines(tmp_path / "resumed") == log_lines(tmp_path / "whole")
    for name in ("step-000004", "step-000006"):
        assert checkpoint_content(tmp_path / "resumed", name) == checkpoint_content(tmp_path / "whole", name)
    status = json.loads((tmp_path / "resumed/run.json").read_text())
    assert (status["best"], status["best_success"], status["best_l1"]) == ("step-000004", 0.75, None)
    curves = read_curves(tmp_path / "resumed")
    titles = [axis.get_title() for axis in draw_curves([curves]).axes]
    assert "success in the environment" in titles
    rates = curves.held_out["success_rate"]
    assert rates[np.isfinite(rates)].tolist() == [0.25, 0.75, 0.75]


def test_an_environment_that_fails_costs_the_figure_and_not_the_run(small: Small, tmp_path: Path) -> None:
    def act(*_: Any) -> Rollout:
        raise VlaftError("a motor is hot")

    told = run(small.recipe("lora8", *ACTS, "train.steps=2"), tmp_path / "run", acting=act)
    assert told.summary and told.summary.steps == 2
    assert told.warnings == ["train.evaluate_env: nothing was counted at step 2: a motor is hot"]


def test_train_says_how_often_the_model_succeeded(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--recipe", "lora8", "--out", str(tmp_path / "run"), *small.words(), *ACTS, "train.steps=2"]
    assert main([*words, "train.best_by=success"]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "step 2 | acted: 50% of 4 episodes succeeded (15% to 85%) (best so far)" in told
    assert "best: step-000002 (50% succeeded)" in told
    words[4] = str(tmp_path / "other")
    words[words.index(ACTS[0])] = "train.evaluate_env=tabeltop"
    assert main(words) == 2
    assert "did you mean 'tabletop'" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
