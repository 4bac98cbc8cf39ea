"""What the model computes: what it looks at, which path it takes, what it is registered as."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from golden_models import NAMES, Golden, copy_checkpoint, golden
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForImageTextToText

from vlaft.action.tokens import IGNORED
from vlaft.model import OpenVLAConfig, OpenVLAForActionPrediction
from vlaft.training.model import recompute_blocks


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest) -> Golden:
    return golden(request.param)


@pytest.fixture
def model(case: Golden) -> OpenVLAForActionPrediction:
    return case.load()


@torch.no_grad()
def test_different_images_give_different_logits(case: Golden, model: OpenVLAForActionPrediction) -> None:
    # upstream's code under newer transformers drops the image silently: every image gives the same action
    prompt = case.tensors["input_ids"][:1, : case.expected["prompt_lengths"][0]]
    images = case.tensors["pixel_values"]
    last = [model(prompt, images[row : row + 1]).logits[0, -1] for row in range(len(images))]
    assert (last[0] - last[1]).abs().max() > 0.05
    assert (last[0] - last[2]).abs().max() > 0.05


@torch.no_grad()
def test_every_vit_sees_its_own_three_channels(case: Golden, model: OpenVLAForActionPrediction) -> None:
    pixels = case.tensors["pixel_values"][:1]
    features = model.vision_backbone(pixels)
    start = 0
    for index, vit in enumerate(model.vision_backbone.featurizers):
        changed = pixels.clone()
        changed[:, 3 * index : 3 * index + 3] += 1.0
        different = (model.vision_backbone(changed) != features).any(dim=1)[0]  # [V]
        width = vit.config.embed_dim
        assert different[start : start + width].all()
        assert different.sum() == width
        start += width


@torch.no_grad()
def test_patches_lie_row_by_row(case: Golden, model: OpenVLAForActionPrediction) -> None:
    vit = model.vision_backbone.featurizer
    pixels = torch.zeros(1, 3, 56, 56)
    plain = vit.patch_embed(pixels)
    pixels[:, :, 0:14, 42:56] = 1.0  # first row, last column of a grid of four by four
    changed = (vit.patch_embed(pixels) != plain).any(dim=-1)[0]
    assert changed.nonzero().flatten().tolist() == [3]


@torch.no_grad()
def test_the_last_prompt_token_is_attended(case: Golden, model: OpenVLAForActionPrediction) -> None:
    prompt = case.tensors["input_ids"][:1, : case.expected["prompt_lengths"][0]]
    images = case.tensors["pixel_values"][:1]
    changed = prompt.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 256 + 3
    assert changed[0, -1] != prompt[0, -1]
    full = torch.ones_like(prompt)
    with_mask, other = model(prompt, images, full).logits, model(changed, images, full).logits
    assert (with_mask[0, -1] - other[0, -1]).abs().max() > 1e-3
    # only the last position can know of it, and a full mask is the same as none
    assert torch.equal(with_mask[0, :-1], other[0, :-1])
    torch.testing.assert_close(model(prompt, images).logits, with_mask, rtol=0, atol=1e-5)
    # what upstream's short mask does under newer transformers: the last token is hidden, the logits differ
    short = full.clone()
    short[0, -1] = 0
    assert (model(prompt, images, short).logits[0, -1] - with_mask[0, -1]).abs().max() > 1e-3


@torch.no_grad()
def test_causal_in_the_text_and_full_over_image(case: Golden, model: OpenVLAForActionPrediction) -> None:
    ids, images = case.tensors["input_ids"][:1], case.tensors["pixel_values"][:1]
    before = model(ids, images).logits[0]
    changed = ids.clone()
    changed[0, 5] = changed[0, 5] % 200 + 7
    assert changed[0, 5] != ids[0, 5]
    after = model(changed, images).logits[0]
    position = model.context_size + 5
    assert torch.equal(before[:position], after[:position])
    assert (before[position:] != after[position:]).any(dim=-1).all()
    images_changed = model(ids, images + 0.5).logits[0]
    assert torch.equal(before[0], images_changed[0])  # BOS stands before the patches
    assert (before[1:] != images_changed[1:]).any(dim=-1).all()


def test_padding_never_changes_the_loss(case: Golden, model: OpenVLAForActionPrediction) -> None:
    batch = case.batch
    padded = {
        name: torch.nn.functional.pad(batch[name], (0, 6), value=fill)
        for name, fill in (("input_ids", 77), ("labels", IGNORED), ("attention_mask", 0))
    }
    with torch.no_grad():
        assert model(**(batch | padded)).loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-6)


def test_label_positions_give_the_same_loss_and_gradients(case: Golden, model: OpenVLAForActionPrediction) -> None:
    batch = case.batch
    counts = (batch["labels"] != IGNORED).sum(dim=1)
    positions = torch.stack([torch.nonzero(row != IGNORED).flatten()[: int(counts.min())] for row in batch["labels"]])
    assert counts.min() == counts.max()
    plain = model(**batch)
    plain.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    chosen = model(**batch, label_positions=positions)
    chosen.loss.backward()
    assert torch.equal(chosen.label_ids, plain.label_ids)
    torch.testing.assert_close(chosen.logits, plain.logits, rtol=0, atol=1e-6)
    assert chosen.loss.item() == pytest.approx(plain.loss.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)
    # a column that holds no label is skipped by the loss
    wider = torch.cat([positions[:, :1] - 1, positions], dim=1)
    assert (batch["labels"].gather(1, wider[:, :1]) == IGNORED).all()
    with torch.no_grad():
        assert model(**batch, label_positions=wider).loss.item() == pytest.approx(plain.loss.item(), rel=1e-6)


def test_gradient_checkpointing_gives_the_same_gradients(case: Golden, model: OpenVLAForActionPrediction) -> None:
    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        model(**case.batch).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.train()
    plain = gradients()
    calls = 0

    def counted(function, *args, **kwargs):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        return partial(checkpoint, use_reentrant=False)(function, *args, **kwargs)

    recompute_blocks(model, every=1)
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module._gradient_checkpointing_func = counted
    recomputed = gradients()
    blocks = sum(len(vit.live_blocks) for vit in model.vision_backbone.featurizers)
    assert calls == blocks + len(model.language_model.model.layers)
    assert set(recomputed) == set(plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-7)


def test_auto_classes_load_a_folder_without_remote_code(case: Golden) -> None:
    # config.json names upstream's Python files, which are not there: nothing may ask for them
    assert "auto_map" in json.loads((case.folder / "config.json").read_text())
    config = AutoConfig.from_pretrained(case.folder)
    assert type(config) is OpenVLAConfig
    model = AutoModelForImageTextToText.from_pretrained(case.folder, dtype=torch.float32)
    assert type(model) is OpenVLAForActionPrediction
    with torch.no_grad():
        assert model(**case.batch).loss.item() == pytest.approx(case.expected["loss"], rel=1e-5)


def test_python_files_of_a_folder_are_never_run(case: Golden, tmp_path: Path) -> None:
    folder = copy_checkpoint(case.folder, tmp_path / "checkpoint")
    for name in ("configuration_prismatic.py", "modeling_prismatic.py"):
        (folder / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(model) is OpenVLAForActionPrediction
    assert not (tmp_path / "ran").exists()


def test_save_pretrained_writes_the_released_names(case: Golden, tmp_path: Path) -> None:
    model = case.load()
    names = set(model.state_dict())
    model.save_pretrained(tmp_path)
    again = OpenVLAForActionPrediction.from_pretrained(tmp_path)
    assert set(again.state_dict()) == names
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_fresh_weights_are_finite_and_not_constant(case: Golden) -> None:
    torch.manual_seed(0)
    model = OpenVLAForActionPrediction(case.load().config)
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
    with torch.no_grad():
        logits = model(case.tensors["input_ids"], case.tensors["pixel_values"]).logits
    assert torch.isfinite(logits).all()
    assert logits.std() > 0
