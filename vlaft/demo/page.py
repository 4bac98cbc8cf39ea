"""One self-contained HTML page about a demo: what was measured, films, curves, the commands; see `page.html.j2`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlaft.demo.results import DemoResult, SeedResult, Success, mean_interval, overlapping
from vlaft.errors import DataError
from vlaft.pages.curves import Curves, Panel, panels, read_curves
from vlaft.pages.html import ACCENT, Picture, embedded, fill_page, new_figure, plot

# how an episode ended, and its colour
_DONE, _OTHER, _NOTHING = "picked up the named object", "picked up another object", "picked up nothing"
_UNKNOWN = "failed, and the log does not say how"
_ENDS = {_DONE: ACCENT, _OTHER: "#8b95a1", _NOTHING: "#d3d9e0", _UNKNOWN: "#eef1f4"}


def render(result: DemoResult) -> str:
    """Return the page; pictures and logs that the demo's folders lack, or that cannot be read, are left out."""
    seeds = result.seeds
    columns = [seed.before for seed in seeds], [seed.after for seed in seeds]
    before, after = (_pooled(column) for column in columns)
    curves = [run for run in (_run_curves(seed.folder / "run") for seed in seeds) if run is not None]
    return fill_page(
        "demo/page.html.j2",
        result=result,
        before=before,
        after=after,
        overlapping=overlapping,
        films=next(filter(None, map(_films, seeds)), None),
        endings=_endings(seeds),
        means=[_mean(column) for column in columns],
        train_seconds=sum(seed.train_seconds for seed in seeds) / len(seeds),
        curves=curves,
        curve_plots=[_curve_plot(panel, curves) for panel in panels(curves) if panel.held_out] if curves else [],
        predictions=next(filter(None, map(_predictions, seeds)), None),
    )


def _pooled(each: Iterable[Success]) -> Success:
    """Return success over the episodes of all seeds."""
    counts = [(success.successes, success.episodes) for success in each]
    return Success(sum(done for done, _ in counts), sum(episodes for _, episodes in counts))


def _mean(each: Sequence[Success]) -> tuple[float, tuple[float, float]]:
    """Return the mean rate over seeds and its interval."""
    rates = [success.rate for success in each]
    return sum(rates) / len(rates), mean_interval(rates, each[0].episodes)


def _films(seed: SeedResult) -> dict[str, Any] | None:
    """Return a seed's films, and still pictures of the adapted model; None where it has neither."""
    captions = {"before": "before: the base has never seen this robot", "after": "after: adapted"}
    films = {
        text: _picture(seed.folder / name / "episodes.gif", f"Film of episodes {text}")
        for name, text in captions.items()
    }
    sheet = _picture(
        seed.folder / "after" / "episodes.png",
        "Frames of the adapted model's episodes, one row per episode, from the first frame to the last",
    )
    if not sheet and not any(films.values()):
        return None
    return {"seed": seed.seed, "films": films, "both": all(films.values()), "sheet": sheet}


def _picture(path: Path, description: str) -> Picture | None:
    """Return a picture of a file, or nothing where there is none."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return embedded(data, path.suffix.lstrip("."), description)


def _endings(seeds: Sequence[SeedResult]) -> dict[str, Any] | None:
    """Return how episodes ended, before and after, over all seeds that tell it."""
    found = [(_outcomes(seed.folder / "before.json"), _outcomes(seed.folder / "after.json")) for seed in seeds]
    told = [sides for sides in found if all(sides)]
    if not told:
        return None
    before = Counter(_end(outcome) for old, _ in told for outcome in old)
    after = Counter(_end(outcome) for _, new in told for outcome in new)
    limits = {each["steps"] for sides in told for side in sides for each in side if _end(each) == _NOTHING}
    within = f" within {limits.pop()} steps" if len(limits) == 1 else ""
    ends = [
        {"name": end, "label": end + within if end == _NOTHING else end, "colour": colour}
        for end, colour in _ENDS.items()
        if before[end] or after[end]
    ]
    return {"ends": ends, "before": before, "after": after, "changed": _changed(told)}


def _outcomes(path: Path) -> list[dict[str, Any]]:
    """Return the episodes that `vlaft evaluate --env --json` tells of; none where they cannot be read."""
    try:
        (model,) = json.loads(path.read_text(encoding="utf-8"))["models"]
        told = [(each["seed"], bool(each["success"]), each["steps"], dict(each["info"])) for each in model["outcomes"]]
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return []
    return [dict(zip(("seed", "success", "steps", "info"), each, strict=True)) for each in told]


def _end(outcome: dict[str, Any]) -> str:
    if outcome["success"]:
        return _DONE
    if "picked_up" not in outcome["info"]:
        return _UNKNOWN
    return _NOTHING if outcome["info"]["picked_up"] is None else _OTHER


def _changed(found: Sequence[tuple[list[dict[str, Any]], list[dict[str, Any]]]]) -> tuple[int, int] | None:
    """Return how many episodes were gained and lost; None where before and after are not the same episodes."""
    sides: Counter[tuple[bool, bool]] = Counter()
    for before, after in found:
        if [each["seed"] for each in before] != [each["seed"] for each in after]:
            return None
        sides.update((old["success"], new["success"]) for old, new in zip(before, after, strict=True))
    return sides[False, True], sides[True, False]


def _run_curves(run: Path) -> Curves | None:
    try:
        return read_curves(run)
    except DataError:
        return None


def _predictions(seed: SeedResult) -> dict[str, list[Picture]] | None:
    """Return a seed's pictures of predicted against demonstrated actions, the episodes after the first apart."""
    folder = seed.folder / "held-out"
    episodes = [
        _picture(path, f"Predicted and demonstrated actions of held-out episode {number}, per dimension")
        for number, path in enumerate(sorted(folder.glob("episode-*.png")), start=1)
    ]
    errors = _picture(folder / "errors.png", "How errors of predicted actions are spread, per dimension")
    first = [picture for picture in (*episodes[:1], errors) if picture]
    others = [picture for picture in episodes[1:] if picture]
    return {"first": first, "others": others} if first else None


_INK = "#1c2733"
_DPI = 200  # sharp on screens of two or three pixels to the point


def _curve_plot(panel: Panel, curves: Sequence[Curves]) -> Picture:
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
    return plot(figure, f"{panel.title} over training steps, in training and held out")
