"""What recipes cost, as tables for people. GB are 1e9 bytes."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from vlaft.accounting.costs import PAPER_BATCH, PAPER_GB, RecipeCost
from vlaft.accounting.parameters import PARTS


def _table(first: str, *headings: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def gigabytes(size: int) -> str:
    """Return bytes as GB.

    >>> gigabytes(59_712_345_678)
    '59.7'
    """
    return f"{size / 1e9:.1f}" if size >= 1e8 else f"{size / 1e9:.4f}"


def cost_table(costs: Sequence[RecipeCost], gpu_memory: int, *, paper: bool) -> Table:
    """Return one row per recipe: parameters, peak, what fits.

    Args:
        costs: of the recipes.
        gpu_memory: bytes of the GPU that the largest batches are for.
        paper: add the paper's memory, which describes the SigLIP-only base.
    """
    measured = any(cost.measurement for cost in costs)
    table = _table(
        "recipe",
        "trainable",
        "of total",
        "reached by gradient",
        "batch",
        "peak GB",
        *(["measured GB", "error"] if measured else []),
        f"largest batch in {gpu_memory / 1e9:.0f} GB",
        "smallest card",
        *([f"paper GB, batch {PAPER_BATCH}"] if paper else []),
    )
    for cost in costs:
        counted, memory = cost.counted, cost.memory
        card = "none" if cost.smallest_card is None else f"{cost.smallest_card} GB"
        cells = [
            cost.name,
            f"{counted.trainable:,}",
            f"{100 * counted.trainable / counted.total:.2f} %",
            f"{counted.reached_by_gradient:,}",
            str(memory.batch_size),
            gigabytes(memory.peak) + (f" x {memory.gpus}" if memory.gpus > 1 else ""),
        ]
        if measured:
            one = cost.measurement
            cells += ["", ""] if one is None else [gigabytes(one.peak_bytes), f"{100 * one.error:+.1f} %"]
        cells += [str(cost.largest_batch) if cost.largest_batch else "none", card]
        if paper:
            total, gpus = PAPER_GB.get(cost.name, (None, 1))
            cells.append("" if total is None else f"{total}" + (f" over {gpus}" if gpus > 1 else ""))
        table.add_row(*cells)
    return table


def parts_table(costs: Sequence[RecipeCost]) -> Table:
    """Return trained parameters per part of the model."""
    table = _table("trained in", *PARTS)
    for cost in costs:
        table.add_row(cost.name, *(f"{cost.counted.parts[part].trainable:,}" for part in PARTS))
    return table


def memory_table(cost: RecipeCost) -> Table:
    """Return where each byte goes at the moment of the peak."""
    table = _table("memory at the peak", "bytes", "GB", "share")
    for term, size in (*cost.memory.terms.items(), ("in all", cost.memory.peak)):
        table.add_row(term, f"{size:,}", f"{size / 1e9:.3f}", f"{100 * size / cost.memory.peak:.1f} %")
    return table


def modules_table(cost: RecipeCost) -> Table:
    """Return parameters per module, equal blocks folded into one row."""
    table = _table("module", "parameters", "trained")
    for module, entry in cost.counted.modules.items():
        table.add_row(module, f"{entry.total:,}", f"{entry.trainable:,}" if entry.trainable else "")
    return table
