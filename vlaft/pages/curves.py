"""The curves of runs as one picture, from `log.jsonl`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vlaft.errors import DataError
from vlaft.files import output_file, restored

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOG_FILE = "log.jsonl"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # told apart by the colour-blind, too


@dataclass(frozen=True)
class Panel:
    """One part of the picture.

    Attributes:
        title: what it shows, and in which unit.
        train: key of a training line.
        held_out: key of an evaluation's line, or None.
        from_zero: whether the vertical axis begins at 0; a constant would fill it with noise otherwise.
    """

    title: str
    train: str
    held_out: str | None = None
    from_zero: bool = False


PANELS = (  # of any run
    Panel("loss (nats per token)", "loss", "val_loss"),
    Panel("action token accuracy", "action_accuracy", "val_action_accuracy"),
    Panel("action L1 (normalised units)", "action_l1", "val_action_l1"),
    Panel("learning rate", "learning_rate", from_zero=True),
    Panel("gradient norm before clipping", "grad_norm", from_zero=True),
)
CHUNK_PANELS = (  # of a policy that writes several actions at once
    Panel("L1 of the chunk's first action", "first_action_l1", "val_first_action_l1"),
    Panel("L1 of the chunk's later actions", "later_actions_l1", "val_later_actions_l1"),
)
ACTED = Panel("success in the environment", "success_rate", "success_rate", from_zero=True)  # where a run acted


@dataclass(frozen=True)
class Curves:
    """What a run has logged.

    Attributes:
        run: its folder.
        train: key to values `[N]`, `step` among them; NaN where a line lacks one.
        held_out: likewise, of its evaluations.
        damaged: lines that could not be read; the last one of a run under way may be half-written.
    """

    run: Path
    train: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    held_out: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    damaged: int = 0


def panels(curves: Sequence[Curves]) -> tuple[Panel, ...]:
    """Return what can be drawn of runs: accuracy where one of them wrote tokens, `CHUNK_PANELS` where one wrote chunks.

    The loss of a run without tokens is a distance.
    """
    loss, accuracy, l1, *others = PANELS
    tokens = [np.isfinite(run.train[accuracy.train]).any() for run in curves]
    units = [unit for unit, there in (("nats per token", any(tokens)), ("L1", not all(tokens))) if there]
    chunked = any(np.isfinite(run.train[panel.train]).any() for run in curves for panel in CHUNK_PANELS)
    acted = any(np.isfinite(run.held_out["success_rate"]).any() for run in curves)
    return (
        replace(loss, title=f"loss ({' or '.join(units)})"),
        *((accuracy,) if any(tokens) else ()),
        l1,
        *(CHUNK_PANELS if chunked else ()),
        *others,
        *((ACTED,) if acted else ()),
    )


def read_curves(run: Path) -> Curves:
    """Read a run's `log.jsonl`; the run may still be under way.

    Raises:
        DataError: there is no log, or nothing that can be drawn in it.
    """
    path = restored(run) / LOG_FILE
    if not path.is_file():
        raise DataError(f"{run} has no {LOG_FILE}; give a folder that `vlaft train` wrote")
    train: list[dict[str, Any]] = []
    held_out: list[dict[str, Any]] = []
    damaged = 0
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for text in file:
                try:
                    line = json.loads(text)
                except (ValueError, RecursionError):
                    line = None
                if not isinstance(line, dict) or not np.isfinite(_number(line.get("step"))):
                    damaged += bool(text.strip())
                elif "val_loss" in line or "success_rate" in line:
                    held_out.append(line)
                elif "loss" in line:
                    train.append(line)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error
    every = (*PANELS, *CHUNK_PANELS, ACTED)
    if not train and not held_out:
        raise DataError(f"{path} has no logged step yet; wait for the first one")
    return Curves(
        run,
        _columns(train, ["step", *(panel.train for panel in every)]),
        _columns(held_out, ["step", *(panel.held_out for panel in every if panel.held_out)]),
        damaged,
    )


def plot_curves(curves: Sequence[Curves], out: Path) -> None:
    """Draw the curves of one or several runs over each other and write a PNG.

    Raises:
        VlaftError: the file cannot be written.
    """
    save_figure(draw_curves(curves), out)


def save_figure(figure: Figure, file: Path) -> None:
    """Write a PNG aside and rename it into place.

    Raises:
        VlaftError: the disk is full or not writable, or another process writes there.
    """
    with output_file(file) as partial:
        write_figure(figure, partial)


def write_figure(figure: Figure, file: Path) -> None:
    """Write a PNG as it comes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name or instruction in another script
        figure.savefig(file, format="png", dpi=110)


