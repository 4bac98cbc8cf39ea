"""What a policy with chunks, cameras and a state is trained on, from a conversion to the model's loss."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from small_base import convert_small, write_small_base
from small_run import Small

from vlaft.accounting.meta import example_inputs
from vlaft.data.held_out import HeldOut
from vlaft.errors import DataError
from vlaft.model.configuration import Policy
from vlaft.model.load import load_model
from vlaft.observation.augmentation import pixel_values
from vlaft.training.data import TrainingData, to_inputs
from vlaft.training.step import Normalization, forward

WORDS = ("policy.head=l1", "policy.chunk=3", "policy.cameras=[wrist,main]", "policy.state=true")


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """Six episodes of eight steps with two cameras and a state."""
    folder = tmp_path_factory.mktemp("rich")
    base = write_small_base(folder / "base")
    return Small(base, convert_small(base, folder / "data", rich=True))


def open_data(rich: Small, *words: str) -> TrainingData:
    return TrainingData.open(rich.recipe("lora8", *words), rich.base)


def test_the_released_policy_is_what_no_word_makes_of_it(rich: Small) -> None:
    data = open_data(rich)
    assert data.policy == Policy() and data.warnings == ()
    assert (data.train_examples, data.val_examples) == (40, 8)
    assert data.fingerprint == data.datasets[0].fingerprint


def test_sizes_and_counts_come_from_the_data(rich: Small) -> None:
    data = open_data(rich, *WORDS)
    assert (data.policy.action_size, data.policy.state_size, data.policy.chunk) == (7, 3, 3)
    assert (data.train_examples, data.val_examples) == (5 * 6, 6)
    assert sum(len(batch) for batch in data.validation()) == 6
    assert data.fingerprint.startswith(data.datasets[0].fingerprint + "/")


def test_statistics_of_the_state_are_real_ones(rich: Small) -> None:
    statistics = open_data(rich).statistics["small"]["proprio"]
    np.testing.assert_allclose(statistics["mean"][::2], [np.cos(np.arange(8)).mean(), 0.5], atol=1e-6)
    assert statistics["std"][2] == 0 and len(statistics["q01"]) == 3


@pytest.mark.parametrize("words", [WORDS, ("policy.decoding=parallel", *WORDS[1:])])
def test_a_batch_goes_through_the_model(rich: Small, words: tuple[str, ...]) -> None:
    data = open_data(rich, *words)
    torch.manual_seed(0)
    model = load_model(rich.base)
    model.attach(data.policy)
    means, stds = data.pipeline.means, data.pipeline.stds
    batch = next(data.loader)
    inputs = to_inputs(batch, torch.device("cpu"))
    assert inputs.label_positions.shape == (4, 3 * 7 + 1)
    output = forward(model, inputs, Normalization(means, stds), torch.float32)
    assert torch.isfinite(output.loss)
    found = model.head.compared(output, len(batch))
    assert found.actions.shape == (4, 3, 7)
    # a token's bin is 2/255 wide
    torch.testing.assert_close(found.demonstrated, batch.action, atol=1.01 / 255, rtol=0)
    # state and each camera are read, each in its place
    assert inputs.state is not None
    swapped = replace(inputs, images=inputs.images.flip(1))
    for other in (replace(inputs, state=inputs.state + 1), swapped):
        assert forward(model, other, Normalization(means, stds), torch.float32).loss != output.loss
    kept = model.vision_backbone(pixel_values(inputs.images, means, stds), None)
    again = forward(model, swapped, Normalization(means, stds), torch.float32, vision_features=kept)
    torch.testing.assert_close(again.loss, output.loss)


def test_the_memory_model_sees_a_batch_of_the_same_shapes(rich: Small) -> None:
    data = open_data(rich, *WORDS)
    real = to_inputs(next(data.loader), torch.device("cpu"))
    config = load_model(rich.base).config
    made = example_inputs(config, batch_size=4, tokens=real.input_ids.shape[1], labels=22, policy=data.policy)
    for name, tensor in vars(made).items():
        theirs = getattr(real, name)
        assert (tensor.shape, tensor.dtype) == (theirs.shape, theirs.dtype), name


def test_short_episodes_are_told_and_a_chunk_longer_than_all_is_refused(rich: Small, tmp_path: Path) -> None:
    convert_small(rich.base, tmp_path / "short", rich=True, steps=4)
    both = Small(rich.base, rich.data)
    recipe = both.recipe("lora8", "policy.head=l1", "policy.chunk=6")
    recipe = replace(recipe, data=replace(recipe.data, path=[str(rich.data), str(tmp_path / "short")]))
    data = TrainingData.open(recipe, rich.base)
    assert (data.train_examples, data.val_examples) == (5 * 3, 3)
    train, val = data.warnings
    assert train.startswith("5 of 10 episodes in split 'train' are shorter than policy.chunk=6 and give no example")
    assert "split 'val'" in val
    assert all(len(batch) == 4 for batch in islice(data.loader, 5))
    with pytest.raises(DataError, match=r"steps of policy\.chunk=9 \(the longest has 8\); take a smaller chunk"):
        open_data(rich, "policy.head=l1", "policy.chunk=9")
    with pytest.raises(DataError, match=r"'small' has no camera 'left' \(there are: main, wrist\)"):
        open_data(rich, "policy.cameras=[left]")


def test_held_out_chunks_begin_at_the_same_frames_for_every_model(rich: Small) -> None:
    whole, chunked = HeldOut.open([rich.data]), HeldOut.open([rich.data], chunk=3)
    assert whole.chosen.tolist() == list(range(8)) and chunked.chosen.tolist() == list(range(6))
    for chunk in (1, 2, 3):
        found = chunked.chunks(chunked.chosen[[0, 5]], chunk)
        assert np.array_equal(found, np.stack([whole.action[start : start + chunk] for start in (0, 5)]))
    assert whole.state is not None and whole.state.shape == (8, 3)
    main, wrist = (whole.images([2], camera).astype(int) for camera in ("main", "wrist"))
    assert np.abs(main + wrist - 255).mean() < 8  # JPEG
    for problem, sentence in (
        (lambda: whole.chunks(whole.chosen, 2), "writes 2 actions at once"),
        (lambda: whole.images([0], "left"), r"no camera 'left', .* \(there are: main, wrist\)"),
        (lambda: HeldOut.open([rich.data], chunk=9), r"has the 9 steps .* \(the longest has 8\)"),
    ):
        with pytest.raises(DataError, match=sentence):
            problem()
