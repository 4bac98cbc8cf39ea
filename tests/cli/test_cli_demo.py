"""`vlaft demo` from end to end, with so little training that it takes seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlaft.cli.main import main
from vlaft.demo import steps as demo

LITTLE = ("train.steps=2", "train.batch_size=4", "train.evaluate_every=2", "train.log_every=1", "data.workers=0")


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "TRAINING", LITTLE)
    monkeypatch.setattr(demo, "STEPS", 2)
    monkeypatch.setattr(demo, "BATCH_WORD", LITTLE[1])
    monkeypatch.setattr(demo, "EVALUATION_EPISODES", 2)


def test_the_whole_job(little: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--demos", "6"]) == 0
    told = capsys.readouterr()
    for verb in ("convert", "report", "train", "merge", "export"):
        assert f"$ vlaft {verb} " in told.err
    assert "success before" in told.out
    assert "trainable parameters" in told.out
    page = (out / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    result = json.loads((out / "result.json").read_text())
    assert result["seeds"][0]["after"]["episodes"] == 2

    # what it leaves is a dataset, a run and checkpoints like any other
    assert main(["inspect", str(out / "data")]) == 0
    assert main(["evaluate", str(out / "run"), "--data", str(out / "data"), "--limit", "2"]) == 0
    assert main(["evaluate", str(out / "model-nf4"), "--env", "tabletop", "--episodes", "1"]) == 0
    assert main(["merge", str(out / "run"), "--out", str(tmp_path / "again")]) == 0
    assert main(["export", str(out / "model"), "--out", str(tmp_path / "exported"), "--to", "huggingface"]) == 0

    # a used folder is asked about; what is done is not done again
    assert main(["demo", "--out", str(out), "--demos", "6"]) == 1
    assert "--overwrite" in capsys.readouterr().err
    (out / "merged.json").unlink()
    written = (out / "run" / "report.json").stat().st_mtime_ns
    assert main(["demo", "--out", str(out), "--demos", "6", "--resume"]) == 0
    assert (out / "merged.json").is_file()
    assert (out / "run" / "report.json").stat().st_mtime_ns == written
    assert main(["demo", "--out", str(out), "--demos", "7", "--resume"]) == 1


def test_a_folder_that_is_no_demos_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("dear to me")
    for option in ("--overwrite", "--resume"):
        assert main(["demo", "--out", str(tmp_path), option]) == 1
        assert "no demo's folder" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").is_file()


def test_a_command_that_fails_ends_the_demo_with_its_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("merge", str(tmp_path / "absent"), "--out", str(tmp_path / "demo" / "model"))
    monkeypatch.setattr(demo, "steps", lambda out, settings: [demo.DemoStep(words, out / "model")])
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 1
    told = capsys.readouterr().err
    assert told.count("error:") == 1 and "absent" in told
    assert not (tmp_path / "demo" / "report.html").exists()


def test_an_unknown_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tmp_path / "out"), "--recipe", "lora23"]) == 2
    assert "lora" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
