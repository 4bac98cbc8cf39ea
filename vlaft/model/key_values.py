"""A cache of keys and values that is allocated once, at the length that a prediction needs.

How many tokens are to come is known beforehand (A, the action's dimensions), so nothing has to grow: a decoding step
writes one column in place, where a growing cache would copy everything there is, in every layer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


class KeyValues:
    """Keys and values of every decoder block; transformers' attention asks a cache for no more than `update`.

    Attributes:
        capacity: positions that there is room for.
        length: positions that are filled; the next tokens go behind them. Whoever decodes advances it, and may set it
            back to overwrite what came later.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._blocks: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store keys and values `[B, H, N, d]` of the next N positions of a block; return all up to and with them."""
        begin, end = self.length, self.length + key.shape[2]
        if layer_idx not in self._blocks:
            shape = (*key.shape[:2], self.capacity)
            self._blocks[layer_idx] = key.new_empty(*shape, key.shape[3]), value.new_empty(*shape, value.shape[3])
        keys, values = self._blocks[layer_idx]
        keys[:, :, begin:end] = key
        values[:, :, begin:end] = value
        if begin == 0:
            return key, value
        return keys[:, :, :end], values[:, :, :end]
