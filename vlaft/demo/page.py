"""One self-contained HTML page about a demo: what was measured, films, curves, the commands."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlaft.demo.results import DemoResult, SeedResult, Success, mean_interval, overlapping
from vlaft.errors import DataError
from vlaft.pages.curves import PANELS, Curves, Panel, read_curves
from vlaft.pages.html import ACCENT, between, counted, duration, embedded, new_figure, page, percent, plot, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_STYLE = f"""
h1 {{ line-height: 1.25; margin-bottom: 8px; }}
h1 small {{ white-space: nowrap; font-size: 17px; font-weight: 400; color: #5d6b7a; }}
code {{ background: none; padding: 0; }} ul {{ margin: 6px 0; padding-left: 22px; }} li {{ margin: 3px 0; }}
.range {{ position: relative; width: 180px; height: 22px; background: #f2f4f7; }}
.range i, .range b {{ position: absolute; display: block; background: {ACCENT}; }}
.range i {{ top: 9px; height: 4px; opacity: 0.45; }}
.range b {{ top: 4px; height: 14px; width: 3px; margin-left: -1px; }}
.facts th {{ font-weight: 400; padding-right: 20px; }} .numbers td {{ vertical-align: middle; }}
.films {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 8px 24px; }}
.curves {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 290px), 1fr)); gap: 8px 16px; }}
.films img, .curves img {{ width: 100%; }} .sheet img {{ max-width: none; }}
.ends {{ display: flex; height: 26px; margin: 2px 0 12px; max-width: 640px; }} .ends div {{ min-width: 1px; }}
.key {{ display: inline-block; width: 11px; height: 11px; margin-right: 6px; }}
summary {{ cursor: pointer; margin: 8px 0; }}
.run {{ display: grid; grid-template-columns: 90px 1fr; gap: 12px; padding: 5px 0; border-top: 1px solid #e6eaee; }}
.run span {{ color: #5d6b7a; font-size: 13px; text-align: right; user-select: none; -webkit-user-select: none; }}
.run code {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
@media (max-width: 600px) {{ body {{ padding: 16px 14px 60px; }} h1 {{ font-size: 22px; }}
  .run {{ grid-template-columns: 1fr; gap: 0; }} .run span {{ text-align: left; }} }}
"""
# how an episode ended, and its colour
_DONE, _OTHER, _NOTHING = "picked up the named object", "picked up another object", "picked up nothing"
_UNKNOWN = "failed, and the log does not say how"
_ENDS = {_DONE: ACCENT, _OTHER: "#8b95a1", _NOTHING: "#d3d9e0", _UNKNOWN: "#eef1f4"}


def render(result: DemoResult) -> str:
    """Return the page; pictures and logs that the demo's folders lack, or that cannot be read, are left out."""
    sections = [
        _headline(result),
        _results(result),
        _films(result.seeds),
        _endings(result.seeds),
        _seeds(result.seeds),
        _cost(result),
        _curves(result.seeds),
        _held_out(result.seeds),
        _commands(result),
        _next(result),
    ]
    before, after = _pooled(result)
    title = f"vlaft demo: success {percent(before.rate)} before, {percent(after.rate)} after"
    return page(title, "".join(sections), _STYLE)


def _pooled(result: DemoResult) -> tuple[Success, Success]:
    """Return success before and after over the episodes of all seeds."""
    episodes = [(seed.before, seed.after) for seed in result.seeds]
    before, after = zip(*episodes, strict=True)
    return _sum(before), _sum(after)


def _sum(each: Iterable[Success]) -> Success:
    counts = [(success.successes, success.episodes) for success in each]
    return Success(sum(done for done, _ in counts), sum(episodes for _, episodes in counts))


def _headline(result: DemoResult) -> str:
    before, after = _pooled(result)
    rates = [f"{percent(each.rate)} <small>({between(each.interval)})</small>" for each in (before, after)]
    demonstrations = counted(result.demonstrations, "demonstration")
    seeds = len(result.seeds)
    each = f" of {demonstrations} each" if seeds > 1 else ""
    verdict = (
        "The two intervals overlap: this run does not show that success changed."
        if overlapping(before.interval, after.interval)
        else "The two intervals do not overlap."
        if after.rate > before.rate
        else "The two intervals do not overlap: the adapted model does worse."
    )
    pooled = " They are over the episodes of all seeds, and say nothing of how seeds differ." if seeds > 1 else ""
    return (
        f"<h1>With {demonstrations} of a new robot, success went from {rates[0]} to {rates[1]}</h1>"
        f"<p>{before.episodes:,} episodes before and {after.episodes:,} after, {counted(seeds, 'training seed')}{each},"
        f" recipe <b>{escape(result.recipe)}</b>. In brackets: Wilson intervals of 95 %.{pooled} {verdict}</p>"
        '<p class="quiet">This page shows what was measured in this run, and promises no figure. A simulated table and'
        f" a model of {result.cost.total / 1e6:.1f} million parameters say little of a model of seven billion on a real"
        " robot.</p>"
    )


def _results(result: DemoResult) -> str:
    """Return the table of the first seed's models, each beside the one that it should be compared with."""
    first = result.seeds[0]
    models = [
        ("before: the base", first.before, None),
        ("after: adapted", first.after, ("the base", first.before)),
        ("merged", result.merged, ("adapted", first.after)),
        *([("exported to nf4", result.exported, ("adapted", first.after))] if result.exported else []),
    ]
    rows = []
    for name, success, beside in models:
        overlap = "–"
        if beside is not None:
            other, its = beside
            overlap = f"{'yes' if overlapping(success.interval, its.interval) else 'no'}, with {other}"
        counts = f"{success.successes:,} of {success.episodes:,}"
        rows.append([name, percent(success.rate), between(success.interval), counts, _strip(success), overlap])
    heading = "Success" if len(result.seeds) == 1 else f"Success of seed {first.seed}"
    note = "" if result.exported else " There is no nf4 export: it needs bitsandbytes (pip install 'vlaft[qlora]')."
    columns = ("model", "success", "95 % interval", "episodes", "0 to 100 %", "intervals overlap")
    return (
        f"<h2>{heading}</h2>{table(columns, rows)}"
        '<p class="quiet">An episode is a success when the object that the instruction names has been picked up.'
        f" Intervals that overlap do not tell two models apart.{escape(note)}</p>"
    )


def _strip(success: Success) -> str:
    """Return a bar from 0 to 100 % with the interval and, in it, the rate."""
    low, high = (100 * bound for bound in success.interval)
    bar = f'<i style="left:{low:.1f}%;width:{high - low:.1f}%"></i><b style="left:{100 * success.rate:.1f}%"></b>'
    return f'<div class="range" aria-hidden="true">{bar}</div>'


def _cost(result: DemoResult) -> str:
    cost = result.cost
    more = cost.measured_bytes / cost.predicted_bytes - 1
    off = "the same" if abs(more) < 0.0005 else f"{percent(abs(more))} {'more' if more > 0 else 'less'}"
    seconds = [seed.train_seconds for seed in result.seeds]
    times, per_seed = duration(seconds[0]), ""
    if len(seconds) > 1:
        times = f"{duration(sum(seconds) / len(seconds))} on average over {len(seconds)} seeds"
        per_seed = " for the first seed; others have their own"
    rows = [
        ("trained", f"{cost.trainable:,} of {cost.total:,} parameters ({percent(cost.trainable / cost.total)})"),
        ("memory of a training step, predicted", _size(cost.predicted_bytes)),
        ("memory of a training step, measured", f"{_size(cost.measured_bytes)} ({off})"),
        ("time of training", times),
        ("demonstrations", f"{result.demonstrations:,} ({counted(result.frames, 'frame')}{per_seed})"),
    ]
    body = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in rows)
    return (
        f'<h2>What it cost</h2><table class="facts">{body}</table>'
        '<p class="quiet">Memory is that of live tensors at the peak of a step, tracked in real steps on this'
        " machine.</p>"
    )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _films(seeds: Sequence[SeedResult]) -> str:
    """Return the films of the first seed that has any, side by side, and still pictures of the adapted model."""
    captions = {"before": "before: the base has never seen this robot", "after": "after: adapted"}
    for seed in seeds:
        films = {
            name: _picture(seed.folder / name / "episodes.gif", f"Film of episodes {text}")
            for name, text in captions.items()
        }
        sheet = _picture(
            seed.folder / "after" / "episodes.png",
            "Frames of the adapted model's episodes, one row per episode, from the first frame to the last",
        )
        if not sheet and not any(films.values()):
            continue
        figures = "".join(
            f"<figure><figcaption>{captions[name]}</figcaption>{film}</figure>" for name, film in films.items() if film
        )
        of = f" of seed {seed.seed}" if len(seeds) > 1 else ""
        still = f'<h3>The adapted model, frame by frame</h3><div class="wide sheet">{sheet}</div>' if sheet else ""
        both = " The episodes are the same on both sides." if all(films.values()) else ""
        note = f'<p class="quiet">The first episodes{of}, not chosen by how they went.{both}</p>'
        return f'<h2>Films</h2>{note}<div class="films">{figures}</div>{still}'
    return ""


def _picture(path: Path, description: str) -> str:
    """Return a picture of a file, or nothing where there is none."""
    try:
        data = path.read_bytes()
    except OSError:
        return ""
    return embedded(data, path.suffix.lstrip("."), description)


def _endings(seeds: Sequence[SeedResult]) -> str:
    """Say how episodes ended, before and after, over all seeds that tell it."""
    found = [
        (before, after)
        for seed in seeds
        if (before := _outcomes(seed.folder / "before.json")) and (after := _outcomes(seed.folder / "after.json"))
    ]
    if not found:
        return ""
    columns = {"before": [each for before, _ in found for each in before]}
    columns["after"] = [each for _, after in found for each in after]
    counts = {name: Counter(_end(outcome) for outcome in outcomes) for name, outcomes in columns.items()}
    ends = [end for end in _ENDS if any(count[end] for count in counts.values())]
    limits = {outcome["steps"] for outcomes in columns.values() for outcome in outcomes if _end(outcome) == _NOTHING}
    within = f" within {limits.pop()} steps" if len(limits) == 1 else ""
    labels = {end: end + within if end == _NOTHING else end for end in ends}
    bars = "".join(
        f'<div>{name}</div><div class="ends" role="img" aria-label="{name}: '
        + ", ".join(f"{labels[end]} {count[end]}" for end in ends)
        + '">'
        + "".join(f'<div style="flex:{count[end]};background:{_ENDS[end]}"></div>' for end in ends if count[end])
        + "</div>"
        for name, count in counts.items()
    )
    rows = [
        [
            f'<span class="key" style="background:{_ENDS[end]}"></span>{labels[end]}',
            *(f"{count[end]:,} ({percent(count[end] / count.total())})" for count in counts.values()),
        ]
        for end in ends
    ]
    return f"<h2>How episodes ended</h2>{bars}{table(('', *counts), rows)}{_changes(found)}"


def _outcomes(path: Path) -> list[dict[str, Any]]:
    """Return the episodes that `vlaft evaluate --env --json` tells of; none where they cannot be read."""
    try:
        (model,) = json.loads(path.read_text(encoding="utf-8"))["models"]
        told = [(each["seed"], each["success"], each["steps"], dict(each["info"])) for each in model["outcomes"]]
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return []
    return [dict(zip(("seed", "success", "steps", "info"), each, strict=True)) for each in told]


def _end(outcome: dict[str, Any]) -> str:
    if outcome["success"]:
        return _DONE
    if "picked_up" not in outcome["info"]:
        return _UNKNOWN
    return _NOTHING if outcome["info"]["picked_up"] is None else _OTHER


def _changes(found: Sequence[tuple[list[dict[str, Any]], list[dict[str, Any]]]]) -> str:
    """Say how many episodes changed sides, where before and after are the same episodes."""
    gained = lost = 0
    for before, after in found:
        if [each["seed"] for each in before] != [each["seed"] for each in after]:
            return ""
        sides = [(old["success"], new["success"]) for old, new in zip(before, after, strict=True)]
        gained += sides.count((False, True))
        lost += sides.count((True, False))
    return f"<p>Episode by episode, {gained} that failed before succeeded after, and {lost} the other way round.</p>"


def _seeds(seeds: Sequence[SeedResult]) -> str:
    if len(seeds) == 1:
        return ""
    rows = []
    for seed in seeds:
        cells = [f"{percent(each.rate)} ({between(each.interval)})" for each in (seed.before, seed.after)]
        rows.append([str(seed.seed), *cells, f"{seed.after.episodes:,}", duration(seed.train_seconds)])
    means = []
    for rates, episodes in (
        ([seed.before.rate for seed in seeds], seeds[0].before.episodes),
        ([seed.after.rate for seed in seeds], seeds[0].after.episodes),
    ):
        means.append(f"<b>{percent(sum(rates) / len(rates))}</b> ({between(mean_interval(rates, episodes))})")
    seconds = sum(seed.train_seconds for seed in seeds) / len(seeds)
    rows.append(["<b>mean</b>", *means, "", duration(seconds)])
    columns = ("seed", "before", "after", "episodes", "time of training")
    return (
        f"<h2>Training seeds</h2>{table(columns, rows)}"
        '<p class="quiet">Each has demonstrations, a training and evaluation episodes of its own. Intervals of 95 %:'
        " Wilson's for a seed; for the mean, Student's t over seeds.</p>"
    )


def _curves(seeds: Sequence[SeedResult]) -> str:
    curves = [run for run in (_run_curves(seed.folder / "run") for seed in seeds) if run is not None]
    if not curves:
        return ""
    figures = "".join(
        plot(curve_figure(panel, curves), f"{panel.title} over training steps, in training and held out")
        for panel in CURVES
    )
    several = f" {len(curves)} seeds over each other." if len(curves) > 1 else ""
    return (
        f'<h2>Training</h2><p class="quiet">Lines: training, mean since the last logged step. Dots: demonstrations held'
        f' out, as the expert acted, not success.{several}</p><div class="curves">{figures}</div>'
        f"{_held_out_end(curves[0], several=len(curves) > 1)}"
    )


def _run_curves(run: Path) -> Curves | None:
    try:
        return read_curves(run)
    except DataError:
        return None


def _held_out_end(curves: Curves, *, several: bool) -> str:
    held_out = curves.held_out
    if not len(held_out["step"]):
        return ""
    step, accuracy, l1 = (held_out[key][-1] for key in ("step", "val_action_accuracy", "val_action_l1"))
    of = " by the first seed" if several else ""
    return f"<p>Held out, at step {step:.0f}: {percent(accuracy)} of action tokens exactly right{of}, L1 {l1:.4f}.</p>"


def _held_out(seeds: Sequence[SeedResult]) -> str:
    """Return predicted against demonstrated actions of the first seed that has such pictures."""
    for seed in seeds:
        folder = seed.folder / "held-out"
        episodes = [
            _picture(path, f"Predicted and demonstrated actions of held-out episode {number}, per dimension")
            for number, path in enumerate(sorted(folder.glob("episode-*.png")), start=1)
        ]
        errors = _picture(folder / "errors.png", "How errors of predicted actions are spread, per dimension")
        first = [picture for picture in (*episodes[:1], errors) if picture]
        if not first:
            continue
        figures = "".join(f"<figure>{picture}</figure>" for picture in first)
        others = "".join(f"<figure>{picture}</figure>" for picture in episodes[1:])
        more = (
            f'<details><summary>{counted(len(episodes) - 1, "further episode")}</summary><div class="films">{others}'
            "</div></details>"
            if others
            else ""
        )
        return (
            '<h2>Predicted against demonstrated</h2><p class="quiet">On held-out demonstrations, each model choosing'
            f' all its tokens itself: the base and the adapted run.</p><div class="films">{figures}</div>{more}'
        )
    return ""


def _commands(result: DemoResult) -> str:
    if not result.commands:
        return ""
    total = duration(sum(command.seconds for command in result.commands))
    return (
        f'<h2>The commands that were run</h2><p class="quiet">{total} in all. The times are not copied along.</p>'
        + "".join(_command(duration(command.seconds), command.line) for command in result.commands)
    )


def _command(left: str, line: str) -> str:
    return f'<div class="run"><span>{escape(left)}</span><code>{escape(line)}</code></div>'


def _next(result: DemoResult) -> str:
    model = result.merged.model or str(result.out / "model")
    run = str(result.seeds[0].folder / "run")
    other = str(result.out / "other-episodes")
    lines = [
        ("answer a robot", ["vlaft", "serve", model]),
        (
            "other episodes, with films",
            ["vlaft", "evaluate", model, "--env", "tabletop", "--seed", "0", "--plots", other],
        ),
        ("all curves", ["vlaft", "plot", run]),
        ("the 7B model's cost", ["vlaft", "report", "--recipe", "all", "--gpu-memory", "24GB"]),
        ("your own data", ["vlaft", "inspect", "demos.hdf5"]),
    ]
    return "<h2>What to type next</h2>" + "".join(_command(left, shlex.join(line)) for left, line in lines)


_INK = "#1c2733"
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
