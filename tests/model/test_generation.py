"""Greedy decoding: exactly A tokens, whatever they are, for every row as if it were alone."""

from __future__ import annotations

import pytest
import torch
from golden_models import NAMES, Golden, golden

from vlaft.adapt.methods import attach_lora
from vlaft.model.generation import KeyValues, feed, generate_action_ids, likeliest, read_prompt
from vlaft.model.openvla import OpenVLAForActionPrediction
from vlaft.recipe.settings import LoraConfig


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest) -> Golden:
    return golden(request.param)


@pytest.fixture
def model(case: Golden) -> OpenVLAForActionPrediction:
    return case.load()


def prompt_of(case: Golden, row: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    length = case.expected["prompt_lengths"][row]
    return case.tensors["input_ids"][row : row + 1, :length], case.tensors["pixel_values"][row : row + 1]


@torch.no_grad()
def favour(model: OpenVLAForActionPrediction, token: int) -> None:
    """Make `token` the greedy choice everywhere: a large row in the head along a constant direction."""
    model.language_model.model.norm.weight.zero_()
    weight = model.language_model.lm_head.weight
    weight.zero_()
    # the final norm's output is zero now, so the head needs a bias to prefer a token
    model.language_model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(weight)))
    model.language_model.lm_head.bias[token] = 1.0


@pytest.mark.parametrize("count", [1, 2, 7, 14])
def test_as_many_tokens_as_asked_for(case: Golden, model: OpenVLAForActionPrediction, count: int) -> None:
    prompt, image = prompt_of(case)
    ids = generate_action_ids(model, prompt, image, num_tokens=count)
    assert ids.shape == (1, count)
    assert ids[0, :7].tolist() == case.expected["generated"][0][:count]


def test_cached_decoding_is_what_whole_passes_give(case: Golden, model: OpenVLAForActionPrediction) -> None:
    prompt, image = prompt_of(case, 1)
    ids = generate_action_ids(model, prompt, image, num_tokens=7)[0]
    with torch.no_grad():
        for token in ids:
            assert model(prompt, image).logits[0, -1].argmax() == token
            prompt = torch.cat([prompt, token.view(1, 1)], dim=1)


def test_end_of_sequence_is_a_token_like_any_other(case: Golden, model: OpenVLAForActionPrediction) -> None:
    eos = 2
    favour(model, eos)
    prompt, image = prompt_of(case)
    assert generate_action_ids(model, prompt, image, num_tokens=7).tolist() == [[eos] * 7]


def test_only_action_tokens_when_asked(case: Golden, model: OpenVLAForActionPrediction) -> None:
    first, stop = model.config.action_vocab_size - 256, model.config.action_vocab_size
    assert (first, stop) == (256, 512)
    prompt, image = prompt_of(case)
    for favourite in (2, first - 1, stop, 575):  # ids just outside the range, padding rows included
        favour(model, favourite)
        assert generate_action_ids(model, prompt, image, num_tokens=3).tolist() == [[favourite] * 3]
        ids = generate_action_ids(model, prompt, image, num_tokens=3, action_ids_only=True)
        assert ((ids >= first) & (ids < stop)).all()
    for favourite in (first, stop - 1):
        favour(model, favourite)
        ids = generate_action_ids(model, prompt, image, num_tokens=3, action_ids_only=True)
        assert ids.tolist() == [[favourite] * 3]


def test_padding_ids_do_not_matter(case: Golden, model: OpenVLAForActionPrediction) -> None:
    prompt, image = prompt_of(case)
    padded = torch.nn.functional.pad(prompt, (0, 5), value=99)
    mask = torch.nn.functional.pad(torch.ones_like(prompt), (0, 5))
    ids = generate_action_ids(model, padded, image, mask, num_tokens=7)
    assert ids.tolist() == case.expected["generated"][:1]


def test_the_mode_of_the_model_is_kept(case: Golden, model: OpenVLAForActionPrediction) -> None:
    prompt, image = prompt_of(case)
    for training in (True, False):
        model.train(training)
        generate_action_ids(model, prompt, image, num_tokens=1)
        assert model.training is training


def test_a_model_wrapped_by_peft_generates_too(case: Golden, model: OpenVLAForActionPrediction) -> None:
    adapted = attach_lora(model, LoraConfig(rank=4))
    prompt, image = prompt_of(case)
    assert generate_action_ids(adapted, prompt, image, num_tokens=7).tolist() == case.expected["generated"][:1]


def test_the_cache_is_as_long_as_needed_and_never_moves(case: Golden, model: OpenVLAForActionPrediction) -> None:
    prompt, image = prompt_of(case)
    with torch.inference_mode():
        state = read_prompt(model, prompt, image, None, room=6)
        blocks = state.cache._blocks
        places = [tensor.data_ptr() for pair in blocks.values() for tensor in pair]
        assert len(blocks) == model.config.text_config.num_hidden_layers
        assert {pair[0].shape[2] for pair in blocks.values()} == {model.context_size + prompt.shape[1] + 6}
        token = likeliest(model, state.last)
        for fed in range(6):
            token = likeliest(model, feed(model, state, token[:, None], fed)[:, -1])
        assert token.item() == case.expected["generated"][0][6]
    assert [tensor.data_ptr() for pair in state.cache._blocks.values() for tensor in pair] == places


def test_what_was_fed_can_be_overwritten(case: Golden, model: OpenVLAForActionPrediction) -> None:
    prompt, image = prompt_of(case)
    tokens = torch.tensor([case.expected["generated"][0][:3]])
    with torch.inference_mode():
        state = read_prompt(model, prompt, image, None, room=3)
        together = feed(model, state, tokens, fed=0).clone()
        feed(model, state, tokens.flip(1), fed=0)
        single = torch.cat([feed(model, state, tokens[:, at : at + 1], fed=at) for at in range(3)], dim=1)
    torch.testing.assert_close(single, together, rtol=0, atol=1e-5)


def test_a_cache_returns_what_it_was_given() -> None:
    cache = KeyValues(5)
    first, second = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 1, 8)
    keys, values = cache.update(first, first + 1, 0)
    assert keys.equal(first) and values.equal(first + 1)
    cache.length = 4
    keys, values = cache.update(second, second + 1, 0)
    assert keys.equal(torch.cat([first, second], dim=2)) and values.equal(torch.cat([first + 1, second + 1], dim=2))


def test_action_logits_alone_choose_as_all_logits_do(case: Golden, model: OpenVLAForActionPrediction) -> None:
    hidden = torch.randn(64, model.config.text_config.hidden_size)
    logits = model.language_model.lm_head(hidden)
    assert likeliest(model, hidden, action_ids_only=True).equal(logits[:, 256:512].argmax(dim=-1) + 256)
    assert likeliest(model, hidden).equal(logits.argmax(dim=-1))
