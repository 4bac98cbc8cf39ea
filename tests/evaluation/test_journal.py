"""A folder of results: what is in it, and how an evaluation goes on from it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from small_base import write_small_base
from two_steps import MADE, TwoSteps

from vlaft.cli.main import main
from vlaft.errors import DataError, VlaftError
from vlaft.evaluation.journal import Entry, opened_journal
from vlaft.files import read_json

REQUEST = {"models": ["m"], "seed": 0}


def entry(seed: int, success: bool = True) -> Entry:
    return Entry("m", "t", seed, "push\nit", success, "success" if success else "environment", 3, 21, 1, {"a": 0.5})


def add(folder: Path, *entries: Entry, resume: bool = False) -> list[Entry]:
    with opened_journal(folder, REQUEST, resume=resume, overwrite=False) as journal:
        for each in entries:
            journal.add(each)
        return journal.entries


def test_lines_are_read_again(tmp_path: Path) -> None:
    out = tmp_path / "results"
    add(out, entry(0), entry(1, success=False))
    found = add(out, entry(2), resume=True)
    assert found == [entry(0), entry(1, success=False), entry(2)]
    outcome = found[1].outcome()
    assert (outcome.task, outcome.seed, outcome.success, outcome.ended, outcome.steps, outcome.info) == (
        "t", 1, False, "environment", 3, {"a": 0.5}
    )  # fmt: skip
    with pytest.raises(VlaftError, match="results is not empty; name another folder with --out, or give --overwrite"):
        add(out)


def test_a_line_that_a_kill_cut_off_is_acted_again(tmp_path: Path) -> None:
    out = tmp_path / "results"
    add(out, entry(0), entry(1))
    lines = out / "episodes.jsonl"
    whole = lines.read_bytes()
    for cut in range(len(whole.splitlines(keepends=True)[0]) + 1, len(whole)):
        lines.write_bytes(whole[:cut])
        assert add(out, resume=True) == [entry(0)]
        assert add(out, entry(1), resume=True) == [entry(0), entry(1)] and lines.read_bytes() == whole
    lines.write_bytes(whole.replace(b'"seed": 0', b'"seed": "x"'))
    with pytest.raises(DataError, match=r"episodes.jsonl, line 1 is damaged \(seed must be a whole number, not 'x'\)"):
        add(out, resume=True)


def test_what_a_kill_left_of_its_own_documents_is_removed(tmp_path: Path) -> None:
    out = tmp_path / "results"
    out.mkdir()
    (out / ".evaluation.json.77.tmp").write_text("{")
    assert add(out, entry(0), resume=True) == [entry(0)]
    assert sorted(path.name for path in out.iterdir()) == ["episodes.jsonl", "evaluation.json"]


def test_only_the_same_evaluation_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "results"
    add(out, entry(0))
    with (
        pytest.raises(DataError, match=r"the evaluation there has seed 0, not 5; give the same words to go on"),
        opened_journal(out, REQUEST | {"seed": 5}, resume=True, overwrite=False),
    ):
        raise AssertionError("opened")
    (out / "notes.txt").write_text("mine")
    with (
        pytest.raises(VlaftError, match=r"holds notes.txt, which is of no evaluation; name another folder"),
        opened_journal(out, REQUEST, resume=False, overwrite=True),
    ):
        raise AssertionError("opened")
    (out / "notes.txt").unlink()
    with opened_journal(out, REQUEST | {"seed": 5}, resume=False, overwrite=True) as journal:
        assert journal.entries == [] and not (out / "episodes.jsonl").exists()


def test_a_resumed_evaluation_has_the_results_of_an_uninterrupted_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(write_small_base(tmp_path / "base"))
    envs = ["--env", "two_steps:TwoSteps", "--env", "two_steps:with_argument:fast"]
    words = ["evaluate", base, *envs, "--episodes", "4", "--batch-size", "2", "--json", "--out"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main([*words, str(whole)]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert read_json(whole / "results.json") == expected
    assert [each["task"] for each in expected["models"][0]["tasks"]] == [envs[1], envs[3]]
    assert expected["models"][0]["episodes"] == 8 and expected["models"][0]["ended"] == {"success": 4, "environment": 4}
    killed.mkdir()
    (killed / "evaluation.json").write_bytes((whole / "evaluation.json").read_bytes())
    lines = (whole / "episodes.jsonl").read_bytes().splitlines(keepends=True)
    (killed / "episodes.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:20])
    MADE.clear()
    assert main([*words, str(killed), "--resume", "--workers", "0"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert sorted(seed for each in MADE for seed in each.seeds) == [1, 2, 3]  # what was not there
    for each in (found["models"][0], expected["models"][0]):
        del each["seconds"]
    assert found == expected
    assert "8/8 episodes" in captured.err and f"results written to {killed}" in captured.err
    MADE.clear()
    assert main([*words, str(killed), "--resume"]) == 0 and not MADE
    assert main([*words, str(killed), "--resume", "--seed", "1"]) == 1
    assert "the evaluation there has seed 0, not 1" in capsys.readouterr().err
    weights = next(Path(base).glob("*.safetensors"))
    os.utime(weights, ns=(0, 0))
    assert main([*words, str(killed), "--resume"]) == 1
    assert "other weights acted in the episodes there" in capsys.readouterr().err
    (killed / "evaluation.json").unlink()
    assert main([*words, str(killed), "--resume"]) == 1 and (killed / "episodes.jsonl").is_file()
    assert "holds episodes.jsonl but not evaluation.json" in capsys.readouterr().err


def test_going_on_keeps_the_films_that_are_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = str(write_small_base(tmp_path / "base"))
    words = ["evaluate", base, "--env", "two_steps:TwoSteps", "--episodes", "2", "--out", str(tmp_path / "results")]
    words += ["--plots", str(tmp_path / "films")]
    assert main(words) == 0
    films = {path: path.read_bytes() for path in (tmp_path / "films").iterdir()}
    assert films
    assert main([*words, "--resume"]) == 0
    assert {path: path.read_bytes() for path in (tmp_path / "films").iterdir()} == films


def test_a_number_that_is_not_finite_is_none_in_every_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = TwoSteps.step

    def stepped(self: TwoSteps, action: Any) -> Any:
        *rest, info = step(self, action)
        return (*rest, info | {"distance": float("nan")})

    monkeypatch.setattr(TwoSteps, "step", stepped)
    base = str(write_small_base(tmp_path / "base"))
    words = ["evaluate", base, "--env", "two_steps:TwoSteps", "--episodes", "2", "--workers", "0", "--json"]
    assert main([*words, "--out", str(tmp_path / "results")]) == 0
    outcomes = json.loads(capsys.readouterr().out)["models"][0]["outcomes"]
    assert [each["info"]["distance"] for each in outcomes] == [None, None]
