"""PyTorch's caching allocator for CUDA, replayed: how much memory a GPU must have for what a step allocates.

Its rules, from `CUDACachingAllocator.cpp` (default settings): sizes are rounded up to 512 bytes; requests up to 1 MiB
are cut from segments of 2 MiB, requests below 10 MiB from segments of 20 MiB, larger ones get a segment of their size
rounded up to 2 MiB; a request takes the smallest free block that holds it, whose rest is split off (of large blocks
only if it is over 1 MiB); freed blocks join their free neighbours; segments are kept. A GPU that is almost full
gives free segments back before it gives up, so what is reserved is an upper bound of what is needed.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

BLOCK = 512
_MIB = 2**20
_SMALL, _LARGE = _MIB, 10 * _MIB
_SMALL_SEGMENT, _LARGE_SEGMENT, _ROUND_SEGMENT = 2 * _MIB, 20 * _MIB, 2 * _MIB


@dataclass(eq=False)
class _Block:
    size: int
    order: int  # of creation: the tie-break between blocks of one size
    small: bool
    free: bool = True
    before: _Block | None = None
    after: _Block | None = None


class _Pool:
    def __init__(self) -> None:
        self.blocks: list[tuple[int, int, _Block]] = []  # free ones, by size

    def put(self, block: _Block) -> None:
        insort(self.blocks, (block.size, block.order, block))

    def drop(self, block: _Block) -> None:
        del self.blocks[bisect_left(self.blocks, (block.size, block.order))]

    def take(self, size: int) -> _Block | None:
        at = bisect_left(self.blocks, (size, -1))
        return self.blocks.pop(at)[2] if at < len(self.blocks) else None


def round_up(size: int, unit: int = BLOCK) -> int:
    """Return `size`, at least one unit, in whole units.

    >>> round_up(1), round_up(512), round_up(513)
    (512, 512, 1024)
    """
    return max(1, -(-size // unit)) * unit


def peak_reserved(events: Iterable[tuple[int, int]]) -> int:
    """Return the bytes that the allocator takes from a GPU.

    Args:
        events: `(key, size)` in order; a positive size allocates the storage `key`, a negative one frees it.
    """
    pools = {True: _Pool(), False: _Pool()}
    used: dict[int, _Block] = {}
    reserved = orders = 0
    for key, signed in events:
        if signed < 0:
            _free(used.pop(key), pools)
            continue
        size = round_up(signed)
        small = size <= _SMALL
        block = pools[small].take(size)
        if block is None:
            segment = _SMALL_SEGMENT if small else _LARGE_SEGMENT if size < _LARGE else round_up(size, _ROUND_SEGMENT)
            reserved += segment
            orders += 1
            block = _Block(segment, orders, small)
        rest = block.size - size
        if rest >= BLOCK if small else rest > _SMALL:
            orders += 1
            left_over = _Block(rest, orders, small, before=block, after=block.after)
            if block.after is not None:
                block.after.before = left_over
            block.after, block.size = left_over, size
            pools[small].put(left_over)
        block.free = False
        used[key] = block
    return reserved


def _free(block: _Block, pools: dict[bool, _Pool]) -> None:
    pool = pools[block.small]
    block.free = True
    for neighbour in (block.before, block.after):
        if neighbour is None or not neighbour.free:
            continue
        pool.drop(neighbour)
        block.size += neighbour.size
        if neighbour is block.before:
            block.before = neighbour.before
            if block.before is not None:
                block.before.after = block
        else:
            block.after = neighbour.after
            if block.after is not None:
                block.after.before = block
    pool.put(block)
