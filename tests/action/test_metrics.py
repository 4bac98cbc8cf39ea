"""Loss, accuracy and L1 over action tokens, against the same sums taken with numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_models import golden
from hypothesis import given, settings
from hypothesis import strategies as st

from vlaft.action.metrics import MetricSums
from vlaft.action.tokens import ActionTokenizer
from vlaft.model.openvla import OpenVLAOutput

ACTIONS = ActionTokenizer(vocab_size=512)
EOS = 2


def output(labels: list[int], predicted: list[int], loss: float = 1.0) -> OpenVLAOutput:
    logits = F.one_hot(torch.tensor(predicted), 576).float()
    return OpenVLAOutput(loss=torch.tensor(loss), logits=logits, label_ids=torch.tensor(labels))


def test_end_of_sequence_is_left_out() -> None:
    sums = MetricSums(ACTIONS, torch.device("cpu"))
    sums.add(output([300, 301, EOS], [300, 303, EOS]))
    metrics = sums.read()
    assert metrics.action_accuracy == 0.5
    assert metrics.action_l1 == pytest.approx(2 * (2 / 255) / 2)


def test_reading_begins_anew() -> None:
    sums = MetricSums(ACTIONS, torch.device("cpu"))
    sums.add(output([300], [300], loss=2.0))
    sums.add(output([300], [301], loss=4.0))
    assert sums.read().loss == 3.0
    assert sums.read() == type(sums.read())(0.0, 0.0, 0.0)
    sums.add(output([300], [300], loss=5.0))
    assert sums.read().loss == 5.0


@settings(max_examples=100, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(0, 511), st.integers(0, 575)), min_size=1, max_size=30))
def test_sums_are_those_of_numpy(pairs: list[tuple[int, int]]) -> None:
    labels, predicted = (np.array(side) for side in zip(*pairs, strict=True))
    sums = MetricSums(ACTIONS, torch.device("cpu"))
    half = len(pairs) // 2
    for part in (slice(0, half), slice(half, None)):
        if len(labels[part]):
            sums.add(output(labels[part].tolist(), predicted[part].tolist()))
    metrics = sums.read()
    is_action = ACTIONS.is_action(labels)
    if not is_action.any():
        assert metrics.action_accuracy == metrics.action_l1 == 0.0
        return
    assert metrics.action_accuracy == pytest.approx((labels == predicted)[is_action].mean())
    difference = np.abs(ACTIONS.decode(labels) - ACTIONS.decode(predicted))[is_action]
    assert metrics.action_l1 == pytest.approx(difference.mean(), abs=1e-6)


def test_on_a_models_output() -> None:
    case = golden("fused")
    with torch.no_grad():
        result = case.load()(**case.batch)
    sums = MetricSums(ACTIONS, torch.device("cpu"))
    sums.add(result)
    metrics = sums.read()
    labels, predicted = result.label_ids.numpy(), result.logits.argmax(-1).numpy()
    kept = ACTIONS.is_action(labels)
    assert 0 < kept.sum() < len(labels)
    assert metrics.loss == pytest.approx(case.expected["loss"], rel=1e-5)
    assert metrics.action_accuracy == pytest.approx((labels == predicted)[kept].mean())
    l1 = np.abs(ACTIONS.decode(labels) - ACTIONS.decode(predicted))[kept].mean()
    assert metrics.action_l1 == pytest.approx(l1, rel=1e-5)
