"""Finding trained weights in runs, checkpoints of runs, and adapter folders from anywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_models import MINI
from safetensors.torch import save_file

from vlaft.action.statistics import STATISTICS_FILE
from vlaft.adapt.adapter import save_adapter
from vlaft.adapt.methods import attach_lora
from vlaft.errors import CheckpointError, DataError
from vlaft.model.load import load_model
from vlaft.recipe.settings import LoraConfig
from vlaft.weights.trained import RUN_FILE, TRAINED_FILE, find_trained, is_trained

ADAPTER = MINI / "fused" / "adapter_trained"
STATISTICS = {"mine": {"action": {"q01": [0.0], "q99": [1.0], "mask": [True]}}}
RUN: dict[str, Any] = {
    "base": "someone/base",
    "base_fingerprint": "abc",
    "best": "step-000020",
    "last": "step-000030",
    "recipe": "lora32",
    "inference": {"prompt_style": "openvla"},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    for step in (10, 20, 30):
        shutil.copytree(ADAPTER, folder / "checkpoints" / f"step-{step:06d}")
    (folder / RUN_FILE).write_text(json.dumps(RUN))
    (folder / STATISTICS_FILE).write_text(json.dumps(STATISTICS))
    return folder


def refused(folder: Path, checkpoint: str | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        find_trained(folder, checkpoint)
    return str(caught.value)


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [(None, "step-000020"), ("best", "step-000020"), ("last", "step-000030"), ("step-000010", "step-000010")],
)
def test_checkpoint_of_a_run(run: Path, checkpoint: str | None, name: str) -> None:
    trained = find_trained(run, checkpoint)
    assert trained.weights == run / "checkpoints" / name
    assert trained.has_adapter
    assert (trained.base, trained.base_fingerprint, trained.recipe) == ("someone/base", "abc", "lora32")
    assert trained.statistics == STATISTICS
    assert trained.inference == {"prompt_style": "openvla"}


def test_folder_of_a_checkpoint_knows_its_run(run: Path) -> None:
    assert find_trained(run / "checkpoints" / "step-000010") == find_trained(run, "step-000010")


def test_run_without_a_best_gives_its_last(run: Path) -> None:
    (run / RUN_FILE).write_text(json.dumps(RUN | {"best": None}))
    assert find_trained(run).weights.name == "step-000030"
    assert "no best checkpoint" in refused(run, "best")


def test_run_that_has_saved_nothing(run: Path) -> None:
    (run / RUN_FILE).write_text(json.dumps({"base": "x"}))
    shutil.rmtree(run / "checkpoints")
    assert "no finished checkpoint yet" in refused(run)
    assert "there are: none" in refused(run, "step-000010")


@pytest.mark.parametrize("name", ["step-000099", "../run/checkpoints/step-000010", "/etc", "..", "."])
def test_checkpoints_that_are_not_there_or_lie_outside(run: Path, name: str) -> None:
    sentence = refused(run, name)
    assert "step-000010, step-000020, step-000030" in sentence
    (run / RUN_FILE).write_text(json.dumps(RUN | {"best": name}))
    assert name in refused(run)


@pytest.mark.parametrize("content", ["", "[]", "{", "\x00"])
def test_damaged_run_file(run: Path, content: str) -> None:
    (run / RUN_FILE).write_text(content)
    assert RUN_FILE in refused(run)


@pytest.mark.parametrize("content", [{"best": 3, "last": [1]}, {"best": {"a": 1}}])
def test_run_file_with_other_types(run: Path, content: dict[str, Any]) -> None:
    (run / RUN_FILE).write_text(json.dumps(content))
    assert "run.json: " in refused(run) and "must be a text or null, not " in refused(run)


def test_statistics_of_other_types(run: Path) -> None:
    (run / STATISTICS_FILE).write_text(json.dumps({"mine": {"action": {"q01": ["0"], "q99": [1.0]}}}))
    with pytest.raises(DataError, match=r"mine\.action\.q01 has to be a list of finite numbers"):
        find_trained(run)


def test_trained_tensors_need_their_run(run: Path, tmp_path: Path) -> None:
    weights = run / "checkpoints" / "step-000020"
    shutil.rmtree(weights)
    weights.mkdir()
    save_file({"a": torch.zeros(1)}, weights / TRAINED_FILE)
    found = find_trained(run)
    assert (found.has_adapter, found.tensors().files) == (False, [weights / TRAINED_FILE])
    alone = Path(shutil.copytree(weights, tmp_path / "alone"))
    assert is_trained(alone)
    assert "give the run's folder" in refused(alone)


def test_an_adapter_and_whole_tensors_side_by_side(run: Path) -> None:
    weights = run / "checkpoints" / "step-000020"
    assert not find_trained(run).has_tensors
    save_file({"a": torch.zeros(1)}, weights / TRAINED_FILE)
    found = find_trained(run)
    assert (found.has_adapter, found.tensors().files) == (True, [weights / TRAINED_FILE])


def test_upstreams_adapter_with_statistics_beside_or_above(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ADAPTER, tmp_path / "adapters" / "mine"))
    trained = find_trained(folder)
    assert trained.has_adapter
    assert (trained.base, trained.base_fingerprint, trained.statistics) == (None, None, {})
    (folder.parent / STATISTICS_FILE).write_text(json.dumps({"above": STATISTICS["mine"]}))
    assert list(find_trained(folder).statistics) == ["above"]
    (folder / STATISTICS_FILE).write_text(json.dumps({"beside": STATISTICS["mine"]}))
    assert list(find_trained(folder).statistics) == ["beside"]
    assert "within a run" in refused(folder, "best")


def test_vlafts_adapter_alone_tells_the_fingerprint_of_its_base(tmp_path: Path) -> None:
    adapted = attach_lora(load_model(MINI / "fused"), LoraConfig(rank=2))
    save_adapter(adapted, tmp_path, "0123abcd")
    trained = find_trained(tmp_path)
    assert trained.base_fingerprint == "0123abcd"
    assert trained.base == str(MINI / "fused")


def test_what_is_nothing_of_the_kind(tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "absent")
    assert "neither a run" in refused(tmp_path)
    assert not is_trained(tmp_path)
    assert "neither a run" in refused(MINI / "fused")
    (tmp_path / "file").write_text("x")
    assert "no such folder" in refused(tmp_path / "file")
