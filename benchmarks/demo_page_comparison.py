"""The demo page's section on recipes beside each other and beside the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import combinations

from vlaft.demo.page import comparison_figure
from vlaft.demo.results import PAPER_SUCCESS, RecipeResult
from vlaft.pages.html import between, counted, duration, percent, plot, table

_NORMAL = 1.96  # standard errors on either side of a mean that make an interval of 95 %


def section(comparison: Sequence[RecipeResult]) -> str:
    """Return the section: the figure, what the order says, the table."""
    seeds = sorted({len(result.rates) for result in comparison})
    episodes = sorted({result.episodes for result in comparison})
    several = [count for count in seeds if count > 1]
    kinds = [
        *(["Intervals are Student's t over training seeds."] if several else []),
        *(
            ["A recipe of one training seed has Wilson's interval, which says nothing of how seeds differ."]
            * (1 in seeds)
        ),
        *(
            ["An interval of no width says that the seeds came out alike, not that the mean is certain."]
            if any(len(result.rates) > 1 and len(set(result.rates)) == 1 for result in comparison)
            else []
        ),
    ]
    described = ", ".join(f"{result.recipe} {percent(result.mean)}" for result in comparison)
    return (
        "<h2>Recipes beside each other, and beside the paper's</h2>"
        f"<p>{_range(seeds, 'training seed')} per recipe, {_range(episodes, 'episode')} each, in scenes that nothing"
        f" was chosen by. {' '.join(kinds)} The paper's column (OpenVLA, arXiv 2406.09246, table 1) is a 7B model on"
        " real Franka robots; only the order of recipes can be compared with it, not the height.</p>"
        f'<div class="rows">{plot(comparison_figure(comparison), f"Success of each recipe here: {described}")}</div>'
        f"{order(comparison)}{_table(comparison)}{_searches(comparison)}"
    )


@dataclass(frozen=True)
class Pair:
    """Two recipes that the paper compares too.

    Attributes:
        above: the one that does better in the paper.
        below: the other one.
        overlap: whether our intervals overlap.
        paper_overlap: whether the paper's do, taken as 1.96 standard errors on either side.
    """

    above: RecipeResult
    below: RecipeResult
    overlap: bool
    paper_overlap: bool

    @property
    def reversed(self) -> bool:
        """Whether our means stand in the other order."""
        return self.above.mean < self.below.mean


def pairs(comparison: Sequence[RecipeResult]) -> list[Pair]:
    """Return all pairs of recipes that the paper has, too; the better one of the paper first."""
    known = [result for result in comparison if result.recipe in PAPER_SUCCESS]
    known.sort(key=lambda result: -PAPER_SUCCESS[result.recipe][0])
    return [
        Pair(
            above,
            below,
            overlapping(above.interval, below.interval),
            overlapping(_paper_interval(above.recipe), _paper_interval(below.recipe)),
        )
        for above, below in combinations(known, 2)
    ]


def _paper_interval(recipe: str) -> tuple[float, float]:
    mean, error = PAPER_SUCCESS[recipe]
    return mean - _NORMAL * error, mean + _NORMAL * error


def overlapping(first: tuple[float, float], second: tuple[float, float]) -> bool:
    """Return whether two intervals share a point."""
    return first[0] <= second[1] and second[0] <= first[1]


def order(comparison: Sequence[RecipeResult]) -> str:
    """Say, as HTML, where our order of recipes differs from the paper's, and what of it the intervals bear out."""
    compared = pairs(comparison)
    if not compared:
        return "<p>Fewer than two of these recipes are in the paper's table: there is no order to compare.</p>"
    total = counted(len(compared), "pair") + " of recipes"
    reversals = [pair for pair in compared if pair.reversed]
    ties = sum(pair.above.mean == pair.below.mean for pair in compared)
    tied = f"; {ties} {_are(ties)} equal here" if ties else ""
    if not reversals and not ties:
        parts = [f"<p><b>Our order of recipes is the paper's</b> ({total}).</p>"]
    elif not reversals:
        parts = [f"<p><b>Of {total}, none stands in the other order than in the paper</b>{tied}.</p>"]
    else:
        stand = "stands" if len(reversals) == 1 else "stand"
        told = f"{len(reversals)} of {total} {stand} in the other order than in the paper"
        certain = sum(not pair.overlap and not pair.paper_overlap for pair in reversals)
        parts = [
            f"<p><b>{told}</b>{tied}:</p><ul>{''.join(f'<li>{_reversal(pair)}</li>' for pair in reversals)}</ul>",
            f"<p>{certain} of these {len(reversals)} {_are(certain)} beyond the intervals of both sides.</p>"
            if certain
            else "<p>None of these reversals is beyond doubt: in each, our intervals or the paper's overlap.</p>",
        ]
    parts.append(_undecided(compared))
    return "".join(parts)


