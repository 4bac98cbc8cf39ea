"""How much compressed bytes may unfold to: a megabyte of zeros, packed, claims a gigabyte of memory.

Measurements of robots pack by a factor of 2 to 20. An array that is small when it is unpacked may be constant; a
large one that is almost nothing on disk is a mistake or a trap.
"""

from __future__ import annotations

SMALL = 2**26  # bytes that anything may unfold to: a million steps of 16 float32
_LARGEST_RATIO = 100


def largest_unfolded(stored: int) -> int:
    """Return how many bytes `stored` bytes of numbers or texts may unfold to.

    >>> largest_unfolded(1000) == SMALL, largest_unfolded(10**7)
    (True, 1000000000)
    """
    return max(SMALL, _LARGEST_RATIO * stored)
