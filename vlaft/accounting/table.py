"""What a recipe costs, as tables for people."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from vlaft.accounting.parameters import PARTS, ParameterCount


def parameter_table(counts: Mapping[str, ParameterCount]) -> Table:
    """Return trainable parameters per recipe, their share, and where in the model they are."""
    table = Table(box=None, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    for heading in ("trainable", "of total", "reached by gradient", *PARTS):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, counted in counts.items():
        share = f"{100 * counted.trainable / counted.total:.2f} %"
        parts = [f"{counted.parts[part].trainable:,}" for part in PARTS]
        table.add_row(name, f"{counted.trainable:,}", share, f"{counted.reached_by_gradient:,}", *parts)
    return table
