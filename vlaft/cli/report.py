"""`vlaft report`: what each recipe trains, and what it costs."""

from __future__ import annotations

from typing import Annotated

import typer

from vlaft.cli.arguments import AsJson, Base, ConfigFiles, Settings


def report(
    settings: Settings = None,
    base: Base = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option("--recipe", help="Name or file of a recipe, may be given again; all: every shipped one."),
    ] = None,
    config_files: ConfigFiles = None,
    as_json: AsJson = False,
) -> None:
    """Say what each recipe trains and what it costs, before anything is downloaded or allocated."""
    from dataclasses import asdict

    from vlaft.accounting.parameters import count_parameters
    from vlaft.accounting.table import parameter_table
    from vlaft.cli.console import print_json, show
    from vlaft.config import resolve
    from vlaft.config_layers import recipe_names
    from vlaft.model.presets import base_config

    names = [name for word in recipe or ["all"] for name in (recipe_names() if word == "all" else [word])]
    words = [*([f"base={base}"] if base else []), *(settings or [])]
    recipes = [resolve(name, config_files or (), words) for name in dict.fromkeys(names)]
    config = base_config(recipes[0].base)
    counts = {each.name: count_parameters(each, config) for each in recipes}
    if as_json:
        rows = [
            {
                "name": name,
                "trainable_parameters": counted.trainable,
                "total_parameters": counted.total,
                "reached_by_gradient": counted.reached_by_gradient,
                "parts": {part: asdict(entry) for part, entry in counted.parts.items()},
            }
            for name, counted in counts.items()
        ]
        print_json({"base": recipes[0].base, "recipes": rows})
        return
    show(parameter_table(counts))