def legend_text(name: str, limit: int = 60) -> str:
    r"""Return a path or name as matplotlib takes it: it reads formulas between dollars and drops leading underscores.

    >>> legend_text("_run$1")
    ' _run\\$1'
    """
    text = name if len(name) <= limit else f"...{name[-limit:]}"
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def draw_curves(curves: Sequence[Curves]) -> Figure:
    """Return the figure: training as lines, evaluations on held-out examples as dashed lines with dots."""
    from matplotlib.figure import Figure

    shown = panels(curves)
    columns = (len(shown) + 2) // 2  # in two rows, with a place for the legend
    figure = Figure(figsize=(4.0 * columns + 1.0, 7.0), layout="constrained")
    axes = list(figure.subplots(2, columns).flatten())
    for panel, axis in zip(shown, axes, strict=False):
        for number, run in enumerate(curves):
            _draw(panel, axis, run, COLORS[number % len(COLORS)])
        axis.set_title(panel.title, fontsize=10)
        axis.grid(alpha=0.25)
        axis.set_xlabel("step")
    _explain(axes[len(shown)], curves)
    for unused in axes[len(shown) + 1 :]:
        unused.remove()
    return figure


def _draw(panel: Panel, axis: Axes, run: Curves, color: str) -> None:
    values = run.train[panel.train]
    marker = "." if len(values) == 1 else None  # a line of one point is invisible
    axis.plot(run.train["step"], values, color=color, linewidth=1.2, alpha=0.85, marker=marker)
    if panel.held_out is not None:
        dots = run.held_out[panel.held_out]
        there = np.isfinite(dots)  # held-out examples and episodes have lines of their own
        steps = run.held_out["step"][there]
        axis.plot(steps, dots[there], color=color, linewidth=1.2, linestyle="--", marker="o", markersize=4)
    if panel.from_zero:
        axis.set_ylim(bottom=0)


def _explain(axis: Axes, curves: Sequence[Curves]) -> None:
    """Put the legend in an empty place, with the best held-out L1 of each run."""
    from matplotlib.lines import Line2D

    axis.axis("off")
    handles = [
        Line2D([], [], color="black", linewidth=1.2),
        Line2D([], [], color="black", linewidth=1.2, linestyle="--", marker="o", markersize=4),
    ]
    labels = ["training", "held out"]
    for number, run in enumerate(curves):
        handles.append(Line2D([], [], color=COLORS[number % len(COLORS)], linewidth=4.0))
        labels.append(_label(run))
    axis.legend(handles, labels, loc="upper left", frameon=False)


def _label(run: Curves) -> str:
    name = legend_text(str(run.run), limit=48)
    l1 = run.held_out["val_action_l1"]
    if not np.isfinite(l1).any():
        return name
    best = int(np.nanargmin(l1))
    return f"{name}\nbest held-out L1 {l1[best]:.4f} at step {run.held_out['step'][best]:.0f}"


def _columns(lines: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    return {key: np.array([_number(line.get(key)) for line in lines], dtype=np.float64) for key in keys}


def _number(value: object) -> float:
    """Return a number, or NaN for what is none."""
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else float("nan")
    except OverflowError:  # a whole number beyond float's range
        return float("nan")
