from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlaft.action.tokens import ActionTokenizer, normalize, unnormalize
from vlaft.errors import ConfigError, DataError

STATISTICS = {
    "q01": [-0.5, -2.0, 0.0, 0.3],
    "q99": [0.5, 1.0, 1.0, 0.3],
    "min": [-1.0, -2.5, 0.0, 0.3],
    "max": [1.0, 1.5, 1.0, 0.3],
    "mask": [True, True, False, True],
}


def test_golden_ids_and_values(golden_folder: Path) -> None:
    golden = json.loads((golden_folder / "action_tokens.json").read_text())
    tokenizer = ActionTokenizer(golden["vocab_size"], golden["n_bins"])
    ids = tokenizer.encode(np.array(golden["actions"]))
    assert ids.tolist() == golden["action_token_ids"]
    assert tokenizer.decode(ids).tolist() == golden["decoded"]


def test_golden_bridge_actions(golden_folder: Path) -> None:
    rows = [json.loads(line) for line in (golden_folder / "bridge/examples.jsonl").read_text().splitlines()]
    tokenizer = ActionTokenizer()
    actions = np.array([row["normalized_action"] for row in rows], dtype=np.float32)
    assert tokenizer.encode(actions).tolist() == [row["action_token_ids"] for row in rows]


def test_golden_predicted_actions(tiny: Path) -> None:
    statistics = json.loads((tiny / "checkpoint/dataset_statistics.json").read_text())["bridge_dataset"]["action"]
    cases = json.loads((tiny / "cases.json").read_text())["predict"]
    assert cases
    for case in cases:
        action = unnormalize(ActionTokenizer().decode(case["generated_token_ids"]), statistics)
        assert action.tolist() == case["action"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30), st.integers(2, 512))
def test_decoding_stays_within_half_a_bin(values: list[float], n_bins: int) -> None:
    tokenizer = ActionTokenizer(32000, n_bins)
    ids = tokenizer.encode(values)
    assert tokenizer.is_action(ids).all()
    assert np.abs(tokenizer.decode(ids) - values).max() <= 1 / (n_bins - 1) + 1e-12
    again = tokenizer.encode(tokenizer.decode(ids))
    assert np.array_equal(tokenizer.decode(again), tokenizer.decode(ids))


def test_what_is_an_action_token() -> None:
    tokenizer = ActionTokenizer()
    assert tokenizer.is_action([2, 31743, 31744, 31999, 32000, 29871]).tolist() == [
        False,
        False,
        True,
        True,
        False,
        False,
    ]
    assert tokenizer.decode([2, 32000]).tolist() == [tokenizer.centers[-1], tokenizer.centers[0]]


def test_values_outside_are_clipped_and_not_a_number_is_refused() -> None:
    tokenizer = ActionTokenizer()
    assert tokenizer.encode([-7.0, 7.0]).tolist() == [31999, 31744]
    with pytest.raises(DataError, match="not finite"):
        tokenizer.encode([0.0, float("nan")])


def test_more_bins_than_tokens() -> None:
    with pytest.raises(ConfigError, match="256 action bins"):
        ActionTokenizer(vocab_size=100)


def test_normalized_values() -> None:
    result = normalize([[0.0, -0.5, 1.0, 0.3], [9.0, -9.0, 0.25, 0.3]], STATISTICS)
    assert result.dtype == np.float32
    # the third dimension is masked out; the fourth never changes
    np.testing.assert_allclose(result, [[0.0, 0.0, 1.0, 0.0], [1.0, -1.0, 0.25, 0.0]], atol=1e-6)


def test_a_constant_dimension_comes_back_as_its_constant() -> None:
    back = unnormalize(normalize([0.1, 0.1, 0.0, 0.3], STATISTICS), STATISTICS)
    np.testing.assert_allclose(back, [0.1, 0.1, 0.0, 0.3], atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(-0.5, 0.5), st.floats(-2, 1), st.floats(0, 1)), min_size=1, max_size=20))
def test_normalizing_and_back(rows: list[tuple[float, float, float]]) -> None:
    actions = np.array([[*row, 0.3] for row in rows])
    np.testing.assert_allclose(unnormalize(normalize(actions, STATISTICS), STATISTICS), actions, atol=1e-6)


def test_without_a_mask_everything_is_normalized() -> None:
    statistics = {key: value for key, value in STATISTICS.items() if key != "mask"}
    assert normalize([0.0, -0.5, 0.5, 0.3], statistics)[2] == pytest.approx(0.0, abs=1e-6)


def test_a_wrong_width_is_refused() -> None:
    with pytest.raises(DataError, match="7 dimensions does not fit statistics of 4"):
        normalize(np.zeros(7), STATISTICS)