def _reversal(pair: Pair) -> str:
    above, below = pair.above.recipe, pair.below.recipe
    ours = f"{percent(pair.above.mean)} against {percent(pair.below.mean)}"
    papers = f"{percent(PAPER_SUCCESS[above][0] / 100)} against {percent(PAPER_SUCCESS[below][0] / 100)}"
    here = "overlap" if pair.overlap else "do not overlap"
    there = "the paper's " + ("do" if pair.paper_overlap else "do not")
    if pair.overlap == pair.paper_overlap:
        there = "and so do the paper's" if pair.overlap else "nor do the paper's"
    return (
        f"{escape(above)} is below {escape(below)} here ({ours}) and above it in the paper ({papers}):"
        f" our intervals {here}, {there}."
    )


def _undecided(compared: Sequence[Pair]) -> str:
    overlaps = [pair for pair in compared if pair.overlap]
    papers = sum(pair.paper_overlap for pair in compared)
    paper = f"in the paper (1.96 standard errors on either side), those of {papers} of {len(compared)}."
    if not overlaps:
        return f"<p>Here, the intervals of no pair overlap; {paper}</p>"
    named = ", ".join(f"{escape(pair.above.recipe)} and {escape(pair.below.recipe)}" for pair in overlaps)
    return (
        f"<p>Here, the intervals of {len(overlaps)} of {counted(len(compared), 'pair')} overlap, so that the order"
        f" within them may be chance: {named}; {paper}</p>"
    )


def _table(comparison: Sequence[RecipeResult]) -> str:
    columns = ("recipe", "success", "95 % interval", "each seed", "paper", "trained parameters", "time of a training")
    rows = []
    for result in comparison:
        paper = PAPER_SUCCESS.get(result.recipe)
        rows.append(
            [
                escape(result.recipe),
                percent(result.mean),
                between(result.interval),
                ", ".join(percent(rate) for rate in result.rates),
                "–" if paper is None else f"{paper[0]:.1f} ± {paper[1]:.1f}\N{NO-BREAK SPACE}%",
                f"{result.trainable:,}" if result.trainable else "–",
                duration(result.train_seconds) if result.trainable else "–",
            ]
        )
    return table(columns, rows)


def _searches(comparison: Sequence[RecipeResult]) -> str:
    """Return which learning rates were chosen, and what the search for them saw."""
    rows = [
        [escape(result.recipe), f"{result.learning_rate:g}", _search(result)]
        for result in comparison
        if result.learning_rate is not None
    ]
    if not rows:
        return ""
    return (
        "<h3>Learning rates, and what their search saw</h3>"
        '<p class="quiet">Success in scenes for validation, per learning rate; the best one was chosen. Success above'
        " is in other scenes, which the choice does not flatter.</p>"
        f'<div class="searches">{table(("recipe", "learning rate", "success in validation"), rows)}</div>'
    )


def _search(result: RecipeResult) -> str:
    """Return the searched learning rates with their success, the chosen one bold, and whether it lies at an end."""
    if not result.searched:
        return "–"
    seen = sorted((float(rate), success) for rate, success in result.searched.items())
    texts = []
    for rate, success in seen:
        text = f"{rate:g}:\N{NO-BREAK SPACE}{percent(success)}"
        texts.append(f"<b>{text}</b>" if rate == result.learning_rate else text)
    ends = (seen[0][0], seen[-1][0])
    note = " (chosen at an end of the search)" if len(seen) > 1 and result.learning_rate in ends else ""
    return ", ".join(texts) + note


def _range(numbers: Sequence[int], noun: str) -> str:
    return counted(numbers[0], noun) if len(numbers) == 1 else f"{numbers[0]:,} to {counted(numbers[-1], noun)}"


def _are(number: int) -> str:
    return "is" if number == 1 else "are"
