"""The commands and examples of docs/simulator.md run as they stand there, and its figures hold."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from repository import ROOT
from small_base import write_small_base

from vlaft.cli.main import main
from vlaft.environments.episodes import wilson_interval
from vlaft.environments.interface import Moment
from vlaft.environments.tabletop import recording
from vlaft.environments.tabletop.environment import EPISODE_STEPS, MOTION_NOISE
from vlaft.environments.tabletop.scene import LIFTED, SETUP_A, SETUP_B
from vlaft.evaluation.rollout import KEPT

PAGE = (ROOT / "docs/simulator.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
COMMANDS = [line.strip() for line in re.findall(r"^    (?:vlaft|python) .*$", PAGE, flags=re.MULTILINE)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the page's environment, and a base wherever the page names a model."""
    for name in ("demo-out/base", "demo-out/run", "run"):
        write_small_base(tmp_path / name, "fused")
    (tmp_path / "reach.py").write_text(EXAMPLES[1], encoding="utf-8")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "reach", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(COMMANDS) == 5
    for command in COMMANDS:
        words = shlex.split(re.sub(r"--episodes \d+", "--episodes 2", command))
        if words[0] == "python":
            assert words[1:3] == ["-m", "vlaft.environments.tabletop.recording"] and recording.main(words[3:]) == 0
        else:
            words += ["--overwrite"] if "--plots" in words else ["--workers", "1"]
            assert main(words[1:]) == 0, command
    assert (here / "data-b/dataset.json").is_file()
    assert sorted(path.name for path in (here / "films").iterdir()) == ["episodes.gif", "episodes.png"]
    capsys.readouterr()
    assert main(["evaluate", "demo-out/run", "--env", "reach:Reach", "--episodes", "3", "--json"]) == 0
    outcomes = json.loads(capsys.readouterr().out)["models"][0]["outcomes"]
    assert [each["instruction"] for each in outcomes] == ["move to the red square"] * 3


def test_the_examples(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(EXAMPLES) == 4
    names: dict = {}
    sys.path.append(str(here))
    exec(EXAMPLES[0], names)
    assert names["info"]["instruction"].endswith(" block") and names["info"]["success"] is False
    exec(EXAMPLES[2], {})
    rate, steps = capsys.readouterr().out.split()
    assert (rate, steps) == ("0.0", "50")
    exec(EXAMPLES[3].replace("episodes=20", "episodes=2"), {})
    assert re.match(r"[\d.]+ \([\d.e-]+, [\d.]+\)", capsys.readouterr().out)


def test_who_goes_to_the_goal_succeeds(here: Path) -> None:
    """The page's environment can be solved, and counts it."""
    from vlaft.environments.episodes import roll_out
    from vlaft.environments.registry import environment_maker

    def towards(moments: list[Moment]) -> list[np.ndarray]:
        moves = []
        for moment in moments:
            white, red = (
                np.argwhere((moment.frame == colour).all(axis=2)) for colour in ((255, 255, 255), (220, 40, 40))
            )
            row, column = (red.mean(axis=0) - white.mean(axis=0)) / 500 if len(red) else (0.0, 0.0)
            moves.append(np.clip([[column, row, 0, 0, 0, 0, 1]], -0.03, 0.03))
        return moves

    rollout = roll_out(towards, environment_maker("reach:Reach"), seeds=range(10), parallel=4)
    assert rollout.success_rate == 1.0 and max(each.steps for each in rollout.episodes) < 20


def test_the_figures() -> None:
    assert (LIFTED, EPISODE_STEPS, MOTION_NOISE, KEPT) == (0.10, 30, 0.1, 3)
    assert (SETUP_A.max_step, SETUP_B.max_step) == (0.06, 0.045)
    assert [round(np.degrees(abs(angle))) for angle in (SETUP_B.frame_angle, SETUP_B.camera_angle)] == [7, 14]
    assert SETUP_A.frame_angle == SETUP_A.camera_angle == 0
    for setup in (SETUP_A, SETUP_B):
        *first, last = setup.objects
        assert f"pick up the {', '.join(first)} or {last} **{setup.noun}**" in PAGE
    for episodes, width in ((100, 0.2), (400, 0.1)):
        low, high = wilson_interval(episodes // 2, episodes)
        assert high - low == pytest.approx(width, abs=0.01)
    assert recording.RECORDING_NOISE > MOTION_NOISE
