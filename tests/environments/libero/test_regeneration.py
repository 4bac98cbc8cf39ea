"""LIBERO's own demonstrations replayed: with a simulator that adds up actions, and with LIBERO's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from libero_files import Demonstration, write_libero_file
from small_base import write_small_base

from vlaft.cli.main import main
from vlaft.data.standardize.steps import moving_steps
from vlaft.environments.libero import environment, regeneration
from vlaft.environments.libero.demonstrations import Sight
from vlaft.environments.libero.environment import LiberoEnv, as_libero
from vlaft.environments.libero.expert import Picker
from vlaft.environments.libero.regeneration import Replay, read_source, regenerate
from vlaft.environments.libero.tasks import SUITES
from vlaft.errors import ConfigError, DataError, VlaftError
from vlaft.files import read_json

MILK = "pick_up_the_milk_and_place_it_in_the_basket"
IDLE = np.array([0, 0, 0, 0, 0, 5e-5, -1])


class Adder:
    """A simulator whose hand goes where actions add up to; done beyond x = 1."""

    def __init__(self) -> None:
        self.place, self.asked = np.zeros(3), []
        self.world = SimpleNamespace(get_sim_state=lambda: np.array([7.0, *self.place]))

    def restore(self, state: np.ndarray, number: int) -> dict[str, np.ndarray]:
        if state.shape != (4,):
            raise DataError(f"a state of this task has 4 numbers, not {[*state.shape]}")
        self.place = state[1:].copy()
        self.asked.append(number)
        return seen(self.place, 256)

    def act(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], bool]:
        self.place = self.place + action[:3]
        return seen(self.place, 256), bool(self.place[0] > 1)


def seen(place: np.ndarray, size: int) -> dict[str, np.ndarray]:
    frame = np.zeros((size, size, 3), np.uint8)
    frame[0, :, 0] = int(100 * place[0]) % 256  # the bottom row, which the simulator gives first
    return {
        "agentview_image": frame, "robot0_eye_in_hand_image": frame + 1, "robot0_eef_pos": place,
        "robot0_eef_quat": np.array([0, 0, 2**-0.5, 2**-0.5]), "robot0_gripper_qpos": np.array([0.04, -0.04]),
        "robot0_joint_pos": np.arange(7.0),
    }  # fmt: skip


def moved(*moves: float, idle: tuple[int, ...] = ()) -> Demonstration:
    """Return a demonstration of moves along x, with idle steps before some of them."""
    demo, place = Demonstration(), np.zeros(3)
    for step, move in enumerate(moves):
        for action in [IDLE] * (step in idle) + [np.array([move, 0, 0, 0, 0, 0, -1])]:
            state = np.array([0.0, *place])
            place = place + action[:3]
            demo.add(state, action, seen(place, 128))
    return demo


@pytest.fixture
def adder(monkeypatch: pytest.MonkeyPatch) -> Adder:
    made = Adder()
    monkeypatch.setattr(regeneration, "kept_environment", lambda suite, index: made)
    return made


def test_successes_are_kept_and_idle_steps_are_not(adder: Adder, tmp_path: Path) -> None:
    demos = [moved(0.4, 0.4, 0.4, idle=(0, 2)), moved(0.1, 0.1), moved(0.6, 0.6, 0.6, -1.5), moved(1.5)]
    write_libero_file(tmp_path / "raw" / f"{MILK}_demo.hdf5", demos, bddl=f"x/bddl_files/libero_object/{MILK}.bddl")
    counts: list[tuple[int, int]] = []
    report = lambda phase, done, total: counts.append((done, total))  # noqa: E731
    done = regenerate(tmp_path / "raw", tmp_path / "new", workers=0, progress=report)
    file = f"{MILK}_demo.hdf5"
    assert done.replays == {file: {"demo_0": Replay(True, 3, 2), "demo_1": Replay(False, 2, 0),
                                   "demo_2": Replay(False, 4, 0), "demo_3": Replay(True, 1, 0)}}  # fmt: skip
    assert done.failed == [f"{file}: demo_1", f"{file}: demo_2"] and done.reused == 0  # what falls out again has failed
    assert counts[0] == (0, 4) and counts[-1] == (4, 4) and adder.asked == [0, 1, 2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "raw"]
    with h5py.File(tmp_path / "new" / file) as made, h5py.File(tmp_path / "raw" / file) as raw:
        assert sorted(made["data"]) == ["demo_0", "demo_3"]
        demo, before = made["data/demo_0"], raw["data/demo_0"]
        assert np.array_equal(demo["actions"], before["actions"][[1, 2, 4]])
        assert np.allclose(demo["obs/ee_pos"][:, 0], [0, 0.4, 0.8])  # before the action
        assert np.allclose(demo["obs/ee_states"][0], [0, 0, 0, 0, 0, np.pi / 2])
        assert demo["obs/agentview_rgb"].shape == (3, 256, 256, 3) and demo["obs/agentview_rgb"].dtype == np.uint8
        assert demo["obs/agentview_rgb"][:, 0, 0, 0].tolist() == [0, 40, 80]  # upside down, as they were
        assert demo["obs/eye_in_hand_rgb"][:, 9, 0, 0].tolist() == [1, 1, 1]
        assert demo["states"][:, 0].tolist() == [0, 7, 7]  # the first is the recorded one, as upstream has it
        assert np.array_equal(demo["robot_states"][0], before["robot_states"][0])
        assert demo["dones"][()].tolist() == demo["rewards"][()].tolist() == [0, 0, 1]
        assert {name: data.shape[1:] for name, data in demo["obs"].items() if data.ndim == 2} == {
            "ee_ori": (3,), "ee_pos": (3,), "ee_states": (6,), "gripper_states": (2,), "joint_states": (7,)
        }  # fmt: skip
    again = regenerate(tmp_path / "raw", tmp_path / "new", workers=0)
    assert again.replays == done.replays and again.reused == 4 and len(adder.asked) == 4


def test_idle_is_what_upstream_takes_for_it() -> None:
    still, near, closed = np.zeros(7), np.array([9e-5, 0, 0, 0, 0, 0, 0]), np.array([0, 0, 0, 0, 0, 0, 1.0])
    over = np.array([9e-5, 9e-5, 0, 0, 0, 0, 0])
    assert moving_steps(np.stack([closed, still, over, near, closed, still, closed])).tolist() == [2, 4, 5, 6]


def test_it_goes_on_where_it_was(adder: Adder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for task, first in ((MILK, 0.7), (SUITES["libero_object"][3], 0.8)):
        write_libero_file(tmp_path / "libero_object" / f"{task}_demo.hdf5", [moved(first, 0.9), moved(2.0), moved(0.1)])
    regenerate(tmp_path / "libero_object", tmp_path / "whole", workers=0)
    adder.asked.clear()
    act = adder.act

    def stopped(action: np.ndarray) -> tuple[dict[str, np.ndarray], bool]:
        if len(adder.asked) == 3:
            raise KeyboardInterrupt
        return act(action)

    monkeypatch.setattr(adder, "act", stopped)
    with pytest.raises(KeyboardInterrupt):
        regenerate(tmp_path / "libero_object", tmp_path / "new", workers=0)
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(adder, "act", act)
    adder.asked.clear()
    done = regenerate(tmp_path / "libero_object", tmp_path / "new", workers=0)
    assert done.reused == 2 and len(adder.asked) == 4
    whole, new = (read_json(tmp_path / name / "regeneration.json") for name in ("whole", "new"))
    assert whole == new
    for file in new["replays"]:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "new" / file).read_bytes()


def test_other_files_are_not_taken_for_the_same(adder: Adder, tmp_path: Path) -> None:
    raw = write_libero_file(tmp_path / "raw" / f"{MILK}_demo.hdf5", [moved(2.0)])
    regenerate(raw, tmp_path / "new", workers=0)
    write_libero_file(raw, [moved(2.0, 2.0)])
    with pytest.raises(
        DataError, match=r"new was made of other files than .*, or these have changed since; name another"
    ):
        regenerate(raw, tmp_path / "new", workers=0)
    assert regenerate(raw, tmp_path / "new", workers=0, overwrite=True).all == [Replay(True, 2, 0)]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="mine holds something that is no replay of LIBERO's files"):
        regenerate(raw, tmp_path / "mine", workers=0, overwrite=True)
    with pytest.raises(ConfigError, match=r"lies in .*raw, which --overwrite would delete"):
        regenerate(raw, tmp_path / "raw", workers=0, overwrite=True)


@pytest.mark.parametrize(
    ("place", "attributes", "task"),
    [
        ("any.hdf5", {"bddl": f"chiliocosm/bddl_files/libero_object/{MILK}.bddl"}, ("libero_object", 7)),
        (f"libero_object/{MILK}_demo.hdf5", {}, ("libero_object", 7)),
        (f"{MILK}_demo.hdf5", {}, ("libero_object", 7)),
        ("KITCHEN_SCENE3_turn_on_the_stove_and_put_the_moka_pot_on_it_demo.hdf5", {}, ("libero_10", 2)),
        ("any.hdf5", {"language": "put the bowl on the stove"}, ("libero_goal", 1)),
        ("any.hdf5", {}, None),
        ("any.hdf5", {"bddl": ""}, None),
        ("any.hdf5", {"language": "put the white mug on the plate", "bddl": "mine.bddl"}, ("libero_90", None)),
    ],
)
def test_of_which_task_a_file_is(
    place: str, attributes: dict[str, str], task: tuple[str, int | None] | None, tmp_path: Path
) -> None:
    path = write_libero_file(tmp_path / place, [moved(2.0)], **attributes)
    if task is None:
        with pytest.raises(
            DataError, match="neither its attribute bddl_file_name nor its name tells the task; name it"
        ):
            read_source(path)
        return
    source = read_source(path)
    assert source.suite == task[0] and task[1] in (None, source.index) and source.demos == ("demo_0",)


@pytest.mark.parametrize(
    ("name", "values", "told"),
    [
        ("actions", np.full((2, 7), np.nan), r"demo_0: its actions are \[2, 7\] or not all finite"),
        ("actions", np.ones((2, 4)), "demo_0: its actions have 4 numbers, LIBERO's have 7"),
        ("actions", np.ones((991, 7)), "demo_0 has 991 steps; the simulator ends an episode after 990"),
        ("robot_states", np.ones((1, 4)), "demo_0: its robot_states have 4 numbers, LIBERO's have 9"),
        ("states", np.ones(4), "demo_0: its states are"),
        ("states", np.ones((0, 4)), "demo_0: its states are"),
        ("actions", None, "demo_0 has no dataset 'actions'"),
        ("states", None, "demo_0 has no dataset 'states'"),
    ],
)
def test_damaged_files(name: str, values: np.ndarray | None, told: str, adder: Adder, tmp_path: Path) -> None:
    path = write_libero_file(tmp_path / f"{MILK}_demo.hdf5", [moved(2.0)])
    with h5py.File(path, "a") as file:
        del file[f"data/demo_0/{name}"]
        if values is not None:
            file[f"data/demo_0/{name}"] = values
    with pytest.raises(DataError, match=told):
        regenerate(path, tmp_path / "new", workers=0)
    assert not (tmp_path / "new").exists() and not (tmp_path / "new.partial").exists()


def test_what_cannot_be_replayed(adder: Adder, tmp_path: Path) -> None:
    failing = write_libero_file(tmp_path / "failing" / f"{MILK}_demo.hdf5", [moved(0.1), moved(0.2)])
    with pytest.raises(DataError, match="none of 2 demonstrations ended in success when it was replayed"):
        regenerate(failing, tmp_path / "new", workers=0)
    other = moved(2.0)
    other.states = [np.zeros(9) for _ in other.states]
    path = write_libero_file(tmp_path / "other" / f"{MILK}_demo.hdf5", [other])
    with pytest.raises(DataError, match=r"demo_0: a state of this task has 4 numbers, not \[9\]"):
        regenerate(path, tmp_path / "new", workers=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="there are no HDF5 files"):
        regenerate(tmp_path / "empty", tmp_path / "new", workers=0)
    made = write_libero_file(tmp_path / "made" / f"{MILK}_demo.hdf5", [moved(2.0)])
    regenerate(made, tmp_path / "new", workers=0)
    with pytest.raises(DataError, match="256 pixels already; convert it without --regenerate"):
        regenerate(tmp_path / "new", tmp_path / "newer", workers=0)


def test_convert_replays_first(
    adder: Adder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(regeneration, "how_many", lambda tasks, parallel, workers: (1, False))
    demos = [moved(0.4, 0.4, 0.4, idle=(0, 2)), moved(0.1, 0.1), moved(0.6, 0.6)]
    write_libero_file(tmp_path / "raw" / f"{MILK}_demo.hdf5", demos)
    base, new, data = write_small_base(tmp_path / "base"), tmp_path / "libero_object_no_noops", tmp_path / "data"
    words = ["convert", str(tmp_path / "raw"), "--regenerate", str(new), "--base", str(base), "--workers", "1", "--out"]
    for wrong, told in (
        ([str(data), "--dry-run"], "leave --dry-run out"),
        ([str(data), str(tmp_path)], "takes one folder of LIBERO's files at a time, not 2 sources"),
        ([str(base)], "is not empty"),  # said before anything is replayed
    ):
        assert main([*words, *wrong]) in (1, 2) and told in capsys.readouterr().err
    assert not adder.asked and not new.exists()
    assert main([*words, str(data), "--val-fraction", "0"]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert (
        f"2 of 3 demonstrations ended in success when replayed and are kept in {new}: 5 steps, without 2 idle" in told
    )
    assert f"left out {MILK}_demo.hdf5: demo_1: it did not end in success when it was replayed" in told
    assert "observation after the action" not in told  # LIBERO's own files have it so, and these do not
    description = read_json(data / "dataset.json")
    (source,) = description["sources"]
    assert (source["name"], source["preset"], source["episodes"], source["steps"], source["fps"]) == (
        "libero_object_no_noops", "libero_hdf5", 2, 5, 20
    )  # fmt: skip
    rows = pq.read_table(next(data.glob("train-*.parquet"))).to_pylist()
    assert len(rows) == 5 and {row["instruction"] for row in rows} == {"pick up the milk and place it in the basket"}
    assert [row["action"][0] for row in rows] == pytest.approx([0.4, 0.4, 0.4, 0.6, 0.6])
    assert {row["action"][6] for row in rows} == {1.0} and [row["state"][0] for row in rows[:3]] == pytest.approx(
        [0, 0.4, 0.8]
    )
    assert main([*words, str(tmp_path / "again")]) == 0 and adder.asked == [0, 1, 2]
    assert "(3 were replayed before)" in capsys.readouterr().err


def recorded(env: LiberoEnv, seed: int, *, idle: int) -> Demonstration:
    """Let the expert act, as LIBERO's recorder looks on, with idle steps in the middle."""
    env.scatter(seed)
    demo, sight, expert = Demonstration(), Sight(env.world), Picker()
    first = 5  # rows that LIBERO's recorder leaves out, while forces settle; people have hardly moved by then
    for step in range(280):
        wanted = as_libero(expert.action(sight.scene()).astype(np.float64))
        still = {0: first, 30: idle}.get(step, 0)
        for action in [np.append(np.zeros(6), wanted[6])] * still + [wanted]:
            state = env.world.get_sim_state()
            seen, done = env.act(action)
            demo.add(state, action, seen)
        if done:
            break
    return Demonstration(demo.states[first:], demo.actions[first:], demo.seen[first:])


