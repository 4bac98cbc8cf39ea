"""docs/chunks.md as its reader types it: from a LeRobot set of two cameras to a robot that acts chunks."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lerobot_sets import with_two_cameras
from repository import ROOT
from serving_fixtures import running
from small_base import write_small_base

from vlaft.cli.main import main
from vlaft.data.codec import encode_image
from vlaft.policy import load

# what follows is about more than the way from a dataset to a robot
GUIDE = (ROOT / "docs/chunks.md").read_text(encoding="utf-8").partition("## Recipes and words")[0]
CHUNK = 10
STATE = [0.44, 0.03, 0.24, -3.12, 0.03, 0.8, 0.01, 0.01]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, flags=re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines()]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the guide's commands were run, in their order."""
    folder = tmp_path_factory.mktemp("guide")
    write_small_base(folder / "base", "fused")
    with_two_cameras(ROOT / "tests/data/lerobot/v3.0-internvla_pick_place", folder / "cups")
    for name, level in (("front", 90), ("wrist", 200)):
        (folder / f"{name}.png").write_bytes(encode_image(np.full((48, 64, 3), level, np.uint8), "png"))
    small = {"report": ["--base", "base"], "train": ["train.steps=2", "train.batch_size=2"]}
    with contextlib.chdir(folder):
        for line in commands():
            words = shlex.split(line.replace("openvla/openvla-7b", "base"))
            assert words[0] == "vlaft"
            if words[1] != "serve":  # runs until it is stopped: below
                assert main([*words[1:], *small.get(words[1], [])]) == 0, line
    return folder


def test_the_guide_has_every_verb_on_the_way() -> None:
    verbs = [shlex.split(line)[1] for line in commands()]
    assert verbs == ["inspect", "convert", "report", "train", "evaluate", "merge", "predict", "serve"]
    assert commands()[-1] == "vlaft serve model/"


def test_what_it_reads_and_writes_is_recorded(job: Path) -> None:
    policy = json.loads((job / "model/config.json").read_text())["policy"]
    assert (policy["cameras"], policy["state_size"], policy["chunk"]) == (["main", "wrist"], 8, CHUNK)


def test_the_python_example(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(job)
    frame = np.zeros((48, 64, 3), np.uint8)
    names: dict[str, Any] = {"image": frame, "wrist_image": 255 - frame, "joints": STATE}
    exec(blocks("python")[0], names)
    assert names["prediction"].actions.shape == (CHUNK, 7)


class Robot:
    """Remembers what it was told, and counts how often it was looked at."""

    def __init__(self, steps: int) -> None:
        self.actions: list[np.ndarray] = []
        self.steps = steps

    def camera(self, level: int) -> np.ndarray:
        return np.full((48, 64, 3), level + len(self.actions), np.uint8)

    def state(self) -> list[float]:
        return [number + 0.01 * len(self.actions) for number in STATE]

    def act(self, action: np.ndarray) -> None:
        self.actions.append(action)

    def done(self) -> bool:
        return len(self.actions) == self.steps


def test_the_robots_loop(job: Path) -> None:
    policy = load(job / "model", device="cpu")
    names: dict[str, Any] = {}
    exec(compile(blocks("python")[1], "docs/chunks.md", "exec"), names)
    robot = Robot(CHUNK + 3)
    cameras = {"front": lambda: robot.camera(20), "wrist": lambda: robot.camera(120)}
    with running(policy) as server:
        assert names["run_episode"](cameras, robot, "move the mug", server.url, hz=1000.0)
    told, robot.actions = robot.actions, []
    expected = []
    for asked in (0, CHUNK):
        robot.actions = told[:asked]
        images = {"main": robot.camera(20), "wrist": robot.camera(120)}
        expected += list(policy.predict(images, "move the mug", state=robot.state()).actions)
    np.testing.assert_array_equal(told, expected[: CHUNK + 3])
