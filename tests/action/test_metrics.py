"""Loss, accuracy and L1 over actions, against the same sums taken with numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_models import golden
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vlaft.action.metrics import Metrics, MetricSums
from vlaft.action.tokens import ActionTokenizer
from vlaft.action.written import Compared
from vlaft.model.heads.tokens import TokenHead, TokenOutput

ACTIONS = ActionTokenizer(vocab_size=512)
HEAD = TokenHead(nn.Identity(), ACTIONS)
EOS = 2


def add(sums: MetricSums, labels: list[list[int]], predicted: list[list[int]], loss: float = 1.0) -> None:
    """Add a pass whose rows are action tokens; the end of the sequence follows each."""
    with_end = [[*row, EOS] for row in labels], [[*row, EOS + 1] for row in predicted]
    label_ids, ids = (torch.tensor(rows).flatten() for rows in with_end)
    output = TokenOutput(loss=torch.tensor(loss), logits=F.one_hot(ids, 576).float(), label_ids=label_ids)
    assert output.loss is not None
    sums.add(output.loss, HEAD.compared(output, len(labels)))


def test_end_of_sequence_is_left_out() -> None:
    sums = MetricSums(torch.device("cpu"))
    add(sums, [[300, 301]], [[300, 303]])
    metrics = sums.read()
    assert metrics.action_accuracy == 0.5
    assert metrics.action_l1 == pytest.approx(2 * (2 / 255) / 2)


def test_a_loss_counts_by_its_terms_and_reading_begins_anew() -> None:
    sums = MetricSums(torch.device("cpu"))
    add(sums, [[300]], [[300]], loss=2.0)
    add(sums, [[300], [300], [300]], [[301], [301], [301]], loss=4.0)
    assert sums.read().loss == (2 * 2.0 + 6 * 4.0) / 8
    assert sums.read() == Metrics(0.0, None, 0.0)
    add(sums, [[300]], [[300]], loss=5.0)
    assert sums.read().loss == 5.0


def test_actions_without_tokens_have_no_accuracy() -> None:
    sums = MetricSums(torch.device("cpu"))
    actions, demonstrated = torch.zeros(2, 8, 7), torch.full((2, 8, 7), 0.25)
    sums.add(torch.tensor(0.25), Compared(actions, demonstrated, None, torch.tensor(2 * 8 * 7)))
    metrics = sums.read()
    assert metrics == Metrics(0.25, None, 0.25, 0.25, 0.25)


def test_a_chunks_first_action_is_told_from_the_later_ones() -> None:
    sums = MetricSums(torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    errors = torch.rand(5, 3, 2, generator=generator)
    for part in (errors[:1], errors[1:]):
        sums.add(part.mean(), Compared(part, torch.zeros_like(part), None, torch.tensor(part.numel())))
    metrics = sums.read()
    assert metrics.action_l1 == pytest.approx(float(errors.mean()))
    assert metrics.first_action_l1 == pytest.approx(float(errors[:, 0].mean()))
    assert metrics.later_actions_l1 == pytest.approx(float(errors[:, 1:].mean()))
    add(sums, [[300, 301]], [[300, 303]])
    alone = sums.read()
    assert alone.first_action_l1 is None and alone.later_actions_l1 is None


@settings(max_examples=100, deadline=None)
@given(
    pairs=st.lists(
        st.lists(st.tuples(st.integers(256, 511), st.integers(0, 575)), min_size=3, max_size=3), min_size=2, max_size=10
    )
)
def test_sums_are_those_of_numpy(pairs: list[list[tuple[int, int]]]) -> None:
    labels, predicted = np.moveaxis(np.array(pairs), -1, 0)
    sums = MetricSums(torch.device("cpu"))
    half = len(pairs) // 2
    for part in (slice(0, half), slice(half, None)):
        add(sums, labels[part].tolist(), predicted[part].tolist())
    metrics = sums.read()
    assert metrics.action_accuracy == pytest.approx((labels == predicted).mean())
    difference = np.abs(ACTIONS.decode(labels) - ACTIONS.decode(predicted))
    assert metrics.action_l1 == pytest.approx(difference.mean(), abs=1e-6)


def test_on_a_models_output() -> None:
    """Rows of seven actions and the end of the sequence, in a batch of three."""
    case = golden("fused")
    model, labels = case.load(), case.batch["labels"]
    columns = [torch.nonzero(row != -100).flatten() for row in labels]
    whole = [row for row, found in enumerate(columns) if len(found) == 8]
    assert whole
    batch = {name: tensor[whole] for name, tensor in case.batch.items()}
    positions = torch.stack([columns[row] for row in whole])
    with torch.no_grad():
        result = model(**batch, label_positions=positions)
    sums = MetricSums(torch.device("cpu"))
    sums.add(result.loss, model.head.compared(result, len(whole)))
    metrics = sums.read()
    ids, predicted = result.label_ids.view(-1, 8)[:, :-1].numpy(), result.logits.argmax(-1).view(-1, 8)[:, :-1].numpy()
    assert ACTIONS.is_action(ids).all()
    assert metrics.loss == pytest.approx(float(result.loss), rel=1e-6)
    assert metrics.action_accuracy == pytest.approx((ids == predicted).mean())
    l1 = np.abs(ACTIONS.decode(ids) - ACTIONS.decode(predicted)).mean()
    assert metrics.action_l1 == pytest.approx(l1, rel=1e-5)
