"""Policies exported, to OpenVLA-OFT's own folder too, and read back: the same answers, and upstream's names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from oft_folders import golden_checkpoint, upstream_folder
from small_policies import ask, merged_policy, write_rich
from small_run import Small

from vlaft.cli.main import main
from vlaft.model.load import read_policy_files
from vlaft.policy import load


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return write_rich(tmp_path_factory.mktemp("rich"))


@pytest.fixture(scope="module", params=["oft", "oft-state", "oft-film"])
def merged(request: pytest.FixtureRequest, rich: Small, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, merged_policy(rich, request.param, tmp_path_factory.mktemp(request.param))


def given(name: str) -> dict[str, object]:
    """Return what upstream's folders do not tell."""
    cameras = ["main"] if name == "oft" else ["main", "wrist"]
    return {"chunk": 3, "normalization": "minmax" if name == "oft-film" else "q99", "cameras": cameras}


def words(name: str) -> list[str]:
    cameras = "[main]" if name == "oft" else "[main,wrist]"
    return ["policy.chunk=3", f"policy.normalization={given(name)['normalization']}", f"policy.cameras={cameras}"]


def test_the_release_carries_head_and_all(
    merged: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, folder = merged
    out = tmp_path / "out"
    assert main(["export", str(folder), "--out", str(out)]) == 0
    assert re.search(r"(\d+) of \1 values on 4 examples", capsys.readouterr().err)
    assert ask(load(out, device="cpu")) == pytest.approx(ask(load(folder, device="cpu")), abs=1e-6)
    config = json.loads((out / "config.json").read_text())
    assert config["policy"]["chunk"] == 3 and "auto_map" not in config  # upstream's released code would misread it
    card = (out / "README.md").read_text()
    assert "chunks of 3 actions of 7 numbers" in card and "vlaft.load" in card
    assert ("`wrist`" in card) == (name != "oft")
    half = tmp_path / "half"
    assert main(["export", str(folder), "--out", str(half), "--dtype", "bfloat16"]) == 0
    before, after = read_policy_files(folder), read_policy_files(half)
    assert all(torch.equal(before[key], after[key]) for key in before) and set(before) == set(after)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_policy_keeps_its_modules(merged: tuple[str, Path], tmp_path: Path, kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    name, folder = merged
    if name == "oft-state":
        pytest.skip("of its modules, oft-film has all")
    out, half = tmp_path / "out", tmp_path / "half"
    assert main(["export", str(folder), "--out", str(out), "--to", kind]) == 0
    before, after = read_policy_files(folder), read_policy_files(out)
    assert all(torch.equal(before[key], after[key]) for key in before) and set(before) == set(after)
    policy = load(out, device="cpu")
    assert policy.model.is_quantized
    assert all(parameter.dtype == torch.float32 for parameter in policy.model.policy_parameters().values())
    # the base alone is rounded, and quantised as it would be in memory; products of 4 bits are those of bfloat16 here
    assert main(["export", str(folder), "--out", str(half), "--dtype", "bfloat16"]) == 0
    assert ask(policy) == pytest.approx(ask(load(half, device="cpu", dtype=kind)), abs=1e-4 if kind == "int8" else 2e-2)


def test_upstreams_folder_is_written_and_read_back(merged: tuple[str, Path], tmp_path: Path) -> None:
    name, folder = merged
    out = tmp_path / "out"
    assert main(["export", str(folder), "--out", str(out), "--to", "oft"]) == 0
    files = {path.name for path in out.iterdir()}
    expected = {"action_head--3_checkpoint.pt", "dataset_statistics.json", "config.json"}
    expected |= {"proprio_projector--3_checkpoint.pt"} if name != "oft" else set()
    expected |= {"vision_backbone--3_checkpoint.pt"} if name == "oft-film" else set()
    assert expected <= files and not {"action_head.safetensors", "proprio_projector.safetensors"} & files
    assert sum(file.endswith(".pt") for file in files) == len(expected) - 2
    head = torch.load(out / "action_head--3_checkpoint.pt", weights_only=True)
    assert all(key.startswith("module.model.") for key in head) and len(head) == 16
    assert np.array_equal(ask(load(out, device="cpu")), ask(load(folder, device="cpu")))
    # without what config.json says, as upstream's own folders are
    config = json.loads((out / "config.json").read_text())
    assert config["auto_map"]["AutoModelForVision2Seq"] == "modeling_prismatic.OpenVLAForActionPrediction"
    del config["policy"]
    (out / "config.json").write_text(json.dumps(config))
    assert np.array_equal(ask(load(out, device="cpu", policy=given(name))), ask(load(folder, device="cpu")))


def test_a_backbone_has_the_names_that_upstreams_loader_expects(
    rich: Small, golden_folder: Path, tiny: Path, tmp_path: Path
) -> None:
    """A golden policy with FiLM, read and written again: the keys, and the shapes but for the adapters' rank."""
    source = golden_checkpoint(golden_folder, "c", tmp_path / "golden")
    said = ["policy.chunk=25", "policy.cameras=[high,left,right]", "policy.normalization=minmax"]
    plain, out = tmp_path / "plain", tmp_path / "out"
    assert main(["merge", str(source), "--out", str(plain), "--base", str(tiny / "checkpoint"), *said]) == 0
    assert main(["export", str(plain), "--out", str(out), "--to", "oft"]) == 0
    before = torch.load(source / "vision_backbone--5_checkpoint.pt", weights_only=True)
    after = torch.load(out / "vision_backbone--latest_checkpoint.pt", weights_only=True)
    assert set(before) == set(after)

    def shape(key: str, tensors: dict[str, torch.Tensor]) -> list[int]:
        sides = list(tensors[key].shape)
        rank = 0 if ".lora_A." in key else 1 if ".lora_B." in key else None
        return [side for index, side in enumerate(sides) if index != rank]

    assert all(shape(key, before) == shape(key, after) for key in before)
    for part, prefix in (("action_head", "module.model."), ("proprio_projector", "module.fc")):
        names = set(torch.load(source / f"{part}--5_checkpoint.pt", weights_only=True))
        assert names == set(torch.load(out / f"{part}--latest_checkpoint.pt", weights_only=True))
        assert all(key.startswith(prefix) for key in names)


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_a_folder_of_upstreams_answers_as_the_plain_policy(
    merged: tuple[str, Path], tmp_path: Path, prefix: str
) -> None:
    name, folder = merged
    source = upstream_folder(folder, tmp_path / "source", prefix=prefix, unmerged=prefix != "")
    plain, policy = load(folder, device="cpu"), load(source, device="cpu", policy=given(name))
    # the run cropped frames, as upstream's own do unless they are told otherwise
    size = plain.pipeline.size
    assert ask(policy, size) == pytest.approx(ask(plain, size), abs=2e-5)
    exact = ask(policy)  # frames of another size, which upstream puts through JPEG
    assert exact != pytest.approx(ask(plain), abs=2e-5)
    out = tmp_path / "merged"
    assert main(["merge", str(source), "--out", str(out), *words(name)]) == 0
    assert ask(load(out, device="cpu")) == pytest.approx(exact, abs=2e-5)
    assert not any(path.is_symlink() for path in out.iterdir())
    assert main(["export", str(source), "--out", str(tmp_path / "export"), *words(name)]) == 0
    assert ask(load(tmp_path / "export", device="cpu")) == pytest.approx(exact, abs=2e-5)


def test_a_policy_on_the_hub_is_known_by_its_name(
    merged: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, folder = merged
    if name != "oft-state":
        pytest.skip("those on the Hub read two cameras and a state")
    source = upstream_folder(folder, tmp_path / "source")
    monkeypatch.setattr("vlaft.adapt.policies.resolve_checkpoint", lambda name: source)
    policy = load("moojink/openvla-7b-oft-finetuned-libero-spatial", device="cpu")
    assert policy.model.policy.cameras == ["main", "wrist"] and ask(policy).shape == (8, 7)


def test_every_verb_takes_such_a_folder(
    merged: tuple[str, Path], rich: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, folder = merged
    source = str(upstream_folder(folder, tmp_path / "source"))
    assert main(["evaluate", source, str(folder), "--data", str(rich.data), "--json", *words(name)]) == 0
    first, second = (model["free_running"] for model in json.loads(capsys.readouterr().out)["models"])
    assert first["overall"]["l1_normalized"] == pytest.approx(second["overall"]["l1_normalized"], abs=1e-5)
    assert main(["evaluate", source, "--data", str(rich.data)]) == 1
    assert "nothing there says policy.chunk and policy.cameras" in capsys.readouterr().err
    assert main(["export", source, "--out", str(tmp_path / "x"), "policy.chunk=3", "train.steps=3"]) == 1
    assert "'train.steps' is no setting of a policy" in capsys.readouterr().err
    assert main(["merge", source, "--out", str(tmp_path / "x"), "--dtype", "float32", *words(name)]) == 2
    assert main(["doctor", source]) == 0
    assert "a policy in OpenVLA-OFT's layout" in capsys.readouterr().out.replace("\n", " ")
    assert main(["export", source, "--out", source, "--overwrite", *words(name)]) == 1
    assert Path(source, "config.json").is_file() and not (tmp_path / "x").exists()
    assert main(["inspect", source]) == 1
    assert main(["doctor", str(folder)]) == 0


def test_an_adapter_of_such_a_folder_is_not_used_without_its_head(
    golden_folder: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = golden_checkpoint(golden_folder, "b", tmp_path / "golden")
    adapter = str(source / "lora_adapter")
    assert main(["merge", adapter, "--out", str(tmp_path / "out"), "--base", str(tiny / "checkpoint")]) == 1
    assert f"give {source} itself" in capsys.readouterr().err


def test_only_policies_that_write_all_at_once_go_to_upstream(
    rich: Small, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(tiny / "checkpoint"), "--out", str(tmp_path / "out"), "--to", "oft"]) == 1
    assert "token after token" in capsys.readouterr().err
