"""One HTML page about demonstrations: frames, plots, statistics, warnings; its text is in `page.html.j2`."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vlaft.data.sentences import flow
from vlaft.inspection.facts import FRAMES_PER_EPISODE, THUMBNAIL_HEIGHT, Inspection, thumbnail
from vlaft.observation.images import Image
from vlaft.pages.html import ACCENT, SECOND, Picture, embedded, fill_page, new_figure, plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_EPISODES_DRAWN = 40  # lines per plot; more are a smear
_COLUMNS = 4  # of small plots side by side
_NAME = 40  # letters of an episode's name before it is cut to its last part
_GAP = 4  # pixels between the frames of a strip
# words that are to be typed: `key='...'` or `--option ...`
_TYPED = re.compile(
    r"(\b[a-z_]+='[^']*'|\b[a-z_]+=\S+?(?=[\s,;:)]|$)|--[a-z][\w-]*(?: (?!when|or|and|unless)[\w.-]+)?)"
)


def render(inspection: Inspection, summary: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        inspection: taken with thumbnails.
        summary: what `vlaft.inspection.summary.summarize` made of it.
    """
    instructions = Counter(text or "(none)" for text in summary["instruction_per_episode"])
    instructions.update(dict.fromkeys(summary["instructions"], 0))  # of some steps of an episode
    return fill_page(
        "inspection/page.html.j2",
        summary=summary,
        instructions=instructions,
        warnings=[_TYPED.split(warning) for warning in summary["warnings"]],
        frames_per_episode=FRAMES_PER_EPISODE,
        turned=any(not np.array_equal(stored, seen) for stored, seen in inspection.pictures.values()),
        sheets=list(_sheets(inspection)) if any(episode.cameras for episode in inspection.episodes) else None,
        lengths=_lengths(inspection),
        drawn=min(len(inspection.episodes), _EPISODES_DRAWN),
        over_time=_actions(inspection),
        vectors=list(_vectors(summary)),
        columns=("mean", "std", "min", "q01", "q99", "max"),
        number=_number,
    )


def _sheets(inspection: Inspection) -> Iterator[dict[str, Any]]:
    """Yield a contact sheet per camera: one strip of frames per episode."""
    for camera in inspection.shapes:
        stored, seen = inspection.pictures.get(camera, (None, None))
        pair = []
        if stored is not None and seen is not None and not np.array_equal(stored, seen):
            pair = [_jpeg(thumbnail(stored), "as stored"), _jpeg(thumbnail(seen), "as converted")]
        strips = []
        for episode in inspection.episodes:
            facts = episode.cameras.get(camera)
            if facts is None:
                continue
            name = episode.name
            strips.append(
                {
                    "name": name,
                    "short": name if len(name) <= _NAME else "…/" + name.rpartition("/")[2][-_NAME:],
                    "instruction": episode.instruction,
                    "picture": _jpeg(_strip(facts.thumbnails), f"{camera}, {name}") if facts.thumbnails else None,
                    "error": facts.error,
                }
            )
        yield {"camera": camera, "ours": inspection.labels.get(camera), "pair": pair, "strips": strips}


def _strip(thumbnails: Sequence[Image]) -> Image:
    """Join frames of one height side by side."""
    gap = np.full((len(thumbnails[0]), _GAP, 3), 255, dtype=np.uint8)
    joined = [part for image in thumbnails for part in (image, gap)]
    return np.concatenate(joined[:-1], axis=1)


def _jpeg(image: Image, description: str) -> Picture:
    from PIL import Image as PillowImage

    data = io.BytesIO()
    PillowImage.fromarray(np.ascontiguousarray(image)).save(data, "JPEG", quality=80)
    height, width = image.shape[:2]
    shown = round(width * THUMBNAIL_HEIGHT / height)  # small frames are enlarged by the browser
    return embedded(data.getvalue(), "jpeg", description, (shown, THUMBNAIL_HEIGHT))


def _lengths(inspection: Inspection) -> Picture:
    from matplotlib.ticker import MaxNLocator

    lengths = [episode.steps for episode in inspection.episodes]
    figure, [[axes]] = new_figure(1, 1, height=2.0)
    axes.bar(range(len(lengths)), lengths, color=ACCENT, width=0.8)
    median = float(np.median(lengths))
    axes.axhline(median, color=SECOND, linewidth=1, linestyle="--")
    axes.set_title(f"dashed: median, {median:g}", fontsize=9, loc="left")
    axes.set_xlabel("episode")
    axes.set_ylabel("steps")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return plot(figure, "steps of every episode")


def _actions(inspection: Inspection) -> Picture:
    """Return the raw action over time, one small plot per dimension, a line per episode."""
    shown = list(inspection.episodes)[:_EPISODES_DRAWN]
    figure, plots = _small_plots(shown[0].action.shape[1], inspection.action_names, height=1.75)
    for dim, axes in enumerate(plots):
        for number, episode in enumerate(shown):
            axes.plot(episode.action[:, dim], linewidth=0.8, alpha=0.7, color=_colour(number, len(shown)))
    return plot(figure, "actions over time")


def _vectors(summary: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the action as stored and as converted, or one of them where they are the same."""
    standardized = summary["standardized"]
    if standardized is None or (standardized["steps"] and summary["kind"] == "source"):
        yield _vector("The action as stored", summary["action"])
    if standardized is not None:
        steps = ", ".join(flow(step) for step in standardized["steps"]) or "no standardizing steps"
        yield _vector("The action as converted", standardized, f"{standardized['rows']} steps; {steps}.")


def _vector(title: str, action: Mapping[str, Any], note: str = "") -> dict[str, Any]:
    return {"title": title, "note": note, "action": action, "histograms": plot(_histograms(action), title)}


def _histograms(action: Mapping[str, Any]) -> Figure:
    from matplotlib.ticker import MaxNLocator

    figure, plots = _small_plots(action["dim"], action["names"], height=1.6)
    for dim, axes in enumerate(plots):
        histogram = action["histograms"][dim]
        edges = np.asarray(histogram["edges"])
        axes.bar(edges[:-1], histogram["counts"], width=np.diff(edges), align="edge", color=ACCENT)
        for name in ("q01", "q99"):
            axes.axvline(action["stats"][name][dim], color=SECOND, linewidth=1, linestyle="--")
        axes.set_yscale("symlog", linthresh=1)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_ylim(bottom=0)
    return figure


def _small_plots(size: int, names: Sequence[str], height: float) -> tuple[Figure, list[Axes]]:
    """Return a plot per dimension of an action, several side by side."""
    figure, grid = new_figure(-(-size // _COLUMNS), min(size, _COLUMNS), height)
    cells = [axes for row in grid for axes in row]
    for dim, axes in enumerate(cells[:size]):
        axes.set_title(f"{dim} {names[dim]}" if names else str(dim), fontsize=9, loc="left", parse_math=False)
    for axes in cells[size:]:
        axes.set_axis_off()
    return figure, cells[:size]


def _number(value: float) -> str:
    return f"{value:.4g}".replace("-", "\u2212")


def _colour(number: int, count: int) -> tuple[float, float, float, float]:
    from matplotlib import colormaps

    red, green, blue, _ = colormaps["viridis"](number / max(count - 1, 1) * 0.9)
    return float(red), float(green), float(blue), 1.0
