"""The words of `vlaft evaluate`, on the Bridge sample and the golden base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import two_steps
from small_base import convert_small, write_small_base

from vlaft.cli.main import main


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A base and its data."""
    folder = tmp_path_factory.mktemp("evaluate-cli")
    base = write_small_base(folder / "base")
    return str(base), str(convert_small(base, folder / "data"))


def test_bridge(samples: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, data = str(tiny / "checkpoint"), str(tmp_path / "data")
    source = str(samples / "rlds/bridge_dataset")
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
    whole, lines = lines, lines[: 1 + 8 * 2 * 2]
    looks = whole[len(lines) :]  # the other table: whether they look
    assert looks[0] == ["moved", "by", "model", "another's", "black", "white"]
    assert [line[:3] for line in looks[1:]] == [
        ["camera", "main", "base"], ["instruction", "base", "not"],
        ["camera", "main", "second"], ["instruction", "second", "not"],
    ]  # fmt: skip
    assert looks[1][3:] == looks[3][3:] and looks[1][3] == "100%"
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
        ([base], 2, "evaluate on demonstrations with --data, or in an environment with --env: one of them"),
        ([base, "--data", data, "--env", "tabletop"], 2, "with --data, or in an environment with --env: one of them"),
        ([base, "--data", data, "--unnorm-key", "mini"], 2, "--unnorm-key is for --env"),
        ([base, "--data", data, "--step-limit", "9"], 2, "--step-limit is for --env"),
        ([base, "--data", data, "--resize", "lanczos"], 2, "--resize is for --env; with --data, frames are taken"),
        (["--data", data], 2, "which model? name a checkpoint, a run or an adapter"),
        ([base, "--env", "tabeltop"], 2, "there is no such environment; did you mean 'tabletop'?"),
        ([base, "--env", "absent_module:make"], 2, "there is no module 'absent_module'"),
        ([base, "--env", "two_steps:make"], 2, "the module has no 'make'"),
        ([base, "--env", "two_steps:broken"], 1, "factory failed: OSError: no robot on /dev/ttyUSB0"),
        ([base, "--env", "tabletop", "--limit", "3"], 2, "--limit is for --data"),
        ([base, "--env", "tabletop", "--env", "tabletop"], 1, "--env tabletop is named twice"),
        ([base, "--env", "metaworld:push-v2"], 2, "has no task 'push-v2'; did you mean 'push-v3'?"),
        ([base, "--env", "libero:libero_objects:1"], 2, "has no suite 'libero_objects'; did you mean 'libero_object'?"),
        ([base, "--env", "libero:libero_goal:1", "--episodes", "51"], 1, "has 50 first states, and 51 episodes would"),
        ([base, "--env", "tabletop", "--workers", "-1"], 2, "Invalid value for '--workers'"),
        ([base, "--data", data, "--workers", "2"], 2, "--out and --workers are for --env"),
        ([base, "--env", "tabletop", "--resume"], 2, "name it with --out"),
        ([base, "--env", "tabletop", "--out", str(used)], 1, "is not empty; name another folder with --out"),
        ([base, "--env", "tabletop", "--out", "r", "--resume", "--overwrite"], 2, "contradict each other"),
        ([base, "--env", "tabletop", "--episodes", "0"], 2, "Invalid value for '--episodes'"),
        ([base, "--env", "tabletop", "--seed", "-1"], 2, "Invalid value for '--seed'"),
        ([base, "--env", "tabletop", "--plots", str(used)], 1, "is not empty; name another folder with --plots"),
        ([base, "--env", "tabletop", "--dtype", "int3"], 1, "dtype 'int3' is not known"),
        ([base, str(used / "absent"), "--env", "tabletop"], 1, "no such folder"),
        ([base, base, "--env", "tabletop"], 1, "is named twice"),
    ]
    for words, code, sentence in cases:
        assert main(["evaluate", *words]) == code, words
        captured = capsys.readouterr()
        assert sentence in captured.err and captured.err.startswith("error: "), captured.err
        assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert main(["evaluate", base, "--data", data, "--limit", "2", "--plots", str(used), "--overwrite"]) == 0
    assert "2 plots written to" in capsys.readouterr().err
    assert (used / "notes.txt").is_file() and (used / "errors.png").is_file()


def acting(*models: str, env: str = "two_steps:TwoSteps") -> list[str]:
    return ["evaluate", *models, "--env", env, "--episodes", "4", "--batch-size", "3"]


