"""Adapters on disk: peft's layout, upstream's additions, and adapters that do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from golden_models import NAMES, Golden, golden
from peft import PeftModel
from safetensors.torch import load_file, save_file

from vlaft.adapt.adapter import (
    load_adapter,
    load_adapter_weights,
    read_adapter_config,
    read_adapter_tensors,
    save_adapter,
)
from vlaft.adapt.methods import attach_lora
from vlaft.errors import CheckpointError
from vlaft.recipe.settings import LoraConfig
from vlaft.weights.trained import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_base

EXTRA = "base_model.model.language_model.lm_head.base_layer.weight"


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest) -> Golden:
    return golden(request.param)


@pytest.fixture
def folder(case: Golden, tmp_path: Path) -> Path:
    return Path(shutil.copytree(case.folder / "adapter_trained", tmp_path / "adapter"))


def rewrite(folder: Path, change) -> None:  # type: ignore[no-untyped-def]
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    change(tensors)
    save_file(tensors, folder / ADAPTER_WEIGHTS)


def refused(case: Golden, folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_adapter(case.load(), folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_the_frozen_head_that_upstream_stores_is_skipped(case: Golden) -> None:
    folder = case.folder / "adapter_trained"
    assert EXTRA in load_file(folder / ADAPTER_WEIGHTS)
    assert set(load_file(folder / ADAPTER_WEIGHTS)) - set(read_adapter_tensors(folder)) == {EXTRA}


def test_configuration_of_an_old_peft_is_read_without_its_remote_code(case: Golden) -> None:
    content = json.loads((case.folder / "adapter_init" / ADAPTER_CONFIG).read_text())
    assert "transformers_modules" in content["auto_mapping"]["parent_library"]
    config = read_adapter_config(case.folder / "adapter_init")
    assert config.auto_mapping is None
    assert (config.r, config.lora_alpha) == (4, 4)
    assert set(config.target_modules) == set(content["target_modules"])


def test_saved_adapter_comes_back_bit_for_bit(case: Golden, tmp_path: Path) -> None:
    adapted = load_adapter(case.load(), case.folder / "adapter_trained")
    save_adapter(adapted, tmp_path, "0123abcd")
    assert adapter_base(tmp_path) == ("0123abcd", None)
    assert adapter_base(case.folder / "adapter_trained") == (None, None)
    ours, theirs = read_adapter_tensors(tmp_path), read_adapter_tensors(case.folder / "adapter_trained")
    assert set(load_file(tmp_path / ADAPTER_WEIGHTS)) == set(ours) == set(theirs)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    again = load_adapter(case.load(), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**case.batch).logits, adapted(**case.batch).logits)


def test_peft_itself_reads_what_is_saved(case: Golden, tmp_path: Path) -> None:
    adapted = load_adapter(case.load(), case.folder / "adapter_trained")
    save_adapter(adapted, tmp_path)
    theirs = PeftModel.from_pretrained(case.load(), tmp_path)
    with torch.no_grad():
        assert torch.equal(theirs(**case.batch).logits, adapted(**case.batch).logits)


def test_adapter_of_the_other_base() -> None:
    for one, other in (NAMES, NAMES[::-1]):
        sentence = refused(golden(one), golden(other).folder / "adapter_trained")
        assert "another base" in sentence


def test_adapter_of_another_width(case: Golden, folder: Path) -> None:
    name = "base_model.model.projector.fc1.lora_A.weight"

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = torch.zeros(4, tensors[name].shape[1] + 1)

    rewrite(folder, widen)
    sentence = refused(case, folder)
    assert "another base" in sentence
    assert name in sentence


def test_missing_and_extra_tensors(case: Golden, folder: Path) -> None:
    name = "base_model.model.projector.fc1.lora_A.weight"
    rewrite(folder, lambda tensors: tensors.pop(name))
    assert name in refused(case, folder)
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(4, 56 if case.folder.name == "fused" else 32)}))
    load_adapter(case.load(), folder)
    odd = "base_model.model.projector.fc9.lora_A.weight"
    rewrite(folder, lambda tensors: tensors.update({odd: torch.zeros(4, 4)}))
    assert odd in refused(case, folder)


def test_another_rank_is_refused(case: Golden) -> None:
    adapted = attach_lora(case.load(), LoraConfig(rank=8))
    with pytest.raises(CheckpointError, match="another base"):
        load_adapter_weights(adapted, case.folder / "adapter_init")


def test_damaged_weights(case: Golden, folder: Path) -> None:
    data = (folder / ADAPTER_WEIGHTS).read_bytes()
    for size in (0, 5, 100, len(data) // 2, len(data) - 1):
        (folder / ADAPTER_WEIGHTS).write_bytes(data[:size])
        assert ADAPTER_WEIGHTS in refused(case, folder)
        with pytest.raises(CheckpointError, match="adapter_model"):
            read_adapter_tensors(folder)
    (folder / ADAPTER_WEIGHTS).unlink()
    assert ADAPTER_WEIGHTS in refused(case, folder)
    with pytest.raises(CheckpointError, match="adapter_model"):
        adapter_base(folder)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"peft_type": "IA3"}',
        '{"peft_type": "LORA", "r": 0, "target_modules": ["fc1"]}',
        '{"peft_type": "LORA", "r": "x", "target_modules": ["fc1"]}',
        '{"peft_type": "LORA", "r": 4, "target_modules": ["nothing"]}',
        '{"peft_type": "LORA", "r": 4, "target_modules": 3}',
        '{"peft_type": "LORA", "r": 4, "target_modules": ["fc1"], "use_dora": 3, "lora_alpha": null}',
        '{"peft_type": "LORA", "r": 4, "target_modules": ["fc1"], "lora_dropout": "x"}',
    ],
)
def test_damaged_configuration(case: Golden, folder: Path, content: str) -> None:
    (folder / ADAPTER_CONFIG).write_text(content)
    refused(case, folder)


def test_special_initialisation_does_not_alter_the_base_on_loading(case: Golden, folder: Path) -> None:
    content = json.loads((folder / ADAPTER_CONFIG).read_text()) | {"init_lora_weights": "olora"}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(content))
    model = case.load()
    head = model.language_model.lm_head.weight.detach().clone()
    adapted = load_adapter(model, folder)
    assert torch.equal(adapted.get_base_model().language_model.lm_head.base_layer.weight, head)
