"""The words of `vlaft evaluate`, on the Bridge sample and the golden base; what is measured: tests/test_evaluate.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_base import convert_small, write_small_base

from vlaft.cli.main import main


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A base and its data."""
    folder = tmp_path_factory.mktemp("evaluate-cli")
    base = write_small_base(folder / "base")
    return str(base), str(convert_small(base, folder / "data"))


def test_bridge(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, data = str(shared / "golden/openvla-tiny/checkpoint"), str(tmp_path / "data")
    source = str(shared / "data/rlds/bridge_dataset")
    assert main(["convert", source, "--preset", "bridge", "--base", base, "--out", data, "--workers", "1"]) == 0
    capsys.readouterr()
    words = ["evaluate", base, "--data", data, "--limit", "16", "--batch-size", "8"]
    assert main([*words, "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert (report["split"], report["examples"], report["episodes"]) == ("val", 16, 16)
    model = report["models"][0]
    assert model["model"] == base and model["statistics_from"] == "model"
    names = [dimension["name"] for dimension in model["free_running"]["dimensions"]]
    assert names == ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
    for decoding in ("teacher_forced", "free_running"):
        for dimension in model[decoding]["dimensions"]:
            assert 0 <= dimension["token_accuracy"] <= dimension["within_one_bin"] <= 1
        assert 0 <= model[decoding]["gripper_f1"] <= 1
    first = [model[decoding]["dimensions"][0] for decoding in ("teacher_forced", "free_running")]
    assert first[0] == first[1]  # the first token has nothing of an action before it
    assert "evaluating: 16/16 examples" in captured.err


def test_models_in_one_table(small: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, data = small
    link = tmp_path / "second"
    link.symlink_to(base)
    assert main(["evaluate", base, str(link), "--data", data, "--dtype", "float32", "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    lines = [line.split() for line in captured.out.splitlines() if line.strip()]
    assert lines[0][:3] == ["dimension", "model", "decoding"] and lines[0][-2:] == ["gripper", "F1"]
    assert len(lines) == 1 + 8 * 2 * 2
    assert [line[:3] for line in lines[1:5]] == [
        ["all", "base", "forced"], ["all", "base", "free"], ["all", "second", "forced"], ["all", "second", "free"]
    ]  # fmt: skip
    assert lines[1][3:] == lines[3][3:] and lines[2][3:] == lines[4][3:]
    assert len(lines[5]) == 9 and len(lines[-1]) == 10  # one dimension has an L1 in robot units, the last an F1 too
    assert "8 examples of 1 episode in split 'val'" in captured.err
    assert captured.err.count("has no statistics for every dataset here") == 2


def test_refused(small: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, data = small
    used = tmp_path / "used"
    used.mkdir()
    (used / "notes.txt").write_text("x")
    cases = [
        ([base, "--data", data, "--plots", str(used)], 1, "is not empty; name another folder with --plots"),
        ([base, "--data", data, "--plots", str(used / "notes.txt")], 1, "is a file; --plots needs a folder"),
        ([base, "--data", data, "--split", "test"], 1, "split 'test' is not known"),
        ([base, "--data", data, "--dtype", "int3"], 1, "dtype 'int3' is not known"),
        ([base, "--data", data, "--limit", "0"], 2, "Invalid value for '--limit'"),
        ([base, "--data", str(used)], 1, "is no converted dataset"),
        ([str(used), "--data", data], 1, "no config.json here"),
        ([base, str(used / "absent"), "--data", data], 1, "no such folder"),
        ([base, base, "--data", data], 1, "is named twice"),
        ([base], 2, "Missing option '--data'"),
        (["--data", data], 2, "Missing argument"),
    ]
    for words, code, sentence in cases:
        assert main(["evaluate", *words]) == code, words
        captured = capsys.readouterr()
        assert sentence in captured.err and captured.err.startswith("error: "), captured.err
        assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert main(["evaluate", base, "--data", data, "--limit", "2", "--plots", str(used), "--overwrite"]) == 0
    assert "2 plots written to" in capsys.readouterr().err
    assert (used / "notes.txt").is_file() and (used / "errors.png").is_file()