def test_acting(small: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, _ = small
    films = tmp_path / "films"
    assert main([*acting(base), "--seed", "7", "--plots", str(films)]) == 0
    captured = capsys.readouterr()
    heading, row = (line.split() for line in captured.out.splitlines())
    assert heading == ["model", "success", "95", "%", "interval", "episodes", "mean", "steps", "ended", "by"]
    assert row == [base, "50.0%", "15.0%", "to", "85.0%", "4", "2.0", "success", "2,", "environment", "2"]
    assert "acting in two_steps:TwoSteps: 4/4 episodes" in captured.err
    assert f"2 pictures written to {films}" in captured.err
    assert sorted(path.name for path in films.iterdir()) == ["episodes.gif", "episodes.png"]
    assert main([*acting(base), "--plots", str(films)]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert main([*acting(base), "--plots", str(films), "--overwrite"]) == 0


def test_acting_as_json(small: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two models, one of which has the environment's own statistics; what an environment prints is kept apart."""
    base, _ = small
    other = Path(shutil.copytree(base, tmp_path / "other"))
    known = json.loads((other / "config.json").read_text())["norm_stats"]
    (other / "dataset_statistics.json").write_text(json.dumps(known | {"tabletop_a": known["mini"]}))
    assert main([*acting(base, str(other), env="tabletop-a"), "--json", "--seed", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["env"], report["seed"]) == (["tabletop-a"], 2)
    first, second = report["models"]
    assert (first["model"], first["tasks"][0]["unnorm_key"]) == (base, "mini")
    assert (second["model"], second["tasks"][0]["unnorm_key"]) == (str(other), "tabletop_a")
    for model in (first, second):
        assert model["episodes"] == len(model["outcomes"]) == 4
        assert model["successes"] == sum(each["success"] for each in model["outcomes"])
        assert model["interval"][0] <= model["success_rate"] <= model["interval"][1]
        assert [each["seed"] for each in model["outcomes"]] == [2, 3, 4, 5]
        assert all(each["info"]["instruction"] == each["instruction"] for each in model["outcomes"])
    assert first["outcomes"] == second["outcomes"]  # the same weights, episodes and ranges
    assert main([*acting(base, env="two_steps:Chatty"), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["models"][0]["successes"] == 2
    assert captured.err.count("the motors hum") == 8
    tokens = json.loads(captured.out)["models"][0]["non_action_tokens"]
    warning = f"{tokens} of 56 tokens stand for no action, and were acted on as full moves"
    assert (warning in captured.err) == (tokens > 0)


def test_acting_that_fails(small: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, _ = small
    two_steps.MADE.clear()
    films = tmp_path / "films"
    cases = [
        ("two_steps:Failing", 1, "step() 1 of the episode with seed 1 failed: RuntimeError: a motor is hot (--debug"),
        ("two_steps:NoSuccess", 1, "step() gives no info['success']"),
        ("two_steps:Interrupted", 130, "interrupted"),
    ]
    for env, code, sentence in cases:
        assert main([*acting(base, env=env), "--json", "--plots", str(films)]) == code
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("error: ") == 1 and sentence in captured.err
    assert "Traceback" not in captured.err and not films.exists()
    assert [env.closed for env in two_steps.MADE] == [1] * 9
    assert main(["--debug", *acting(base, env="two_steps:Failing")]) == 1
    assert 'raise RuntimeError("a motor\\nis hot")' in capsys.readouterr().err


def test_a_policy_whose_actions_do_not_fit(
    small: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(small[0], tmp_path / "other"))
    known = json.loads((other / "config.json").read_text())["norm_stats"]["mini"]
    short = {key: value[:5] if isinstance(value, list) else value for key, value in known["action"].items()}
    (other / "dataset_statistics.json").write_text(json.dumps({"tabletop_b": known | {"action": short}}))
    assert main(["evaluate", str(other), "--env", "tabletop", "--episodes", "1"]) == 1
    sentence = "its actions in 'tabletop_b' have 5 numbers, and tabletop takes 7 (x, y, z, roll, pitch, yaw, gripper)"
    assert sentence in capsys.readouterr().err


def test_environments_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--list-envs"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert (
        len(lines) == 1 + 2 + 50 + 130
        and lines[1].startswith("tabletop ")
        and "your own as module:factory" in captured.err
    )
    (push,) = (line for line in lines if line.startswith("metaworld:push-v3 "))
    assert push.split("  ")[0] == "metaworld:push-v3" and push.rstrip().endswith("push the puck to the target")
    assert main(["evaluate", "--list-envs", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert len(listed) == 182 and listed[0]["step_limit"] == 30 and listed[0]["unnorm_keys"] == ["tabletop_b"]
