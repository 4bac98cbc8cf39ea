"""Figures of the demo's page: the curves of its runs, and recipes beside the paper's.

Each is small enough to be read on a phone, where it is as wide as the screen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vlaft.demo_results import PAPER_SUCCESS, RecipeResult
from vlaft.html_page import ACCENT, new_figure, percent
from vlaft.plot import PANELS, Curves, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _GREY = "#1c2733", "#7b8794"
_DPI = 200  # sharp on screens of two or three pixels to the point
CURVES = tuple(panel for panel in PANELS if panel.held_out)


def curve_figure(panel: Panel, curves: Sequence[Curves]) -> Figure:
    """Draw one quantity over the steps of one or several runs: training as lines, held-out examples as dots."""
    figure, [[axes]] = new_figure(1, 1, height=2.5, width=3.7, dpi=_DPI)
    held_out = panel.held_out
    for number, run in enumerate(curves):
        values = run.train[panel.train]
        marker = "." if np.isfinite(values).sum() == 1 else None  # a line of one point is invisible
        label = "training" if number == 0 else None
        axes.plot(run.train["step"], values, color=ACCENT, linewidth=1.3, alpha=0.8, marker=marker, label=label)
        if held_out is not None and len(run.held_out["step"]):
            label = "held out" if number == 0 else None
            steps, dots = run.held_out["step"], run.held_out[held_out]
            axes.plot(steps, dots, "--o", color=_INK, linewidth=0.8, markersize=3.5, label=label)
    axes.set_title(panel.title, fontsize=10, loc="left", parse_math=False)
    axes.set_xlabel("step", fontsize=9)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    return figure


def comparison_figure(comparison: Sequence[RecipeResult]) -> Figure:
    """Draw a row per recipe: our mean with its 95 % interval, and below it the paper's mean with its standard error."""
    count = len(comparison)
    figure, [[axes]] = new_figure(1, 1, height=0.52 * count + 0.9, width=5.2, dpi=_DPI)
    for row, result in enumerate(comparison):
        low, high = result.interval
        ours = row - 0.14 if result.recipe in PAPER_SUCCESS else row
        seeds = [100 * rate for rate in result.rates] if len(result.rates) > 1 else []
        axes.plot(seeds, [ours] * len(seeds), "|", color=ACCENT, markersize=8, alpha=0.6)
        bar = ([100 * (result.mean - low)], [100 * (high - result.mean)])
        axes.errorbar(100 * result.mean, ours, xerr=bar, fmt="o", color=ACCENT, markersize=6, capsize=3)
        _value(axes, 100 * high, ours, percent(result.mean), ACCENT)
        if result.recipe in PAPER_SUCCESS:
            mean, error = PAPER_SUCCESS[result.recipe]
            axes.errorbar(
                mean, row + 0.2, xerr=error, fmt="D", color=_GREY, markerfacecolor="white", markersize=5, capsize=3
            )
            _value(axes, mean + error, row + 0.2, percent(mean / 100), _GREY)
    axes.set_yticks(range(count), [result.recipe for result in comparison], fontsize=9.5, parse_math=False)
    axes.set_ylim(count - 0.45, -0.55)
    axes.set_xlim(-3, 114)  # room for the figures beside the bars
    axes.set_xticks(range(0, 101, 20))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    for row in range(1, count):
        axes.axhline(row - 0.5, color="#e6eaee", linewidth=0.8)
    axes.set_xlabel("success (%)", fontsize=9)
    _legend(figure, seeds=any(len(result.rates) > 1 for result in comparison))
    return figure


def _value(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    axes.annotate(text, (x, y), (5, 0), textcoords="offset points", va="center", fontsize=8, color=colour)


def _legend(figure: Figure, *, seeds: bool) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=ACCENT, marker="o", markersize=6),
        *([Line2D([], [], color=ACCENT, marker="|", markersize=8, linestyle="", alpha=0.6)] if seeds else []),
        Line2D([], [], color=_GREY, marker="D", markerfacecolor="white", markersize=5),
    ]
    labels = ["here, 95 % interval", *(["each seed"] if seeds else []), "paper, ± one standard error"]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
