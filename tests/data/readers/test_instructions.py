"""Several tasks within an episode: every step keeps its own instruction, whatever the format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pytest
from lerobot_sets import edit_rows, make_v2, read_all
from rlds_sets import writer

from vlaft.data.episode import gather
from vlaft.data.layout import Layout, apply_layout
from vlaft.data.readers.hdf5.source import open_hdf5
from vlaft.data.readers.rlds.source import RldsReader


def test_gather() -> None:
    warnings: list[str] = []
    assert gather(["open", "open"], "x", warnings) == ("open", ())
    assert gather(["open", ""], "x", warnings) == ("open", ())  # one text in all: it is the episode's
    assert gather(["", " "], "x", warnings) == gather([], "x", warnings) == ("", ())
    assert gather(["open", "close", "close"], "x", warnings) == ("close", ("open", "close", "close"))
    assert warnings == []
    for _ in range(2):  # reading an episode again repeats nothing
        assert gather(["open", "close", "", "open"], "x", warnings) == ("open", ("open", "close", "open", "open"))
    assert warnings == ["x: the rows name 2 instructions, and 1 of 4 none; those get the most frequent: 'open'"]


def test_lerobot_rows(tmp_path: Path) -> None:
    root = make_v2(tmp_path / "a")
    edit_rows(root, 0, task_index=pa.array([0, 0, 1, 1, 1, 0]))
    source, episodes = read_all(root)
    own = ("task 0", "task 0", "task 1", "task 1", "task 1", "task 0")
    assert [episode.step_instructions for episode in episodes] == [own, ("task 1",) * 5]
    assert source.warnings == []
    assert episodes[0].select(np.array([1, 2])).step_instructions == own[1:3]
    given = apply_layout(episodes[0], Layout(action=("action",), instruction="lift"))
    assert given.step_instructions == ("lift",) * 6
    for number in range(2):
        texts = ["fold", "fold", "", "lift", "lift", "lift"][number:]
        edit_rows(root, number, task_index=None, task=pa.array(texts))
    source, episodes = read_all(root)
    assert episodes[0].step_instructions == ("fold", "fold", "lift", "lift", "lift", "lift")
    assert any("name 2 instructions, and 1 of 6 none" in text for text in source.warnings)


@pytest.mark.parametrize(
    ("values", "own"),
    [
        (["open it", "open it", "close it"], ("open it", "open it", "close it")),
        (["", "open it", "open it"], ("open it",) * 3),
        (np.array([list(b"open\0"), list(b"shut\0"), list(b"shut\0")], np.int32), ("open", "shut", "shut")),
    ],
)
def test_rlds_steps(tmp_path: Path, values: Any, own: tuple[str, ...]) -> None:
    name = "language_instruction" if isinstance(values, list) else "language"
    episode = {"action": np.zeros((3, 7), np.float32), name: values}
    source = RldsReader(writer.write_rlds(tmp_path, "tiny", {"train": [episode]}))
    assert source.read(source.episodes()[0]).step_instructions == own
    assert source.warnings == []


@pytest.mark.parametrize(
    ("texts", "own"),
    [
        (["open", "open", "close"], ("open", "open", "close")),
        (["open"], ("open",) * 3),
        (["open", "close"], ("open",) * 3),  # not one per step: the first one
    ],
)
def test_hdf5_datasets(tmp_path: Path, texts: list[str], own: tuple[str, ...]) -> None:
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["run_0/command"] = np.zeros((3, 7), np.float32)
        file["run_0/camera"] = np.zeros((3, 8, 8, 3), np.uint8)
        file["run_0/text"] = texts
    options = {
        "episodes": "run_*",
        "action": ["command"],
        "cameras": {"main": "camera"},
        "instruction": {"dataset": "text"},
    }
    source = open_hdf5(tmp_path / "a.hdf5", options)
    assert source.read(source.episodes()[0]).step_instructions == own
