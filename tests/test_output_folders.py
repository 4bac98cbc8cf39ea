"""Output folders appear whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import faults
import pytest
from safetensors import SafetensorError

from vlaft import files as module
from vlaft.errors import ConfigError, VlaftError
from vlaft.files import check_apart, joined, locked, output_file, output_files, output_folder, restored


def fill(folder: Path, text: str) -> None:
    folder.mkdir(parents=True)
    (folder / "file").write_text(text)


def read(folder: Path) -> str:
    return (folder / "file").read_text()


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
    with pytest.raises(ValueError, match="x"), output_folder(out, overwrite=True) as partial:
        (partial / "new").write_text("y")
        raise ValueError("x")
    assert [path.name for path in out.iterdir()] == ["old"]
    with output_folder(out, overwrite=True) as partial:
        (partial / "new").write_text("y")
        assert (out / "old").exists()
    assert [path.name for path in out.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [out]


def test_left_overs_of_a_killed_command_are_in_nobodys_way(tmp_path: Path) -> None:
    fill(tmp_path / ".out.partial", "stale")
    fill(tmp_path / ".out.old", "stale")
    fill(tmp_path / "out", "fresh")
    (tmp_path / ".out.lock").write_text("4194305 elsewhere\n")
    with output_folder(tmp_path / "out", overwrite=True) as partial:
        assert list(partial.iterdir()) == []
        assert read(tmp_path / "out") == "fresh"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
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
    with pytest.raises(VlaftError, match="No space left"), output_folder(out, overwrite=True) as partial:
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
    with pytest.raises(VlaftError, match="Input/output error"), output_folder(out, overwrite=True) as partial:
        (partial / "new").write_text("y")
    monkeypatch.undo()
    assert [path.name for path in out.iterdir()] == ["old"]


@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        (".", "is the folder that this command runs in, which cannot be replaced; name a folder in it"),
        ("file", "is a file; the output has to be a folder"),
        ("file/out", "file/out cannot be written, since .*file is a file"),
        ("loop", "leads through links in a circle"),
        ("loop/out", "leads through links in a circle"),
        ("/", "is the root of all folders"),
        ("/proc", "is where a disk is mounted"),
        ("/proc/out", "cannot be written"),
        ("x" * 300, "File name too long"),
    ],
)
def test_a_place_where_no_folder_can_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    for overwrite in (False, True):
        with pytest.raises(VlaftError, match=sentence) as caught, output_folder(Path(out), overwrite=overwrite):
            pytest.fail("the block must not be entered")
        assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    fill(tmp_path / "disk" / "out", "old")
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    with output_folder(tmp_path / "out", overwrite=True) as partial:
        (partial / "file").write_text("new")
    assert (tmp_path / "out").is_symlink() and read(tmp_path / "out") == "new"
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["out"]


def test_what_libraries_say_of_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(VlaftError, match="No space left"), output_folder(tmp_path / "out"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_what_comes_to_lie_there_meanwhile_stays(tmp_path: Path) -> None:
    """Whether replacing was allowed or not: it was allowed for what was there then."""
    out = tmp_path / "out"
    with pytest.raises(VlaftError, match="put there meanwhile"), output_folder(out) as partial:
        (partial / "file").write_text("new")
        fill(out, "mine")
    assert read(out) == "mine" and list(tmp_path.iterdir()) == [out]
    for change in (
        lambda: (out / "file").write_text("also mine"),
        lambda: (out / "another").write_text("mine"),
        lambda: (out / "folder").mkdir(),
    ):
        with pytest.raises(VlaftError, match="put there meanwhile"), output_folder(out, overwrite=True) as partial:
            (partial / "file").write_text("new")
            change()
    assert read(out) == "also mine" and {path.name for path in out.iterdir()} == {"file", "another", "folder"}
    assert list(tmp_path.iterdir()) == [out]
    with output_folder(out, overwrite=True) as partial:
        (partial / "file").write_text("new")
        (out / "another").unlink()
    assert read(out) == "new"


def test_what_is_put_there_in_the_last_moment_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, rename = tmp_path / "out", Path.rename
    fill(out, "old")

    def late(self: Path, target: Path) -> Path:
        if self == out:
            (out / "precious").write_text("mine")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    with pytest.raises(VlaftError, match="put there meanwhile"), output_folder(out, overwrite=True):
        pass
    assert read(out) == "old" and (out / "precious").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("fault", ["kill", "term", "int", "eio"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_whatever_the_moment(tmp_path: Path, overwrite: bool, fault: str) -> None:
    """What was there or what is new is found, by the next that reads; the next that writes leaves nothing else."""
    out = tmp_path / "out"

    def begin() -> None:
        shutil.rmtree(out, ignore_errors=True)
        if overwrite:
            fill(out, "old")

    def write(text: str) -> None:
        with output_folder(out, overwrite=overwrite) as partial:
            (partial / "inner").mkdir()
            (partial / "inner" / "more").write_text(text)
            (partial / "file").write_text(text)

    def stopped() -> None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with suppress(VlaftError, KeyboardInterrupt):
            write("new")

    def look(at: int, code: int) -> None:
        assert code == (-signal.SIGKILL if fault == "kill" else 0), at
        if fault in ("term", "int"):
            assert not list(tmp_path.glob(".*")), at
        restored(out)
        found = read(out) if out.exists() else None
        assert found in ({"old", "new"} if overwrite else {None, "new"}), at
        if found == "new":
            assert (out / "inner" / "more").read_text() == "new"
            shutil.rmtree(out)
        write("again")
        assert read(out) == "again" and list(tmp_path.iterdir()) == [out], at
        begin()

    begin()
    assert faults.at_each_moment(tmp_path, fault, stopped, look) > 10


def test_of_two_at_once_one_is_refused(tmp_path: Path) -> None:
    """Both begin at a barrier, many times; each output is of one process alone."""
    script = """
