"""`vlaft inspect` on the sample sets, whose facts were computed with other libraries, and on what is broken."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from repository import ROOT

from vlaft.cli.main import main

PARTS = "action=[action.delta_eef_position,action.delta_eef_rotation,action.gripper_close]"
GENERIC = [
    "episodes=episodes/traj_*",
    "action=[cmd/ee_delta,cmd/gripper]",
    "cameras={front: camera/front_jpeg, wrist: camera/wrist_chw, small: camera/small_float}",
    "instruction={attribute: instruction}",
    "fps={attribute: control_hz}",
]
SETS = {
    "hdf5_robomimic_image": [],
    "hdf5_libero_raw": [],
    "hdf5_libero_regenerated": [],
    "hdf5_aloha_raw": [],
    "hdf5_aloha_compressed": [],
    "hdf5_generic_mixed": GENERIC,
    "lerobot_v2.0_gr00t_pick_place": [],
    "lerobot_v2.1_internvla_pick_place": [PARTS],
    "lerobot_v2.1_pusht_image": [],
    "lerobot_v3.0_internvla_pick_place": [],
}


def inspected(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["inspect", *words, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert isinstance(value, dict)
    return value


def facts(samples: Path, name: str) -> dict[str, Any]:
    value = json.loads((samples / "expected" / f"{name}.json").read_text())
    assert isinstance(value, dict)
    return value


def check_numbers(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["dim"] == expected["dim"]
    for name in ("mean", "std", "min", "max", "q01", "q99"):
        np.testing.assert_allclose(found["stats"][name], expected["stats"][name], rtol=1e-5, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("name", SETS)
def test_json_agrees_with_what_other_libraries_read(
    name: str, samples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = facts(samples, name)
    found = inspected([str(samples / expected["path"]), *SETS[name], "--no-frames"], capsys)
    for key in ("episodes", "steps", "steps_per_episode", "cameras", "instructions", "instruction_per_episode"):
        assert found[key] == expected[key], key
    assert next(iter(found["cameras"])) == expected["main_camera"]
    assert found["fps"] == (None if expected["fps"] is None else pytest.approx(expected["fps"]))
    check_numbers(found["action"], expected["action"])
    assert len(found["action"]["names"]) in (0, found["action"]["dim"])
    assert all(isinstance(warning, str) for warning in found["warnings"])
    for histogram in found["action"]["histograms"]:
        assert sum(histogram["counts"]) == found["steps"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rlds_bridge_dataset", []),
        ("rlds_encodings", ["action=[action/world_vector,action/rotation_delta,action/gripper_closedness_action]"]),
    ],
)
def test_json_of_rlds_tells_the_splits_apart(
    name: str, words: list[str], samples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = facts(samples, name)
    found = inspected([str(samples / expected["path"]), *words], capsys)
    assert list(found["splits"]) == list(expected["splits"])
    for split, told in expected["splits"].items():
        for key in ("episodes", "steps", "steps_per_episode", "instructions"):
            assert found["splits"][split][key] == told[key], (split, key)
        check_numbers(found["splits"][split]["action"], told["action"])
        # depth, masks and grey images are no cameras
        colour = {camera: size for camera, size in told["cameras"].items() if size[2] == 3}
        assert found["splits"][split]["cameras"] == colour
    assert found["cameras"] == found["splits"]["train"]["cameras"]
    assert found["steps"] == sum(told["steps"] for told in expected["splits"].values())
    assert found["fps"] is None


def test_bridge_is_warned_about_with_the_words_to_type(samples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(samples / "rlds/bridge_dataset/1.0.0")
    warnings = inspected([source], capsys)["warnings"]
    for word in ("--preset bridge", "fps=", "steps='[drop_first]'", "25 of 50 episodes repeat", "action_mask="):
        assert any(word in warning for warning in warnings), word
    [black] = [warning for warning in warnings if "black" in warning]
    kept = re.search(r"cameras='([^']*)'", black)
    assert "image_3" in black and kept is not None
    # the words do what they promise
    typed = ["--preset", "bridge", f"cameras={kept[1]}"]
    again = inspected([source, *typed], capsys)["warnings"]
    assert len(again) == 1 and "25 of 50 episodes repeat" in again[0]


def test_all_proposed_steps_together_settle_what_was_wrong(samples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(samples / "lerobot/v2.1-internvla_pick_place")
    first = inspected([source, PARTS, "--no-frames"], capsys)
    [gripper] = first["grippers"]
    assert (gripper["kind"], gripper["open_at"]) == ("binary", -1.0)
    assert 0.10 < first["idle_share"] < 0.14
    [together] = [warning for warning in first["warnings"] if warning.startswith("all steps proposed")]
    proposed = re.search(r"steps='([^']*)'", together)
    assert proposed is not None
    mended = inspected([source, PARTS, f"steps={proposed[1]}", "--no-frames"], capsys)
    assert not any("steps=" in warning for warning in mended["warnings"])
    assert (mended["standardized"]["stats"]["min"][6], mended["standardized"]["stats"]["max"][6]) == (0.0, 1.0)
    assert mended["standardized"]["rows"] < first["steps"] and mended["steps"] == first["steps"]
    check_numbers(mended["action"], first["action"])  # the raw action stays what it was


def test_people_get_tables_and_numbered_warnings(samples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(samples / "hdf5/robomimic_image.hdf5"), "--limit", "2"]) == 0
    out = capsys.readouterr().out
    assert "robomimic" in out and "10 Hz" in out and "agentview_image 84x84x3 as agentview" in out
    assert "open at -1" in out and "axis_x" in out and "q99" in out and "█" in out
    assert "instruction='what the robot does'" in out


def test_without_a_known_action_it_says_which_arrays_there_are(
    samples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, example in (
        ("lerobot/v2.1-internvla_pick_place", PARTS.replace("=[", "='[").replace(",", ", ") + "'"),
        ("rlds/encodings/1.0.0", "action/world_vector, action/rotation_delta, action/gripper_closedness_action"),
    ):
        assert main(["inspect", str(samples / path), "--json"]) == 1
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        assert example in captured.err and "there are, with their widths" in captured.err


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("broken/lerobot_lfs_pointers", "git lfs pull"),
        ("broken/lerobot_malformed_info", "info.json"),
        ("broken/robosuite_no_images.hdf5", "render"),
        ("nowhere", "does not exist"),
        ("expected/broken.json", "understood are"),
    ],
)
def test_what_is_broken_is_refused_in_one_sentence(
    path: str, word: str, samples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(samples / path), "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1 and word in captured.err and "Traceback" not in captured.err


@pytest.mark.parametrize(("source", "extra"), [("hdf5/libero_raw", []), ("rlds/bridge_dataset", ["--limit", "2"])])
def test_the_page_is_self_contained_and_its_pictures_open(
    source: str, extra: list[str], samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from html.parser import HTMLParser

    from PIL import Image

    page = tmp_path / "page.html"
    summary = inspected([str(samples / source), *extra, "--html", str(page)], capsys)
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//cdn|<script|@import|url\(", text)

    class Links(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.found: list[str] = []

        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            self.found += [value or "" for key, value in attributes if key in ("src", "href", "srcset")]

    links = Links()
    links.feed(text)
    assert links.found and all(link.startswith("data:") for link in links.found)
    pictures = [link for link in links.found if link.startswith("data:image/")]
    assert len(pictures) >= len(summary["cameras"]) * summary["episodes"] + 3
    blank = 0
    for link in pictures:
        with Image.open(io.BytesIO(base64.b64decode(link.partition(",")[2]))) as image:
            image.load()
            blank += bool(np.median(np.asarray(image)) < 8)
    assert blank == (summary["episodes"] if "image_3" in summary["cameras"] else 0)  # BridgeData's fourth view is black
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_an_existing_page_stays_unless_told_otherwise(
    samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, page = str(samples / "hdf5/aloha_raw"), tmp_path / "page.html"
    page.write_text("mine")
    assert main(["inspect", source, "--html", str(page)]) == 1
    assert "--overwrite" in capsys.readouterr().err and page.read_text() == "mine"
    assert main(["inspect", source, "--html", str(tmp_path / "absent/page.html")]) == 1
    assert main(["inspect", source, "--html", str(tmp_path)]) == 1
    assert main(["inspect", source, "--html", str(page), "--overwrite", "--limit", "1"]) == 0
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_markup_in_an_instruction_stays_text(samples: Path, tmp_path: Path) -> None:
    source, page = str(samples / "hdf5/aloha_raw"), tmp_path / "page.html"
    words = [source, "instruction=<script>alert(1)</script>", "--html", str(page), "--limit", "1"]
    assert main(["inspect", *words]) == 0
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text and "&lt;script&gt;" in text


def test_usage(samples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(samples / "hdf5/aloha_raw")
    assert main(["inspect", source, source]) == 2
    assert main(["inspect", source, "instuction=x"]) == 1
    assert "did you mean 'instruction'" in capsys.readouterr().err
    assert main(["inspect", source, "--preset", "nonsense"]) == 1


def test_a_converted_dataset(samples: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "data"
    words = [str(samples / "rlds/bridge_dataset"), "--preset", "bridge", "--limit", "3", "--workers", "1"]
    words += ["--base", str(tiny / "checkpoint"), "--out", str(out)]
    assert main(["convert", *words]) == 0
    source = inspected([*words[:5]], capsys)
    found = inspected([str(out)], capsys)
    assert found["kind"] == "converted" and found["episodes"] == source["episodes"] == 6
    assert found["steps"] == source["standardized"]["rows"] == 48
    assert found["splits"]["train"]["steps"] == 24 and found["fps"] == 5
    assert set(found["cameras"]) == {"image", "image_secondary"}
    assert set(found["instructions"]) == set(source["instructions"])
    for name, values in found["action"]["stats"].items():
        np.testing.assert_allclose(values, source["standardized"]["stats"][name], rtol=1e-6, atol=1e-9)
    assert found["action"]["names"] == ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
    page = tmp_path / "page.html"
    assert main(["inspect", str(out), "--html", str(page)]) == 0
    assert "image_secondary" in page.read_text(encoding="utf-8")
    assert main(["inspect", str(out), "--preset", "bridge"]) == 2
    shard = next(out.glob("train-*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-100])
    capsys.readouterr()
    assert main(["inspect", str(out)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


DOCS = ROOT / "docs/datasets.md"


def documented() -> list[str]:
    """The documented commands on sets that are among the samples."""
    blocks = re.findall(r"```bash\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.partition(" #")[0] for line in lines if line.startswith("vlaft inspect tests/data/")]


def test_the_documented_commands_run(monkeypatch: pytest.MonkeyPatch) -> None:
    import shlex

    monkeypatch.chdir(DOCS.parents[1])
    assert len(documented()) >= 9
    for line in documented():
        assert main([*shlex.split(line)[1:], "--limit", "1", "--no-frames"]) == 0, line


def test_the_documented_tables_are_those_of_the_code() -> None:
    import runpy

    script = runpy.run_path(str(DOCS.parents[1] / "tools/document_datasets.py"))
    text = DOCS.read_text(encoding="utf-8")
    assert script["filled"](text) == text, "run tools/document_datasets.py"
    assert "| `drop_first` |" in text and "| `bridge` |" in text
