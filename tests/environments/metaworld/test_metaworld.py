"""Meta-World's tasks: what can be seen and done, what its experts do, and the whole job from recording to acting."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from repository import ROOT
from small_base import write_small_base

from vlaft.cli.main import main
from vlaft.environments.metaworld import environment as module
from vlaft.environments.metaworld.environment import MetaWorldEnv, as_metaworld, as_openvla
from vlaft.environments.metaworld.tasks import ACTION, CONTROL_RATE, EPISODE_STEPS, INSTRUCTIONS
from vlaft.environments.registry import shipped_tasks, tasks_named
from vlaft.environments.task import ExpertEpisode
from vlaft.errors import DataError, MissingExtra, UsageError, VlaftError


@pytest.fixture
def simulator() -> None:
    """Skip, with the sentence that a user would read, where Meta-World is not installed or cannot draw."""
    try:
        MetaWorldEnv("reach-v3").close()
    except VlaftError as error:
        pytest.skip(str(error))


def test_fifty_tasks_are_named_and_said() -> None:
    assert len(INSTRUCTIONS) == len(set(INSTRUCTIONS.values())) == 50
    tasks = tasks_named("metaworld")
    assert [task.name for task in tasks] == [f"metaworld:{name}" for name in INSTRUCTIONS]
    assert {task.name for task in tasks} < {task.name for task in shipped_tasks()}
    (push,) = tasks_named("metaworld:push-v3")
    assert push.cameras == ("main", "wrist") and push.step_limit == EPISODE_STEPS and push.waiting_steps == 0
    assert push.unnorm_keys == ("metaworld_push_v3", "metaworld")
    assert push.instruction == "push the puck to the target" and [len(names) for names in push.actions] == [4, 7]
    with pytest.raises(UsageError, match="metaworld:push-v2: Meta-World has no task 'push-v2'; did you mean 'push-v3'"):
        tasks_named("metaworld:push-v2")
    with pytest.raises(UsageError, match="has no task 'zzz'; --list-envs names them"):
        tasks_named("metaworld:zzz")


def test_actions_in_either_convention() -> None:
    generator = np.random.default_rng(0)
    actions = generator.uniform(-1, 1, (50, 4)).astype(np.float32)
    padded = as_openvla(actions)
    assert padded.shape == (50, 7) and padded.dtype == np.float32 and not padded[:, 3:6].any()
    assert padded[:, 6].min() >= 0 and padded[:, 6].max() <= 1 and abs(padded[:, :3]).max() <= 0.01
    for four, seven in zip(actions, padded, strict=True):
        assert np.allclose(as_metaworld(seven.astype(float)), four, atol=1e-6)
        assert np.array_equal(as_metaworld(four.astype(float)), four.astype(float))
    assert as_metaworld(np.array([3.0, -3, 0, 2])).tolist() == [1, -1, 0, 1]
    for wrong in (np.zeros(5), np.zeros((1, 4)), np.array([0, np.nan, 0, 0])):
        with pytest.raises(DataError, match="Meta-World takes actions of four or of seven finite numbers, not"):
            as_metaworld(wrong)


def test_without_the_package_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    module._library.cache_clear()
    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(MissingExtra, match=r"metaworld needs metaworld: pip install 'vlaft\[metaworld\]'"):
        tasks_named("metaworld:push-v3")[0].make()


@pytest.mark.parametrize("when", ["imported", "made"])
def test_where_nothing_can_draw_it_is_said_what_to_install(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*words: object) -> None:
        raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")

    class World:
        model = np_random = sawyer_observation_space = None

        def __delattr__(self, name: str) -> None:
            return None

    library = SimpleNamespace(
        mujoco=SimpleNamespace(Renderer=fail), worlds={"push-v3": World}, experts={"push-v3": None}
    )
    if when == "made":
        monkeypatch.setattr(module, "_library", lambda: library)
    else:
        module._library.cache_clear()
        broken = ModuleType("metaworld")
        broken.__path__ = []  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "metaworld", broken)
        monkeypatch.setitem(sys.modules, "metaworld.policies", ModuleType("metaworld.policies"))
        lacking = type("Lacking", (ModuleType,), {"__getattr__": lambda self, name: fail()})("metaworld.env_dict")
        monkeypatch.setitem(sys.modules, "metaworld.env_dict", lacking)
        monkeypatch.setitem(sys.modules, "mujoco", ModuleType("mujoco"))
    monkeypatch.setenv("MUJOCO_GL", "egl")
    with pytest.raises(
        VlaftError, match=r"cannot draw with MUJOCO_GL=egl \((Attribute|Import)Error.*apt-get install libegl1"
    ):
        MetaWorldEnv("push-v3")


@pytest.mark.metaworld
@pytest.mark.usefixtures("simulator")
def test_what_can_be_seen_and_done() -> None:
    env = MetaWorldEnv("pick-place-v3")
    observation, info = env.reset(seed=3)
    assert info == {"instruction": INSTRUCTIONS["pick-place-v3"]} and observation["state"].dtype == np.float32
    for name in ("image", "image_wrist"):
        frame = observation[name]
        assert frame.shape == (224, 224, 3) and frame.dtype == np.uint8 and frame.std() > 10
    puck = (observation["image"].astype(int) @ [1, -1, -1] > 60).sum()  # red: the puck and the robot's arm
    assert puck > 100
    x, _, z, opened = observation["state"]
    before = observation["image"]
    for _ in range(10):
        observation, _, terminated, truncated, info = env.step([1, 0, 0.5, 1])
    assert observation["state"][0] - x == pytest.approx(0.09, abs=0.03)  # a centimetre each, and some lag
    assert observation["state"][2] > z and observation["state"][3] < opened
    assert (observation["image"] != before).any() and not info["success"] and not terminated and not truncated
    env.reset(seed=4)
    for _ in range(10):
        other = env.step([0.01, 0, 0.005, 0, 0, 0, 0])[0]  # the same in metres, the gripper closed
    assert np.allclose(other["state"], observation["state"], atol=0.01)
    again = env.reset(seed=3)[0]
    another = MetaWorldEnv("pick-place-v3")
    expected = another.reset(seed=3)[0]
    another.close()
    assert all((again[name] == expected[name]).all() for name in again)
    assert (again["image"] != env.reset(seed=5)[0]["image"]).any()
    env.draw_only(("wrist",))
    spared = env.reset(seed=3)[0]
    assert [*spared] == ["state", "image_wrist"] and (spared["image_wrist"] == again["image_wrist"]).all()
    env.draw_only(None)
    assert [*env.step([0, 0, 0, 0])[0]] == ["state", "image", "image_wrist"]
    env.close()


@pytest.mark.metaworld
@pytest.mark.usefixtures("simulator")
def test_the_expert_succeeds_and_says_what_it_wanted() -> None:
    episode: ExpertEpisode = tasks_named("metaworld:reach-v3")[0].expert.demonstrate(1, None)  # type: ignore[union-attr]
    steps = len(episode.actions)
    assert episode.success and 20 < steps < 100 and CONTROL_RATE == 80
    assert episode.actions.shape == episode.states.shape == (steps, len(ACTION))
    assert abs(episode.actions).max() <= 1
    assert {camera: frames.shape for camera, frames in episode.frames.items()} == {
        "main": (steps, 224, 224, 3), "wrist": (steps, 224, 224, 3)
    }  # fmt: skip
    env = MetaWorldEnv("reach-v3")
    observation, _ = env.reset(seed=1)
    for number, action in enumerate(episode.actions):  # the same again
        assert (observation["image"] == episode.frames["main"][number]).all()
        observation, *_, info = env.step(action)
    assert info["success"]
    disturbed = env.demonstrate(1, 0.5)
    assert disturbed.success and (disturbed.actions[0] == episode.actions[0]).all()
    assert (disturbed.actions[:10] != episode.actions[:10]).any()  # what is wanted where it was knocked to
    env.close()


@pytest.mark.metaworld
@pytest.mark.slow
@pytest.mark.usefixtures("simulator")
@pytest.mark.parametrize("task", list(INSTRUCTIONS))
def test_every_task_begins_the_same_way_from_the_same_seed(task: str) -> None:
    env = MetaWorldEnv(task)
    first = env.reset(seed=7)[0]
    for _ in range(5):
        env.step([0, 0.5, -0.5, 1])
    env.reset(seed=8)
    again = env.reset(seed=7)[0]
    assert all((first[name] == again[name]).all() for name in first)
    env.close()


@pytest.mark.metaworld
@pytest.mark.usefixtures("simulator")
def test_the_whole_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The commands of docs/metaworld.md as they stand there, with fewer episodes and a model that learns nothing."""
    monkeypatch.chdir(tmp_path)
    base = str(write_small_base(tmp_path / "base"))
    page = (ROOT / "docs/metaworld.md").read_text(encoding="utf-8")
    commands = [shlex.split(line)[1:] for line in re.findall(r"^vlaft .*$", page, re.MULTILINE)]
    assert [words[0] for words in commands] == ["evaluate", "record", "inspect", "convert", "train", "evaluate"]
    more = {"convert": ["--workers", "1"], "train": ["train.steps=2", "train.batch_size=2"]}
    monkeypatch.setattr("vlaft.environments.metaworld.tasks.EPISODE_STEPS", 12)
    for words in commands:
        words = ["2" if word == "50" else base if word == "openvla/openvla-7b" else word for word in words]
        capsys.readouterr()
        assert main([*words, *more.get(words[0], ())]) == 0, words
    assert capsys.readouterr().out.split("\n")[1].split()[:2] == ["run/", "0.0%"]
    (model,) = json.loads(Path("results/results.json").read_text())["models"]
    (task,) = model["tasks"]
    assert task["unnorm_key"] == "metaworld_reach_v3" and model["episodes"] == 2
    assert [each["steps"] for each in model["outcomes"]] == [12, 12] and model["ended"] == {"step limit": 2}
    assert [each["seed"] for each in model["outcomes"]] == [1000, 1001]
    assert {path.name for path in Path("films").iterdir()} == {"episodes.gif", "episodes.png"}
    assert len(Path("results/episodes.jsonl").read_text().splitlines()) == 2
