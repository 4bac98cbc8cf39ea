"""`vlaft demo`: the whole job on a simulated robot, each command printed as it runs."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlaft.cli.arguments import Overwrite, Resume

if TYPE_CHECKING:
    from rich.table import Table

    from vlaft.demo.results import Command, DemoResult, RecipeResult, Success
    from vlaft.demo.steps import Settings, Step


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")] = Path("demo-out"),
    recipe: Annotated[str, typer.Option("--recipe", help="Name of a shipped recipe.")] = "lora32",
    all_recipes: Annotated[
        bool,
        typer.Option("--all-recipes", help="Compare every recipe as well, over three seeds: an hour or more."),
    ] = False,
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
    from vlaft.demo.steps import LEARNING_RATES, Settings
    from vlaft.errors import UsageError, did_you_mean
    from vlaft.files import locked

    if recipe not in LEARNING_RATES:
        hint = did_you_mean(recipe, [*LEARNING_RATES])
        raise UsageError(f"--recipe {recipe}: the demo knows {', '.join(LEARNING_RATES)}{hint}")
    check_output_folder(out, overwrite=overwrite, resume=resume)
    with locked(out):
        settings = Settings(recipe, demos, seeds)
        _begin(out, settings, resume=resume, overwrite=overwrite)
        _demo(out, settings, all_recipes)


def _demo(out: Path, settings: Settings, all_recipes: bool) -> None:
    """Do what is not done yet, and tell what came of it."""
    from vlaft.cli.console import say, show
    from vlaft.demo.results import write_result
    from vlaft.demo.steps import read_result, steps, write_base

    base = write_base(out)
    say(f"{base} is the small base that ships with vlaft: it has learned to pick up blocks, with another robot.")
    commands = _run(steps(out, settings), out)
    result = read_result(out, settings, commands)
    write_result(out / "result.json", result)
    comparison: list[RecipeResult] = []
    if all_recipes:
        from benchmarks.demo_recipes import comparison_steps, read_comparison

        count = max(settings.seeds, 3)
        _run(comparison_steps(out, base, settings.demonstrations, count), out)
        comparison = read_comparison(out, count)
        write_result(out / "comparison.json", comparison)
    _write_page(out, result, comparison)
    show("")
    show(_table(result))
    if comparison:
        show("")
        show(_comparison_table(comparison))
    show(f"\n{out / 'report.html'} has the films, the curves and the commands.")
    show(f"next: vlaft serve {out / 'model'}")


def _begin(out: Path, settings: Settings, *, resume: bool, overwrite: bool) -> None:
    """Write down what was asked for; a demo goes on only with the same."""
    import json
    from dataclasses import asdict

    from vlaft.errors import ConfigError, VlaftError
    from vlaft.files import output_file, staged

    file = out / "demo.json"
    content = json.dumps(asdict(settings), indent=2) + "\n"
    if resume and file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
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


def _run(steps: Iterable[Step], out: Path) -> list[Command]:
    """Run what has not been done yet; return all commands as they were run, with the times that they took."""
    import json

    from vlaft.cli.console import say
    from vlaft.demo.results import Command
    from vlaft.files import output_file

    file = out / "commands.json"
    known: dict[str, dict] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    commands = []
    for step in steps:
        key = step.result.relative_to(out).as_posix()
        if step.done:
            say(f"\n$ {step.line}\n(done earlier)")
        else:
            say(f"\n$ {step.line}")
            began = time.monotonic()
            _run_step(step)
            known[key] = {"line": step.line, "seconds": time.monotonic() - began}
            with output_file(file) as partial:
                partial.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
        commands.append(Command(**known.get(key, {"line": step.line, "seconds": 0.0})))
    return commands


def _run_step(step: Step) -> None:
    """Run a command in this process, which has imported torch already.

    Raises:
        typer.Exit: it failed, and has said why.
    """
    from vlaft.cli.main import main
    from vlaft.environments.tabletop import recording
    from vlaft.files import output_file

    step.result.parent.mkdir(parents=True, exist_ok=True)
    run = main if step.module is None else recording.main
    if step.output is None:
        code = run(list(step.words))
    else:
        captured = io.StringIO()
        with contextlib.redirect_stdout(captured):
            code = run(list(step.words))
        if code == 0:
            with output_file(step.output) as partial:
                partial.write_text(captured.getvalue(), encoding="utf-8")
    if code:
        raise typer.Exit(code)


def _write_page(out: Path, result: DemoResult, comparison: list[RecipeResult]) -> None:
    from vlaft.demo.page import render
    from vlaft.files import output_file

    with output_file(out / "report.html") as partial:
        partial.write_text(render(result, comparison), encoding="utf-8")


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


def _comparison_table(comparison: list[RecipeResult]) -> Table:
    from rich.table import Table

    from vlaft.demo.results import PAPER_SUCCESS

    table = Table("recipe", box=None, pad_edge=False)
    for heading in ("success", "95 % over seeds", "paper (7B, real robot)", "learning rate", "trainable", "seconds"):
        table.add_column(heading, justify="right")
    for each in comparison:
        low, high = each.interval
        mean, error = PAPER_SUCCESS.get(each.recipe, (None, None))
        table.add_row(
            each.recipe,
            f"{each.mean:.1%}",
            f"{low:.1%} to {high:.1%}",
            "" if mean is None else f"{mean:.1f} ± {error:.1f} %",
            "" if each.learning_rate is None else f"{each.learning_rate:g}",
            f"{each.trainable:,}" if each.trainable else "",
            f"{each.train_seconds:.0f}" if each.train_seconds else "",
        )
    return table
