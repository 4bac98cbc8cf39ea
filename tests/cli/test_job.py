"""The main job through the command line, on the real Bridge sample and the golden base."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vlaft.cli.main import main
from vlaft.weights.layout import tensor_table


@pytest.fixture(scope="module")
def base(tiny: Path) -> Path:
    return tiny / "checkpoint"


@pytest.fixture(scope="module")
def data(samples: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("job") / "data"
    words = ["convert", str(samples / "rlds/bridge_dataset"), "--preset", "bridge", "--base", str(base)]
    assert main([*words, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def run(data: Path, base: Path) -> Path:
    out = data.parent / "run"
    words = ["train", "--recipe", "lora32", "--data", str(data), "--base", str(base), "--out", str(out)]
    settings = ["train.steps=12", "train.batch_size=4", "train.log_every=4", "train.evaluate_every=12"]
    settings += ["data.val_examples=16", "train.learning_rate=2e-3", "data.workers=0"]
    assert main([*words, *settings]) == 0
    return out


@pytest.fixture(scope="module")
def merged(run: Path) -> Path:
    out = run.parent / "merged"
    assert main(["merge", str(run), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def exported(merged: Path) -> Path:
    out = merged.parent / "exported"
    assert main(["export", str(merged), "--out", str(out), "--to", "huggingface"]) == 0
    return out


def test_the_loss_falls(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 1


def test_the_run_folder_is_complete(run: Path, base: Path) -> None:
    status = json.loads((run / "run.json").read_text())
    assert status["last"] == status["best"] == "step-000012"
    assert status["status"] == "finished"
    checkpoint = run / "checkpoints/step-000012"
    assert (checkpoint / "adapter_model.safetensors").is_file()
    environment = json.loads((run / "environment.json").read_text())
    assert environment["versions"]["torch"]
    assert environment["base_fingerprint"] == status["base_fingerprint"]
    assert json.loads((run / "dataset_statistics.json").read_text())["bridge_dataset"]["num_transitions"] == 400
    assert (
        json.loads((run / "report.json").read_text())["trainable_parameters"] == 395_616 * 4
    )  # the golden count at rank 8, at rank 32
    assert main(["train", "--recipe", str(run / "recipe.yaml"), "--out", str(run.parent / "unused"), "--dry-run"]) == 0


def test_adapter_merged_and_exported_predict_the_same(
    run: Path, merged: Path, exported: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = [str(tiny / f"frames/{index}.png") for index in range(4)]
    images = [word for frame in frames for word in ("--image", frame)]
    answers = []
    for model in (run, merged, exported):
        capsys.readouterr()
        words = ["predict", str(model), *images, "--instruction", "put carrot on plate", "--dtype", "float32"]
        assert main([*words, "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    ids = [[row["action_token_ids"] for row in answer] for answer in answers]
    # float32 merge of a bfloat16 base is rounded to bfloat16 once, which no token here notices
    assert ids[0] == ids[1] == ids[2]
    assert all(len(row["action"]) == 7 and row["unnorm_key"] == "bridge_dataset" for row in answers[0])


def test_the_export_has_the_layout_of_its_base(exported: Path, base: Path) -> None:
    ours, theirs = tensor_table(exported), tensor_table(base)
    described = [{name: (e.dtype, e.shape, e.file) for name, e in table.items()} for table in (ours, theirs)]
    assert described[0] == described[1]
    config = json.loads((exported / "config.json").read_text())
    original = json.loads((base / "config.json").read_text())
    assert set(original) <= set(config)
    assert config["model_type"] == "openvla"
    assert list(config["norm_stats"]) == ["bridge_dataset"]
    assert config["auto_map"]["AutoConfig"].endswith("configuration_prismatic.OpenVLAConfig")
    assert config["image_pipeline"]["center_crop"] is True  # the recipe trains with augmentation
    names = {path.name for path in base.iterdir()}
    assert names <= {path.name for path in exported.iterdir()}


def test_predict_gives_upstreams_actions(tiny: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for case in json.loads((tiny / "cases.json").read_text())["predict"]:
        words = ["predict", str(base), "--image", str(tiny / case["frame"]), "--json", "--device", "cpu"]
        assert main([*words, "--instruction", case["instruction"]]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["action_token_ids"] == case["generated_token_ids"]
        np.testing.assert_allclose(answer["action"], case["action"], atol=1e-12)
        assert answer["unnorm_key"] == "bridge_dataset"


def test_a_base_with_other_parameters_is_refused_by_merge(
    run: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(base, other, copy_function=shutil.copyfile)
    shard = next(other.glob("model-00003*"))
    tensors = load_file(shard)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] + 1}, shard, metadata={"format": "pt"})
    assert main(["merge", str(run), "--base", str(other), "--out", str(tmp_path / "out")]) == 1
    assert "another base" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_merging_twice_is_refused(run: Path, merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(run), "--base", str(merged), "--out", str(tmp_path / "out")]) == 1
    assert "merged into this checkpoint already" in capsys.readouterr().err


def test_a_used_output_folder_is_refused_and_kept(
    run: Path, data: Path, base: Path, merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    words = ["train", "--data", str(data), "--base", str(base), "--out", str(run)]
    assert main(words) == 1
    assert "is not empty" in capsys.readouterr().err
    assert main([*words, "--resume", "--overwrite"]) == 2
    assert main(["merge", str(run), "--out", str(merged)]) == 1
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
