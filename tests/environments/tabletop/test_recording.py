"""The scripted expert, which does what it is asked from any state, and its demonstrations, recorded and converted."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import faults
import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from small_base import write_small_base

from vlaft.cli.main import main as vlaft
from vlaft.data.codec import decode_image
from vlaft.data.store import ConvertedDataset
from vlaft.environments.tabletop import recording
from vlaft.environments.tabletop.environment import EPISODE_STEPS, TabletopEnv
from vlaft.environments.tabletop.recording import demonstrate, expert_action, main, record_demonstrations
from vlaft.environments.tabletop.scene import SETUP_A, SETUP_B, Scene, SetUp, new_scene
from vlaft.errors import ConfigError, VlaftError

BOTH = pytest.mark.parametrize("setup", [SETUP_A, SETUP_B], ids=lambda setup: setup.name)


def finish(scene: Scene) -> int:
    """Let the expert act until something is picked up; return the number of steps."""
    for number in range(EPISODE_STEPS):
        if scene.picked_up is not None:
            return number
        scene.step(expert_action(scene))
    return EPISODE_STEPS


@BOTH
@pytest.mark.parametrize("noise", [0.0, 0.15])
def test_it_picks_up_what_it_is_told(setup: SetUp, noise: float) -> None:
    steps = []
    for seed in range(150):
        scene = new_scene(setup, np.random.default_rng(seed), noise=noise)
        steps.append(finish(scene))
        assert scene.picked_up == scene.target, seed
    assert max(steps) < EPISODE_STEPS - 5 and min(steps) >= 5


@BOTH
def test_actions_are_within_limits_and_follow_from_the_state(setup: SetUp) -> None:
    space = TabletopEnv(setup).action_space
    for seed in range(20):
        scene = new_scene(setup, np.random.default_rng(seed), noise=0.1)
        for _ in range(EPISODE_STEPS):
            before = copy.deepcopy(scene)
            action = expert_action(scene)
            assert (expert_action(before) == action).all()
            assert (before.objects == scene.objects).all() and (before.gripper == scene.gripper).all()
            assert np.hypot(*action[:2]) <= setup.max_step + 1e-9 and action.astype(np.float32) in space
            assert (action[3:6] == 0).all() and action[6] in (0, 1)
            scene.step(action)


@BOTH
def test_it_opens_after_closing_on_nothing(setup: SetUp) -> None:
    scene = new_scene(setup, np.random.default_rng(3))
    scene.is_open, scene.gripper = False, np.array([*scene.objects[0, :2] + 0.05, 0.01])
    assert expert_action(scene)[6] == 1.0
    finish(scene)
    assert scene.picked_up == scene.target


@BOTH
def test_it_lets_go_of_another_object(setup: SetUp) -> None:
    scene = new_scene(setup, np.random.default_rng(4))
    scene.gripper = scene.objects[1].copy()
    scene.step(np.zeros(7))
    assert scene.held == 1
    finish(scene)
    assert scene.picked_up == scene.target


@BOTH
def test_a_demonstration_without_disturbances_can_be_done_again(setup: SetUp) -> None:
    for seed in range(20):
        shown = demonstrate(setup, seed, disturbed=0.0)
        env = TabletopEnv(setup, recording.RECORDING_NOISE)
        observation, info = env.reset(seed=seed)
        assert shown.instruction == info["instruction"]
        for frame, wrist_frame, state, action in zip(
            shown.frames, shown.wrist_frames, shown.states, shown.actions, strict=True
        ):
            assert (observation["image"] == frame).all() and (observation["state"] == state).all()
            assert (observation["image_wrist"] == wrist_frame).all()
            observation, _, terminated, _, info = env.step(action)
        assert terminated and info["success"]


@BOTH
def test_what_is_recorded_is_what_the_expert_wanted(setup: SetUp, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, outcomes = [], []

    def expert(scene: Scene) -> np.ndarray:
        wanted.append(expert_action(scene).astype(np.float32))
        return wanted[-1].astype(np.float64)

    class Watched(TabletopEnv):
        def step(self, action: np.ndarray) -> Any:
            outcomes.append((action, super().step(action)))
            return outcomes[-1][1]

    monkeypatch.setattr(recording, "expert_action", expert)
    monkeypatch.setattr(recording, "TabletopEnv", Watched)
    done = changed = 0
    for seed in range(40):
        wanted.clear()
        outcomes.clear()
        shown = demonstrate(setup, seed)
        assert (shown.actions == np.stack(wanted)).all() and len(shown.frames) == len(outcomes)
        for (_, answer), frame, state in zip(outcomes, shown.frames[1:], shown.states[1:], strict=False):
            assert (answer[0]["image"] == frame).all() and (answer[0]["state"] == state).all()
        done += outcomes[-1][1][4]["success"]
        changed += sum(bool((action != want).any()) for (action, _), want in zip(outcomes, wanted, strict=True))
        again = demonstrate(setup, seed)
        assert (shown.frames == again.frames).all() and (shown.actions == again.actions).all()
    assert done >= 39 and 20 < changed < 100  # about one step in eight of 400


def test_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new/demos.hdf5"
    frames = record_demonstrations(path, SETUP_A, [7, 3])
    assert [each.name for each in path.parent.iterdir()] == ["demos.hdf5"]
    with h5py.File(path) as file:
        data = file["data"]
        assert list(data) == ["demo_0", "demo_1"] and data.attrs["total"] == frames
        assert json.loads(data.attrs["env_args"])["env_kwargs"]["control_freq"] == 5
        for demo, seed, target in zip(data.values(), (7, 3), SETUP_A.objects, strict=False):
            shown = demonstrate(SETUP_A, seed, target)
            assert shown.instruction == f"pick up the {target} block"  # each object in turn
            assert demo.attrs["num_samples"] == len(shown.actions) and demo.attrs["seed"] == seed
            assert demo.attrs["language_instruction"] == shown.instruction
            assert (demo["actions"][:] == shown.actions).all() and demo["actions"].dtype == np.float32
            assert (demo["obs/agentview_image"][:] == shown.frames).all()
            assert (demo["obs/robot0_eye_in_hand_image"][:] == shown.wrist_frames).all()
            assert (demo["obs/robot_state"][:] == shown.states).all()


def test_recorded_and_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, data = tmp_path / "tabletop_b.hdf5", tmp_path / "data"
    assert main(["--out", str(file), "--episodes", "6", "--seed", "40"]) == 0
    assert capsys.readouterr().out.startswith("6 demonstrations of tabletop_b, ")
    base = write_small_base(tmp_path / "base", "fused")
    words = ["convert", str(file), "--preset", "tabletop", "--base", str(base), "--out", str(data), "--workers", "1"]
    assert vlaft(words) == 0
    converted = ConvertedDataset(data)
    assert list(converted.statistics) == ["tabletop_b"]  # the name under which `evaluate --env tabletop` looks
    statistics = converted.statistics["tabletop_b"]
    assert statistics["action"]["mask"] == [True] * 6 + [False]
    assert converted.cameras == ("image", "image_wrist")  # `main` and `wrist`, as the environment names them
    [source] = converted.info["sources"]
    assert source["layout"]["state_names"] == ["x", "y", "z", "gripper"]
    rows = [row for shard in sorted(data.glob("*.parquet")) for row in pq.read_table(shard).to_pylist()]
    targets = [*SETUP_B.objects, *SETUP_B.objects]
    shown = [demonstrate(SETUP_B, 40 + number, targets[number]) for number in range(6)]
    assert len(rows) == sum(len(each.actions) for each in shown)
    states = np.concatenate([each.states for each in shown])
    assert statistics["proprio"]["max"] == pytest.approx(states.max(axis=0), abs=1e-6)
    for number, demonstration in enumerate(shown):
        own = sorted(
            (row for row in rows if row["source"].endswith(f"demo_{number}")), key=lambda row: row["frame_index"]
        )
        assert {row["instruction"] for row in own} == {demonstration.instruction}
        assert np.array([row["action"] for row in own], np.float32) == pytest.approx(demonstration.actions, abs=1e-6)
        wrist = np.stack([decode_image(row["image_wrist"]["bytes"], "wrist") for row in own])
        resized = np.stack([converted.pipeline.prepare(frame) for frame in demonstration.wrist_frames])
        assert abs(wrist.astype(float) - resized).mean() < 3  # stored with some loss
        assert np.array([row["state"] for row in own], np.float32) == pytest.approx(demonstration.states, abs=1e-6)


def test_an_existing_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "demos.hdf5"
    path.write_text("mine")
    assert main(["--out", str(path), "--episodes", "1"]) == 1
    assert capsys.readouterr().err == f"error: {path} exists; name another file, or remove it first\n"
    assert path.read_text() == "mine"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, OSError])
def test_a_partial_file_is_never_left(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(setup: object, seed: int, target: str) -> recording.Demonstration:
        if seed == 2:
            raise error
        return demonstrate(SETUP_B, seed, target)

    monkeypatch.setattr(recording, "demonstrate", failing)
    with pytest.raises(VlaftError if error is OSError else error):
        record_demonstrations(tmp_path / "demos.hdf5", SETUP_B, range(4))
    assert not list(tmp_path.iterdir())
    if error is KeyboardInterrupt:
        assert main(["--out", str(tmp_path / "demos.hdf5"), "--episodes", "4", "--seed", "0"]) == 130
        assert not list(tmp_path.iterdir())


def test_told_to_stop_it_leaves_nothing(tmp_path: Path) -> None:
    words = [sys.executable, "-m", recording.__name__, "--out", str(tmp_path / "demos.hdf5"), "--episodes", "900"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, preexec_fn=faults.heed_signals)
    deadline = time.monotonic() + 300
    while not (tmp_path / ".demos.hdf5.partial").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.terminate()
    _, told = process.communicate(timeout=120)
    assert (process.returncode, told) == (130, "error: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_bad_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    cases = [
        (["--episodes", "0"], tmp_path / "a.hdf5", "no demonstrations were asked for"),
        (["--seed", "-3"], tmp_path / "a.hdf5", "-3 is no seed"),
        ([], tmp_path / "file/a.hdf5", "cannot be written"),
    ]
    for words, out, told in cases:
        assert main(["--out", str(out), *words]) == 1
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and told in captured.err and captured.err.count("\n") == 1
    with pytest.raises(ConfigError):
        record_demonstrations(tmp_path / "a.hdf5", SETUP_B, [])
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    with pytest.raises(SystemExit, match="2"):
        main(["--out", str(tmp_path / "a.hdf5"), "--setup", "tabletop_c"])
