"""`vlaft recipes`: list, show and copy the shipped training recipes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from vlaft.cli.arguments import AsJson
from vlaft.errors import ConfigError

_COUNT = re.compile(r"([\d,]+) parameters on openvla-7b")  # in the second comment line of a recipe

app = typer.Typer(help="List, show or copy the shipped training recipes.", invoke_without_command=True)


@app.callback()
def recipes(context: typer.Context, as_json: AsJson = False) -> None:
    """List, show or copy the shipped training recipes; without a further word, list them."""
    if context.invoked_subcommand is None:
        list_recipes(as_json)


@app.command("list")
def list_recipes(as_json: AsJson = False) -> None:
    """List the recipes: what each is for, and what it costs."""
    from rich.table import Table

    from vlaft.cli.console import print_json, show
    from vlaft.recipe.resolve import find_recipe, opening_comments, recipe_names

    rows: list[dict[str, str]] = []
    for name in recipe_names():
        purpose, cost = opening_comments(find_recipe(name))
        rows.append({"name": name, "purpose": purpose, "cost": cost})
    if as_json:
        print_json(rows)
        return
    table = Table("recipe", "what it is for", box=None, pad_edge=False)
    table.add_column("trainable (openvla-7b)", justify="right", no_wrap=True)
    for row in rows:
        count = _COUNT.search(row["cost"])
        table.add_row(row["name"], row["purpose"], count[1] if count else "")
    show(table)


@app.command("show")
def show_recipe(
    name: Annotated[str, typer.Argument(help="Name of a shipped recipe, or path of a recipe file.")],
    resolved: Annotated[bool, typer.Option("--resolved", help="With every setting, defaults included.")] = False,
) -> None:
    """Print a recipe's YAML."""
    from vlaft.cli.console import visible
    from vlaft.files import read_yaml
    from vlaft.recipe.resolve import find_recipe, resolve, to_yaml

    if resolved:
        typer.echo(to_yaml(resolve(name)), nl=False)
        return
    file = find_recipe(name)
    read_yaml(file, "a recipe")  # refuses what is no recipe, in one sentence
    typer.echo(visible(file.read_text(encoding="utf-8")), nl=False)


@app.command("copy")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="Name of a shipped recipe.")],
    destination: Annotated[Path, typer.Argument(help="File or folder to write to.")] = Path(),
) -> None:
    """Copy a recipe to a file of your own, to edit it and to use it with --recipe FILE."""
    from vlaft.cli.console import say
    from vlaft.files import output_file
    from vlaft.recipe.resolve import find_recipe

    source = find_recipe(name)
    target = destination / source.name if destination.is_dir() else destination
    if not target.parent.is_dir():
        raise ConfigError(f"{target} cannot be written (there is no folder {target.parent})")
    with output_file(target, overwrite=False) as partial:
        partial.write_bytes(source.read_bytes())
    say(f"wrote {target}")
