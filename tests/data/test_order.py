"""The order of examples: listed as ever, or computed with nothing in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlaft.data import order as ordering
from vlaft.data.order import Order, Runs, scattered


def listed_by_version_1(groups: Sequence[tuple[float, np.ndarray]], seed: int, epoch: int) -> list[int]:
    """Return an epoch as the first versions drew it: their runs have to go on with the same examples."""
    generator = np.random.Generator(np.random.Philox(key=[seed % 2**64, epoch]))
    parts = []
    for number, (weight, rows) in enumerate(groups):
        count = round(weight * len(rows))
        copies, rest = divmod(count, len(rows))
        parts += [rows] * copies
        if rest:
            fixed = np.random.Generator(np.random.Philox(key=[seed % 2**64, 2**63 + number]))
            parts.append(fixed.permutation(rows)[(epoch * rest + np.arange(rest)) % len(rows)])
    return generator.permutation(np.concatenate(parts)).tolist()


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """Compute few positions at once: the epochs here are short, and each has keys of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ordering, "_TOGETHER", 16)
        yield


LENGTHS = st.lists(st.tuples(st.floats(0.1, 3.5), st.integers(1, 40)), min_size=1, max_size=4)


@settings(max_examples=25, deadline=None)
@given(LENGTHS, st.integers(0, 2**32), st.integers(0, 5))
def test_a_listed_order_is_that_of_earlier_versions(groups: list[tuple[float, int]], seed: int, epoch: int) -> None:
    first, runs, arrays = 0, [], []
    for weight, length in groups:  # each group in two stretches, the later one first
        half = length // 2
        runs.append((weight, Runs.of([first + half, first], [length - half, half])))
        arrays.append((weight, np.array([*range(first + half, first + length), *range(first, first + half)])))
        first += length
    if not sum(round(weight * length) for weight, length in groups):
        return
    order = Order(runs, seed)
    assert order.listed
    expected = [row for number in (epoch, epoch + 1) for row in listed_by_version_1(arrays, seed, number)]
    assert order.examples(epoch * order.length, 2 * order.length).tolist() == expected


@settings(max_examples=25, deadline=None)
@given(LENGTHS, st.integers(0, 2**64 - 1), st.integers(1, 50))
def test_a_computed_order_gives_each_example_as_often_as_its_weight_says(
    groups: list[tuple[float, int]], seed: int, batch: int
) -> None:
    starts = np.cumsum([0, *(length for _, length in groups)]).tolist()
    runs = [(weight, Runs.of([start], [length])) for (weight, length), start in zip(groups, starts, strict=False)]
    if not sum(round(weight * length) for weight, length in groups):
        return
    order = Order(runs, seed)
    order.listed = False
    epochs = [Counter(order.examples(epoch * order.length, order.length).tolist()) for epoch in range(4)]
    for (weight, length), start in zip(groups, starts, strict=False):
        count = round(weight * length)
        for epoch in epochs:
            times = [epoch[row] for row in range(start, start + length)]
            assert sum(times) == count and set(times) <= {count // length, count // length + 1}
        # what is left over is walked through from epoch to epoch, so that every example gets its turn
        together = [sum(epoch[row] for epoch in epochs) for row in range(start, start + length)]
        assert max(together) - min(together) <= 1
    whole = order.examples(0, 3 * order.length).tolist()
    pieces = [order.examples(start, batch).tolist() for start in range(0, 2 * order.length, batch)]
    assert [row for piece in pieces for row in piece] == whole[: len(pieces) * batch] or batch > order.length


@pytest.mark.parametrize("length", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_scattered_is_a_permutation_that_the_keys_choose(length: int) -> None:
    drawn = [np.random.default_rng(seed).integers(2**64, size=8, dtype=np.uint64) for seed in range(2)]
    places = np.arange(length)
    found = [scattered(places, length, keys) for keys in drawn]
    assert all(np.array_equal(np.sort(permuted), places) for permuted in found)
    assert length < 16 or not np.array_equal(*found)
    assert np.array_equal(scattered(places[::3], length, drawn[0]), found[0][::3])


def test_a_computed_order_is_even() -> None:
    """Over seeds, every part of the data comes first, next to every other, equally often: chi-square, 99 degrees."""
    length, parts = 100_000, 100
    first, pairs = np.zeros(parts), np.zeros((10, 10))
    for seed in range(2000):
        order = Order([(1.0, Runs.of([0], [length]))], seed)
        order.listed = False
        one, two = order._at(np.array([seed * length, seed * length + 1]))
        first[one * parts // length] += 1
        pairs[one * 10 // length, two * 10 // length] += 1
    for counts in (first, pairs):
        assert ((counts - 20) ** 2 / 20).sum() < 149  # exceeded once in a thousand
    order = Order([(1.0, Runs.of([0], [length]))], 3)
    order.listed = False
    first_epoch = order._at(np.arange(length))
    assert abs(np.corrcoef(first_epoch, np.arange(length))[0, 1]) < 0.01
    both = np.corrcoef(first_epoch, order._at(np.arange(length, 2 * length)))[0, 1]
    assert abs(both) < 0.01


def test_large_epochs_are_computed_and_hold_nothing() -> None:
    small, large = (Order([(1.0, Runs.of([0], [length]))], 0) for length in (ordering._LISTED, ordering._LISTED + 1))
    assert small.listed and not large.listed
    huge = Order([(0.5, Runs.of([0], [10**9])), (2.0, Runs.of([10**9], [10**8]))], 1)
    assert huge.length == 7 * 10**8
    found = huge.examples(huge.length - 50, 100)  # over the end of an epoch
    assert len(set(found.tolist())) == 100 and found.max() < 11 * 10**8


def test_runs_are_cut_at_a_limit() -> None:
    runs = Runs.of([10, 0, 30], [5, 3, 2])
    assert runs.at(np.arange(len(runs))).tolist() == [10, 11, 12, 13, 14, 0, 1, 2, 30, 31]
    assert runs.below(12).at(np.arange(5)).tolist() == [10, 11, 0, 1, 2] and len(runs.below(12)) == 5
    assert len(runs.below(0)) == 0
