"""Models in environments: which environment a name stands for, which statistics are used, what is counted."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_base import convert_small, write_small_base
from small_run import Small, run
from two_steps import MADE, TwoSteps

from vlaft.action.execution import Execution
from vlaft.cli.main import main
from vlaft.environments.registry import environment_maker
from vlaft.environments.tabletop.environment import TabletopEnv
from vlaft.errors import CheckpointError, ConfigError, DataError, UsageError, VlaftError
from vlaft.evaluation import rollout as module
from vlaft.evaluation.rollout import evaluate_in, pictures
from vlaft.policy import load


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, with statistics of one dataset, `mini`."""
    return write_small_base(tmp_path_factory.mktemp("rollout") / "base")


@pytest.fixture(scope="module")
def chunked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose policy reads two cameras and a state of three numbers, and writes chunks of eight actions."""
    folder = tmp_path_factory.mktemp("chunked")
    base = write_small_base(folder / "base", "fused")
    small = Small(base, convert_small(base, folder / "data", rich=True))
    run(small.recipe("oft-state", "train.steps=1"), folder / "run")
    return folder / "run"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder that Python does not know of."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def with_statistics(base: Path, folder: Path, *names: str) -> Path:
    """Copy the base, with statistics of further datasets, of twice the range."""
    shutil.copytree(base, folder)
    known = json.loads((base / "config.json").read_text())["norm_stats"]
    twice = {key: [2 * each for each in known["mini"]["action"][key]] for key in ("q01", "q99")}
    known |= {name: {"action": known["mini"]["action"] | twice} for name in names}
    (folder / "dataset_statistics.json").write_text(json.dumps(known))
    return folder


def test_shipped_names() -> None:
    for name, setup in [("tabletop", "tabletop_b"), ("tabletop-b", "tabletop_b"), ("tabletop-a", "tabletop_a")]:
        environment = environment_maker(name)()
        assert isinstance(environment, TabletopEnv) and environment.setup.name == setup
    make = environment_maker("tabletop")
    assert make() is not make()


def test_a_module_of_the_working_folder(here: Path) -> None:
    (here / "helper_of_mine.py").write_text("from two_steps import TwoSteps\nMine = TwoSteps\n")
    (here / "robots_of_mine").mkdir()
    source = "def make():\n    from helper_of_mine import Mine\n    return Mine()\n"  # imported when it is called
    (here / "robots_of_mine/arm.py").write_text(source)
    before = list(sys.path)
    environment = environment_maker("robots_of_mine.arm:make")()
    assert isinstance(environment, TwoSteps)
    assert sys.path == [*before, str(here)]  # at the end: a file of the folder hides no package from others
    assert environment_maker("two_steps:TwoSteps") is TwoSteps
    assert environment_maker("two_steps:with_argument:left: fast")().argument == "left: fast"  # type: ignore[attr-defined]
    assert sys.path == [*before, str(here)]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("tabeltop", r"tabeltop: there is no such environment; did you mean 'tabletop'\? \(tabletop, tabletop-a"),
        ("tabletop_b", "did you mean 'tabletop-b'"),
        ("", "there is no such environment"),
        ("two_steps", "or your own as module:factory"),
        ("two_steps:with_argument:", "there is no such environment"),
        ("metaworld:push", "Meta-World has no task 'push'; did you mean 'push-v3'"),
        ("libero", r"libero: LIBERO has suites; name one \(libero_spatial, libero_object, "),
        ("libero:spatial", "LIBERO has no suite 'spatial'; did you mean 'libero_spatial'"),
        ("libero:libero_object:10", "libero_object has no task '10'; its tasks are 0 to 9, see --list-envs"),
        ("libero:libero_object:milk", "libero_object has no task 'milk'"),
        ("libero:libero_object:", "libero_object has no task ''"),
        ("two_steps:", "there is no such environment"),
        (":make", "there is no such environment"),
        (".two_steps:make", "there is no such environment"),
        ("envs/two_steps.py:make", "there is no such environment"),
        ("two_steps.py:make", "name the module, not its file: two_steps:make"),
        ("two_stebs:TwoSteps", "there is no module 'two_stebs'; run from the folder that has it"),
        ("two_steps.inner:TwoSteps", "there is no module 'two_steps.inner'"),
        ("two_steps:TwoStep", "the module has no 'TwoStep'; did you mean 'TwoSteps'"),
        ("two_steps:NUMBER", "'NUMBER' cannot be called; name a function or class"),
    ],
)
def test_names_that_stand_for_nothing(name: str, told: str, here: Path) -> None:
    with pytest.raises(UsageError, match=told):
        environment_maker(name)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("import no_such_simulator", "the module needs 'no_such_simulator', which is not installed"),
        ("def make(:", "the module failed to load: SyntaxError: .* \\(--debug shows where\\)"),
        ("1 / 0", "the module failed to load: ZeroDivisionError"),
    ],
)
def test_modules_that_do_not_load(source: str, told: str, here: Path) -> None:
    name = f"unsound_{abs(hash(source))}"
    (here / f"{name}.py").write_text(source)
    with pytest.raises(VlaftError, match=told) as caught:
        environment_maker(f"{name}:make")
    assert not isinstance(caught.value, UsageError)
    assert name not in sys.modules


def test_a_model_acts_in_a_users_environment(base: Path) -> None:
    MADE.clear()
    told: list[int] = []
    evaluation = evaluate_in(
        str(base), "two_steps:TwoSteps", episodes=5, seed=10, parallel=2, keep=1, advance=told.append
    )
    episodes = evaluation.rollout.episodes
    assert [(each.seed, each.success, each.steps) for each in episodes] == [
        (seed, seed % 2 == 0, 2) for seed in range(10, 15)
    ]
    assert (
        evaluation.rollout.success_rate == 0.6
        and told == [1] * 5
        and evaluation.unnorm_keys == {"two_steps:TwoSteps": "mini"}
    )
    assert [env.closed for env in MADE] == [1, 1]
    assert [len(each.frames) for each in episodes] == [3, 3, 0, 0, 0]  # the first success, the first failure
    # what the environment was given is what the model predicts for its frame and its instruction
    frame = np.full((100, 140, 3), 100, np.uint8)
    expected = load(base).predict(frame, "push the red cube 10").action
    given = next(env for env in MADE if env.seeds[0] == 10).actions[0]
    assert given == pytest.approx(expected, rel=1e-5) and given.dtype == np.float32
    assert evaluation.tokens == 5 * 2 * 7 and 0 <= evaluation.non_action_tokens <= evaluation.tokens
    found = evaluation.to_json()
    assert (found["episodes"], found["successes"], found["success_rate"]) == (5, 3, 0.6)
    assert found["interval"] == list(evaluation.rollout.interval)
    assert found["outcomes"][1] == {
        "task": "two_steps:TwoSteps",
        "seed": 11,
        "instruction": "push the red cube 11",
        "success": False,
        "ended": "environment",
        "steps": 2,
        "info": {"success": False, "dry": True},
    }
    json.dumps(found)


def test_a_policy_of_several_cameras_a_state_and_chunks_acts(chunked: Path, tmp_path: Path) -> None:
    def acted(model: Path, **options: Any) -> list[np.ndarray]:
        MADE.clear()
        evaluation = evaluate_in(str(model), "two_steps:TwoCameras", episodes=2, seed=4, **options)
        assert [each.steps for each in evaluation.rollout.episodes] == [10, 10]
        assert evaluation.tokens == 0  # it writes none
        return next(env for env in MADE if env.seeds[0] == 4).actions

    def chunk(step: int) -> np.ndarray:
        frame = np.full((100, 140, 3), 40 + step, np.uint8)
        seen = {"wrist": 255 - frame, "main": frame}  # by name, in whatever order
        return policy.predict(seen, "push the red cube 4", state=np.full(3, 0.1 * step)).actions

    policy = load(chunked)
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(acted(chunked), [*chunk(0), *chunk(8)[:2]], **close)
    by_three = acted(chunked, execution=Execution(3))
    np.testing.assert_allclose(by_three, [*chunk(0)[:3], *chunk(3)[:3], *chunk(6)[:3], chunk(9)[0]], **close)
    assert len(acted(chunked, execution=Execution(ensemble=True))) == 10
    assert main(["merge", str(chunked), "--out", str(tmp_path / "merged")]) == 0
    np.testing.assert_allclose(acted(tmp_path / "merged"), acted(chunked), rtol=1e-3, atol=1e-4)


def test_only_what_is_looked_at_is_drawn(chunked: Path, base: Path) -> None:
    def acted(model: Path, env: str, **options: Any) -> tuple[list[np.ndarray], Any]:
        MADE.clear()
        evaluation = evaluate_in(str(model), f"two_steps:{env}", episodes=1, seed=4, **options)
        ((frames, actions),) = ((each.frames, each.actions) for each in evaluation.rollout.episodes)
        return [*MADE[-1].actions, *frames, *actions], getattr(MADE[-1], "drawn", None)

    both, none, main = ("main", "wrist"), (), ("main",)
    for model, options, drawn in (
        (chunked, {}, [both, *[none] * 7, both, none, none]),
        (chunked, {"execution": Execution(4)}, [both, *[none] * 3, both, *[none] * 3, both, none, none]),
        (chunked, {"keep": 1}, [both, *[main] * 7, both, main, main]),
        (base, {"keep": 1}, [main] * 11),  # it reads one camera, at every step
    ):
        spared, told = acted(model, "Sparing", **options)
        everything, _ = acted(model, "TwoCameras", **options)
        assert told == drawn
        assert all((one == two).all() for one, two in zip(spared, everything, strict=True))


def test_an_episode_ends_at_the_lower_limit(base: Path) -> None:
    for asked, steps, ended in ((1, 1, "step limit"), (5, 2, "success")):
        (outcome,) = evaluate_in(str(base), "two_steps:TwoSteps", episodes=1, step_limit=asked).rollout.episodes
        assert (outcome.steps, outcome.ended) == (steps, ended)


@pytest.mark.parametrize(
    ("env", "told"),
    [
        ("TwoSteps", r"run: it reads the camera 'wrist', which two_steps:TwoSteps lacks \(it has: main\)"),
        ("WideState", "run: it reads a state of 3 numbers, and two_steps:WideState observes one of 7"),
        ("NoState", "run: it reads a state of 3 numbers, and two_steps:NoState observes none"),
    ],
)
def test_an_environment_that_lacks_what_the_policy_reads(chunked: Path, env: str, told: str) -> None:
    MADE.clear()
    with pytest.raises(DataError, match=told):
        evaluate_in(str(chunked), f"two_steps:{env}", episodes=1)
    assert [each.closed for each in MADE] == [1]


def test_more_actions_than_a_chunk_has(chunked: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model, chunk, asked in ((chunked, 8, "9"), (base, 1, "2")):
        words = ["evaluate", str(model), "--env", "two_steps:TwoCameras", "--episodes", "1", "--execute", asked]
        assert main(words) == 1
        told = capsys.readouterr().err
        assert f"--execute {asked}: the policy writes chunks of {chunk}; give at most {chunk}" in told


def test_the_same_seeds_give_the_same_episodes(base: Path) -> None:
    first, again, other = (evaluate_in(str(base), "tabletop", episodes=3, seed=seed, keep=3) for seed in (4, 4, 7))

    def frames(evaluation: module.RolloutEvaluation) -> list[np.ndarray]:
        return [np.stack(each.frames) for each in evaluation.rollout.episodes]

    for one, two in zip(frames(first), frames(again), strict=True):
        assert (one == two).all()
    assert (frames(first)[0][0] != frames(other)[0][0]).any()
    assert all("disc" in each.instruction and each.steps <= 30 for each in first.rollout.episodes)


def test_whose_statistics(base: Path, tmp_path: Path) -> None:
    merged = with_statistics(base, tmp_path / "merged", "tabletop_b", "tabletop_a")
    options = {"episodes": 1, "keep": 1}

    def key(env: str, unnorm_key: str | None = None, model: Path = merged) -> str:
        return evaluate_in(str(model), env, unnorm_key=unnorm_key, **options).unnorm_keys[env]  # type: ignore[arg-type]

    assert key("tabletop") == "tabletop_b" and key("tabletop-a") == "tabletop_a"
    assert key("tabletop", "mini") == "mini"
    assert key("tabletop", model=base) == "mini"  # the only one
    with pytest.raises(DataError, match=r"merged: the statistics hold 3 datasets; .* \(--unnorm-key\)"):
        key("two_steps:TwoSteps")
    with pytest.raises(DataError, match="merged: there are no statistics for 'minni'; did you mean 'mini'"):
        key("tabletop", "minni")
    ranges = [
        evaluate_in(str(merged), "tabletop", unnorm_key=name, **options).rollout.episodes[0].actions[0]  # type: ignore[arg-type]
        for name in ("mini", "tabletop_b")
    ]
    assert ranges[1][:6] == pytest.approx(2 * ranges[0][:6], rel=1e-5)  # the gripper is not scaled


def test_what_is_wrong_shows_before_a_model_is_loaded(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_loading(*words: object, **options: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(module, "load", no_loading)
    with pytest.raises(UsageError, match="no such environment"):
        evaluate_in(str(base), "table")
    with pytest.raises(VlaftError, match="factory failed: OSError: no robot on /dev/ttyUSB0"):
        evaluate_in(str(base), "two_steps:broken")
    with pytest.raises(ConfigError, match="--env tabletop is named twice"):
        evaluate_in(str(base), ["tabletop", "tabletop"])
    for options, told in [({"episodes": 0}, "no episodes"), ({"seed": -1}, "-1 is no seed"), ({"parallel": 0}, "few")]:
        with pytest.raises(ConfigError, match=told):
            evaluate_in(str(base), "tabletop", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("env", "told"),
    [("Failing", "seed 1 failed: RuntimeError: a motor is hot"), ("NoSuccess", "gives no info\\['success'\\]")],
)
def test_environments_that_go_wrong_are_closed(base: Path, env: str, told: str) -> None:
    MADE.clear()
    with pytest.raises(VlaftError, match=told):
        evaluate_in(str(base), f"two_steps:{env}", episodes=4, parallel=3)
    assert [each.closed for each in MADE] == [1, 1, 1]


def test_models_that_go_wrong(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MADE.clear()
    with pytest.raises(CheckpointError, match="no such folder"):
        evaluate_in(str(tmp_path / "absent"), "two_steps:TwoSteps", episodes=1)

    def full(self: object, moments: object) -> None:
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(module._Actor, "__call__", full)
    with pytest.raises(VlaftError, match="memory is full at --batch-size 8: halve it"):
        evaluate_in(str(base), "two_steps:TwoSteps", episodes=1, parallel=8)
    assert [each.closed for each in MADE] == [1, 1]


def test_pictures(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "films"
    out.mkdir()
    (out / "notes.png").write_text("mine")
    (out / "episodes-2-of_before.png").write_text("old")
    several, one, none = (
        evaluate_in(str(base), "two_steps:TwoSteps", episodes=episodes, keep=keep).rollout.episodes
        for episodes, keep in ((5, 1), (1, 1), (1, 0))
    )
    with pictures(out) as drawn:
        drawn.add("", several)
        drawn.add("nothing", none)
        drawn.add("1-base-two_steps:TwoSteps", one)
    names = ["episodes.gif", "episodes.png", *[f"episodes-1-base-two_steps-TwoSteps.{kind}" for kind in ("gif", "png")]]
    assert drawn.names == names
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "notes.png"])
    with Image.open(out / "episodes.gif") as film:
        assert film.size == (2 * 252 + 4, 180 + 30)
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(VlaftError, match=r"films cannot be written, since .*file is a file"),
        pictures(tmp_path / "file/films"),
    ):
        raise AssertionError("opened")
