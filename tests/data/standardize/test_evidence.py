"""Rules for the gripper against what demonstrations show: fingers that open, and hands that begin open."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

from vlaft.cli.main import main
from vlaft.data.episode import Episode
from vlaft.data.standardize.evidence import finger_opening, gripper_step, opens_with_high
from vlaft.errors import DataError

ROBOSUITE = {"env_name": "Lift", "type": 1, "env_kwargs": {"control_freq": 20}}
ISAAC = {"env_name": "Isaac-Stack-Cube-Franka-IK-Rel-v0", "type": 2, "sim_args": {"dt": 0.01, "decimation": 5}}


def commands_of(length: int) -> NDArray[np.float64]:
    """Open at first (1), closed (-1) in the middle, open again."""
    return np.where((np.arange(length) > 5) & (np.arange(length) < length - 6), -1.0, 1.0)


def follow(opens: NDArray[np.bool_]) -> NDArray[np.float64]:
    """One finger's way in metres: 8 mm a step towards where it is told to be, from fully open, stopped at 1 cm."""
    finger = np.full(len(opens), 0.04)
    for step in range(1, len(opens)):
        finger[step] = np.clip(finger[step - 1] + (0.008 if opens[step - 1] else -0.008), 0.01, 0.04)
    return finger


def write(
    path: Path,
    env: dict[str, Any] | None,
    *,
    opens_at: float = 1.0,
    fingers: Callable[[NDArray[np.float64]], NDArray[np.float64]] | None = lambda f: np.stack([f, -f], axis=1),
    begin_open: bool = True,
    episodes: int = 4,
    prefix: str = "obs/",
) -> Path:
    """A robomimic file whose gripper opens at `opens_at`; its fingers, where measured, follow."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        if env is not None:
            data.attrs["env_args"] = json.dumps(env)
        for number in range(episodes):
            length = 30 + number
            told = commands_of(length) * (1 if begin_open else -1)
            demo = data.create_group(f"demo_{number}")
            motion = rng.normal(0, 0.1, (length, 6))
            demo["actions"] = np.concatenate([motion, told[:, None] * opens_at], axis=1).astype(np.float32)
            demo[f"{prefix}eef_pos"] = np.cumsum(motion[:, :3], axis=0)
            demo[f"{prefix}eef_quat"] = np.tile([1.0, 0, 0, 0], (length, 1))
            if fingers is not None:
                name = "gripper_pos" if prefix == "obs/" else "gripper_qpos"
                demo[prefix + name] = fingers(follow(told > 0))
            demo["obs/table_cam"] = rng.integers(0, 255, (length, 8, 8, 3), dtype=np.uint8)
    return path


def inspected(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any], str]:
    capsys.readouterr()
    code = main(["inspect", *words, "--no-frames", "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out), captured.err


def dry_run(words: list[str], base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    given = [*words, "instruction=open it", "--base", base, "--out", str(tmp_path / "out"), "--dry-run"]
    code = main(["convert", *given])
    assert not (tmp_path / "out").exists()
    return code, capsys.readouterr().err


def test_isaac_lab_opens_at_plus_one(tmp_path: Path, base: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "isaac.hdf5", ISAAC)
    code, found, _ = inspected([str(path)], capsys)
    assert (code, found["format"], found["question"], found["fps"]) == (0, "isaac-lab", None, 20)
    assert found["state"] == ["obs/eef_pos", "obs/eef_quat", "obs/gripper_pos"]
    assert found["grippers"][0]["open_at"] == 1 and found["standardized"]["steps"] == ["scale_gripper"]
    assert found["standardized"]["names"][6] == "gripper" and found["standardized"]["mask"] == [True] * 6 + [False]
    assert found["standardized"]["stats"]["mean"][6] == pytest.approx(
        np.mean(np.concatenate([commands_of(30 + number) > 0 for number in range(4)]))
    )
    assert dry_run([str(path)], base, tmp_path, capsys)[0] == 0


@pytest.mark.parametrize(
    ("env", "opens_at", "options"),
    [
        (ISAAC, -1, {}),  # the fingers deny the rule
        (ISAAC, -1, {"fingers": None}),  # beginnings alone
        (ISAAC, -1, {"fingers": lambda finger: finger[:, None]}),  # one finger, in metres
        (ISAAC, -1, {"fingers": lambda finger: np.stack([finger, finger], axis=1)}),
        (ISAAC, -1, {"begin_open": False}),  # the fingers, although the beginnings seem to agree
        (ROBOSUITE, 1, {"prefix": "obs/robot0_"}),
        (ROBOSUITE, 1, {"prefix": "obs/robot0_", "fingers": None}),
        (None, 1, {"fingers": None}),
    ],
)
def test_a_rule_that_the_data_contradict_is_asked_about(
    env: dict[str, Any] | None,
    opens_at: float,
    options: dict[str, Any],
    tmp_path: Path,
    base: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(tmp_path / "demos.hdf5", env, opens_at=opens_at, **options)
    code, found, told = inspected([str(path)], capsys)
    assert code == 1 and told.count("error: ") == 1 and found["question"] in told
    assert found["grippers"][0]["open_at"] is None and "not known" in found["grippers"][0]["why"]
    code, refused = dry_run([str(path)], base, tmp_path, capsys)
    assert code == 1 and found["question"] in refused and "\n" not in found["question"]

    keep, turn = (shlex.split(word)[0] for word in re.findall(r"steps='[^']*'", found["question"]))
    for word, opened in ((keep, -opens_at), (turn, opens_at)):
        code, settled, _ = inspected([str(path), word], capsys)
        assert (code, settled["question"]) == (0, None)
        gripper = settled["standardized"]["stats"]["mean"][6]
        raw = settled["action"]["stats"]["mean"][6]
        assert gripper == pytest.approx((1 + raw * opened) / 2, abs=1e-6)
        assert dry_run([str(path), word], base, tmp_path, capsys)[0] == 0


def test_steps_of_the_users_own_are_kept_with_a_warning(
    tmp_path: Path, base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "isaac.hdf5", ISAAC, opens_at=-1)
    _, found, _ = inspected([str(path), "steps=[scale_gripper]"], capsys)
    assert any("measured fingers" in text and "are kept" in text for text in found["warnings"])
    code, told = dry_run([str(path), "steps=[scale_gripper]"], base, tmp_path, capsys)
    assert code == 0 and "measured fingers" in told
    own = tmp_path / "own.yaml"
    own.write_text("steps: [scale_gripper]\n")
    assert dry_run([str(path), "--preset", str(own)], base, tmp_path, capsys)[0] == 0
    # steps that are only added settle nothing
    assert dry_run([str(path), "steps+=[drop_first]"], base, tmp_path, capsys)[0] == 1


def test_a_presets_rule_is_held_against_the_data_too(
    tmp_path: Path, base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--preset", "robomimic", "cameras={primary: obs/table_cam}", "state=obs/robot0_eef_pos"]
    wrong = write(tmp_path / "wrong.hdf5", ROBOSUITE, opens_at=1, prefix="obs/robot0_")
    code, told = dry_run([str(wrong), *words], base, tmp_path, capsys)
    assert code == 1 and "the preset robomimic" in told and "steps='[{scale_gripper: {from_range: [1, -1]" in told
    right = write(tmp_path / "right.hdf5", ROBOSUITE, opens_at=-1, prefix="obs/robot0_")
    assert dry_run([str(right), *words], base, tmp_path, capsys)[0] == 0


@pytest.mark.parametrize(
    ("opened", "closed", "runs", "which"),
    [(0, 255, "-127 to 0.5", 1), (1, 0, "0 to 0.5", 2), (0.08, 0, "0.46 to 0.5", 2)],
)
def test_units_that_a_rule_does_not_expect_are_asked_about(
    opened: float,
    closed: float,
    runs: str,
    which: int,
    tmp_path: Path,
    base: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(tmp_path / "wide.hdf5", ROBOSUITE, fingers=None)
    with h5py.File(path, "a") as file:
        for demo in file["data"].values():
            demo["actions"][:, 6] = np.where(demo["actions"][:, 6] > 0, opened, closed)
    code, told = dry_run([str(path)], base, tmp_path, capsys)
    assert code == 1 and f"runs from {runs}" in told
    words = [shlex.split(word)[0] for word in re.findall(r"steps='[^']*'", told)]
    code, found, _ = inspected([str(path), words[which]], capsys)
    ends = [found["standardized"]["stats"][name][6] for name in ("min", "max")]
    assert code == 0 and found["question"] is None and ends == pytest.approx([0, 1], abs=0.01)
    share = (found["action"]["stats"]["mean"][6] - closed) / (opened - closed)
    assert found["standardized"]["stats"]["mean"][6] == pytest.approx(share, abs=0.01)  # open is 1


def test_fingers_that_agree_outweigh_how_the_episodes_begin(
    tmp_path: Path, base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.hdf5", ISAAC, begin_open=False)
    assert inspected([str(path)], capsys)[1]["question"] is None
    assert dry_run([str(path)], base, tmp_path, capsys)[0] == 0


def test_knuckles_and_shares_tell_nothing() -> None:
    told = commands_of(40) > 0
    finger = follow(told)
    closing = 20 * (0.04 - finger)  # an angle, or a share of the way: 0 is open
    for values in (closing[:, None], np.stack([closing, 1.1 * closing], axis=1), closing):
        episode = Episode(index=0, name="e", length=40, arrays={"obs/gripper_pos": values})
        assert finger_opening(episode) is None
    for pair in (np.stack([finger, -finger], axis=1), np.stack([-finger, finger], axis=1)):
        state = np.concatenate([np.zeros((40, 6)), pair], axis=1).astype(np.float32)
        opening = finger_opening(Episode(index=0, name="e", length=40, state=state))
        np.testing.assert_allclose(opening, 2 * finger, rtol=1e-6)
        assert opens_with_high([told.astype(float)], [opening]) is True
        assert opens_with_high([1 - told.astype(float)], [opening]) is False
        assert opens_with_high([told.astype(float)] * 2, [opening, None]) is None
    assert opens_with_high([told.astype(float)], [np.full(40, 0.08)]) is None
    assert opens_with_high([np.random.default_rng(0).normal(size=40)], [2 * finger]) is None
    assert opens_with_high([np.zeros(0)], [np.zeros(0)]) is None


def test_a_damaged_array_that_nothing_needs_is_no_evidence() -> None:
    class Damaged(dict[str, NDArray[np.generic]]):
        def __getitem__(self, name: str) -> NDArray[np.generic]:
            raise DataError("damaged")

    episode = Episode(index=0, name="e", length=4, arrays=Damaged({"obs/gripper_pos": np.zeros((4, 2))}))
    assert finger_opening(episode) is None


def test_steps_name_a_gripper_that_is_not_the_last() -> None:
    assert gripper_step("invert_gripper", 6, 7) == "invert_gripper"
    assert gripper_step("invert_gripper", 0, 7) == {"invert_gripper": {"dim": 0}}
    assert gripper_step("scale_gripper", 6, 7, from_range=[0, 2]) == {"scale_gripper": {"from_range": [0, 2]}}
