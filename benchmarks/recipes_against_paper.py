"""Compare every recipe on the demo's new robot, and the order of recipes with the paper's.

    python benchmarks/recipes_against_paper.py --out recipes-out

takes an hour or more on two CPU cores; the same command again goes on where it was interrupted. The same for every
recipe are demonstrations, base, number of steps, batch, augmentation, schedule, the candidates for the learning rate,
the episodes that choose among them and the episodes that are reported. A tie goes to the lower rate.

OUT/
  base/                        the demo's base
  validation/                  demonstrations that learning rates are chosen on
  seed-1/ ...                  demonstrations of each training seed
  RECIPE/search-RATE/          a run on the validation demonstrations, and validation.json: its successes
  RECIPE/seed-1/ ...           runs with the best rate, and report.json: their successes on seeds used for nothing else
  zero-shot/seed-1/ ...        the base as it is
  comparison.json, comparison.md, comparison.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from studies import begin, run

from vlaft.cli.console import say
from vlaft.cli.main import main as vlaft
from vlaft.demo.results import Cost, Success, mean_interval, overlapping, write_result
from vlaft.demo.steps import (
    BATCH_WORD,
    DemoStep,
    acting,
    converting,
    recording,
    run_steps,
    scene_seeds,
    train_seconds,
    trained,
    training,
    write_base,
)
from vlaft.files import locked, output_file
from vlaft.pages.html import ACCENT, between, counted, duration, new_figure, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RECIPES = ("last-layer", "frozen-vision", "sandwich", "lora32", "qlora32", "full")
ZERO_SHOT = "zero-shot"
RATES = (5e-4, 1e-3, 2e-3, 5e-3)
# First scenes of demonstrations and of episodes for choosing learning rates; no training seed is near them.
VALIDATION = (500_000, 550_000)
# The paper's own column: success of OpenVLA 7B adapted to Franka-Tabletop tasks, in percent, with standard errors
# (OpenVLA, arXiv 2406.09246, table 1)
PAPER_SUCCESS = {
    "full": (69.7, 7.2),
    "last-layer": (30.3, 6.1),
    "frozen-vision": (47.0, 6.9),
    "sandwich": (62.1, 7.9),
    "lora32": (68.2, 7.5),
}
NORMAL = 1.96  # standard errors on either side of a mean that make an interval of 95 %
GREY = "#7b8794"


@dataclass(frozen=True)
class RecipeResult:
    """One recipe in the comparison.

    Attributes:
        recipe: its name; `zero-shot` for the base as it is.
        learning_rate: that did best on the validation seeds; None where nothing was trained.
        searched: learning rate to success on the validation seeds.
        rates: success of each training seed, on seeds that nothing was chosen by.
        episodes: of each of these.
        trainable: number of parameters.
        train_seconds: mean of one training.
    """

    recipe: str
    learning_rate: float | None
    searched: Mapping[str, float]
    rates: Sequence[float]
    episodes: int
    trainable: int
    train_seconds: float

    @property
    def mean(self) -> float:
        """Mean success over training seeds."""
        return sum(self.rates) / len(self.rates)

    @property
    def interval(self) -> tuple[float, float]:
        """Interval of 95 % of the mean over training seeds (Student's t); Wilson's where there is one seed."""
        return mean_interval(self.rates, self.episodes)


def comparison_steps(out: Path, base: Path, demonstrations: int, seeds: int) -> Iterator[DemoStep]:
    """Yield the commands in their order; each is to be done before the next is asked for.

    Args:
        out: folder of all results.
        base: the demo's base.
        demonstrations: per seed.
        seeds: number of training seeds.
    """
    yield recording(out / "validation", demonstrations, VALIDATION[0])
    yield converting(out / "validation", base)
    for seed in range(1, seeds + 1):
        folder = out / f"seed-{seed}"
        yield recording(folder, demonstrations, scene_seeds(seed)[0])
        yield converting(folder, base)
        yield acting(base, out / ZERO_SHOT / f"seed-{seed}", "report", scene_seeds(seed)[1])
    for recipe in RECIPES:
        cost = out / recipe / "cost.json"
        words = ("report", "--base", str(base), "--recipe", recipe, "--measure", "--json", BATCH_WORD)
        yield DemoStep(words, cost, cost)
        for rate in RATES:
            folder = search_folder(out, recipe, rate)
            yield training(recipe, rate, 0, base, out / "validation" / "data", folder / "run")
            yield acting(trained(folder), folder, "validation", VALIDATION[1])
    for seed in range(1, seeds + 1):  # seed by seed, so that whatever there is compares all recipes
        for recipe in RECIPES:
            folder = out / recipe / f"seed-{seed}"
            data = out / f"seed-{seed}" / "data"
            yield training(recipe, best_rate(out, recipe), seed, base, data, folder / "run")
            yield acting(trained(folder), folder, "report", scene_seeds(seed)[1])


def search_folder(out: Path, recipe: str, rate: float) -> Path:
    """Return where a candidate of the search lies."""
    return out / recipe / f"search-{rate:g}"


def searched(out: Path, recipe: str) -> dict[str, float]:
    """Return learning rate, as text, to success on the validation episodes."""
    return {f"{rate:g}": Success.from_file(search_folder(out, recipe, rate) / "validation.json").rate for rate in RATES}


def best_rate(out: Path, recipe: str) -> float:
    """Return the learning rate that did best on the validation episodes; the lowest of several."""
    found = searched(out, recipe)
    return max(RATES, key=lambda rate: (found[f"{rate:g}"], -rate))


def read_comparison(out: Path, seeds: int) -> list[RecipeResult]:
    """Gather what the commands left on disk, the base as it is first."""

    def successes(name: str) -> list[Success]:
        return [Success.from_file(out / name / f"seed-{seed}" / "report.json") for seed in range(1, seeds + 1)]

    base = successes(ZERO_SHOT)
    results = [RecipeResult(ZERO_SHOT, None, {}, [each.rate for each in base], base[0].episodes, 0, 0.0)]
    for recipe in RECIPES:
        found = successes(recipe)
        times = [train_seconds(out / recipe / f"seed-{seed}" / "run") for seed in range(1, seeds + 1)]
        results.append(
            RecipeResult(
                recipe=recipe,
                learning_rate=best_rate(out, recipe),
                searched=searched(out, recipe),
                rates=[each.rate for each in found],
                episodes=found[0].episodes,
                trainable=Cost.from_file(out / recipe / "cost.json").trainable,
                train_seconds=sum(times) / len(times),
            )
        )
    return results


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
    return mean - NORMAL * error, mean + NORMAL * error


def order(comparison: Sequence[RecipeResult]) -> list[str]:
    """Say, in lines of Markdown, where our order of recipes differs from the paper's, and what of it is certain."""
    compared = pairs(comparison)
    if not compared:
        return ["Fewer than two of these recipes are in the paper's table: there is no order to compare."]
    total = counted(len(compared), "pair") + " of recipes"
    reversals = [pair for pair in compared if pair.reversed]
    ties = sum(pair.above.mean == pair.below.mean for pair in compared)
    tied = f"; {ties} {_are(ties)} equal here" if ties else ""
    if not reversals and not ties:
        lines = [f"Our order of recipes is the paper's ({total})."]
    elif not reversals:
        lines = [f"Of {total}, none stands in the other order than in the paper{tied}."]
    else:
        stand = "stands" if len(reversals) == 1 else "stand"
        certain = sum(not pair.overlap and not pair.paper_overlap for pair in reversals)
        lines = [
            f"{len(reversals)} of {total} {stand} in the other order than in the paper{tied}:",
            "",
            *(f"- {_reversal(pair)}" for pair in reversals),
            "",
            f"{certain} of these {len(reversals)} {_are(certain)} beyond the intervals of both sides."
            if certain
            else "None of these reversals is beyond doubt: in each, our intervals or the paper's overlap.",
        ]
    return [*lines, "", _undecided(compared)]


def _reversal(pair: Pair) -> str:
    above, below = pair.above.recipe, pair.below.recipe
    ours = f"{percent(pair.above.mean)} against {percent(pair.below.mean)}"
    papers = f"{percent(PAPER_SUCCESS[above][0] / 100)} against {percent(PAPER_SUCCESS[below][0] / 100)}"
    here = "overlap" if pair.overlap else "do not overlap"
    there = "the paper's " + ("do" if pair.paper_overlap else "do not")
    if pair.overlap == pair.paper_overlap:
        there = "and so do the paper's" if pair.overlap else "nor do the paper's"
    return (
        f"{above} is below {below} here ({ours}) and above it in the paper ({papers}): our intervals {here}, {there}."
    )


def _undecided(compared: Sequence[Pair]) -> str:
    overlaps = [pair for pair in compared if pair.overlap]
    papers = sum(pair.paper_overlap for pair in compared)
    paper = f"in the paper (1.96 standard errors on either side), those of {papers} of {len(compared)}."
    if not overlaps:
        return f"Here, the intervals of no pair overlap; {paper}"
    named = ", ".join(f"{pair.above.recipe} and {pair.below.recipe}" for pair in overlaps)
    return (
        f"Here, the intervals of {len(overlaps)} of {counted(len(compared), 'pair')} overlap, so that the order"
        f" within them may be chance: {named}; {paper}"
    )


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


def markdown(comparison: Sequence[RecipeResult]) -> str:
    """Return the table, what its order says, and what the search for learning rates saw."""
    seeds = sorted({len(result.rates) for result in comparison})
    episodes = sorted({result.episodes for result in comparison})
    kinds = [
        *(["Intervals are Student's t over training seeds."] if seeds[-1] > 1 else []),
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
    columns = ("recipe", "success", "95 % interval", "each seed", "paper", "trained parameters", "time of a training")
    lines = [
        "# Recipes beside each other, and beside the paper's",
        "",
        f"{_range(seeds, 'training seed')} per recipe, {_range(episodes, 'episode')} each, in scenes that nothing was"
        f" chosen by. {' '.join(kinds)} The paper's column (OpenVLA, arXiv 2406.09246, table 1) is a 7B model on real"
        " Franka robots; only the order of recipes can be compared with it, not the height.",
        "",
        *_table(columns, [_row(result) for result in comparison]),
        "",
        *order(comparison),
    ]
    chosen = [result for result in comparison if result.learning_rate is not None]
    if chosen:
        lines += [
            "",
            "## Learning rates, and what their search saw",
            "",
            "Success in scenes for validation, per learning rate; the best one was chosen. Success above is in other"
            " scenes, which the choice does not flatter.",
            "",
            *_table(
                ("recipe", "learning rate", "success in validation"),
                [[result.recipe, f"{result.learning_rate:g}", _search(result)] for result in chosen],
            ),
        ]
    return "\n".join(lines) + "\n"


def _row(result: RecipeResult) -> list[str]:
    paper = PAPER_SUCCESS.get(result.recipe)
    return [
        result.recipe,
        percent(result.mean),
        between(result.interval),
        ", ".join(percent(rate) for rate in result.rates),
        "–" if paper is None else f"{paper[0]:.1f} ± {paper[1]:.1f}\N{NO-BREAK SPACE}%",
        f"{result.trainable:,}" if result.trainable else "–",
        duration(result.train_seconds) if result.trainable else "–",
    ]


def _search(result: RecipeResult) -> str:
    """Return the searched learning rates with their success, the chosen one bold, and whether it lies at an end."""
    if not result.searched:
        return "–"
    seen = sorted((float(rate), success) for rate, success in result.searched.items())
    texts = []
    for rate, success in seen:
        text = f"{rate:g}:\N{NO-BREAK SPACE}{percent(success)}"
        texts.append(f"**{text}**" if rate == result.learning_rate else text)
    ends = (seen[0][0], seen[-1][0])
    note = " (chosen at an end of the search)" if len(seen) > 1 and result.learning_rate in ends else ""
    return ", ".join(texts) + note


def _range(numbers: Sequence[int], noun: str) -> str:
    return counted(numbers[0], noun) if len(numbers) == 1 else f"{numbers[0]:,} to {counted(numbers[-1], noun)}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]


def draw(comparison: Sequence[RecipeResult]) -> Figure:
    """Draw a row per recipe: our mean with its 95 % interval, and below it the paper's mean with its standard error."""
    count = len(comparison)
    figure, [[axes]] = new_figure(1, 1, height=0.52 * count + 0.9, width=5.2, dpi=200)
    for row, result in enumerate(comparison):
        low, high = result.interval
        ours = row - 0.14 if result.recipe in PAPER_SUCCESS else row
        seeds = [100 * rate for rate in result.rates] if len(result.rates) > 1 else []
        axes.plot(seeds, [ours] * len(seeds), "|", color=ACCENT, markersize=8, alpha=0.6)
        bar = ([100 * (result.mean - low)], [100 * (high - result.mean)])
        axes.errorbar(100 * result.mean, ours, xerr=bar, fmt="o", color=ACCENT, markersize=6, capsize=3)
        _value(axes, 100 * high, ours, percent(result.mean), ACCENT)
        if result.recipe in PAPER_SUCCESS:
            mean, error = PAPER_SUCCESS[result.recipe]
            axes.errorbar(
                mean, row + 0.2, xerr=error, fmt="D", color=GREY, markerfacecolor="white", markersize=5, capsize=3
            )
            _value(axes, mean + error, row + 0.2, percent(mean / 100), GREY)
    axes.set_yticks(range(count), [result.recipe for result in comparison], fontsize=9.5, parse_math=False)
    axes.set_ylim(count - 0.45, -0.55)
    axes.set_xlim(-3, 114)  # room for the figures beside the bars
    axes.set_xticks(range(0, 101, 20))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    for row in range(1, count):
        axes.axhline(row - 0.5, color="#e6eaee", linewidth=0.8)
    axes.set_xlabel("success (%)", fontsize=9)
    _legend(figure, seeds=any(len(result.rates) > 1 for result in comparison))
    return figure


def _value(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    axes.annotate(text, (x, y), (5, 0), textcoords="offset points", va="center", fontsize=8, color=colour)


def _legend(figure: Figure, *, seeds: bool) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=ACCENT, marker="o", markersize=6),
        *([Line2D([], [], color=ACCENT, marker="|", markersize=8, linestyle="", alpha=0.6)] if seeds else []),
        Line2D([], [], color=GREY, marker="D", markerfacecolor="white", markersize=5),
    ]
    labels = ["here, 95 % interval", *(["each seed"] if seeds else []), "paper, ± one standard error"]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)


