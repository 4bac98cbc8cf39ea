"""Rounding merged weights to the type that they are stored in, and how much of what was learned survives it.

Bfloat16 has 8 significant bits: to the nearest number, a change of less than a 512th of a weight is lost. Small updates
(whole tensors trained at 2e-5 for a few hundred steps) lose most of their numbers that way, and always the small ones,
so that the written change is too short. Stochastic rounding goes to one or the other neighbour with the probability
that keeps the mean: each number is off by more, but the changes of thousands of numbers add up as they should
(docs/export.md has the comparison).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from vlaft.weights.stream import Scratch

Mode = Literal["nearest", "stochastic"]
MODES: tuple[Mode, ...] = ("nearest", "stochastic")
ENOUGH = 0.8  # share of the learned change: at 0.64 answers suffered, at 0.82 they did not (docs/export.md)
_PIECE = 2**16  # numbers that are looked at together: what a core's cache holds


def generator_of(name: str) -> torch.Generator:
    """Return the random numbers with which a tensor of this name is rounded: every merge writes the same bytes."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def round_to(exact: Tensor, out: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Write `exact`, rounded, into `out`, and return that.

    Args:
        exact: float32, on the CPU where a generator is given.
        out: of the same shape and the type to round to.
        generator: for stochastic rounding; None rounds to the nearest number. Blocks of rows that are rounded one
            after the other with one generator get what the whole tensor would get at once.
    """
    out.copy_(exact)
    if generator is None or out.dtype == exact.dtype:
        return out
    rest = exact - out.float()
    other = torch.nextafter(out, torch.where(rest > 0, torch.inf, -torch.inf).to(out.dtype))
    gap = (other.float() - out.float()).abs()
    up = torch.rand(exact.shape, generator=generator) * gap < rest.abs()
    return out.copy_(torch.where(up & other.isfinite(), other, out))


@dataclass
class Rounding:
    """Rounds the tensors that training changed, and adds up what becomes of the changes.

    Attributes:
        mode: to the nearest number, or stochastically.
        types: to which types something was rounded, by torch's names.
        changed: how many numbers training changed.
        kept: how many of them still differ from the base (itself rounded, where it was wider).
    """

    mode: Mode = "nearest"
    types: set[str] = field(default_factory=set)
    changed: int = 0
    kept: int = 0
    _learned: float = 0.0  # squared norm of the learned change
    _written: float = 0.0  # and of the written one
    _along: float = 0.0  # their product

    def generator(self, name: str) -> torch.Generator | None:
        """Return what `round` takes for all blocks of the tensor `name`."""
        return generator_of(name) if self.mode == "stochastic" else None

    def round(
        self, exact: Tensor, base: Tensor, out: Tensor, scratch: Scratch, generator: torch.Generator | None
    ) -> None:
        """Round a block of a changed tensor into `out`.

        Args:
            exact: what training made of it, of any floating-point type.
            base: what the base has there.
            out: of the output's type.
            scratch: lends memory.
            generator: the tensor's.
        """
        round_to(exact if generator is None else exact.float(), out, generator)
        if out.dtype in (exact.dtype, torch.float32, torch.float64):
            return  # nothing is rounded
        self.types.add(str(out.dtype).removeprefix("torch."))
        for begin in range(0, exact.numel(), _PIECE):
            piece = slice(begin, begin + _PIECE)
            self._count(exact.view(-1)[piece], base.view(-1)[piece], out.view(-1)[piece], scratch)

    def _count(self, exact: Tensor, base: Tensor, out: Tensor, scratch: Scratch) -> None:
        shape = tuple(exact.shape)
        learned = scratch.take("learned", torch.float32, shape).copy_(exact).sub_(base)
        start = base if base.dtype == out.dtype else scratch.take("start", out.dtype, shape).copy_(base)
        written = scratch.take("written", torch.float32, shape).copy_(out).sub_(start)
        self._learned += float(torch.dot(learned, learned))
        self._written += float(torch.dot(written, written))
        self._along += float(torch.dot(learned, written))
        # Counted by their signs: three times as fast as count_nonzero, and exact for so few.
        self.changed += int(torch.dot(learned.sign_(), learned))
        self.kept += int(torch.dot(learned.mul_(written.sign_()), learned))

    @property
    def survives(self) -> float:
        """Length of the written change along the learned one, over the length of that: 1 where all of it survives."""
        return self._along / self._learned if self._learned else 1.0

    @property
    def error(self) -> float:
        """Norm of written change minus learned change, over the norm of the learned change."""
        square = self._written - 2 * self._along + self._learned
        return float((max(square, 0.0) / self._learned) ** 0.5) if self._learned else 0.0

    def to_json(self) -> dict[str, Any] | None:
        """Return the record for `merge.json`, or None where nothing was rounded."""
        if not self.types:
            return None
        return {
            "to": sorted(self.types),
            "mode": self.mode,
            "changed": self.changed,
            "kept": self.kept,
            "survives": self.survives,
            "error": self.error,
        }
