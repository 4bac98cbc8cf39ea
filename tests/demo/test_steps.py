"""The demo's commands: what they are, what is left to do, what their results say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gymnasium import spaces

from vlaft.demo import steps as demo
from vlaft.demo.results import Success, mean_interval
from vlaft.demo.steps import DemoSettings, steps
from vlaft.environments.tabletop.environment import CONTROL_RATE, TabletopEnv
from vlaft.recipe.resolve import recipe_names, resolve


def evaluation(path: Path, successes: int, episodes: int = 20) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"models": [{"model": "m", "successes": successes, "episodes": episodes}]}))


def test_the_commands_are_those_of_the_job(tmp_path: Path) -> None:
    verbs = [step.words[0] if step.module is None else step.module for step in steps(tmp_path, DemoSettings())]
    order = [
        "vlaft.environments.tabletop.recording",
        "convert",
        "report",
        "evaluate",
        "train",
        "evaluate",
        "evaluate",
        "merge",
        "evaluate",
    ]
    assert verbs[: len(order)] == order
    assert verbs[len(order) :] in ([], ["export", "evaluate"])


def test_every_shipped_recipe_whose_cameras_the_tabletop_has_can_be_demonstrated() -> None:
    space = TabletopEnv().observation_space
    assert isinstance(space, spaces.Dict)
    cameras = {"main", *(name.removeprefix("image_") for name in space if name.startswith("image_"))}
    acting = {name for name in recipe_names() if cameras.issuperset(resolve(name).policy.cameras)}
    assert set(demo.LEARNING_RATES) == acting == {*recipe_names()} - {"oft-film"}  # which has three


def test_chunks_are_a_second_long(tmp_path: Path) -> None:
    assert demo.CHUNK == CONTROL_RATE
    for recipe in demo.LEARNING_RATES:
        lines = [step.line for step in steps(tmp_path, DemoSettings(recipe))]
        said = [line for line in lines if f"policy.chunk={demo.CHUNK}" in line]
        assert len(said) == (2 if resolve(recipe).policy.chunk > 1 else 0)  # report and train
        resolve(recipe, words=demo.TRAINING + demo.chunk_words(recipe))  # does not contradict itself


def test_seeds_have_scenes_of_their_own(tmp_path: Path) -> None:
    ranges = []
    for demonstrations, episodes in [demo.scene_seeds(seed) for seed in range(1, 10)]:
        ranges += [range(demonstrations, demonstrations + 900), range(episodes, episodes + demo.EVALUATION_EPISODES)]
    together = [number for each in ranges for number in each]
    assert len(together) == len(set(together))
    lines = [step.line for step in steps(tmp_path, DemoSettings(seeds=2))]
    assert any(f"--seed {demo.scene_seeds(2)[0]}" in line and "recording" in line for line in lines)
    assert sum(f"--seed {demo.scene_seeds(2)[1]} " in line for line in lines) == 2  # before and after


def test_a_step_is_done_when_its_result_is_there(tmp_path: Path) -> None:
    step = demo.acting(tmp_path / "model", tmp_path, "after", 5)
    assert not step.done
    (tmp_path / "after.json").write_text("{}")
    assert step.done
    assert step.line.endswith(f"--json > {tmp_path}/after.json")


def test_training_goes_on_where_it_was(tmp_path: Path) -> None:
    run = tmp_path / "run"
    before = demo.training("lora32", 1e-3, 1, tmp_path / "base", tmp_path / "data", run)
    run.mkdir()
    after = demo.training("lora32", 1e-3, 1, tmp_path / "base", tmp_path / "data", run)
    assert "--resume" not in before.words
    assert "--resume" in after.words


def test_a_success_is_read_with_its_interval(tmp_path: Path) -> None:
    evaluation(tmp_path / "after.json", 18)
    success = Success.from_file(tmp_path / "after.json")
    assert success.rate == 0.9
    assert success.interval == pytest.approx((0.699, 0.972), abs=1e-3)


def test_the_interval_over_training_seeds_is_students() -> None:
    half = 4.303 * 0.0721110 / 3**0.5  # two degrees of freedom, by the tables; the standard deviation of these three
    assert mean_interval([0.8, 0.9, 0.94], 100) == pytest.approx((0.88 - half, 1.0), abs=1e-4)
    assert mean_interval([0.9], 10) == pytest.approx((0.596, 0.982), abs=1e-3)
    assert mean_interval([0.5, 0.5], 10) == (0.5, 0.5)
