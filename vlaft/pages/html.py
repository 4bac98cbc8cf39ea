"""Self-contained HTML pages: templates filled with text that is escaped, and pictures inside; see `page.html.j2`."""

from __future__ import annotations

import base64
import io
import shlex
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACCENT, SECOND = "#3c78b4", "#b45309"  # what is drawn, and lines over it


def fill_page(template: str, **values: Any) -> str:
    """Return a page.

    Args:
        template: its path in the package, such as `demo/page.html.j2`.
        values: what it names. All text among them is escaped.
    """
    environment = Environment(loader=PackageLoader("vlaft", ""), autoescape=True, undefined=StrictUndefined)
    environment.filters.update(percent=percent, between=between, duration=duration, counted=counted, size=size)
    environment.filters.update(grouped="{:,}".format, quote=shlex.quote)
    return environment.get_template(template).render(ACCENT=ACCENT, **values) + "\n"


@dataclass(frozen=True)
class Picture:
    """A picture that is inside the page.

    Attributes:
        description: what it shows, for those who cannot see it.
        source: its file, as a `data:` address.
        size: width and height on the page, in CSS pixels; None for its own.
    """

    description: str
    source: str
    size: tuple[int, int] | None = None


def embedded(data: bytes, kind: str, description: str, size: tuple[int, int] | None = None) -> Picture:
    """Return a picture of a file that is `png`, `jpeg` or `gif`."""
    return Picture(description, f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}", size)


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


def plot(figure: Figure, description: str) -> Picture:
    """Return a figure as a picture inside the page."""
    data = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name or instruction in another script
        figure.savefig(data, format="png")
    return embedded(data.getvalue(), "png", description)


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


def size(count: int) -> str:
    """Return a number of bytes as text.

    >>> size(143_100_000), size(15_080_000_000)
    ('143.1 MB', '15.08 GB')
    """
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun.

    >>> counted(1, "seed"), counted(1200, "episode")
    ('1 seed', '1,200 episodes')
    """
    return f"{number:,} {noun}{'s' * (number != 1)}"
