"""`vlaft inspect`: what is in demonstrations, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlaft.cli.arguments import AsJson

if TYPE_CHECKING:
    from vlaft.inspection.contents import Contents, Entry
    from vlaft.inspection.facts import Inspection


_BARS = "▁▂▃▄▅▆▇█"
_BAR_COLUMNS = 20
_BARS_HEADER = "min to max"
_INSTRUCTIONS_SHOWN = 12
_DAMAGED_SHOWN = 6


def inspect(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE [KEY=VALUE]...",
            help="A file, folder, Hub id or converted dataset, then settings of the layout as for `vlaft convert`.",
            show_default=False,
        ),
    ],
    preset: Annotated[str | None, typer.Option("--preset", help="Dataset preset.", show_default=False)] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Only the first episodes of each split.", show_default=False)
    ] = None,
    frames: Annotated[
        bool, typer.Option("--frames/--no-frames", help="Decode some frames of each episode; off is faster for videos.")
    ] = True,
    html: Annotated[
        Path | None,
        typer.Option("--html", help="Write a page with frames, plots and warnings to this file.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of --html.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what is in demonstrations, and what is wrong with them: each warning says what to type about it.

    Where they contradict the rule for the gripper, it ends with the question that a conversion asks too (exit code 1).

    Example: vlaft inspect demos.hdf5 --html demos.html
    """
    from vlaft.cli.console import print_json, say
    from vlaft.inspection.contents import NotInspected
    from vlaft.inspection.summary import summarize
    from vlaft.inspection.warnings import find

    if html is not None:
        _check_page(html, overwrite)
    try:
        inspection = _inspect(words, preset, limit, frames, thumbnails=html is not None)
    except NotInspected as error:
        if error.contents is not None and not as_json:
            show_contents(error.contents)
        raise
    findings = find(inspection)
    summary = summarize(inspection, findings)
    if html is not None:
        from vlaft.inspection.page import render

        _write(html, render(inspection, summary))
    if as_json:
        print_json(summary)
    else:
        _show(summary, inspection.contents)
    if html is not None:
        say(f"wrote {html}")
    if inspection.question:
        from vlaft.errors import DataError

        raise DataError(inspection.question)


def _inspect(
    words: Sequence[str], preset: str | None, limit: int | None, frames: bool, *, thumbnails: bool
) -> Inspection:
    from vlaft.cli.convert import _phases, _sources
    from vlaft.errors import UsageError
    from vlaft.inspection.converted import inspect_converted, is_converted
    from vlaft.inspection.facts import inspect_source

    requests = _sources(words, [preset] if preset else [], [], [])
    if len(requests) != 1:
        raise UsageError(f"{len(requests)} sources are given; inspect them one by one")
    request = requests[0]
    with _phases() as report:
        if is_converted(request.path):
            if preset or request.layout:
                raise UsageError(f"{request.path} is converted already, so --preset and settings change nothing there")
            return inspect_converted(request.path, limit=limit, frames=frames, thumbnails=thumbnails, progress=report)
        return inspect_source(request, limit=limit, frames=frames, thumbnails=thumbnails, progress=report)


def _check_page(page: Path, overwrite: bool) -> None:
    """Refuse a page that cannot be written before the long work, not after it."""
    from vlaft.errors import VlaftError

    if page.is_dir():
        raise VlaftError(f"{page} is a folder; --html needs a file")
    if page.exists() and not overwrite:
        raise VlaftError(f"{page} exists already; name another file with --html, or give --overwrite")
    if not page.parent.is_dir():
        raise VlaftError(f"there is no folder {page.parent} to write {page.name} to")


def _write(page: Path, content: str) -> None:
    from vlaft.files import output_file

    with output_file(page) as partial:
        partial.write_text(content, encoding="utf-8")


def _show(summary: Mapping[str, Any], contents: Contents | None) -> None:
    from rich.table import Table

    from vlaft.cli.console import show
    from vlaft.data.sentences import flow

    overview = Table(box=None, show_header=False, pad_edge=False)
    overview.add_column(style="bold", no_wrap=True)
    overview.add_column(overflow="fold")
    for name, value in overview_rows(summary):
        overview.add_row(name, value)
    show(overview)
    show("")
    if contents is not None:
        show_contents(contents)
        show("")
    standardized = summary["standardized"]
    source = " + ".join(summary["action"]["source"]) or "the column action"
    changed = standardized is None or (standardized["steps"] and summary["kind"] == "source")
    if changed:
        show(f"action as stored: {source}")
        show(_action_table(summary["action"]))
    if standardized is not None:
        steps = ", ".join(flow(step) for step in standardized["steps"]) or "no standardizing steps"
        if changed:
            show("")
        show(f"action as converted: {source}; {steps}; {standardized['rows']:,} steps")
        show(_action_table(standardized))
    show("")
    warnings = [text for text in summary["warnings"] if text != summary["question"]]  # that one ends the command
    if not warnings:
        show("no warnings")
        return
    count = len(warnings)
    show(f"{count} warning{'s' if count > 1 else ''}")
    for number, warning in enumerate(warnings, start=1):
        show(f"{number:3d}. {warning}")


