"""`vlaft report`: what each recipe trains, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlaft.cli.arguments import AsJson, Base, ConfigFiles, GpuMemory, Settings
from vlaft.errors import VlaftError

if TYPE_CHECKING:
    from rich.table import Table

    from vlaft.accounting.costs import RecipeCost
    from vlaft.recipe.settings import RecipeConfig

_NO_GPU = 24 * 10**9  # what the largest batch is worked out for where no GPU is here and none is named


def report(
    settings: Settings = None,
    base: Base = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option("--recipe", help="Name or file of a recipe, may be given again; all: every shipped one."),
    ] = None,
    config_files: ConfigFiles = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="Examples per forward pass, instead of the recipe's.")
    ] = None,
    gpu_memory: GpuMemory = None,
    gpus: Annotated[
        int, typer.Option("--gpus", min=1, help="GPUs over which FSDP shards weights, gradients and optimizer state.")
    ] = 1,
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", min=10, help="Text tokens per example, actions and end of sequence included."),
    ] = None,
    explain: Annotated[
        str | None, typer.Option("--explain", help="Recipe of which to print where each byte goes.", show_default=False)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Picture to draw: a bar per recipe, cards as lines.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run three real steps on random weights beside each prediction.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what each recipe trains and what it costs, before anything is downloaded or allocated.

    Example: vlaft report --recipe lora32 --recipe qlora32 --gpu-memory 24GB train.gradient_checkpointing=all
    """
    from vlaft.accounting.costs import PAPER_BASE, recipe_cost
    from vlaft.accounting.meta import ACTION_SIZE, STATE_SIZE
    from vlaft.accounting.plan import on_local_base, present_gpu
    from vlaft.cli.arguments import parse_size
    from vlaft.cli.console import print_json, progress, show
    from vlaft.errors import UsageError
    from vlaft.model.load import base_config
    from vlaft.model.openvla import PARTS
    from vlaft.recipe.resolve import recipe_names

    if explain and recipe:
        raise UsageError("--explain names its recipe itself; leave --recipe out")
    asked = [explain] if explain else recipe or ["all"]
    names = [name for word in asked for name in (recipe_names() if word == "all" else [word])]
    options = {"base": base} if base else {}
    recipes = _on_base(list(dict.fromkeys(names)), config_files or (), settings or (), options)
    memory = parse_size(gpu_memory) if gpu_memory else present_gpu() or _NO_GPU
    config = base_config(on_local_base(recipes[0]).base)
    costs = []
    with progress("tracing a training step on the meta device", len(recipes), "recipes") as advance:
        for each in recipes:
            costs.append(recipe_cost(each, config, gpu_memory=memory, tokens=tokens, batch_size=batch_size, gpus=gpus))
            advance(1, each.name)
    if measure:
        import torch

        from vlaft.accounting.measure import measured

        costs = measured(recipes, config, costs, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    title = f"{recipes[0].base}: memory per GPU" + (f", sharded over {gpus} GPUs" if gpus > 1 else "")
    if plot is not None:
        plot_costs(costs, title, plot)
    if as_json:
        print_json({"base": recipes[0].base, "gpu_memory": memory, "recipes": [cost.to_json() for cost in costs]})
        return
    paper = recipes[0].base == PAPER_BASE
    show(cost_table(costs, memory, paper=paper))
    show("")
    if explain:
        show(f"The peak comes in: {costs[0].memory.moment}\n")
        show(memory_table(costs[0]))
        show("")
        show(part_table(costs[0]))
        show("")
        show(inference_table(costs[0]))
        show("")
        show(modules_table(costs[0]))
        return
    show(parts_table(costs))
    if any(set(cost.counted.parts) - set(PARTS) for cost in costs):
        show(
            f"\nHeads and the state are counted for {ACTION_SIZE} action and {STATE_SIZE} state dimensions;"
            " `vlaft train --dry-run` counts them for your data."
        )
    if paper:
        show("\nThe paper's figures are its own: another training stack, and nothing recomputed in the backward pass.")


def _on_base(
    names: list[str], config_files: Sequence[Path], settings: Sequence[str], options: dict[str, Any]
) -> list[RecipeConfig]:
    """Resolve recipes on one base; where that is a policy already, those of several that train another are left out."""
    from vlaft.adapt.policies import policy_on_base
    from vlaft.cli.console import warn
    from vlaft.errors import ConfigError
    from vlaft.recipe.resolve import resolve

    recipes, contrary = [], []
    for name in names:
        try:
            recipes.append(resolve(name, config_files, settings, options, policy_on_base))
        except ConfigError as error:
            if len(names) == 1:
                raise
            resolve(name, config_files, settings, options)  # what is wrong whatever the base is
            contrary.append((name, error))
    if not recipes:
        raise contrary[0][1]
    if contrary:
        left_out = ", ".join(name for name, _ in contrary)
        warn(f"left out, because {recipes[0].base} is a policy already, and another one: {left_out}")
    return recipes


_COLOURS = {
    "weights": "#4c6a92",
    "adapters": "#7fa3c7",
    "gradients": "#c98b4a",
    "optimizer state": "#e3be7d",
    "activations": "#5b9a72",
    "logits": "#a9cfa5",
    "allocator and CUDA": "#b8b8b8",
}


def plot_costs(costs: Sequence[RecipeCost], title: str, path: Path) -> None:
    """Draw stacked bars, one per recipe in the order given, and write them to `path` (its ending says the format).

    Raises:
        VlaftError: the ending is unknown, or the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from vlaft.accounting.memory import CARDS
    from vlaft.files import output_file

    figure = Figure(figsize=(9, 1.6 + 0.42 * len(costs)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = [f"{cost.name}, batch {cost.memory.batch_size}" for cost in costs]
    starts = [0.0] * len(costs)
    for term, colour in _COLOURS.items():
        widths = [_gigabytes(cost, term) for cost in costs]
        axes.barh(names, widths, left=starts, color=colour, label=term)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    limit = 1.08 * max(*starts, CARDS[0])
    for card in CARDS:
        if card < limit:
            axes.axvline(card, color="#555555", linewidth=0.6, linestyle=":")
            axes.text(card, -0.75, str(card), ha="center", va="bottom", fontsize=7, color="#555555")
    axes.set_xlim(0, limit)
    axes.invert_yaxis()
    axes.set_xlabel("GB per GPU at the peak of a training step (dotted: common cards)")
    axes.set_title(title, fontsize=10, pad=16)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=len(_COLOURS))
    ending = path.suffix.removeprefix(".").lower() or "png"
    known = figure.canvas.get_supported_filetypes()
    if ending not in known:
        raise VlaftError(
            f"{path}: no picture can be written as '{ending}'; name a .png file, or one of {sorted(known)}"
        )
    if not path.parent.is_dir():
        raise VlaftError(f"{path} cannot be written (there is no folder {path.parent})")
    with output_file(path) as partial:
        figure.savefig(partial, format=ending, dpi=150)


def _gigabytes(cost: RecipeCost, term: str) -> float:
    terms = cost.memory.terms
    if term in terms:
        return terms[term] / 1e9
    return sum(size for name, size in terms.items() if name not in _COLOURS) / 1e9


def _table(first: str, *headings: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def gigabytes(size: int) -> str:
    """Return bytes as GB.

    >>> gigabytes(59_712_345_678)
    '59.7'
    """
    return f"{size / 1e9:.1f}" if size >= 1e8 else f"{size / 1e9:.4f}"


def cost_table(costs: Sequence[RecipeCost], gpu_memory: int, *, paper: bool) -> Table:
    """Return one row per recipe: parameters, peak, what fits.

    Args:
        costs: of the recipes.
        gpu_memory: bytes of the GPU that the largest batches are for.
        paper: add the paper's memory, which describes the SigLIP-only base.
    """
    from vlaft.accounting.costs import PAPER_BATCH, PAPER_GB

    measured = any(cost.measurement for cost in costs)
    table = _table(
        "recipe",
        "trainable",
        "of total",
        "reached by gradient",
        "batch",
        "peak GB",
        *(["measured GB", "error"] if measured else []),
        f"largest batch in {gpu_memory / 1e9:.0f} GB",
        "smallest card",
        "inference GB",
        *([f"paper GB, batch {PAPER_BATCH}"] if paper else []),
    )
    for cost in costs:
        counted, memory = cost.counted, cost.memory
        card = "none" if cost.smallest_card is None else f"{cost.smallest_card} GB"
        cells = [
            cost.name,
            f"{counted.trainable:,}",
            f"{100 * counted.trainable / counted.total:.2f} %",
            f"{counted.reached_by_gradient:,}",
            str(memory.batch_size),
            gigabytes(memory.peak) + (f" x {memory.gpus}" if memory.gpus > 1 else ""),
        ]
        if measured:
            one = cost.measurement
            cells += ["", ""] if one is None else [gigabytes(one.peak_bytes), f"{100 * one.error:+.1f} %"]
        cells += [str(cost.largest_batch) if cost.largest_batch else "none", card]
        cells.append(gigabytes(cost.inference["bfloat16"].peak))
        if paper:
            total, gpus = PAPER_GB.get(cost.name, (None, 1))
            cells.append("" if total is None else f"{total}" + (f" over {gpus}" if gpus > 1 else ""))
        table.add_row(*cells)
    return table


def parts_table(costs: Sequence[RecipeCost]) -> Table:
    """Return trained parameters per part of the model; a policy's own modules where any recipe has them."""
    parts = list(dict.fromkeys(part for cost in costs for part in cost.counted.parts))
    table = _table("trained in", *(part.replace("_", " ") for part in parts))
    for cost in costs:
        counts = (cost.counted.parts.get(part) for part in parts)
        table.add_row(cost.name, *("" if count is None else f"{count.trainable:,}" for count in counts))
    return table


def memory_table(cost: RecipeCost) -> Table:
    """Return where each byte goes at the moment of the peak."""
    table = _table("memory at the peak", "bytes", "GB", "share")
    for term, size in (*cost.memory.terms.items(), ("in all", cost.memory.peak)):
        table.add_row(term, f"{size:,}", f"{size / 1e9:.3f}", f"{100 * size / cost.memory.peak:.1f} %")
    return table


def part_table(cost: RecipeCost) -> Table:
    """Return what each part of the model takes in training besides activations, and its weights at inference."""
    table = _table("part", "parameters", "trained", "weights GB", "gradients GB", "moments GB", "inference GB")
    acting = cost.inference["bfloat16"].weights
    for part, taken in cost.parts.items():
        counted = cost.counted.parts[part]
        sizes = (taken.weights, taken.gradients, taken.moments, acting.get(part, 0))
        table.add_row(
            part.replace("_", " "),
            f"{counted.total:,}",
            f"{counted.trainable:,}" if counted.trainable else "",
            *(f"{size / 1e9:.3f}" if size else "" for size in sizes),
        )
    return table


def inference_table(cost: RecipeCost) -> Table:
    """Return where each byte goes when the merged policy acts, in bfloat16 and with its base in 4 bits."""
    ways = cost.inference
    table = _table("memory at inference", *(f"{name} GB" for name in ways))
    for term in dict.fromkeys(term for way in ways.values() for term in way.terms):
        table.add_row(term, *(f"{way.terms.get(term, 0) / 1e9:.3f}" for way in ways.values()))
    table.add_row("in all", *(f"{way.peak / 1e9:.3f}" for way in ways.values()))
    return table


def modules_table(cost: RecipeCost) -> Table:
    """Return parameters per module, equal blocks folded into one row."""
    table = _table("module", "parameters", "trained")
    for module, entry in cost.counted.modules.items():
        table.add_row(module, f"{entry.total:,}", f"{entry.trainable:,}" if entry.trainable else "")
    return table
