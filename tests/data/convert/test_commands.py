"""The commands of docs/converting.md, and what the sample sets become."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image as PillowImage
from repository import ROOT

from vlaft.cli.main import main
from vlaft.data.codec import decode_image
from vlaft.data.store import ConvertedDataset

PAGE = ROOT / "docs/converting.md"
COMMANDS = [line for line in re.findall(r"^vlaft (convert tests/data/.*)$", PAGE.read_text(), re.MULTILINE)
            if "--plan" not in line]  # fmt: skip
BASE = "--base tests/golden/openvla-tiny/checkpoint"
BY_FILE = [command for command in COMMANDS if "my_robot.yaml" in command or "my_mix.yaml" in command]
BY_WORDS = [command for command in COMMANDS if command not in BY_FILE]


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the commands where the page says, as they are written there."""
    monkeypatch.chdir(PAGE.parents[1])


def run(command: str, out: Path, *more: str) -> int:
    words = shlex.split(command)
    words[words.index("--out") + 1] = str(out)
    return main([*words, "--workers", "1", *more])


def converted(command: str, out: Path, *more: str) -> ConvertedDataset:
    assert run(command, out, *more) == 0
    dataset = ConvertedDataset(out)
    dataset.verify()
    return dataset


def command_for(part: str) -> str:
    return next(command for command in COMMANDS if part in command)


def rows(dataset: ConvertedDataset) -> list[dict[str, Any]]:
    both = [*dataset.table("train").to_pylist(), *dataset.table("val").to_pylist()]
    return sorted(both, key=lambda row: (row["episode_index"], row["frame_index"]))


def first_image(dataset: ConvertedDataset, episode: int, step: int = 0, column: str = "image") -> np.ndarray:
    for split in ("train", "val"):
        table = dataset.table(split, ["episode_index", "frame_index"]).to_pylist()
        for index, row in enumerate(table):
            if (row["episode_index"], row["frame_index"]) == (episode, step):
                return decode_image(dataset.image(split, index, column) or b"", "x", accurate_dct=True)
    raise AssertionError("no such row")


def test_the_page_has_a_command_for_every_valid_set(samples: Path) -> None:
    sets = [f"{path.parent.name}/{path.name}" for folder in ("rlds", "lerobot", "hdf5")
            for path in (samples / folder).iterdir()]  # fmt: skip
    assert len(sets) == 12
    assert [name for name in sets if not any(name in command for command in COMMANDS)] == []


@pytest.mark.parametrize("command", BY_WORDS, ids=lambda command: " ".join(command.split()[1:4])[-60:])
def test_every_documented_command_converts(
    samples: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command, tmp_path / "out", "--dry-run", "--json") == 0  # reads all actions
    told = json.loads(capsys.readouterr().out)
    name = command.split("tests/data/")[1].split()[0].replace("/", "_", 1).removesuffix(".hdf5")
    name = name.replace("-", "_") if name.startswith("lerobot") else name
    facts = json.loads((samples / f"expected/{name}.json").read_text())
    episodes = facts.get("episodes") or sum(part["episodes"] for part in facts["splits"].values())
    assert sum(told["episodes"].values()) == told["sources"][0]["episodes"] == episodes
    if facts.get("instruction_per_episode") and all(facts["instruction_per_episode"]):
        assert told["sources"][0]["instructions"] == list(dict.fromkeys(facts["instruction_per_episode"]))
    dataset = converted(command, tmp_path / "out", "--limit", "1")
    assert dataset.rows("train") > 0 and first_image(dataset, 0, int("bridge" in command)).shape == (224, 224, 3)


