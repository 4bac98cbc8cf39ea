"""Pictures of an evaluation: what was predicted along demonstrations, and how errors are spread."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from vlaft.data.held_out import HeldOut, HeldOutEpisode
from vlaft.evaluation.offline import Evaluation
from vlaft.files import output_files
from vlaft.pages.curves import COLORS, legend_text, write_figure

MARKERS = ("o", "s", "^", "D", "v", "P")
ERRORS_FILE = "errors.png"
STEPS_FILE = "steps.png"
_OURS = re.compile(r"episode-\d+\.png|errors\.png|steps\.png")
_ROWS = 7  # dimensions above one another


def draw_evaluations(
    folder: Path, evaluations: Sequence[Evaluation], held_out: HeldOut, *, episodes: int = 4
) -> list[Path]:
    """Write `episode-0000.png` and the like, `errors.png`, and of chunks `steps.png`; earlier ones are removed.

    Args:
        folder: made where it is missing.
        evaluations: of the models to compare, on the same examples.
        held_out: those examples.
        episodes: how many demonstrations to draw, evenly spread over those that were evaluated.

    Returns:
        The files.

    Raises:
        VlaftError: the folder cannot be written, or another process writes there.
    """
    numbers = held_out.evaluated
    count = min(episodes, len(numbers))
    drawn = [numbers[index] for index in np.linspace(0, len(numbers) - 1, count).round().astype(int)]
    names = [f"episode-{number:04d}.png" for number in drawn]
    with output_files(folder, _OURS) as partial:
        for number, name in zip(drawn, names, strict=True):
            write_figure(draw_episode(held_out.episodes[number], evaluations, held_out), partial / name)
        write_figure(draw_errors(evaluations, held_out), partial / ERRORS_FILE)
        names.append(ERRORS_FILE)
        if any(_chunk(each) > 1 for each in evaluations):
            write_figure(draw_steps(evaluations, held_out), partial / STEPS_FILE)
            names.append(STEPS_FILE)
    return [folder / name for name in names]


def draw_episode(episode: HeldOutEpisode, evaluations: Sequence[Evaluation], held_out: HeldOut) -> Figure:
    """Draw the demonstrated actions of an episode as a line, and free-running predictions over it, in robot units.

    A chunk is drawn from its start on. Those that a robot would act on, one after the other, are drawn full, with a
    mark where it looks again; those from the frames in between are thin.
    """
    title = f"{held_out.split} split of {episode.dataset}, {episode.source}\n{_shortened(episode.instruction)}"
    figure, axes = _grid(held_out, title, "step")
    steps = held_out.frame[episode.rows]
    place = {int(row): index for index, row in enumerate(held_out.chosen)}
    shown = [(step, place[int(row)]) for step, row in zip(steps, episode.rows, strict=True) if int(row) in place]
    for dimension, axis in enumerate(axes):
        axis.plot(steps, held_out.action[episode.rows, dimension], color="black", linewidth=1.8, zorder=3)
        for number, evaluation in enumerate(evaluations):
            style = _style(number, len(evaluations))
            chunk = _chunk(evaluation)
            if chunk == 1:
                predicted = [evaluation.predicted[index, 0, dimension] for _, index in shown]
                axis.plot([step for step, _ in shown], predicted, **style)
                continue
            ahead = np.arange(chunk)
            lines = {step: (step + ahead, evaluation.predicted[index, :, dimension]) for step, index in shown}
            acted = _one_after_the_other(list(lines), chunk)
            thin = [np.column_stack(line) for step, line in lines.items() if step not in acted]
            axis.add_collection(LineCollection(thin, colors=style["color"], linewidths=0.6, alpha=0.45))
            for step in acted:
                axis.plot(*lines[step], **style, markevery=[0])
    _legend(figure, evaluations, demonstrated=True)
    return figure


def _chunk(evaluation: Evaluation) -> int:
    """Return K, how many actions a model writes at once."""
    return int(evaluation.predicted.shape[1])


def _one_after_the_other(steps: Sequence[int], chunk: int) -> list[int]:
    """Return where a robot that acts on whole chunks would look again.

    >>> _one_after_the_other([0, 1, 2, 3, 4, 5, 9], 3)
    [0, 3, 9]
    """
    found: list[int] = []
    for step in steps:
        if not found or step >= found[-1] + chunk:
            found.append(step)
    return found


def draw_steps(evaluations: Sequence[Evaluation], held_out: HeldOut) -> Figure:
    """Draw the mean free-running error over the steps of a chunk, per dimension, in normalised units."""
    title = f"mean distance by step of the chunk, {len(held_out):,} examples of the {held_out.split} split"
    figure, axes = _grid(held_out, title, "step of the chunk (1: the action at the frame itself)")
    for dimension, axis in enumerate(axes):
        for number, evaluation in enumerate(evaluations):
            means = abs(evaluation.error[..., dimension]).mean(axis=0)
            axis.plot(np.arange(1, len(means) + 1), means, **_style(number, len(evaluations)))
        axis.set_ylim(bottom=0)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, evaluations, demonstrated=False, marked=True)
    return figure


def draw_errors(evaluations: Sequence[Evaluation], held_out: HeldOut) -> Figure:
    """Draw how free-running errors are spread, per dimension, in normalised units."""
    title = f"predicted less demonstrated, {len(held_out):,} examples of the {held_out.split} split"
    figure, axes = _grid(held_out, title, "error in normalised units (the whole range is 2)")
    widest = max(float(abs(each.error).max()) for each in evaluations)
    edges = np.linspace(-1.0, 1.0, 62) * max(widest, 0.05) * 1.02  # an odd number of bins: one about zero
    for dimension, axis in enumerate(axes):
        highest = 0.0
        for number, evaluation in enumerate(evaluations):
            share = (
                np.histogram(evaluation.error[..., dimension].ravel(), bins=edges)[0]
                / evaluation.error[..., dimension].size
            )
            style = _style(number, len(evaluations))
            axis.stairs(share, edges, color=style["color"], linewidth=style["linewidth"])
            highest = max(highest, float(share.max()))
        axis.axvline(0.0, color="black", linewidth=0.6)
        axis.set_ylim(0, 1.1 * highest)
        axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    _legend(figure, evaluations, demonstrated=False)
    return figure


def _grid(held_out: HeldOut, title: str, below: str) -> tuple[Figure, list[Axes]]:
    """Return a figure with one axis per dimension, in columns of at most seven."""
    count = len(held_out.names)
    columns = -(-count // _ROWS)
    rows = -(-count // columns)
    figure = Figure(figsize=(5.0 + 4.0 * columns, 1.4 + 1.25 * rows), layout="constrained")
    grid: NDArray = figure.subplots(rows, columns, squeeze=False)
    axes = list(grid.T.flatten())
    for axis in axes[count:]:
        axis.remove()
    for index, (name, axis) in enumerate(zip(held_out.names, axes, strict=False)):
        axis.set_ylabel(name, parse_math=False)
        axis.grid(alpha=0.25)
        if index % rows == rows - 1 or index == count - 1:
            axis.set_xlabel(below)
        else:
            axis.tick_params(labelbottom=False)
    figure.suptitle(title, fontsize=10, parse_math=False)
    return figure, axes[:count]


def _legend(
    figure: Figure, evaluations: Sequence[Evaluation], *, demonstrated: bool, marked: bool | None = None
) -> None:
    from matplotlib.lines import Line2D

    marked = demonstrated if marked is None else marked
    handles = [Line2D([], [], color="black", linewidth=2.0)] if demonstrated else []
    labels = ["demonstrated"] if demonstrated else []
    for number, evaluation in enumerate(evaluations):
        style = _style(number, len(evaluations))
        handles.append(Line2D([], [], **style if marked else style | {"marker": None}))
        labels.append(legend_text(evaluation.model))
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3), frameon=False)


def _style(number: int, count: int) -> dict[str, Any]:
    """Draw each model thinner than the one before it, so that models that agree are all seen."""
    behind = count - 1 - number
    return {
        "color": COLORS[number % len(COLORS)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 3.0 + 1.5 * behind,
        "linewidth": 1.1 + 0.9 * behind,
    }


def _shortened(text: str, limit: int = 90) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[:limit]}..."
