"""The replayed caching allocator."""

from hypothesis import given, settings
from hypothesis import strategies as st

from vlaft.accounting.allocator import peak_reserved, round_up

MIB = 2**20


def test_small_requests_share_a_segment_and_large_ones_get_their_own():
    assert peak_reserved([(0, 100), (1, 1000), (2, MIB // 2)]) == 2 * MIB
    assert peak_reserved([(0, 5 * MIB)]) == 20 * MIB
    assert peak_reserved([(0, 5 * MIB), (1, 5 * MIB), (2, 5 * MIB)]) == 20 * MIB
    assert peak_reserved([(0, 11 * MIB + 1)]) == 12 * MIB


def test_freed_blocks_are_used_again_and_join():
    assert peak_reserved([(0, 30 * MIB), (0, -1), (1, 30 * MIB)]) == 30 * MIB
    # two neighbours of 8 MiB make room for one of 9 only when they join
    assert peak_reserved([(0, 8 * MIB), (1, 8 * MIB), (0, -1), (1, -1), (2, 9 * MIB)]) == 20 * MIB


def test_a_hole_that_is_too_small_is_fragmentation():
    assert peak_reserved([(0, 30 * MIB), (0, -1), (1, 20 * MIB), (2, 12 * MIB)]) == 42 * MIB


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40 * MIB), st.booleans()), min_size=1, max_size=60))
def test_reserved_is_never_less_than_what_is_held(requests):
    events, held, peak, live = [], [], 0, 0
    for key, (size, frees) in enumerate(requests):
        events.append((key, size))
        held.append((key, size))
        live += round_up(size)
        peak = max(peak, live)
        if frees:
            old, old_size = held.pop(len(held) // 2)
            events.append((old, -old_size))
            live -= round_up(old_size)
    reserved = peak_reserved(events)
    assert peak <= reserved <= sum(round_up(size, 20 * MIB) + 20 * MIB for size, _ in requests)
    assert reserved % (2 * MIB) == 0
