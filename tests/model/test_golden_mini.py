"""Forward, backward and greedy decoding against upstream's own numbers, on the two mini models."""

from __future__ import annotations

import pytest
import torch
from golden_models import NAMES, Golden, golden

from vlaft.model.generation import generate_action_ids
from vlaft.model.openvla import OpenVLAForActionPrediction


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest) -> Golden:
    return golden(request.param)


@pytest.fixture(scope="module")
def model(case: Golden) -> OpenVLAForActionPrediction:
    return case.load()


@torch.no_grad()
def test_projector_features(case: Golden, model: OpenVLAForActionPrediction) -> None:
    features = model.projector(model.vision_backbone(case.tensors["pixel_values"]))
    torch.testing.assert_close(features, case.tensors["projector_features"], rtol=0, atol=1e-5)


@torch.no_grad()
def test_logits_of_every_position(case: Golden, model: OpenVLAForActionPrediction) -> None:
    inputs = {name: tensor for name, tensor in case.batch.items() if name != "labels"}
    logits = model(**inputs).logits
    assert logits.shape == case.tensors["logits"].shape
    torch.testing.assert_close(logits, case.tensors["logits"], rtol=0, atol=1e-4)


@torch.no_grad()
def test_logits_at_labels_are_the_rows_of_upstreams_logits_that_predict_them(
    case: Golden, model: OpenVLAForActionPrediction
) -> None:
    output = model(**case.batch)
    labels = case.tensors["labels"]
    # upstream's alignment: text logits begin at the last patch, logits[:, P:-1] predict labels[:, 1:]
    shifted, targets = case.tensors["logits"][:, model.context_size : -1], labels[:, 1:]
    assert torch.equal(output.label_ids, targets[targets != -100])
    assert len(output.logits) == len(output.label_ids) > 0
    torch.testing.assert_close(output.logits, shifted[targets != -100], rtol=0, atol=1e-4)


def test_loss_and_gradient_norms(case: Golden, model: OpenVLAForActionPrediction) -> None:
    model.zero_grad(set_to_none=True)
    loss = model(**case.batch).loss
    loss.backward()
    norms = {name: None if p.grad is None else p.grad.norm().item() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    assert loss.item() == pytest.approx(case.expected["loss"], rel=1e-5)
    expected = case.expected["grad_norms"]
    assert set(norms) == set(expected)
    assert {name for name, norm in norms.items() if norm is None} == {n for n, e in expected.items() if e is None}
    for name, norm in expected.items():
        if norm is not None:
            assert norms[name] == pytest.approx(norm, rel=1e-4), name


def test_parameters_without_gradient_are_the_last_blocks_norms_and_pooling_head(case: Golden) -> None:
    unreached = {name for name, norm in case.expected["grad_norms"].items() if norm is None}
    assert unreached
    dead = (".blocks.2.", "featurizer.norm.", ".attn_pool.")  # three blocks each, so block 2 is the last
    assert {name for name in case.expected["grad_norms"] if any(part in name for part in dead)} == unreached


def test_generated_ids_in_a_batch_of_different_lengths(case: Golden, model: OpenVLAForActionPrediction) -> None:
    lengths = case.expected["prompt_lengths"]
    assert len(set(lengths)) > 1
    width = max(lengths)
    mask = (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).long()
    prompts = case.tensors["input_ids"][:, :width] * mask  # padding id 0 on the right
    ids = generate_action_ids(model, prompts, case.tensors["pixel_values"], mask, num_tokens=7)
    assert ids.tolist() == case.expected["generated"]


def test_generated_ids_one_by_one(case: Golden, model: OpenVLAForActionPrediction) -> None:
    for row, (length, expected) in enumerate(
        zip(case.expected["prompt_lengths"], case.expected["generated"], strict=True)
    ):
        prompt = case.tensors["input_ids"][row : row + 1, :length]
        ids = generate_action_ids(model, prompt, case.tensors["pixel_values"][row : row + 1], num_tokens=7)
        assert ids.tolist() == [expected]
