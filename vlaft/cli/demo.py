"""`vlaft demo`: the whole job on a simulated robot, each command printed as it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlaft.cli.arguments import Overwrite, Resume

if TYPE_CHECKING:
    from rich.table import Table

    from vlaft.demo.results import DemoResult, Success
    from vlaft.demo.steps import DemoSettings


def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")] = Path("demo-out"),
    recipe: Annotated[str, typer.Option("--recipe", help="Name of a shipped recipe.")] = "lora32",
    demos: Annotated[int, typer.Option("--demos", help="Demonstrations per training seed.", min=2, max=900)] = 50,
    seeds: Annotated[
        int, typer.Option("--seeds", help="Training seeds, each with its own demonstrations.", min=1, max=9)
    ] = 1,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Adapt a small model to a new simulated robot: no GPU, no download, a few minutes.

    Records demonstrations of a scripted expert, converts them, predicts what training costs, trains, lets the model
    act before and after, merges, exports, and writes report.html. Each command is printed before it runs; everything in
    the folder works with the ordinary commands afterwards.

    Example: vlaft demo --out demo-out --recipe lora32
    """
    from vlaft.cli.arguments import check_output_folder
    from vlaft.demo.steps import LEARNING_RATES, DemoSettings, StepFailed
    from vlaft.errors import UsageError, did_you_mean
    from vlaft.files import locked

    if recipe not in LEARNING_RATES:
        hint = did_you_mean(recipe, [*LEARNING_RATES])
        raise UsageError(f"--recipe {recipe}: the demo knows {', '.join(LEARNING_RATES)}{hint}")
    check_output_folder(out, overwrite=overwrite, resume=resume)
    with locked(out):
        settings = DemoSettings(recipe, demos, seeds)
        _begin(out, settings, resume=resume, overwrite=overwrite)
        try:
            _demo(out, settings, vlaft=context.obj)
        except StepFailed as failed:
            raise typer.Exit(failed.exit_code) from None


def _demo(out: Path, settings: DemoSettings, vlaft: Callable[[Sequence[str]], int]) -> None:
    """Do what is not done yet, and tell what came of it.

    Args:
        out: the demo's folder.
        settings: what was asked for.
        vlaft: runs the command line with these words and returns its exit code.

    Raises:
        StepFailed: one of the commands did.
    """
    from vlaft.cli.console import say, show
    from vlaft.demo.page import render
    from vlaft.demo.results import write_result
    from vlaft.demo.steps import read_result, run_steps, steps, write_base
    from vlaft.files import output_file

    base = write_base(out)
    say(f"{base} is the small base that ships with vlaft: it has learned to pick up blocks, with another robot.")
    commands = run_steps(steps(out, settings), out, vlaft, say)
    result = read_result(out, settings, commands)
    write_result(out / "result.json", result)
    with output_file(out / "report.html") as partial:
        partial.write_text(render(result), encoding="utf-8")
    show("")
    show(f"the adapted policy {result.described}")
    show(_table(result))
    show(f"\n{out / 'report.html'} has the films, the curves and the commands.")
    show(f"next: vlaft serve {out / 'model'}")


def _begin(out: Path, settings: DemoSettings, *, resume: bool, overwrite: bool) -> None:
    """Write down what was asked for; a demo goes on only with the same."""
    import json
    from dataclasses import asdict

    from vlaft.errors import ConfigError, VlaftError
    from vlaft.files import output_file, read_json, staged

    file = out / "demo.json"
    content = json.dumps(asdict(settings), indent=2) + "\n"
    if resume and file.is_file():
        before = read_json(file)
        if before | {"seeds": 0} != asdict(settings) | {"seeds": 0}:
            raise ConfigError(
                f"{out} was begun with --recipe {before['recipe']} --demos {before['demonstrations']}: resume it with"
                " these, or give another --out"
            )
        with output_file(file) as partial:
            partial.write_text(content, encoding="utf-8")
        return
    if resume and out.is_dir() and any(out.iterdir()):
        raise VlaftError(f"{out} is no demo's folder; name another folder with --out")
    if overwrite and out.is_dir() and any(out.iterdir()) and not file.is_file():
        raise VlaftError(f"{out} is no demo's folder, so --overwrite does not clear it; name another with --out")
    with staged(out, overwrite=overwrite) as folder:
        (folder / file.name).write_text(content, encoding="utf-8")


def _table(result: DemoResult) -> Table:
    from rich.table import Table

    cost = result.cost
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("success before", *_success([each.before for each in result.seeds]))
    table.add_row("success after", *_success([each.after for each in result.seeds]))
    table.add_row("merged", *_success([result.merged]))
    if result.exported is not None:
        table.add_row("exported to nf4", *_success([result.exported]))
    else:
        table.add_row("exported to nf4", "not done", "bitsandbytes is not installed")
    share = f"{cost.trainable / cost.total:.1%} of {cost.total:,}"
    table.add_row("trainable parameters", f"{cost.trainable:,}", share)
    memory = f"{cost.predicted_bytes / 1e6:.0f} MB predicted, {cost.measured_bytes / 1e6:.0f} MB measured"
    table.add_row("memory of a training step", memory, "tensors alive at its peak")
    seconds = sum(each.train_seconds for each in result.seeds) / len(result.seeds)
    whole = sum(command.seconds for command in result.commands)
    table.add_row("time", f"{seconds:.0f} s to train", f"{whole:.0f} s in all")
    return table


def _success(found: list[Success]) -> tuple[str, str]:
    """Return the mean success and what is known of how sure it is."""
    from vlaft.demo.results import mean_interval

    rates = [each.rate for each in found]
    low, high = mean_interval(rates, found[0].episodes)
    mean = f"{sum(rates) / len(rates):.0%}"
    if len(found) == 1:
        return mean, f"{low:.0%} to {high:.0%}, {found[0].episodes} episodes"
    each = ", ".join(f"{rate:.0%}" for rate in rates)
    return mean, f"{low:.0%} to {high:.0%} over training seeds ({each}; {found[0].episodes} episodes each)"
