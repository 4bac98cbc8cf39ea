"""`vlaft plot`: the curves of one or several runs as a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlaft.cli.arguments import Overwrite


def plot(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folder that `vlaft train` wrote.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="PNG file to write; by default curves.png in the run.", show_default=False),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Draw loss, accuracy, L1, learning rate and gradient norm of runs over each other."""
    from vlaft.cli.console import say, warn
    from vlaft.errors import UsageError, VlaftError

    if out is None and len(runs) > 1:
        raise UsageError("several runs go into one picture; name it with --out")
    file = runs[0] / "curves.png" if out is None else out
    if file.suffix.lower() != ".png":
        raise UsageError(f"--out {file}: give a file that ends in .png")
    if file.is_dir():
        raise VlaftError(f"{file} is a folder; --out needs a file")
    if file.exists() and not overwrite:
        raise VlaftError(f"{file} exists already; name another file with --out, or give --overwrite")
    from vlaft.pages.curves import plot_curves, read_curves

    curves = [read_curves(run) for run in runs]
    for run in curves:
        if run.damaged > 1:  # the last line of a run under way may be half-written
            warn(f"{run.run}: {run.damaged} lines of its log cannot be read and are left out")
    plot_curves(curves, file)
    say(f"written to {file}")
