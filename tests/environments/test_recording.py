"""Recorded demonstrations: which episodes a dataset has, kills, and what readers find in it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from processes import gone
from repository import ROOT

from vlaft.cli.main import main
from vlaft.data.layout import apply_layout
from vlaft.data.readers.lerobot.source import LeRobotReader
from vlaft.environments import recording as module
from vlaft.environments.recording import RecordRequest, record
from vlaft.environments.registry import tasks_named
from vlaft.environments.task import Expert, ExpertEpisode, Task
from vlaft.errors import ConfigError, DataError, UsageError, VlaftError
from vlaft.files import read_json


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_tabletop_as_a_lerobot_dataset(tmp_path: Path) -> None:
    told: list[int] = []
    done = record(RecordRequest(("tabletop",), tmp_path / "demos", episodes=3, seed=10), advance=told.append)
    assert (done.episodes, done.failures, done.reused, sum(told)) == (3, {"tabletop": 0}, 0, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demos"]
    source = LeRobotReader(tmp_path / "demos")
    assert not source.warnings
    expert = tasks_named("tabletop")[0].expert
    assert expert is not None
    for seed, ref in zip((10, 11, 12), source.episodes(), strict=True):
        episode, shown = apply_layout(source.read(ref), source.layout), expert.demonstrate(seed, None)
        assert episode.instruction == shown.instruction and episode.fps == expert.rate
        assert np.array_equal(episode.action, shown.actions) and np.array_equal(episode.state, shown.states)
        frames = np.stack(list(episode.cameras["main"].read(range(episode.length))))
        error = (frames.astype(float) - shown.frames["main"]) ** 2
        assert 10 * np.log10(255**2 / error.mean()) > 40  # dB


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_the_dataset_does_not_depend_on_processes_or_kills(how: signal.Signals, tmp_path: Path) -> None:
    words = ["record", "tabletop", "--episodes", "6", "--seed", "3", "--out"]
    assert main([*words, str(tmp_path / "here")]) == 0
    out = tmp_path / "there"
    command = [sys.executable, "-m", "vlaft", *words, str(out), "--workers", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    partial = tmp_path / "there.partial"
    while process.poll() is None and not list(partial.glob("tabletop-*")):
        time.sleep(0.02)
    workers = children(process.pid)
    process.send_signal(how)
    _, told = process.communicate()
    assert len(workers) == 2 and all(map(gone, workers))
    if how == signal.SIGINT:
        assert process.returncode == 130 and "Traceback" not in told
        assert (
            told.splitlines()[-1]
            == "error: interrupted; give the same command again to go on, what is finished is kept"
        )
    finished = len(list(partial.glob("tabletop-*")))
    assert finished >= 1 and not out.exists()
    done = record(RecordRequest(("tabletop",), out, episodes=6, seed=3, workers=2))
    assert finished <= done.reused <= 6 and done.episodes == 6
    assert contents(out) == contents(tmp_path / "here")
    assert not partial.exists()


def failing(modulus: int) -> Expert:
    """The tabletop's expert, who pretends to fail at every seed that can be divided."""
    real = tasks_named("tabletop")[0].expert
    assert real is not None

    def demonstrate(seed: int, disturbed: float | None) -> ExpertEpisode:
        shown = real.demonstrate(seed, disturbed)
        return ExpertEpisode(shown.instruction, seed % modulus > 0, shown.frames, shown.actions, shown.states)

    return Expert(demonstrate, real.rate, real.action, real.state, real.robot)


