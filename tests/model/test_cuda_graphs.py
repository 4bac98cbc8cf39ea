"""When predictions are recorded; recording itself needs a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from golden_models import golden
from torch import Tensor

from vlaft.model.cuda_graphs import CudaGraphs, record
from vlaft.model.generation import generate_action_ids


class Recorder:
    """Stands in for a GPU: a recording computes on the buffers that it was made with, when it is replayed."""

    def __init__(self) -> None:
        self.made, self.replayed = 0, 0

    def __call__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor | None]) -> Any:
        self.made += 1
        held = [None if tensor is None else tensor.clone() for tensor in inputs]

        def replay(others: Sequence[Tensor | None]) -> Tensor:
            self.replayed += 1
            for place, tensor in zip(held, others, strict=True):
                if place is not None and tensor is not None:
                    place.copy_(tensor)
            return function(*held)

        return replay


def test_a_shape_is_recorded_when_it_comes_again() -> None:
    recorder = Recorder()
    graphs = CudaGraphs(recorder)
    for number in range(4):
        assert (
            graphs.run("twice", lambda x, _: 2 * x, torch.full((2,), float(number)), None).tolist() == [2 * number] * 2
        )
    assert (recorder.made, recorder.replayed) == (1, 3)
    graphs.run("twice", lambda x, _: 2 * x, torch.zeros(3), None)  # another shape
    graphs.run("thrice", lambda x, _: 3 * x, torch.zeros(2), None)  # another function
    graphs.run("twice", lambda x, _: 2 * x, torch.zeros(2), torch.zeros(2))  # another kind of call
    assert (recorder.made, recorder.replayed) == (1, 3)


def test_few_recordings_are_kept() -> None:
    recorder = Recorder()
    graphs = CudaGraphs(recorder)
    for size in range(1, 7):
        for _ in range(2):
            graphs.run(None, lambda x: x + 1, torch.zeros(size))
    assert recorder.made == 6
    graphs.run(None, lambda x: x + 1, torch.zeros(6))
    assert recorder.made == 6
    graphs.run(None, lambda x: x + 1, torch.zeros(1))  # dropped since
    assert recorder.made == 7


def test_where_recording_fails_predictions_go_on(caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    graphs = CudaGraphs(fail)
    for _ in range(4):
        assert graphs.run(None, lambda x: x + 1, torch.zeros(2)).tolist() == [1, 1]
    assert [record.getMessage() for record in caplog.records] == [
        "predictions are not recorded as CUDA graphs: operation not permitted when stream is capturing"
    ]


def test_a_replay_of_generation_answers_for_its_own_input() -> None:
    case = golden("fused")
    model, recorder = case.load(), Recorder()
    graphs = CudaGraphs(recorder)
    lengths = case.expected["prompt_lengths"]
    for _ in range(3):
        for row in range(2):
            prompt = case.tensors["input_ids"][row : row + 1, : lengths[row]]
            pixels = case.tensors["pixel_values"][row : row + 1]
            ids = generate_action_ids(model, prompt, pixels, num_tokens=7, graphs=graphs)
            assert ids.tolist() == case.expected["generated"][row : row + 1]
    assert recorder.replayed >= 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_recorded_generation_is_what_runs_otherwise() -> None:
    case = golden("fused")
    model = case.load().cuda()
    graphs = CudaGraphs(record)
    prompt, pixels = case.tensors["input_ids"].cuda(), case.tensors["pixel_values"].cuda()
    mask = case.tensors["attention_mask"].cuda()
    for seed in range(4):
        shifted = pixels + 0.1 * seed
        expected = generate_action_ids(model, prompt, shifted, mask, num_tokens=7)
        assert generate_action_ids(model, prompt, shifted, mask, num_tokens=7, graphs=graphs).equal(expected)
    assert graphs._recordings
