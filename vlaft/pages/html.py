"""Parts of self-contained HTML pages: a plain style, pictures inside, and nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACCENT, SECOND = "#3c78b4", "#b45309"  # what is drawn, and lines over it

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2733; background: #fff; margin: 0 auto; max-width: 1080px;
       padding: 24px 20px 80px; }
h1 { font-size: 26px; margin: 0 0 2px; } h2 { font-size: 19px; margin: 40px 0 10px; }
h3 { font-size: 15px; margin: 24px 0 6px; } p { margin: 6px 0; } .quiet { color: #5d6b7a; }
table { border-collapse: collapse; font-size: 14px; } td, th { padding: 3px 14px 3px 0; text-align: left;
       vertical-align: top; } th { color: #5d6b7a; font-weight: 600; }
.wide { overflow-x: auto; } .numbers td, .numbers th { text-align: right; font-variant-numeric: tabular-nums;
       border-bottom: 1px solid #e6eaee; white-space: nowrap; } .numbers .name { text-align: left; }
code { font: 13px/1.45 ui-monospace, monospace; background: #f1e6c8; border-radius: 3px; padding: 0 4px; }
img { display: block; max-width: 100%; } .plot { margin: 6px 0; }
.pair { display: flex; gap: 24px; flex-wrap: wrap; } figure { margin: 0 0 10px; } figcaption { font-size: 13px; }
"""


def page(title: str, body: str, style: str = "") -> str:
    """Return a whole page.

    Args:
        title: as text.
        body: as HTML.
        style: rules on top of those that all pages share.
    """
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,"><style>{_STYLE}{style}</style></head>'
        f"<body>{body}</body></html>\n"
    )


def embedded(data: bytes, kind: str, description: str, more: str = "") -> str:
    """Return a picture that is inside the page.

    Args:
        data: its file.
        kind: `png`, `jpeg` or `gif`.
        description: what it shows, for those who cannot see it.
        more: further attributes, as HTML.
    """
    encoded = base64.b64encode(data).decode("ascii")
    # height:auto lets a picture that is wider than the page keep its shape
    return f'<img alt="{escape(description)}" {more} style="height:auto" src="data:image/{kind};base64,{encoded}">'


def new_figure(
    rows: int, columns: int, height: float, *, width: float = 10.4, dpi: int = 110
) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure without pyplot, whose state is global and whose backend may want a display.

    Args:
        rows: of axes.
        columns: of axes.
        height: of a row, in inches.
        width: of the figure, in inches.
        dpi: pixels per inch.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height * rows + 0.3), dpi=dpi, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for row in grid:
        for axes in row:
            axes.tick_params(labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
    return figure, [list(row) for row in grid]


def plot(figure: Figure, description: str) -> str:
    """Return a figure as a picture inside the page."""
    data = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name or instruction in another script
        figure.savefig(data, format="png")
    return f'<div class="plot">{embedded(data.getvalue(), "png", description)}</div>'


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, names: int = 1) -> str:
    """Return a table that scrolls sideways where it is wider than the page.

    Args:
        headings: as text.
        rows: their cells, as HTML.
        names: so many first columns hold words and stand left; numbers stand right.
    """

    def line(tag: str, cells: Sequence[str]) -> str:
        kinds = [' class="name"' if column < names else "" for column in range(len(cells))]
        return (
            "<tr>" + "".join(f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, cells, strict=True)) + "</tr>"
        )

    head = line("th", [escape(heading) for heading in headings])
    return f'<div class="wide"><table class="numbers">{head}{"".join(line("td", row) for row in rows)}</table></div>'


def percent(share: float) -> str:
    r"""Return a share as text.

    >>> percent(0.815)
    '81.5\xa0%'
    """
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def between(interval: tuple[float, float]) -> str:
    r"""Return an interval of shares as text.

    >>> between((0.0625, 0.5))
    '6.2 to 50.0\xa0%'
    """
    return f"{100 * interval[0]:.1f} to {percent(interval[1])}"


def duration(seconds: float) -> str:
    """Return a time as text.

    >>> duration(2.34), duration(75), duration(3720)
    ('2.3 s', '1 min 15 s', '1 h 02 min')
    """
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun.

    >>> counted(1, "seed"), counted(1200, "episode")
    ('1 seed', '1,200 episodes')
    """
    return f"{number:,} {noun}{'s' * (number != 1)}"
