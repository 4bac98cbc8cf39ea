"""One HTML page about demonstrations: frames, plots, statistics, warnings.

It is self-contained: pictures are inside, and nothing is loaded from elsewhere.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from vlaft.data.sentences import flow
from vlaft.inspection.facts import FRAMES_PER_EPISODE, THUMBNAIL_HEIGHT, Inspection, thumbnail
from vlaft.observation.images import Image
from vlaft.pages.html import ACCENT, SECOND, embedded, new_figure, page, plot

_EPISODES_DRAWN = 40  # lines per plot; more are a smear
_COLUMNS = 4  # of small plots side by side
_NAME = 40  # letters of an episode's name before it is cut to its last part
_GAP = 4  # pixels between the frames of a strip
_STYLE = """
ol.warnings { background: #fff7e6; border: 1px solid #f0d79a; border-radius: 6px; padding: 12px 16px 12px 40px;
       margin: 0; } ol.warnings li { margin: 5px 0; overflow-wrap: anywhere; }
.strip { display: grid; grid-template-columns: 150px 1fr; gap: 12px; align-items: center; padding: 4px 0;
       border-top: 1px solid #e6eaee; font-size: 13px; } .strip div { overflow-wrap: anywhere; }
@media (max-width: 600px) { .strip { grid-template-columns: 1fr; gap: 4px; } }
"""


def render(inspection: Inspection, summary: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        inspection: taken with thumbnails.
        summary: what `vlaft.inspection.summary.summarize` made of it.
    """
    title = f"{summary['name']}: {summary['episodes']} episodes, {summary['steps']} steps"
    sections = [
        f"<h1>{escape(str(summary['name']))}</h1><p class=quiet>{escape(str(summary['path']))}</p>",
        _overview(summary),
        _warnings(summary["warnings"]),
        _sheets(inspection),
        _lengths(inspection),
        _actions(inspection),
    ]
    standardized = summary["standardized"]
    if standardized is None or (standardized["steps"] and summary["kind"] == "source"):
        sections.append(_figures("The action as stored", summary["action"]))
    if standardized is not None:
        steps = ", ".join(flow(step) for step in standardized["steps"]) or "no standardizing steps"
        sections.append(_figures("The action as converted", standardized, f"{standardized['rows']} steps; {steps}."))
    return page(title, "".join(sections), _STYLE)


def _overview(summary: Mapping[str, Any]) -> str:
    splits = ", ".join(f"{split} {counts['episodes']}" for split, counts in summary["splits"].items())
    lengths = sorted(summary["steps_per_episode"])
    rate = "unknown" if summary["fps"] is None else f"{summary['fps']:g} Hz"
    absolute = {True: "absolute targets, by the state", False: "deltas, by the state", None: "not told by the data"}
    cameras = []
    for name, shape in summary["cameras"].items():
        ours = summary["camera_names"].get(name)
        called = "" if ours == name else f" as {ours}" if ours else ", not kept"
        cameras.append(escape(f"{name} ({'×'.join(str(size) for size in shape)}{called})"))
    grippers = [
        escape(
            f"{guess['label']}: {guess['low']:.3g} to {guess['high']:.3g}, {guess['kind']}, open at "
            + ("unknown" if guess["open_at"] is None else f"{guess['open_at']:.3g}")
            + f" ({guess['why']})"
        )
        for guess in summary["grippers"]
    ]
    counts: dict[str, int] = {}
    for text in summary["instruction_per_episode"]:
        counts[text or "(none)"] = counts.get(text or "(none)", 0) + 1
    counts.update({text: 0 for text in summary["instructions"] if text not in counts})  # of some steps of an episode
    instructions = [escape(text) + (f" ({count} episodes)" if count > 1 else "") for text, count in counts.items()]
    rows = [
        ("format", escape(summary["format"] + (f", preset {summary['preset']}" if summary["preset"] else ""))),
        ("episodes", f"{summary['episodes']}" + (f" ({escape(splits)})" if splits else "")),
        ("steps", f"{summary['steps']} ({lengths[0]} to {lengths[-1]} per episode)"),
        ("control rate", rate),
        ("cameras", "<br>".join(cameras) or "none"),
        ("instructions", "<br>".join(instructions)),
        ("action", f"{summary['action']['dim']} dimensions of {escape(' + '.join(summary['action']['source']))}"),
        ("absolute or delta", absolute[summary["absolute"]]),
        ("idle steps", f"{summary['idle_share']:.1%}"),
        *([("gripper", "<br>".join(grippers))] if grippers else []),
    ]
    return "<table>" + "".join(f"<tr><th>{name}<td>{value}" for name, value in rows) + "</table>"


def _warnings(warnings: Sequence[str]) -> str:
    if not warnings:
        return "<h2>Warnings</h2><p>None.</p>"
    items = "".join(f"<li>{_marked(warning)}" for warning in warnings)
    return f"<h2>Warnings ({len(warnings)})</h2><ol class=warnings>{items}</ol>"


def _marked(warning: str) -> str:
    """Set words that are to be typed, `key='...'` or `--option ...`, in code."""
    word = re.compile(
        r"\b[a-z_]+='[^']*'|\b[a-z_]+=\S+?(?=[\s,;:)]|$)|--[a-z][\w-]*(?: (?!when|or|and|unless)[\w.-]+)?"
    )
    parts, end = [], 0
    for match in word.finditer(warning):
        parts += [escape(warning[end : match.start()]), f"<code>{escape(match[0])}</code>"]
        end = match.end()
    return "".join([*parts, escape(warning[end:])])


def _sheets(inspection: Inspection) -> str:
    """Return a contact sheet per camera: one strip of frames per episode."""
    parts = ["<h2>Frames</h2>"]
    if not any(episode.cameras for episode in inspection.episodes):
        return parts[0] + "<p>No frames were looked at.</p>"
    turned = any(not np.array_equal(stored, seen) for stored, seen in inspection.pictures.values())
    parts.append(
        f"<p class=quiet>Up to {FRAMES_PER_EPISODE} frames per episode, from the first to the last"
        + (", as converted: turned or recoloured by the standardizing steps.</p>" if turned else ".</p>")
    )
    for camera in inspection.shapes:
        ours = inspection.labels.get(camera)
        note = "" if ours == camera else f" (as {ours})" if ours else " (not kept by the layout)"
        parts.append(f"<h3>{escape(camera + note)}</h3>")
        stored, seen = inspection.pictures.get(camera, (None, None))
        if stored is not None and seen is not None and not np.array_equal(stored, seen):
            pair = (("as stored", stored), ("as converted", seen))
            figures = [
                f"<figure>{_jpeg(thumbnail(image), text)}<figcaption>{text}</figcaption></figure>"
                for text, image in pair
            ]
            parts.append(f"<div class=pair>{''.join(figures)}</div>")
        for episode in inspection.episodes:
            facts = episode.cameras.get(camera)
            if facts is None:
                continue
            picture = _jpeg(_strip(facts.thumbnails), f"{camera}, {episode.name}") if facts.thumbnails else ""
            failed = escape(facts.error) if facts.error else ""
            short = episode.name if len(episode.name) <= _NAME else "…/" + episode.name.rpartition("/")[2][-_NAME:]
            label = f'<b title="{escape(episode.name)}">{escape(short)}</b><br>{escape(episode.instruction[:90])}'
            parts.append(f"<div class=strip><div>{label}</div><div>{picture}{failed}</div></div>")
    return "".join(parts)


def _strip(thumbnails: Sequence[Image]) -> Image:
    """Join frames of one height side by side."""
    gap = np.full((len(thumbnails[0]), _GAP, 3), 255, dtype=np.uint8)
    joined = [part for image in thumbnails for part in (image, gap)]
    return np.concatenate(joined[:-1], axis=1)


def _jpeg(image: Image, description: str) -> str:
    from PIL import Image as PillowImage

    data = io.BytesIO()
    PillowImage.fromarray(np.ascontiguousarray(image)).save(data, "JPEG", quality=80)
    height, width = image.shape[:2]
    shown = round(width * THUMBNAIL_HEIGHT / height)  # small frames are enlarged by the browser
    return embedded(data.getvalue(), "jpeg", description, f"width={shown} height={THUMBNAIL_HEIGHT}")


def _lengths(inspection: Inspection) -> str:
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
    return "<h2>Lengths</h2>" + plot(figure, "steps of every episode")


def _actions(inspection: Inspection) -> str:
    """Return the raw action over time, one small plot per dimension, a line per episode."""
    shown = list(inspection.episodes)[:_EPISODES_DRAWN]
    size = shown[0].action.shape[1]
    rows = -(-size // _COLUMNS)
    figure, grid = new_figure(rows, min(size, _COLUMNS), height=1.75)
    cells = [axes for row in grid for axes in row]
    for dim, axes in enumerate(cells):
        if dim >= size:
            axes.set_axis_off()
            continue
        for number, episode in enumerate(shown):
            axes.plot(episode.action[:, dim], linewidth=0.8, alpha=0.7, color=_colour(number, len(shown)))
        axes.set_title(_title(inspection.action_names, dim), fontsize=9, loc="left", parse_math=False)
    more = f"; the first {len(shown)} of {len(inspection.episodes)}" if len(shown) < len(inspection.episodes) else ""
    return (
        "<h2>Actions over time</h2>"
        f"<p class=quiet>As stored, over the steps of an episode; one line per episode{more}.</p>"
        + plot(figure, "actions over time")
    )


def _figures(title: str, action: Mapping[str, Any], note: str = "") -> str:
    """Return histograms and the table of statistics of one action vector."""
    from matplotlib.ticker import MaxNLocator

    size = action["dim"]
    figure, grid = new_figure(-(-size // _COLUMNS), min(size, _COLUMNS), height=1.6)
    cells = [axes for row in grid for axes in row]
    for dim, axes in enumerate(cells):
        if dim >= size:
            axes.set_axis_off()
            continue
        histogram = action["histograms"][dim]
        edges = np.asarray(histogram["edges"])
        axes.bar(edges[:-1], histogram["counts"], width=np.diff(edges), align="edge", color=ACCENT)
        for name in ("q01", "q99"):
            axes.axvline(action["stats"][name][dim], color=SECOND, linewidth=1, linestyle="--")
        axes.set_yscale("symlog", linthresh=1)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_ylim(bottom=0)
        axes.set_title(_title(action["names"], dim), fontsize=9, loc="left", parse_math=False)
    columns = ("mean", "std", "min", "q01", "q99", "max")
    clipped = action.get("clipped")
    head = "".join(f"<th>{name}" for name in (*columns, *(["clipped"] if clipped else [])))
    body = []
    for dim in range(size):
        cells_of = "".join(f"<td>{_number(action['stats'][name][dim])}" for name in columns)
        if clipped:
            cells_of += f"<td>{clipped[dim]:.1%}" if action["mask"][dim] else "<td>–"
        body.append(f"<tr><td>{dim}<td class=name>{escape(action['names'][dim]) if action['names'] else ''}{cells_of}")
    return (
        f"<h2>{escape(title)}</h2><p class=quiet>{escape(note)} Counts on a logarithmic scale; dashed: q01 and q99,"
        " between which training clips.</p>"
        + plot(figure, title)
        + f"<div class=wide><table class=numbers><tr><th>#<th class=name>name{head}{''.join(body)}</table></div>"
    )


def _number(value: float) -> str:
    return f"{value:.4g}".replace("-", "\u2212")


def _title(names: Sequence[str], dim: int) -> str:
    return f"{dim} {names[dim]}" if names else str(dim)


def _colour(number: int, count: int) -> tuple[float, float, float, float]:
    from matplotlib import colormaps

    red, green, blue, _ = colormaps["viridis"](number / max(count - 1, 1) * 0.9)
    return float(red), float(green), float(blue), 1.0