def compare(out: Path, demonstrations: int, seeds: int) -> str:
    """Run what is not done yet and write the results; return them as Markdown.

    Raises:
        StepFailed: one of the commands did.
        VlaftError: the folder cannot be used.
    """
    with locked(out):
        begin(out, {"demos": demonstrations}, "comparison of recipes")
        run_steps(comparison_steps(out, write_base(out), demonstrations, seeds), out, vlaft, say)
        comparison = read_comparison(out, seeds)
        write_result(out / "comparison.json", comparison)
        with output_file(out / "comparison.md") as partial:
            partial.write_text(markdown(comparison), encoding="utf-8")
        with output_file(out / "comparison.png") as partial:
            draw(comparison).savefig(partial, format="png")
    return markdown(comparison)


def main() -> int:
    """Return the exit code: 0 done, 1 user error, 130 interrupted, or that of the command that failed."""
    parser = argparse.ArgumentParser(description="Compare every recipe on the demo's new robot.")
    parser.add_argument("--out", type=Path, default=Path("recipes-out"), help="folder to write, or to go on with")
    parser.add_argument("--demos", type=int, default=50, help="demonstrations per training seed")
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 10), help="training seeds")
    options = parser.parse_args()
    return run(lambda: compare(options.out, options.demos, options.seeds))


if __name__ == "__main__":
    sys.exit(main())
