"""`vlaft report`: what each recipe trains, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlaft.cli.arguments import AsJson, Base, ConfigFiles, GpuMemory, Settings

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
    from vlaft.accounting.plot import plot_costs
    from vlaft.accounting.table import cost_table, memory_table, modules_table, parts_table
    from vlaft.cli.arguments import parse_size
    from vlaft.cli.console import print_json, progress, show
    from vlaft.config import resolve
    from vlaft.config_layers import recipe_names
    from vlaft.errors import UsageError
    from vlaft.model.presets import base_config

    if explain and recipe:
        raise UsageError("--explain names its recipe itself; leave --recipe out")
    asked = [explain] if explain else recipe or ["all"]
    names = [name for word in asked for name in (recipe_names() if word == "all" else [word])]
    options = {"base": base} if base else {}
    recipes = [resolve(name, config_files or (), settings or (), options) for name in dict.fromkeys(names)]
    memory = parse_size(gpu_memory) if gpu_memory else _present_gpu() or _NO_GPU
    config = base_config(recipes[0].base)
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
        show(modules_table(costs[0]))
        return
    show(parts_table(costs))
    if paper:
        show("\nThe paper's figures are its own: another training stack, and nothing recomputed in the backward pass.")


def _present_gpu() -> int | None:
    import torch

    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(0).total_memory)