import sys, pathlib
from vlaft.errors import VlaftError
from vlaft.files import output_folder
out, name, overwrite = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
for line in sys.stdin:
    try:
        with output_folder(out / line.strip(), overwrite=overwrite) as partial:
            for number in range(20):
                (partial / str(number)).write_text(name)
        print("done", flush=True)
    except VlaftError as error:
        print(error, flush=True)
"""
    for overwrite in (False, True):
        words = [sys.executable, "-c", script, str(tmp_path)]
        pipe = subprocess.PIPE
        both = [subprocess.Popen([*words, name, str(overwrite)], stdin=pipe, stdout=pipe, text=True) for name in "ab"]
        refused = 0
        for number in range(50):
            out = tmp_path / f"{overwrite}{number}"
            for process in both:
                process.stdin.write(out.name + "\n")  # type: ignore[union-attr]
                process.stdin.flush()  # type: ignore[union-attr]
            told = [process.stdout.readline().strip() for process in both]  # type: ignore[union-attr]
            assert "done" in told, told
            content = [path.read_text() for path in out.iterdir()]
            assert len(content) == 20 and len(set(content)) == 1
            if "is writing there" in "".join(told):
                refused += 1
            else:
                assert told == ["done", "done"] if overwrite else "is not empty" in "".join(told)
        for process in both:
            process.communicate()
        assert refused  # they did meet
        assert not list(tmp_path.glob(".*"))


def test_the_second_is_told_who_is_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    who = rf"out: process {os.getpid()} on .* is writing there; wait until it has ended, or name another --out"
    with locked(out), pytest.raises(VlaftError, match=who), output_folder(out):
        pytest.fail("the block must not be entered")
    with output_folder(out):
        pass


def test_a_shared_lock_is_held_until_the_last_has_ended(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with locked(out, shared=True):
        survivor = joined(out)
        survivor.__enter__()
        with pytest.raises(VlaftError, match="is writing there"), locked(out):
            pytest.fail("the block must not be entered")
    with pytest.raises(VlaftError, match="is writing there"), locked(out, shared=True):
        pytest.fail("the block must not be entered")
    survivor.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []
    with locked(out), pytest.raises(VlaftError, match="is writing there"), joined(out):
        pytest.fail("the block must not be entered")
    with joined(out):  # where the lock is not seen
        assert list(tmp_path.iterdir()) == []


def test_a_reader_does_not_disturb_who_writes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(tmp_path / ".out.old", "old")
    with locked(tmp_path / "other"):
        assert read(restored(out)) == "old"
    out.rename(tmp_path / ".out.old")
    with locked(out):  # moves it back
        out.rename(tmp_path / ".out.old")
        assert not restored(out).exists()
    assert read(out) == "old"


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "page.html"
    with output_file(file) as partial:
        partial.write_text("one")
    with pytest.raises(ValueError, match="x"), output_file(file) as partial:
        partial.write_text("tw")
        raise ValueError("x")
    with pytest.raises(VlaftError, match="exists already"), output_file(file, overwrite=False) as partial:
        partial.write_text("two")
    with output_file(file) as partial:
        partial.write_text("three")
        with pytest.raises(VlaftError, match="is writing there"), output_file(file):
            pytest.fail("the block must not be entered")
        assert file.read_text() == "one"
    assert file.read_text() == "three"
    assert list(file.parent.iterdir()) == [file]
    with pytest.raises(VlaftError, match=r"page\.html is a file"), output_file(file / "page.html"):
        pytest.fail("the block must not be entered")


def test_what_is_read_is_not_replaced(tmp_path: Path) -> None:
    check_apart(tmp_path / "out", [tmp_path / "out-base", tmp_path])
    with pytest.raises(ConfigError, match="which --overwrite would delete"):
        check_apart(tmp_path / "out", [tmp_path / "out" / "base"])


@pytest.mark.parametrize("made", [False, True])
def test_files_appear_at_once_where_there_are_none_yet(tmp_path: Path, made: bool) -> None:
    """So that the same command, which refuses a folder that is not empty, may be given again after a kill."""
    pictures = tmp_path / "pictures"

    def work() -> None:
        with output_files(pictures, re.compile(r"\w\.png")) as partial:
            for name in ("a.png", "b.png"):
                (partial / name).write_text("new")

    def look(at: int, code: int) -> None:
        there = sorted(path.name for path in pictures.iterdir()) if pictures.is_dir() else []
        assert there in ([], ["a.png", "b.png"]), at
        shutil.rmtree(pictures, ignore_errors=True)
        if made:
            pictures.mkdir()

    if made:
        pictures.mkdir()
    assert faults.at_each_moment(tmp_path, "kill", work, look) > 6


@pytest.mark.parametrize("fault", ["kill", "term"])
def test_files_move_in_together_and_each_is_whole(tmp_path: Path, fault: str) -> None:
    """At every moment each of the old files or its successor is there; others' files stay."""
    pictures = tmp_path / "pictures"
    names = re.compile(r"\w\.png")

    def draw(text: str, *which: str) -> None:
        with output_files(pictures, names) as partial:
            for name in which:
                (partial / f"{name}.png").write_text(text)

    def work() -> None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with suppress(KeyboardInterrupt):
            draw("new", "b", "c")

    def look(at: int, code: int) -> None:
        there = {path.name: path.read_text() for path in pictures.iterdir()}
        assert there.pop("mine.txt") == "mine"
        assert there["b.png"] in ("old", "new") and there.get("c.png", "new") == "new", at
        assert fault == "kill" or not list(tmp_path.glob(".*")), at
        draw("new", "b", "c")
        assert sorted(path.name for path in pictures.iterdir()) == ["b.png", "c.png", "mine.txt"], at
        assert [path.name for path in tmp_path.iterdir()] == ["pictures"], at
        draw("old", "a", "b")

    fill(pictures, "x")
    (pictures / "file").rename(pictures / "mine.txt")
    (pictures / "mine.txt").write_text("mine")
    draw("old", "a", "b")
    assert faults.at_each_moment(tmp_path, fault, work, look) > 8
    with pytest.raises(ValueError, match="x"), output_files(pictures, names) as partial:
        (partial / "b.png").write_text("half")
        raise ValueError("x")
    assert (pictures / "b.png").read_text() == "new" and not list(tmp_path.glob(".*"))