@pytest.mark.libero
def test_libero_replays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An expert's demonstrations in LIBERO's layout, 128 pixels, one of them cut short, through to a dataset."""
    try:
        environment._library()
    except VlaftError as error:
        pytest.skip(str(error))
    with monkeypatch.context() as small:
        small.setattr(environment, "SIZE", 128)
        env = LiberoEnv("libero_object", 6)
        whole = recorded(env, 4, idle=4)
        env.close()
    demos = [Demonstration(whole.states[:15], whole.actions[:15], whole.seen[:15]), whole]
    task = SUITES["libero_object"][6]
    raw = write_libero_file(
        tmp_path / "raw" / "butter_demo.hdf5", demos, bddl=f"libero/libero/bddl_files/libero_object/{task}.bddl",
        language="pick up the butter and place it in the basket",
    )  # fmt: skip
    named, new = tmp_path / f"{task}_demo.hdf5", tmp_path / "libero_object_no_noops"
    raw.rename(named)
    base = write_small_base(tmp_path / "base")
    words = ["convert", str(named), "--regenerate", str(new), "--base", str(base), "--out", str(tmp_path / "data")]
    assert main([*words, "--workers", "1", "--val-fraction", "0"]) == 0
    assert "1 of 2 demonstrations ended in success when replayed" in (told := " ".join(capsys.readouterr().err.split()))
    assert f"{task}_demo.hdf5: demo_0" in told and "without 4 idle ones" in told
    with h5py.File(new / named.name) as made, h5py.File(named) as before:
        demo, original = made["data/demo_1"], before["data/demo_1"]
        assert original["obs/agentview_rgb"].shape[1:] == (128, 128, 3)
        frames = demo["obs/agentview_rgb"][()]
        assert frames.shape == (len(original["actions"]) - 4, 256, 256, 3)
        # the same scene at twice the size: each row before its action, which the original shows after the one before
        kept = moving_steps(original["actions"][()])
        off = demo["obs/ee_pos"][1:] - original["obs/ee_pos"][()][kept[:-1]]
        assert np.abs(off).max() < 0.03
        shown = frames[1::10].reshape(-1, 128, 2, 128, 2, 3).mean((2, 4))
        recorded_frames = original["obs/agentview_rgb"][()][kept[:-1]][::10].astype(float)
        assert np.abs(shown - recorded_frames).mean() < 6
    rows = pq.read_table(next((tmp_path / "data").glob("train-*.parquet"))).to_pylist()
    assert len(rows) == len(frames) and {row["action"][6] for row in rows} == {0.0, 1.0}
    assert rows[0]["instruction"] == "pick up the butter and place it in the basket"
