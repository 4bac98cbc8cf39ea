"""What recipes cost, as a picture: a bar of memory per recipe, and common cards as lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlaft.accounting.costs import RecipeCost
from vlaft.accounting.memory import CARDS
from vlaft.errors import VlaftError

_COLOURS = {
    "weights": "#4c6a92",
    "adapters": "#7fa3c7",
    "gradients": "#c98b4a",
    "optimizer state": "#e3be7d",
    "activations": "#5b9a72",
    "logits": "#a9cfa5",
    "allocator and CUDA": "#b8b8b8",
}


def plot_costs(costs: Sequence[RecipeCost], title: str, path: Path) -> None:
    """Draw stacked bars, one per recipe in the order given, and write them to `path` (its ending says the format).

    Raises:
        VlaftError: the ending is unknown, or the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.42 * len(costs)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = [f"{cost.name}, batch {cost.memory.batch_size}" for cost in costs]
    starts = [0.0] * len(costs)
    for term, colour in _COLOURS.items():
        widths = [_gigabytes(cost, term) for cost in costs]
        axes.barh(names, widths, left=starts, color=colour, label=term)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    limit = 1.08 * max(*starts, CARDS[0])
    for card in CARDS:
        if card < limit:
            axes.axvline(card, color="#555555", linewidth=0.6, linestyle=":")
            axes.text(card, -0.75, str(card), ha="center", va="bottom", fontsize=7, color="#555555")
    axes.set_xlim(0, limit)
    axes.invert_yaxis()
    axes.set_xlabel("GB per GPU at the peak of a training step (dotted: common cards)")
    axes.set_title(title, fontsize=10, pad=16)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=len(_COLOURS))
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise VlaftError(f"{path}: no picture can be written in this format ({error}); name a .png file") from None
    except OSError as error:
        raise VlaftError(f"{path} cannot be written ({error.strerror})") from None


def _gigabytes(cost: RecipeCost, term: str) -> float:
    terms = cost.memory.terms
    if term in terms:
        return terms[term] / 1e9
    return sum(size for name, size in terms.items() if name not in _COLOURS) / 1e9