def test_both_versions_of_one_lerobot_set_give_the_same_examples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All actions by the statistics of a dry run, and every row of the first episode, frames included."""
    commands = [command_for(f"{version}-internvla") + " --name one" for version in ("v2.1", "v3.0")]
    statistics = []
    for command in commands:
        assert run(command, tmp_path / "out", "--dry-run", "--json") == 0
        statistics.append(json.loads(capsys.readouterr().out)["statistics"])
    assert statistics[0]["one"]["action"] == statistics[1]["one"]["action"]
    assert statistics[0]["one"]["num_transitions"] == statistics[1]["one"]["num_transitions"] == 48
    old, new = (
        converted(f"{command} --limit 1 --image-size 32", tmp_path / str(number))
        for number, command in enumerate(commands)
    )
    without = ("source", "state")
    assert [{k: v for k, v in row.items() if k not in without} for row in rows(old)] == [
        {k: v for k, v in row.items() if k not in without} for row in rows(new)
    ]
    assert old.rows("train") == new.rows("train") == 12
    assert all(old.image("train", index) == new.image("train", index) for index in range(12))
    gripper = {row["action"][6] for row in rows(new)}
    assert gripper == {0.0, 1.0} and rows(new)[0]["action"][6] == 1.0  # the source's -1 is open


def small(image: np.ndarray) -> np.ndarray:
    return np.asarray(PillowImage.fromarray(image).resize((64, 64), PillowImage.Resampling.BOX)).astype(int)


def best_turn(frame: np.ndarray, references: list[np.ndarray]) -> tuple[int, bool]:
    """Which quarter turns and mirroring bring any of the references nearest to the frame."""
    distances = {}
    for reference in references:
        upright = small(reference)
        for turns in range(4):
            for mirrored in (False, True):
                other = np.rot90(upright[:, ::-1] if mirrored else upright, turns)
                distance = float(np.abs(other - small(frame)).mean())
                distances[turns, mirrored] = min(distance, distances.get((turns, mirrored), np.inf))
    return min(distances, key=distances.__getitem__)


def test_libero_raw_and_regenerated_are_the_same_way_up(samples: Path, tmp_path: Path) -> None:
    """Both come from videos with upright frames; rows reversed and then turned by 180 degrees is a mirror image."""
    found = {}
    for kind in ("libero_raw", "libero_regenerated"):
        dataset = converted(command_for(f"hdf5/{kind} "), tmp_path / kind)
        found[kind] = dataset
        expected = json.loads((samples / f"expected/hdf5_{kind}.json").read_text())
        stored = np.asarray(expected["action"]["first_of_first_episode"])
        first = rows(dataset)[0]
        assert first["instruction"] == "move the potato to the top of the cooking utensils"
        np.testing.assert_allclose(first["action"][:6], stored[:6], atol=1e-6)
        assert stored[6] == -1 and first["action"][6] == 1.0  # robosuite's -1 opens; OpenVLA's 1 is open
        assert {row["action"][6] for row in rows(dataset)} == {0.0, 1.0}
    video = samples / "lerobot/v2.1-internvla_pick_place/videos/chunk-000"
    upright = {}
    for kind, camera in (("libero_raw", "video.base_view_2"), ("libero_regenerated", "video.base_view")):
        with av.open(str(video / camera / "episode_000002.mp4")) as container:
            upright[kind] = [next(container.decode(video=0)).to_ndarray(format="rgb24")]
    turns = {kind: best_turn(first_image(dataset, 0), upright[kind]) for kind, dataset in found.items()}
    assert turns == {"libero_raw": (0, True), "libero_regenerated": (0, True)}


def test_compressed_aloha_equals_raw_within_jpeg_error(tmp_path: Path) -> None:
    """Step 2 of the raw recording (0.2 s apart) is step 5 of the compressed one (0.08 s): same action, same scene.

    The raw frames are smaller, so the two are compared at a size below both.
    """
    raw = converted(command_for("aloha_raw"), tmp_path / "raw")
    packed = converted(command_for("aloha_compressed"), tmp_path / "packed")
    action = {(row["episode_index"], row["frame_index"]): row["action"] for row in rows(raw)}[0, 2]
    assert action == {(row["episode_index"], row["frame_index"]): row["action"] for row in rows(packed)}[0, 5]
    one, other = (small(first_image(dataset, 0, step)) for dataset, step in ((raw, 2), (packed, 5)))
    coloured = np.abs(one[..., 0] - one[..., 2]) > 60  # the red and the blue piece
    assert coloured.sum() > 10
    right = np.abs(one - other)
    wrong = np.abs(one - other[..., ::-1])
    assert right.mean() < 1 and right[coloured].mean() < 0.1 * wrong[coloured].mean()


def test_a_mapping_in_words_and_in_a_file_convert_alike(tmp_path: Path) -> None:
    text = PAGE.read_text().split("# my_robot.yaml\n")[1].split("```")[0]
    (tmp_path / "my_robot.yaml").write_text(text.replace("steps: [clip_gripper]\n", ""))
    file = command_for("my_robot.yaml").replace("my_robot.yaml", f"{tmp_path}/my_robot.yaml")
    by_file = converted(file, tmp_path / "file")
    by_words = converted(command_for("generic_mixed"), tmp_path / "words")
    assert rows(by_file) == rows(by_words)
    assert by_file.cameras == by_words.cameras == ("image", "image_wrist")
    assert by_file.image("train", 5, "image_wrist") == by_words.image("train", 5, "image_wrist")
    (tmp_path / "my_robot.yaml").write_text(text)
    stepped = converted(f"{file} fps=4 cameras.front.rotate=90", tmp_path / "stepped")
    assert stepped.info["sources"][0]["fps"] == 4 and stepped.info["sources"][0]["layout"]["steps"] == ["clip_gripper"]
    plain, turned = first_image(by_file, 0).astype(int), first_image(stepped, 0).astype(int)
    assert np.abs(np.rot90(plain) - turned).mean() < 3 < np.abs(plain - turned).mean()


def test_steps_are_replaced_and_added(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(words: str) -> dict[str, Any]:
        command = f"convert tests/data/rlds/bridge_dataset --preset bridge {BASE} --limit 3 --out x {words}"
        assert run(command, tmp_path / "out", "--dry-run", "--json") == 0
        return json.loads(capsys.readouterr().out)

    plain, replaced = told(""), told("steps=[drop_first]")
    assert plain["rows"]["train"] == 24 and replaced["rows"]["train"] == 27
    slower = told("steps+='{resample: {fps: 2.5}}'")
    assert slower["rows"]["train"] == 12 and slower["sources"][0]["fps"] == 2.5
    assert slower["sources"][0]["layout"]["steps"][:3] == plain["sources"][0]["layout"]["steps"]
    assert run(COMMANDS[0] + " steps=[drop_frist]", tmp_path / "out") == 1
    assert "unknown standardizing step 'drop_frist'; did you mean 'drop_first'?" in capsys.readouterr().err


def test_a_mix_keeps_statistics_and_weights_apart(samples: Path, tmp_path: Path) -> None:
    mix = PAGE.read_text().split("# my_mix.yaml\n")[1].split("```")[0]
    (tmp_path / "my_mix.yaml").write_text(mix.replace("tests/data", str(samples)))
    command = command_for("my_mix.yaml").replace("my_mix.yaml", f"{tmp_path}/my_mix.yaml")
    dataset = converted(command, tmp_path / "out", "--limit", "2")
    assert [(source["name"], source["weight"]) for source in dataset.info["sources"]] == [
        ("bridge_dataset", 0.5),
        ("kitchen", 2.0),
    ]
    assert set(dataset.statistics) == {"bridge_dataset", "kitchen"}
    assert dataset.statistics["bridge_dataset"]["action"]["mean"] != dataset.statistics["kitchen"]["action"]["mean"]
    assert {row["dataset"] for row in rows(dataset)} == {"bridge_dataset", "kitchen"}


def test_a_source_that_says_nothing_asks_for_an_instruction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for policy in ("stop", "skip"):
        command = f"convert tests/data/hdf5/robomimic_image.hdf5 --preset robomimic {BASE} --on-error {policy} --out x"
        assert run(command, tmp_path / "out") == 1
        told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert len(told) == 1 and "none of the 8 episodes says what the robot does" in told[0]
        assert "instruction='open the drawer'" in told[0]


@pytest.mark.parametrize("name", ["lerobot_lfs_pointers", "lerobot_malformed_info", "robosuite_no_images.hdf5"])
def test_broken_sets_end_in_one_sentence(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for policy in ("stop", "skip"):
        code = run(f"convert tests/data/broken/{name} {BASE} --on-error {policy} --out x", tmp_path / "out")
        lines = capsys.readouterr().err.strip().splitlines()
        assert code == 1 and len(lines) == 1 and lines[0].startswith("error: ")
    assert list(tmp_path.iterdir()) == []
