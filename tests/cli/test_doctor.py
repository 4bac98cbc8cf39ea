"""`vlaft doctor`."""

import importlib.util
import json
import shutil
from collections import namedtuple

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