def test_failures_are_left_out_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tasks_named("tabletop")[0].make
    for modulus in (2, 1):
        task = Task("tabletop", made, expert=failing(modulus))
        monkeypatch.setattr(module, "tasks_named", lambda name, task=task: (task,))
        if modulus == 2:
            done = record(RecordRequest(("tabletop",), tmp_path / "demos", episodes=3))
            assert (done.episodes, done.failures) == (3, {"tabletop": 3})
            said = read_json(tmp_path / "demos/meta/recording.json")
            assert said["seeds"] == {"tabletop": [100_001, 100_003, 100_005]} and said["failures"] == {"tabletop": 3}
        else:
            with pytest.raises(DataError, match="tabletop: the expert failed in 10 of 10 episodes; disturb it less"):
                record(RecordRequest(("tabletop",), tmp_path / "none", episodes=3))

    def broken(seed: int, disturbed: float | None) -> ExpertEpisode:
        raise VlaftError("no display")

    expert = replace(failing(1), demonstrate=broken)
    monkeypatch.setattr(module, "tasks_named", lambda name: (Task("tabletop", made, expert=expert),))
    with pytest.raises(VlaftError, match="no display"):
        record(RecordRequest(("tabletop",), tmp_path / "nothing", episodes=3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demos", "none.partial"]


def test_whether_too_many_failed_does_not_depend_on_which_are_read_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tasks_named("tabletop")[0].make
    monkeypatch.setattr(module, "tasks_named", lambda name: (Task("tabletop", made, expert=failing(2)),))
    monkeypatch.setattr(module, "_HOPELESS", 2)
    request = RecordRequest(("tabletop",), tmp_path / "demos", episodes=3)
    monkeypatch.setattr(module, "write_dataset", lambda *given, **named: sys.exit(9))  # as a kill just before the end
    with pytest.raises(SystemExit):
        record(request)
    monkeypatch.undo()
    monkeypatch.setattr(module, "tasks_named", lambda name: (Task("tabletop", made, expert=failing(2)),))
    monkeypatch.setattr(module, "_HOPELESS", 2)
    found = Path.iterdir
    monkeypatch.setattr(
        Path, "iterdir", lambda self: iter(sorted(found(self), key=lambda path: path.name[-1] in "135"))
    )
    assert record(request).failures == {"tabletop": 3}


def test_what_lerobot_looks_up_by_name(tmp_path: Path) -> None:
    """As its documents and its reader (0.4.4) have it: tasks by index, episodes by files and times."""
    out = tmp_path / "demos"
    done = record(RecordRequest(("tabletop",), out, episodes=5))
    info = read_json(out / "meta/info.json")
    assert (info["total_episodes"], info["total_frames"], info["fps"]) == (5, done.steps, 5)
    tasks = pq.read_table(out / "meta/tasks.parquet")
    assert b'"index_columns": ["task"]' in tasks.schema.metadata[b"pandas"]
    assert tasks["task_index"].to_pylist() == [0, 1, 2, 3] and info["total_tasks"] == 4
    rows = pq.read_table(out / "data/chunk-000/file-000.parquet")
    episodes = pq.read_table(out / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert pq.ParquetFile(out / "data/chunk-000/file-000.parquet").num_row_groups == 5
    for number, episode in enumerate(episodes):
        own = rows.slice(episode["dataset_from_index"], episode["length"])
        assert set(own["episode_index"].to_pylist()) == {number}
        assert own["index"].to_pylist() == [*range(episode["dataset_from_index"], episode["dataset_to_index"])]
        text = tasks["task"].to_pylist()[own["task_index"][0].as_py()]
        assert episode["tasks"] == [text] and text.startswith("pick up the ")
        assert own["timestamp"].to_pylist() == pytest.approx([step / 5 for step in range(len(own))])
        assert episode["videos/observation.images.main/to_timestamp"] == episode["length"] / 5
    stats = read_json(out / "meta/stats.json")
    actions = np.array(rows["action"].to_pylist())
    assert stats["action"]["mean"] == pytest.approx(actions.mean(0)) and stats["action"]["count"] == [len(rows)]
    assert stats["action"]["q99"] == pytest.approx(np.quantile(actions, 0.99, axis=0))
    shape = np.shape(stats["observation.images.main"]["mean"])
    assert shape == (3, 1, 1) and 0 < np.max(stats["observation.images.main"]["max"]) <= 1


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"envs": ("tabeltop",)}, UsageError, "tabeltop: there is no such environment; did you mean 'tabletop'"),
        ({"envs": ("two_steps:TwoSteps",)}, ConfigError, "two_steps:TwoSteps has no scripted expert"),
        ({"envs": ("tabletop", "tabletop")}, ConfigError, "an environment is named twice"),
        ({"envs": ("tabletop", "metaworld:push-v3")}, ConfigError, "do not go into one dataset; record each by itself"),
        ({"pad": True}, ConfigError, "its actions are OpenVLA's already; leave --pad-action out"),
        ({"disturbed": 1.0}, ConfigError, "--disturb 1.0: give a share of the steps, from 0 to less than 1"),
        ({"seed": -1}, ConfigError, "-1 is no seed"),
        ({"episodes": 0}, ConfigError, "no demonstrations were asked for"),
    ],
)
def test_what_cannot_be_recorded(changes: dict[str, Any], error: type[VlaftError], told: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=told):
        record(RecordRequest(**{"envs": ("tabletop",), "out": tmp_path / "demos", "episodes": 1} | changes))
    assert not any(tmp_path.iterdir())


def test_what_is_in_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demos"
    words = ["record", "tabletop", "--episodes", "1", "--out", str(out)]
    assert main(words) == 0
    said = capsys.readouterr().err
    assert "1 episodes, " in said and f"next: vlaft inspect {out}" in said
    assert main(words) == 1
    assert "is not empty; name another folder with --out, or give --overwrite" in capsys.readouterr().err
    (tmp_path / "demos.partial").mkdir()
    (tmp_path / "demos.partial/notes.txt").write_text("mine")
    assert main([*words, "--overwrite", "--seed", "1"]) == 1
    assert "holds something that is no unfinished recording" in capsys.readouterr().err
    (tmp_path / "demos.partial/notes.txt").unlink()
    assert main([*words, "--overwrite", "--seed", "1"]) == 0
    assert read_json(out / "meta/recording.json")["seeds"] == {"tabletop": [1]}
    assert main(["record", "tabletop"]) == 2 and "Missing option '--out'" in capsys.readouterr().err
