"""Whatever lies at a path is told by its content, and what no reader takes is told in one sentence."""

from __future__ import annotations

import os
import shutil
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rlds_sets import make_episode, writer

from vlaft.data.readers.opening import open_reader
from vlaft.errors import DataError


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A version folder: two episodes of 4 and 3 steps in `train`, in two shards."""
    return writer.write_rlds(
        tmp_path, "tiny", {"train": [make_episode(4, 0), make_episode(3, 1)]}, shards=2, image_format="png"
    )


def test_open_reader_says_what_it_found(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        open_reader(tmp_path / "nothing")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="is empty"):
        open_reader(empty)
    (empty / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"found: notes.txt.*LeRobot"):
        open_reader(empty)
    with pytest.raises(DataError, match="unknown kind"):
        open_reader(empty / "notes.txt")
    (empty / "dataset.json").write_text("{}")
    with pytest.raises(DataError, match="already converted"):
        open_reader(empty)


def test_open_reader_of_single_files(small: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="single TFRecord shard"):
        open_reader(small / "tiny-train.tfrecord-00000-of-00002")
    pointer = tmp_path / "demos.hdf5"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(DataError, match="git lfs pull"):
        open_reader(pointer)
    folder = tmp_path / "pointers"
    folder.mkdir()
    shutil.copy(pointer, folder)
    with pytest.raises(DataError, match="git lfs pull"):
        open_reader(folder)
    (tmp_path / "zero").touch()
    with pytest.raises(DataError, match="an empty file"):
        open_reader(tmp_path / "zero")
    (tmp_path / "rows").write_bytes(b"PAR1" + struct.pack("<Q", 7))
    with pytest.raises(DataError, match="parquet"):
        open_reader(tmp_path / "rows")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="no regular file"):
        open_reader(tmp_path / "pipe")


def test_a_mistyped_local_path_is_not_looked_up_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for path in ("data/missing", "missing.hdf5", "some/deep/path", "demos/one.hdf5", "../x/y", "x" * 5000):
        with pytest.raises(DataError, match=r"does not exist|cannot be looked up"):
            open_reader(Path(path))


@pytest.fixture
def fake_readers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stand-ins for the other readers, that note how they are called."""
    calls: list[Any] = []
    lerobot, hdf5 = ModuleType("lerobot"), ModuleType("hdf5")
    vars(lerobot)["LeRobotReader"] = lambda path, options: calls.append(("lerobot", path, options))
    vars(lerobot)["looks_like_lerobot"] = lambda path: (path / "meta" / "info.json").is_file()
    vars(lerobot)["download"] = lambda repo_id: Path("cache") / repo_id
    vars(hdf5)["open_hdf5"] = lambda path, options: calls.append(("hdf5", path, options))
    monkeypatch.setitem(sys.modules, "vlaft.data.readers.lerobot.source", lerobot)
    monkeypatch.setitem(sys.modules, "vlaft.data.readers.hdf5.source", hdf5)
    return calls


def test_open_reader_picks_by_content(fake_readers: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pusht" / "meta").mkdir(parents=True)
    (tmp_path / "pusht" / "meta" / "info.json").write_text("{}")
    (tmp_path / "demos").mkdir()
    (tmp_path / "demos" / "no_extension").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    open_reader(tmp_path / "pusht")
    open_reader(tmp_path / "demos", {"swap_rb": "no"})
    open_reader(tmp_path / "demos" / "no_extension")
    (tmp_path / "suites").mkdir()
    shutil.move(tmp_path / "demos", tmp_path / "suites")
    open_reader(tmp_path / "suites")
    open_reader(Path("lerobot/pusht"), {"video": "x"})
    assert fake_readers == [
        ("lerobot", tmp_path / "pusht", {}),
        ("hdf5", tmp_path / "demos", {"swap_rb": "no"}),
        ("hdf5", tmp_path / "demos" / "no_extension", {}),
        ("hdf5", tmp_path / "suites", {}),
        ("lerobot", Path("cache/lerobot/pusht"), {"video": "x"}),
    ]
