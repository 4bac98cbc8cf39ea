"""Rounding: exact where it should be, unbiased where it is stochastic, and its figures against plain arithmetic."""

from __future__ import annotations

import pytest
import torch

from vlaft.adapt.rounding import _PIECE, Rounding, generator_of, round_to
from vlaft.weights.stream import Scratch

KINDS = (torch.bfloat16, torch.float16)


def rounded(exact: torch.Tensor, kind: torch.dtype, seed: int) -> torch.Tensor:
    return round_to(exact, torch.empty(exact.shape, dtype=kind), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_stochastic_rounding_takes_a_neighbour_and_keeps_the_mean(kind: torch.dtype) -> None:
    exact = torch.tensor([0.1, -0.1, 1.0009, -3.3, 1e-3, 0.0, 2.0])
    draws = torch.stack([rounded(exact, kind, seed).float() for seed in range(4000)])
    for index, number in enumerate(exact):
        seen = draws[:, index].unique()
        near = number.to(kind)
        ends = [torch.nextafter(near, torch.tensor(end, dtype=kind)).float() for end in (-torch.inf, torch.inf)]
        assert len(seen) <= 2
        assert ends[0] <= seen.min() <= number <= seen.max() <= ends[1]
        gap = float(seen.max() - seen.min())
        # a mean of 4,000 draws of two values lies within five standard deviations
        assert abs(float(draws[:, index].double().mean() - number)) <= 5 * 0.5 * gap / 4000**0.5 + 1e-12
    assert (draws[:, 5] == 0).all()
    assert (draws[:, 6] == 2).all()  # what the type can hold stays


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_rounded_up_stays(kind: torch.dtype) -> None:
    exact = torch.tensor([torch.inf, -torch.inf, torch.finfo(kind).max, torch.nan])
    found = rounded(exact, kind, 0)
    assert torch.equal(found[:3].float(), exact[:3])
    assert found[3].isnan()


def test_blocks_are_rounded_as_the_whole() -> None:
    exact = torch.randn(37, 11)
    generator = generator_of("a.weight")
    blocks = [
        round_to(block, torch.empty(block.shape, dtype=torch.bfloat16), generator) for block in exact.split([1, 20, 16])
    ]
    whole = round_to(exact, torch.empty(37, 11, dtype=torch.bfloat16), generator_of("a.weight"))
    assert torch.equal(torch.cat(blocks), whole)
    other = round_to(exact, torch.empty(37, 11, dtype=torch.bfloat16), generator_of("b.weight"))
    assert not torch.equal(whole, other)


@pytest.mark.parametrize("base_kind", [torch.bfloat16, torch.float32])
def test_figures_are_those_of_plain_arithmetic(base_kind: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(300, _PIECE // 256, generator=generator).to(base_kind)  # more than one piece
    learned = torch.randn(base.shape, generator=generator) * 2e-3
    learned[::2] = 0
    exact = base.float() + learned
    rounding = Rounding()
    out = torch.empty(base.shape, dtype=torch.bfloat16)
    scratch = Scratch()
    for rows in (slice(0, 200), slice(200, 300)):
        rounding.round(exact[rows], base[rows], out[rows], scratch, rounding.generator("x"))
    assert torch.equal(out, exact.bfloat16())
    true = (exact.double() - base.double()).flatten()
    written = (out.double() - base.bfloat16().double()).flatten()
    assert rounding.changed == int((true != 0).sum())
    assert rounding.kept == int(((true != 0) & (written != 0)).sum())
    assert rounding.survives == pytest.approx(float(true @ written / (true @ true)), rel=1e-4)
    assert rounding.error == pytest.approx(float((written - true).norm() / true.norm()), rel=1e-3)
    assert 0 < rounding.kept < rounding.changed
    record = rounding.to_json()
    assert record is not None
    assert record["to"] == ["bfloat16"]


def test_nothing_is_said_where_nothing_is_rounded() -> None:
    base = torch.randn(4, 5).bfloat16()
    for exact, out in ((base.float() + 1, torch.empty(4, 5)), (base + 1, torch.empty_like(base))):
        rounding = Rounding()
        rounding.round(exact, base, out, Scratch(), None)
        assert torch.equal(out.float(), exact.float())
        assert rounding.to_json() is None
        assert rounding.survives == 1
