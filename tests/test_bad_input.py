"""Wrong or damaged input to the main job: one sentence, the documented exit code, nothing half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from repository import ROOT

from vlaft.cli.main import main


@pytest.fixture
def bridge(samples: Path, tmp_path: Path) -> Path:
    """A copy of the Bridge sample that a test may damage."""
    copy = tmp_path / "bridge_dataset"
    shutil.copytree(samples / "rlds/bridge_dataset", copy, copy_function=shutil.copyfile)
    return copy


@pytest.fixture
def base(tiny: Path) -> Path:
    return tiny / "checkpoint"


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line of error that was printed."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, lines
    assert "Traceback" not in lines[0]
    return lines[0]


def convert(source: Path, base: Path, out: Path, *words: str, preset: str = "bridge") -> int:
    return main(["convert", str(source), "--preset", preset, "--base", str(base), "--out", str(out), *words])


def test_missing_source(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(tmp_path / "nowhere", base, tmp_path / "out") == 1
    assert "nowhere" in sentence(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_damaged_shard(
    bridge: Path, base: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = next(bridge.rglob("*train.tfrecord*"))
    content = bytearray(shard.read_bytes())
    if damage == "truncate":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert convert(bridge, base, tmp_path / "out") == 1
    assert shard.name in sentence(capsys)
    assert not (tmp_path / "out").exists()


def test_missing_shard(bridge: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = next(bridge.rglob("*val.tfrecord*"))
    shard.unlink()
    assert convert(bridge, base, tmp_path / "out") == 1
    assert shard.name in sentence(capsys)


def test_unknown_preset(bridge: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(bridge, base, tmp_path / "out", preset="brigde") == 1
    assert "did you mean 'bridge'" in sentence(capsys)


def test_unknown_camera(bridge: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(bridge, base, tmp_path / "out", "cameras={primary: observation/image_9}") == 1
    assert "observation/image_9" in sentence(capsys)


def test_actions_that_are_not_finite(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import importlib.util

    import numpy as np

    file = ROOT / "examples/rlds_writer.py"
    spec = importlib.util.spec_from_file_location("rlds_writer", file)
    assert spec is not None and spec.loader is not None
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    actions = np.zeros((4, 7), np.float32)
    actions[2, 3] = np.nan
    frames = np.zeros((4, 32, 32, 3), np.uint8)
    episode = {"action": actions, "observation/image": frames, "language_instruction": ["push the block"] * 4}
    source = writer.write_rlds(tmp_path, "robot", {"train": [episode]})
    assert main(["convert", str(source), "--base", str(base), "--out", str(tmp_path / "out")]) == 1
    told = sentence(capsys)
    assert "step 2" in told and "not finite" in told
    assert not (tmp_path / "out").exists()


def test_tokenizer_that_does_not_fit_the_base(
    bridge: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small"
    shutil.copytree(base, small, copy_function=shutil.copyfile)
    config = json.loads((small / "config.json").read_text())
    config["text_config"]["vocab_size"] = 16064
    (small / "config.json").write_text(json.dumps(config))
    assert convert(bridge, small, tmp_path / "out") == 1
    assert "vocab" in sentence(capsys)


def test_base_that_is_no_checkpoint(bridge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(bridge, tmp_path, tmp_path / "out") == 1
    assert "config.json" in sentence(capsys)


def test_used_output_folder(bridge: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    assert convert(bridge, base, out) == 1
    assert "not empty" in sentence(capsys)
    assert convert(bridge, base, out, "--overwrite") == 1  # no dataset of ours: not ours to replace
    assert (out / "precious.txt").read_text() == "mine"


def test_unknown_recipe_and_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--recipe", "lora23", "--out", str(tmp_path / "run")]) == 1
    assert "did you mean 'lora" in sentence(capsys)
    assert main(["train", "--out", str(tmp_path / "run"), "train.batchsize=4"]) == 1
    assert "did you mean 'train.batch_size'" in sentence(capsys)
    assert not (tmp_path / "run").exists()


def test_training_without_data(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--base", str(base), "--out", str(tmp_path / "run")]) == 1
    assert "--data" in sentence(capsys)
    assert main(["train", "--base", str(base), "--data", str(tmp_path), "--out", str(tmp_path / "run")]) == 1
    assert "vlaft convert" in sentence(capsys)
    assert not (tmp_path / "run").exists()


def test_data_of_another_base(
    samples: Path, golden_folder: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    assert convert(samples / "rlds/bridge_dataset", base, data, "--limit", "1") == 0
    other = golden_folder / "mini/fused"
    assert main(["train", "--base", str(other), "--data", str(data), "--out", str(tmp_path / "run")]) == 1
    assert "convert the demonstrations again" in sentence(capsys)
    assert not (tmp_path / "run").exists()


def test_predict_with_wrong_files(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["predict", str(base), "--instruction", "push"]
    assert main([*words, "--image", str(tmp_path / "none.png")]) == 1
    assert "none.png" in sentence(capsys)
    (tmp_path / "text.png").write_text("no image")
    assert main([*words, "--image", str(tmp_path / "text.png")]) == 1
    assert "text.png" in sentence(capsys)


def test_unknown_statistics_key(tiny: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame = tiny / "frames/0.png"
    words = ["predict", str(base), "--image", str(frame), "--instruction", "push", "--unnorm-key", "bridge"]
    assert main(words) == 1
    assert "bridge_dataset" in sentence(capsys)


def test_adapter_that_is_none(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(tmp_path), "--base", str(base), "--out", str(tmp_path / "out")]) == 1
    assert "vlaft train" in sentence(capsys)
    assert not (tmp_path / "out").exists()


def test_adapter_of_another_base(
    golden_folder: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = golden_folder / "mini/fused/adapter_trained"
    assert main(["merge", str(adapter), "--base", str(base), "--out", str(tmp_path / "out")]) == 1
    assert "another base" in sentence(capsys)
    assert not (tmp_path / "out").exists()
