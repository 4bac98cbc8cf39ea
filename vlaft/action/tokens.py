"""Actions to token ids and back, and to the range [-1, 1] and back.

Token ids are never turned into text: upstream pastes the decoded characters into the prompt and tokenizes again,
which gives the same ids only as long as every piece survives the round trip.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlaft.errors import ConfigError, DataError

IGNORED = -100  # label of a position that a loss leaves out

ActionStatistics = Mapping[str, Sequence[float] | Sequence[bool]]  # q01, q99, min, max, mask: one value per dimension
Normalization = Literal["q99", "minmax"]  # which range becomes [-1, 1]: [q01, q99], or [min, max]
_BOUNDS = {"q99": ("q01", "q99"), "minmax": ("min", "max")}


@dataclass(frozen=True)
class ActionTokenizer:
    """Uniform bins over [-1, 1], mapped onto the last `n_bins` ids below `vocab_size` (docs/upstream.md, Tokens).

    There are `n_bins` edges and hence `n_bins - 1` intervals with a centre each, so two ids decode to the highest
    value: `vocab_size - n_bins` stands for exactly 1.0. That is upstream's behaviour and kept.

    Attributes:
        vocab_size: ids of the tokenizer without the rows added for padding: 32000 for Llama 2.
        n_bins: number of edges, 256 in every release.
    """

    vocab_size: int = 32000
    n_bins: int = 256

    def __post_init__(self) -> None:
        if not 2 <= self.n_bins <= self.vocab_size:
            raise ConfigError(f"{self.n_bins} action bins do not fit a vocabulary of {self.vocab_size} tokens")

    @property
    def edges(self) -> NDArray[np.float64]:
        """The bins' edges `[n_bins]`, from -1 to 1."""
        return np.linspace(-1.0, 1.0, self.n_bins)

    @property
    def centers(self) -> NDArray[np.float64]:
        """The bins' centres `[n_bins - 1]`."""
        edges = self.edges
        return (edges[:-1] + edges[1:]) / 2.0

    @property
    def first_id(self) -> int:
        """The lowest id that stands for an action."""
        return self.vocab_size - self.n_bins

    def encode(self, action: ArrayLike) -> NDArray[np.int32]:
        """Return the token ids of a normalized action (any shape; clipped to [-1, 1]).

        Raises:
            DataError: a value is not a number.
        """
        values = np.asarray(action)
        if not np.isfinite(values).all():
            raise DataError("an action that is not finite has no token")
        return (self.vocab_size - np.digitize(np.clip(values, -1.0, 1.0), self.edges)).astype(np.int32)

    def decode(self, ids: ArrayLike) -> NDArray[np.float64]:
        """Return the normalized values of token ids (any shape), each the centre of its bin.

        An id that stands for no action is clipped to the nearest one, as upstream does, and so becomes a full
        move: ask `is_action` before a robot acts on it.
        """
        index = self.vocab_size - np.asarray(ids, dtype=np.int64) - 1
        return self.centers[np.clip(index, 0, self.n_bins - 2)]

    def is_action(self, ids: ArrayLike) -> NDArray[np.bool_]:
        """Return which ids stand for an action."""
        values = np.asarray(ids, dtype=np.int64)
        return (values >= self.first_id) & (values < self.vocab_size)


def normalize(
    action: ArrayLike, statistics: ActionStatistics, normalization: Normalization = "q99"
) -> NDArray[np.float32]:
    """Return actions or states `[..., A]` mapped from their range to [-1, 1] and clipped, where the mask is True.

    A dimension that never changes (min equals max) becomes 0, mask or not; so it does in upstream's training, while
    its deployment makes -1 of it (docs/upstream.md). The mix of precisions is upstream's (TensorFlow arithmetic in
    float32 on a range computed in float64): it decides which bin a value at an edge falls into.

    Raises:
        DataError: the width is not that of the statistics, or these lack the range.
    """
    values = np.asarray(action, dtype=np.float32)
    low, high, mask = _bounds(statistics, values.shape[-1], normalization)
    scale = (high - low + 1e-8).astype(np.float32)
    # a masked dimension may be constant, with a zero range; its quotient is not used
    mapped = np.float32(2.0) * (values - low.astype(np.float32)) / scale - np.float32(1.0)
    result = np.where(mask, np.clip(mapped, np.float32(-1.0), np.float32(1.0)), values)
    least, most, _ = _bounds(statistics, values.shape[-1], "minmax")
    return np.where(least == most, np.float32(0.0), result).astype(np.float32)


def unnormalize(
    action: ArrayLike, statistics: ActionStatistics, normalization: Normalization = "q99"
) -> NDArray[np.float64]:
    """Return actions `[..., A]` mapped from [-1, 1] back to their range, where the mask is True.

    Each as upstream does it: OpenVLA, with [q01, q99], without the 1e-8 that OpenVLA-OFT's range has.

    Raises:
        DataError: the width is not that of the statistics, or these lack the range.
    """
    values = np.asarray(action, dtype=np.float64)
    low, high, mask = _bounds(statistics, values.shape[-1], normalization)
    more = 1e-8 if normalization == "minmax" else 0.0
    return np.where(mask, 0.5 * (values + 1.0) * (high - low + more) + low, values)


def _bounds(
    statistics: ActionStatistics, width: int, normalization: Normalization
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    names = _BOUNDS[normalization]
    if missing := [name for name in names if name not in statistics]:
        raise DataError(f"the statistics lack '{missing[0]}', which normalization={normalization} needs")
    low, high = (np.asarray(statistics[name], dtype=np.float64) for name in names)
    mask = np.asarray(statistics.get("mask", np.ones(len(low), dtype=bool)), dtype=bool)
    if not len(low) == len(high) == len(mask) == width:
        raise DataError(f"an action or state of {width} dimensions does not fit statistics of {len(low)}")
    return low, high, mask
