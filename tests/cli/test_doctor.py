"""`vlaft doctor`."""

import importlib.util
import json
import shutil
from collections import namedtuple
from pathlib import Path

from small_base import convert_small, write_small_base

from vlaft.cli import doctor
from vlaft.cli.main import main


def findings(capsys):
    code = main(["doctor", "--json"])
    captured = capsys.readouterr()
    return code, {one["subject"]: one for one in json.loads(captured.out)}


def test_a_working_machine(capsys):
    code, found = findings(capsys)
    assert code == 0
    assert {"Python", "torch", "bitsandbytes", "disk"} <= set(found)
    assert found["Python"]["state"] == "ok" and found["torch"]["state"] == "ok"
    assert main(["doctor"]) == 0
    assert "Hub cache" in capsys.readouterr().out


def test_what_is_missing_is_named_with_its_remedy(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**10, 9 * 10**9, 10**9))
    code, found = findings(capsys)
    assert code == 0
    assert found["bitsandbytes"]["state"] == "note" and "vlaft[qlora]" in found["bitsandbytes"]["advice"]
    assert found["disk"]["state"] == "note" and "HF_HOME" in found["disk"]["advice"]


def test_what_every_command_needs_gives_exit_code_3(capsys, monkeypatch):
    monkeypatch.setattr(doctor.sys, "version_info", (3, 10, 0))
    code = main(["doctor", "--json"])
    captured = capsys.readouterr()
    assert code == 3 and "3.11" in captured.err
    assert json.loads(captured.out)[0]["state"] == "problem"


def test_folders_are_read_through(tmp_path, capsys):
    base = write_small_base(tmp_path / "base")
    data = convert_small(base, tmp_path / "data")
    assert main(["doctor", str(data), str(base)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "48 examples, all checksums hold" in lines[0] and lines[1].startswith("note")
    info = data / "dataset.json"
    info.write_text(info.read_text().replace('"seed": 7', '"seed": 8').replace('"seed": 0', '"seed": 1'))
    assert main(["doctor", "--json", str(data), str(base)]) == 3
    captured = capsys.readouterr()
    assert [one["state"] for one in json.loads(captured.out)] == ["problem", "note"]
    assert "dataset.json does not match its checksum; convert the source again" in captured.err


def test_a_run_is_read_through_with_its_base(tmp_path, capsys):
    base = write_small_base(tmp_path / "base")
    data, run = convert_small(base, tmp_path / "data"), tmp_path / "run"
    words = ["train", "--recipe", "lora8", "--data", str(data), "--base", str(base), "--out", str(run)]
    assert main([*words, "train.steps=1", "train.batch_size=2", "train.accumulation=1", "data.workers=0"]) == 0
    capsys.readouterr()
    assert main(["doctor", "--json", str(run)]) == 0
    found = {Path(one["subject"]).name: one for one in json.loads(capsys.readouterr().out)}
    documents = {"run.json", "environment.json", "dataset_statistics.json", "recipe.yaml"}
    assert set(found) == documents | {"step-000001", "base"}
    assert {one["state"] for one in found.values()} == {"ok"}
    weights = max(base.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace("batch_size: 2", "batch_size: 3"))
    assert main(["doctor", "--json", str(run)]) == 3
    captured = capsys.readouterr()
    found = {Path(one["subject"]).name: one["state"] for one in json.loads(captured.out)}
    assert {name for name, state in found.items() if state == "problem"} == {"base", "recipe.yaml"}
    assert f"{weights}: the tensor '" in captured.err and "recipe.yaml: the file does not match" in captured.err


def test_what_is_nothing_of_ours_is_refused(tmp_path, capsys):
    assert main(["doctor", str(tmp_path)]) == 1
    assert "neither a converted dataset, nor a run, nor a checkpoint" in capsys.readouterr().err
