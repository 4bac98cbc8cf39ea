"""Output folders appear whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from vlaft import output_folder as module
from vlaft.errors import VlaftError
from vlaft.output_folder import output_folder


def test_what_was_written_is_there_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "down" / "out"
    with output_folder(out) as partial:
        assert partial.parent == out.parent
        (partial / "inner").mkdir()
        (partial / "inner" / "file").write_text("x")
        assert not out.exists()
    assert (out / "inner" / "file").read_text() == "x"
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError, VlaftError])
def test_a_failed_block_leaves_nothing(tmp_path: Path, kind: type[BaseException]) -> None:
    with pytest.raises(kind), output_folder(tmp_path / "out") as partial:
        (partial / "file").write_text("half")
        raise kind("x")
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_is_replaced_only_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("x")
    with pytest.raises(ValueError, match="x"), output_folder(out) as partial:
        (partial / "new").write_text("y")
        raise ValueError("x")
    assert [path.name for path in out.iterdir()] == ["old"]
    with output_folder(out) as partial:
        (partial / "new").write_text("y")
        assert (out / "old").exists()
    assert [path.name for path in out.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [out]


def test_left_overs_of_a_killed_command_are_in_nobodys_way(tmp_path: Path) -> None:
    for name in (".out.partial", ".out.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stale").write_text("x")
    with output_folder(tmp_path / "out") as partial:
        assert list(partial.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert list((tmp_path / "out").iterdir()) == []


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=int(1.5e9))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with (
        pytest.raises(VlaftError, match=r"15\.1 GB are needed and 1\.5 GB are free"),
        output_folder(tmp_path / "out", int(15.1e9)),
    ):
        pytest.fail("the block must not be entered")
    assert list(tmp_path.iterdir()) == []
    with output_folder(tmp_path / "out", int(1.4e9)):
        pass
    assert (tmp_path / "out").is_dir()


def test_full_disk_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VlaftError, match="No space left"), output_folder(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("x")
    monkeypatch.setattr(module, "sync", full)  # where delayed allocation tells it
    with pytest.raises(VlaftError, match="No space left"), output_folder(out) as partial:
        (partial / "new").write_text("y")
    assert [path.name for path in out.iterdir()] == ["old"]


def test_when_the_last_rename_fails_the_old_folder_is_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("x")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name == ".out.partial":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(VlaftError, match="Input/output error"), output_folder(out) as partial:
        (partial / "new").write_text("y")
    monkeypatch.undo()
    assert [path.name for path in out.iterdir()] == ["old"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(VlaftError, match="could not be written"), output_folder(tmp_path / "file" / "out"):
        pytest.fail("the block must not be entered")