def overview_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the lines of the overview: what, and how it is."""
    steps = sorted(summary["steps_per_episode"])
    cameras = []
    for name, (height, width, channels) in summary["cameras"].items():
        ours = summary["camera_names"].get(name)
        called = "" if ours == name else f" as {ours}" if ours else " (not kept)"
        cameras.append(f"{name} {height}x{width}x{channels}{called}")
    cameras += [f"{name} (no frame can be read)" for name in summary["camera_names"] if name not in summary["cameras"]]
    splits = ", ".join(f"{split} {counts['episodes']}" for split, counts in summary["splits"].items())
    instructions = [text or "(empty)" for text in summary["instructions"]]
    more = [f"and {len(instructions) - _INSTRUCTIONS_SHOWN} more"] if len(instructions) > _INSTRUCTIONS_SHOWN else []
    kinds = {
        True: "absolute targets, by the state",
        False: "deltas, by the state",
        None: "unknown, the data do not tell",
    }
    rows = [
        ("dataset", f"{summary['name']} ({summary['path']})"),
        ("format", summary["format"] + (f", preset {summary['preset']}" if summary["preset"] else "")),
        ("episodes", f"{summary['episodes']:,}" + (f" ({splits})" if splits else "")),
        ("steps", f"{summary['steps']:,} ({steps[0]} to {steps[-1]} per episode, median {steps[len(steps) // 2]})"),
        ("rate", "unknown" if summary["fps"] is None else f"{summary['fps']:g} Hz"),
        ("cameras", "\n".join(cameras) or "none"),
        ("instructions", "\n".join([*instructions[:_INSTRUCTIONS_SHOWN], *more]) or "none"),
        ("action", f"{summary['action']['dim']} dimensions; absolute or delta: {kinds[summary['absolute']]}"),
        ("state", " + ".join(summary["state"]) or "none (name its arrays with state='[...]' to keep one)"),
        ("idle steps", f"{summary['idle_share']:.1%}"),
    ]
    if summary["policy"]:
        # with what a policy that writes chunks would read here
        rate = "policy.chunk: as many actions as make a second"
        if summary["fps"]:
            rate = "about a second of actions, at most half an episode"
        rows.append(("chunks", f"{' '.join(summary['policy'])} (with policy.head=l1; {rate})"))
    damaged = [
        entry["why"] if entry["episode"] in entry["why"] else f"{entry['episode']}: {entry['why']}"
        for entry in summary["damaged"]
    ]
    if damaged:
        rest = [f"and {len(damaged) - _DAMAGED_SHOWN} more"] if len(damaged) > _DAMAGED_SHOWN else []
        rows.append(("damaged", "\n".join([*damaged[:_DAMAGED_SHOWN], *rest])))
    for guess in summary["grippers"]:
        opened = "unknown" if guess["open_at"] is None else f"{guess['open_at']:.3g}"
        rows.append(
            (
                "gripper",
                f"{guess['label']}: {guess['low']:.3g} to {guess['high']:.3g}, {guess['kind']},"
                f" open at {opened} ({guess['why']})",
            )
        )
    return rows


def _action_table(action: Mapping[str, Any]) -> Any:
    from rich.table import Table

    from vlaft.cli.console import stdout_console

    columns: dict[str, list[str]] = {"": [str(dim) for dim in range(action["dim"])]}
    if action["names"]:
        columns["name"] = list(action["names"])
    for name in ("mean", "std", "min", "q01", "q99", "max"):
        columns[name] = [f"{value:.4g}" for value in action["stats"][name]]
    clipped = action.get("clipped")
    if clipped:
        shown = zip(clipped, action["mask"], strict=True)
        columns["clipped"] = [f"{share:.1%}" if masked else "-" for share, masked in shown]
    columns[_BARS_HEADER] = [_bars(histogram["counts"]) for histogram in action["histograms"]]
    # a number without its last digits is worse than none
    for spare in (_BARS_HEADER, "std", "mean", "clipped", "q01", "q99"):
        if sum(max(map(len, [name, *cells])) + 2 for name, cells in columns.items()) > stdout_console().width:
            columns.pop(spare, None)
    table = Table(box=None, pad_edge=False)
    for name in columns:
        justify: Any = "left" if name in ("name", _BARS_HEADER) else "right"
        table.add_column(name, justify=justify, no_wrap=True)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    return table


def _bars(counts: Sequence[int]) -> str:
    """Draw a histogram in one line of text; the height is the square root, so that rare values stay visible."""
    joined = [sum(counts[start : start + 2]) for start in range(0, len(counts), len(counts) // _BAR_COLUMNS)]
    most = max(joined)
    return "".join(" " if not count else _BARS[round((count / most) ** 0.5 * (len(_BARS) - 1))] for count in joined)


def show_contents(contents: Contents) -> None:
    """Print the tree on stdout; long names do not push the shapes out of a narrow terminal."""
    from vlaft.cli.console import show, stdout_console

    show(f"in {contents.of}:")
    labels = [_label(entry) for entry in contents.entries]
    width = min(max(map(len, labels), default=0), stdout_console().width // 2, 48)
    for label, entry in zip(labels, contents.entries, strict=True):
        show(f"{label:{width}}  {_told(entry)}".rstrip())


def _label(entry: Entry) -> str:
    *above, name = entry.path.split("/")
    if entry.kind == "file":
        return f"  {entry.path}"
    return "  " * (len(above) + 1) + name + ("/" if entry.kind == "group" and name else "")


def _told(entry: Entry) -> str:
    if entry.kind == "attribute":
        return f"= {entry.note}"
    shape = "" if entry.shape is None else str(list(entry.shape))
    kind = "" if entry.kind in ("group", "file") else entry.kind
    return "  ".join(filter(None, [shape, kind, f"({entry.note})" if entry.note else ""]))
