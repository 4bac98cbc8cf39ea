"""The words of `vlaft convert`; what it does with them is tested in tests/data/convert/test_run.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from vlaft.cli.convert import _layout_settings, _sources, convert
from vlaft.data.store import ConvertedDataset
from vlaft.errors import ConfigError, UsageError


def run(words: list[str]) -> Any:
    app = typer.Typer()
    app.command()(convert)
    return app(words, standalone_mode=False)


def test_words_become_layout_fields() -> None:
    words = ["action=act[0:7]", "cameras.primary=image_0", "fps=5", "steps=[drop_first,{resample: {fps: 5}}]"]
    assert _layout_settings([*words, "instruction=open it"]) == {
        "action": ["act[0:7]"],
        "cameras": {"primary": "image_0"},
        "fps": 5,
        "steps": ["drop_first", {"resample": {"fps": 5}}],
        "instruction": "open it",
    }
    assert _layout_settings(["shift_action=1", "steps+=drop_last", "state=s"]) == {
        "state": ["s"],
        "shift_action": 1,
        "steps+": ["drop_last"],
    }
    assert _layout_settings(["instuction=x"]) == {"instuction": "x"}  # mistyped, refused later
    with pytest.raises(ConfigError, match="already set"):
        _layout_settings(["cameras=x", "cameras.primary=y"])


def test_options_per_source(tmp_path: Path) -> None:
    odd = tmp_path / "a=b"
    odd.mkdir()
    sources = _sources([str(odd), "c", "fps=5"], ["bridge"], ["one", "two"], [])
    assert [(source.path, source.preset, source.name) for source in sources] == [
        (odd, "bridge", "one"),
        (Path("c"), "bridge", "two"),
    ]
    with pytest.raises(UsageError, match="--name is given 1 times for 2 sources"):
        _sources(["a", "b"], [], ["one"], [])
    with pytest.raises(UsageError, match="there is no source"):
        _sources(["fps=5"], [], [], [])


def test_bridge(samples: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tiny / "checkpoint"
    words = [str(samples / "rlds/bridge_dataset"), "--preset", "bridge", "--base", str(checkpoint)]
    words += ["--out", str(tmp_path / "out"), "--limit", "2", "--json", "instruction=lift the pot"]
    run([*words, "--dry-run"])
    captured = capsys.readouterr()
    assert json.loads(captured.out)["rows"] == {"train": 16, "val": 16}
    assert "nothing was written" in captured.err and not (tmp_path / "out").exists()
    run([*words, "--workers", "1"])
    captured = capsys.readouterr()
    assert json.loads(captured.out)["episodes"] == {"train": 2, "val": 2}
    assert "writing examples: 32/32 examples" in captured.err
    assert ConvertedDataset(tmp_path / "out").row("val", 3)["instruction"] == "lift the pot"


def test_an_hdf5_file_of_its_own_layout_is_mapped_by_words(samples: Path, tiny: Path, tmp_path: Path) -> None:
    words = [str(samples / "hdf5/generic_mixed.hdf5"), "episodes=episodes/traj_*", "fps={attribute: control_hz}"]
    words += ["action=[cmd/ee_delta,cmd/gripper]", "cameras.front=camera/front_jpeg"]
    words += ["cameras.wrist.path=camera/wrist_chw", "instruction={attribute: instruction}"]
    words += ["--base", str(tiny / "checkpoint"), "--out", str(tmp_path / "out")]
    run([*words, "--workers", "1"])
    dataset = ConvertedDataset(tmp_path / "out")
    assert dataset.rows("train") + dataset.rows("val") == 4 + 5 + 6
    assert dataset.info["sources"][0]["fps"] == 5 and dataset.cameras == ("image", "image_wrist")


def test_a_wrong_setting_is_told_with_the_nearest_known_one(samples: Path, tiny: Path, tmp_path: Path) -> None:
    words = [str(samples / "rlds/bridge_dataset"), "--base", str(tiny / "checkpoint")]
    with pytest.raises(ConfigError, match="did you mean 'instruction'"):
        run([*words, "--out", str(tmp_path / "out"), "instuction=x"])


def test_a_conversion_in_parts(samples: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(samples / "rlds/bridge_dataset"), "--preset", "bridge", "--base", str(tiny / "checkpoint")]
    words += ["--out", str(tmp_path / "out"), "--limit", "2"]
    plan = ["--plan", str(tmp_path / "plan")]
    run([*words, *plan])
    told = capsys.readouterr().err
    assert "16 examples of 2 episodes in train, 16 examples of 2 episodes in val in 2 files" in told
    assert f"vlaft convert {plan[0]} {plan[1]} --part 1/1" in told
    run([*words, *plan, "--part", "02/2", "--workers", "1", "--json"])  # the same words may be repeated
    captured = capsys.readouterr()
    assert json.loads(captured.out)["rows"] == 16 and "part 2/2 of" in captured.err
    for more, why in (
        (["--part", "1/2", "--seed", "4"], "--seed 4 contradicts .*, which was made with 0"),
        (["--part", "1/2", "--on-error", "skip"], "--on-error skip contradicts"),
        (["--part", "1/2", "--out", "other"], "--out other contradicts"),
        (["--finish", str(samples / "rlds/bridge_dataset")], "the sources or their settings contradict"),
        (["--finish", *words, "fps=7"], "the sources or their settings contradict"),
        (["--part", "1/2", "fps=7"], "there is no source"),
        (["--part", "1/2", "--overwrite"], "--overwrite belongs to --finish"),
        (["--part", "1/2", "--finish"], "--part and --finish are two steps"),
        (["--part", "1/2", "--dry-run"], "give one of them"),
        *(
            (["--part", part], f"--part {part} is no part")
            for part in ("3/2", "0/2", "1", "1/2/3", "1/0", "a/b", "-1/2")
        ),
    ):
        with pytest.raises(UsageError, match=why):
            run([*plan, *more])
    for step in (["--part", "1/2"], ["--finish"]):
        with pytest.raises(UsageError, match="belongs to a plan"):
            run([*words, *step])
    with pytest.raises(UsageError, match="--out is missing"):
        run([*words[:1], *plan])
    run([*plan, "--part", "1/2", "--workers", "1"])
    capsys.readouterr()
    run([*plan, "--finish", "--json"])
    assert json.loads(capsys.readouterr().out)["rows"] == {"train": 16, "val": 16}
    run([*words[:-4], "--out", str(tmp_path / "whole"), "--limit", "2", "--workers", "1"])
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
