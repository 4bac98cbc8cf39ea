"""Checksums of files and documents, and when a file is read again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vlaft import checksums
from vlaft.checksums import checksum, content_checksum, holds, remembered, seal_holds, sealed, unsealed


@pytest.fixture
def settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that counts as large, and as written long enough ago to be remembered."""
    monkeypatch.setattr(checksums, "_WORTH_REMEMBERING", 0)
    monkeypatch.setattr(checksums, "_SETTLED", -1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "file"
    path.write_bytes(b"123456789")
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read."""
    read: list[Path] = []
    original = checksums.checksum

    def checksum(path: Path) -> str:
        read.append(path)
        return original(path)

    monkeypatch.setattr(checksums, "checksum", checksum)
    return read


def test_the_sum_is_crc32c(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"123456789")
    assert checksum(path) == "e3069283"  # the check value of the polynomial
    path.write_bytes(b"")
    assert checksum(path) == "00000000"
    path.write_bytes(bytes(checksums._CHUNK) + b"1")
    whole = checksum(path)
    path.write_bytes(bytes(checksums._CHUNK) + b"2")
    assert checksum(path) != whole


def test_sums_of_earlier_versions_hold_too(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"123456789")
    assert holds(path, 0xCBF43926)  # the check value of zlib's polynomial
    assert not holds(path, 0xCBF43927) and holds(path, "e3069283") and not holds(path, "e3069284")


def test_an_unchanged_file_is_read_once(settled: Path, reads: list[Path]) -> None:
    assert holds(settled, "e3069283") and holds(settled, "e3069283") and not holds(settled, "00000000")
    assert reads == [settled]
    assert holds(settled, "e3069283", fresh=True)
    assert reads == [settled] * 2


def rewrite(path: Path) -> None:
    path.write_bytes(b"12345678a")


def rewrite_and_set_the_time_back(path: Path) -> None:
    before = path.stat()
    path.write_bytes(b"12345678a")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"12345678a")
    other.replace(path)


@pytest.mark.parametrize("change", [rewrite, rewrite_and_set_the_time_back, replace])
def test_a_changed_file_is_read_again(settled: Path, reads: list[Path], change: Callable[[Path], None]) -> None:
    assert holds(settled, "e3069283")
    at = settled.stat().st_ctime_ns
    while settled.stat().st_ctime_ns == at:  # within one tick of the clock a change cannot be seen by its time
        change(settled)
    assert not holds(settled, "e3069283")
    assert len(reads) == 2


def test_a_file_that_was_just_written_is_read_again(
    settled: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksums, "_SETTLED", 3600 * 10**9)
    assert holds(settled, "e3069283") and holds(settled, "e3069283")
    assert len(reads) == 2


def test_a_file_that_changes_while_it_is_read_is_not_remembered(settled: Path) -> None:
    def compute(path: Path) -> str:
        replace(path)
        return "old"

    assert remembered(settled, compute) == "old"
    assert not checksums.cache_folder("checksums").exists()


@pytest.mark.parametrize("spoil", [b"", b"[", b"{}", b"[]", b"null", b"\xff"])
def test_a_damaged_cache_is_no_harm(settled: Path, reads: list[Path], spoil: bytes) -> None:
    assert holds(settled, "e3069283")
    (note,) = checksums.cache_folder("checksums").iterdir()
    note.write_bytes(spoil)
    assert holds(settled, "e3069283")
    note.write_text(note.read_text().replace("e3069283", "e3069284"))
    assert holds(settled, "e3069283")
    assert len(reads) == 3


def test_without_a_cache_files_are_read_each_time(
    settled: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(settled))  # a file, so that no folder can be made in it
    assert holds(settled, "e3069283") and holds(settled, "e3069283")
    assert len(reads) == 2


def test_a_document_is_summed_by_its_content() -> None:
    content = {"a": {"x": 1.5, "y": [1, 2]}, "b": "ä", "c": None}
    assert content_checksum(content) == content_checksum(dict(reversed(content.items())))
    assert content_checksum({10: (1,), 9: 2}) == content_checksum({"9": 2, "10": [1]})
    assert content_checksum(content) != content_checksum(content | {"c": False})
    once = sealed(content)
    assert list(once)[-1] == checksums.SEAL and sealed(once) == once and unsealed(once) == content
    assert seal_holds(once) and seal_holds(content) is None
    assert not seal_holds(once | {"b": "a"}) and not seal_holds(once | {checksums.SEAL: 1})
