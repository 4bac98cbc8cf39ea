"""`vlaft demo` from end to end, with so little training that it takes seconds."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from vlaft.cli.main import main
from vlaft.demo import steps as demo

LITTLE = ("train.steps=2", "train.batch_size=4", "train.evaluate_every=2", "train.log_every=1", "data.workers=0")


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "TRAINING", LITTLE)
    monkeypatch.setattr(demo, "STEPS", 2)
    monkeypatch.setattr(demo, "CHUNK_STEPS", 2)
    monkeypatch.setattr(demo, "CHUNK_BATCH", 4)
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


def _numbers(file: Path) -> int:
    return sum(math.prod(tensor.shape) for tensor in load_file(file).values())


def test_two_cameras_the_state_and_chunks(little: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--demos", "6", "--recipe", "oft-state"]) == 0
    told = capsys.readouterr().out
    said = (
        "reads the main and wrist cameras and the robot's state, and writes chunks of 5 actions at once, by regression"
    )
    assert f"the adapted policy {said}" in told
    page = (out / "report.html").read_text()
    assert said.replace("'", "&#39;") in page and "tokens exactly right" not in page
    policy = json.loads((out / "result.json").read_text())["policy"]
    assert (policy["head"], policy["chunk"], policy["cameras"]) == ("l1", 5, ["main", "wrist"])
    words = ["evaluate", str(out / "model-nf4"), "--env", "tabletop", "--episodes", "1", "--execute", "2", "--json"]
    capsys.readouterr()
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["models"][0]["tokens"] == 0
    cost = json.loads((out / "result.json").read_text())["cost"]
    merged = {"action_head", "proprio_projector"}
    sizes = {name: _numbers(out / "model" / f"{name}.safetensors") for name in merged}
    adapter = _numbers(out / "run/checkpoints/step-000002/adapter_model.safetensors")
    assert cost["trainable"] == adapter + sum(sizes.values())  # for this robot's state, which has four numbers
    assert cost["total"] - cost["trainable"] == _numbers(out / "base/model.safetensors")


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
