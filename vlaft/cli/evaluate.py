"""`vlaft evaluate`: how well models predict held-out demonstrations, or how often they succeed in an environment."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlaft.cli.arguments import AsJson, Base, CenterCrop, Device, Overwrite, Resize, parse_policy
from vlaft.version import __version__

if TYPE_CHECKING:
    from rich.table import Table

    from vlaft.action.execution import Execution
    from vlaft.action.metrics import ActionMetrics, DimensionMetrics
    from vlaft.environments.episodes import EpisodeOutcome
    from vlaft.evaluation.offline import Evaluation

_METRICS = {  # attribute to the heading of its column
    "token_accuracy": "accuracy",
    "within_one_bin": "±1 bin",
    "l1_normalized": "L1",
    "l1_robot": "L1 robot",
    "saturated": "saturated",
    "non_action": "non-action",
}


def evaluate(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL...",
            help="Checkpoint (folder or Hub id), run, run checkpoint, or adapter; policy.KEY=VALUE among them is what"
            " a folder of OpenVLA-OFT's does not tell.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", help="Folder that `vlaft convert` wrote; may be given again.", show_default=False),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            "--env",
            help="Environment to act in: tabletop, metaworld:TASK, libero:SUITE:INDEX, or module:factory; may be given"
            " again.",
            show_default=False,
        ),
    ] = None,
    list_envs: Annotated[bool, typer.Option("--list-envs", help="List the environments, and stop.")] = False,
    split: Annotated[str, typer.Option("--split", help="val or train.")] = "val",
    limit: Annotated[
        int | None, typer.Option("--limit", help="At most so many examples, evenly spread.", min=1, show_default=False)
    ] = None,
    plots: Annotated[
        Path | None,
        typer.Option("--plots", help="Folder for pictures: trajectories and errors, or films.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="With --env: folder for the results, a line for each finished episode.", show_default=False
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in --out.")] = False,
    overwrite: Overwrite = False,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Examples per forward pass, or environments side by side.", min=1)
    ] = 16,
    episodes: Annotated[
        int | None,
        typer.Option(
            "--episodes",
            help="With --env: how many of each task; by default 100, or one for each first state that it has.",
            min=1,
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", help="With --env: of the first episode; the others follow.", min=0)
    ] = 0,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            help="With --env: processes with an environment each, 0 for none; by default by the environment.",
            min=0,
            show_default=False,
        ),
    ] = None,
    unnorm_key: Annotated[
        str | None, typer.Option("--unnorm-key", help="With --env: statistics to use.", show_default=False)
    ] = None,
    execute: Annotated[
        int | None,
        typer.Option(
            "--execute", help="With --env: act N actions of each chunk; by default all.", min=1, show_default=False
        ),
    ] = None,
    ensemble: Annotated[
        bool, typer.Option("--ensemble", help="With --env: ask at each step, act the mean of overlapping chunks.")
    ] = False,
    step_limit: Annotated[
        int | None,
        typer.Option(
            "--step-limit",
            help="With --env: end an episode after N steps; by default after the environment's own.",
            min=1,
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="float32, bfloat16 or float16; by default by the device.", show_default=False),
    ] = None,
    center_crop: CenterCrop = None,
    resize: Resize = None,
    base: Base = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Compare what models predict for held-out demonstrations with what was demonstrated, or let them act.

    With --env, models act in a Gymnasium environment, and their successes are counted.

    Example: vlaft evaluate openvla/openvla-7b run/ model/ --data data/ --plots plots/
    """
    from vlaft.cli.console import print_json, progress, say, show, warn
    from vlaft.errors import UsageError, VlaftError

    if list_envs:
        list_environments(as_json)
        return
    if (not env) == (not data):
        raise UsageError("evaluate on demonstrations with --data, or in an environment with --env: one of them")
    if env and limit is not None:
        raise UsageError("--limit is for --data; with --env, say how many with --episodes")
    if not env and (execute is not None or ensemble):
        raise UsageError("--execute and --ensemble are for --env; with --data, every action of a chunk is compared")
    if not env and step_limit is not None:
        raise UsageError("--step-limit is for --env; with --data, nothing acts")
    if not env and unnorm_key is not None:
        raise UsageError("--unnorm-key is for --env; with --data, statistics are those of the dataset's name")
    if not env and resize is not None:
        raise UsageError("--resize is for --env; with --data, frames are taken as vlaft convert stored them")
    if not env and (out is not None or workers is not None):
        raise UsageError("--out and --workers are for --env; with --data, --json prints what --out would hold")
    if resume and out is None:
        raise UsageError("--resume goes on with what is in a folder of results: name it with --out")
    if resume and overwrite:
        raise UsageError("--resume and --overwrite contradict each other; give one of them")
    if plots is not None and plots.exists() and not plots.is_dir():
        raise VlaftError(f"{plots} is a file; --plots needs a folder")
    if plots is not None and not (overwrite or resume) and plots.is_dir() and any(plots.iterdir()):
        raise VlaftError(f"{plots} is not empty; name another folder with --plots, or give --overwrite")
    from vlaft.evaluation.offline import check_models

    models = models or []
    policy = parse_policy([word for word in models if word.startswith("policy.") and "=" in word])
    models = [word for word in models if not (word.startswith("policy.") and "=" in word)]
    if not models:
        raise UsageError("which model? name a checkpoint, a run or an adapter")
    chunk = check_models(models, policy, base)
    if env:
        from vlaft.action.execution import Execution
        from vlaft.evaluation.rollout import tasks_of, usual_episodes

        execution = Execution(execute, ensemble)
        pipeline = {"center_crop": center_crop, "resize": resize}
        episodes = episodes or usual_episodes(tasks_of(env))
        acting = Acting(
            models, env, episodes, seed, execution, step_limit, unnorm_key, dtype, device, base, policy, pipeline
        )
        results = acting.run(batch_size, workers, plots, out, resume, overwrite)
        print_json(results) if as_json else show(successes(results))
        return
    from vlaft.data.held_out import HeldOut
    from vlaft.evaluation.offline import evaluate as run_evaluation

    assert data is not None
    held_out = HeldOut.open(data, split, limit, chunk=chunk)
    evaluations = []
    with progress("evaluating", total=len(held_out) * len(models), unit="examples") as advance:
        for model in models:
            evaluations.append(
                run_evaluation(
                    model,
                    held_out,
                    batch_size=batch_size,
                    dtype=dtype,
                    device=device,
                    base=base,
                    center_crop=center_crop,
                    policy=policy,
                    advance=partial(advance, note=model),
                )
            )
    if plots is not None:
        from vlaft.evaluation.plots import draw_evaluations

        files = draw_evaluations(plots, evaluations, held_out)
        say(f"{len(files)} plots written to {plots}")
    for evaluation in evaluations:
        if evaluation.statistics_from == "dataset":
            warn(
                f"{evaluation.model} has no statistics for every dataset here, so its actions are read in the data's"
                " own range"
            )
    evaluated = len(held_out.evaluated)
    examples = {"split": split, "examples": len(held_out), "episodes": evaluated}
    if as_json:
        print_json({"data": data, **examples, "models": [_as_dict(each) for each in evaluations]})
        return
    say(f"{len(held_out):,} examples of {evaluated:,} episode{'s' * (evaluated != 1)} in split '{split}'")
    show(comparison(evaluations))
    if any(each.free_running.steps for each in evaluations):
        show("\nL1 by the step of a chunk, 1 being the action at the frame itself:")
        show(by_step(evaluations))
    say("actions move so far when one thing is another moment's, or black or white; moments differ by 100 %:")
    show(looking(evaluations))
    for evaluation in evaluations:
        if evaluation.sight is None:
            say(f"whether {evaluation.model} looks is not told by so few examples")
        for sentence in evaluation.sight.warnings() if evaluation.sight else ():
            warn(f"{evaluation.model} {sentence}")


def list_environments(as_json: bool) -> None:
    """Print what ships with vlaft: names, cameras, actions, limits, what is to be done."""
    from rich.table import Table

    from vlaft.cli.console import print_json, say, show
    from vlaft.environments.registry import shipped_tasks

    tasks = shipped_tasks()
    if as_json:
        print_json([task.described() for task in tasks])
        return
    table = Table("--env", box=None, pad_edge=False)
    for heading in ("cameras", "action", "steps", "what is to be done"):
        table.add_column(heading, justify="right" if heading == "steps" else "left")
    for task in tasks:
        widths = " or ".join(str(len(names)) for names in task.actions)
        steps = f"{task.step_limit}" + (f" + {task.waiting_steps}" if task.waiting_steps else "")
        table.add_row(
            task.name, ", ".join(task.cameras or ()), widths, steps, task.instruction or "(each episode says it)"
        )
    show(table)
    say(
        "and your own as module:factory, or module:factory:argument; metaworld alone stands for all its tasks,"
        " libero:SUITE for all the suite's"
    )


@dataclass(frozen=True)
class Acting:
    """Models that are to act in environments, and how."""

    models: Sequence[str]
    envs: Sequence[str]
    episodes: int
    seed: int
    execution: Execution
    step_limit: int | None
    unnorm_key: str | None
    dtype: str | None
    device: str
    base: str | None
    settings: Mapping[str, Any]
    pipeline: Mapping[str, Any]

    def run(
        self,
        parallel: int,
        workers: int | None,
        plots: Path | None,
        out: Path | None,
        resume: bool,
        overwrite: bool,
    ) -> dict[str, Any]:
        """Let them act; print tables, draw pictures, and return everything."""
        from vlaft.cli.console import progress, say, warn
        from vlaft.evaluation.journal import opened_journal
        from vlaft.evaluation.rollout import KEPT, evaluate_in, pictures, tasks_of

        tasks, done = tasks_of(self.envs), []
        total = self.episodes * len(tasks) * len(self.models)
        with contextlib.ExitStack() as stack:
            journal = None
            if out is not None:
                journal = stack.enter_context(opened_journal(out, self.request(), resume=resume, overwrite=overwrite))
            drawn = None if plots is None else stack.enter_context(pictures(plots, keep=resume))
            # what an environment prints must not come between the results
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            advance = stack.enter_context(progress(f"acting in {', '.join(self.envs)}", total=total, unit="episodes"))
            for number, model in enumerate(self.models, 1):

                def draw(task: str, outcomes: list[EpisodeOutcome], number: int = number, model: str = model) -> None:
                    if drawn is not None:
                        names = [f"{number}-{Path(model).resolve().name}"] * (len(self.models) > 1)
                        drawn.add("-".join(names + [task] * (len(tasks) > 1)), outcomes)

                done.append(
                    evaluate_in(
                        model,
                        self.envs,
                        episodes=self.episodes,
                        seed=self.seed,
                        parallel=parallel,
                        workers=workers,
                        keep=KEPT if drawn is not None else 0,
                        execution=self.execution,
                        step_limit=self.step_limit,
                        unnorm_key=self.unnorm_key,
                        dtype=self.dtype,
                        device=self.device,
                        base=self.base,
                        settings=self.settings,
                        **self.pipeline,
                        journal=journal,
                        advance=partial(advance, note=model),
                        task_done=draw,
                        told=warn,
                    )
                )
            asked = {"env": list(self.envs), "seed": self.seed, "step_limit": self.step_limit}
            results = {**asked, "models": [each.to_json() for each in done]}
            if journal is not None:
                journal.finish(results)
        for each in done:
            if each.non_action_tokens:
                warn(
                    f"{each.model}: {each.non_action_tokens:,} of {each.tokens:,} tokens stand for no action, and were"
                    " acted on as full moves"
                )
        if out is not None:
            say(f"results written to {out}")
        if drawn is not None:
            say(f"{len(drawn.names)} pictures written to {plots}")
        return results

    def request(self) -> dict[str, Any]:
        """Return the words that say what is acted: whoever goes on has to give the same."""
        from vlaft.policy import weights_hash

        own = {"execute": self.execution.actions, "ensemble": self.execution.ensemble}
        words = {key: getattr(self, key) for key in ("seed", "step_limit", "unnorm_key", "dtype", "base")}
        return {
            "vlaft": __version__,
            "weights": [weights_hash(model) for model in self.models],
            **words,
            **self.pipeline,
            "policy": dict(self.settings),
            "models": list(self.models),
            "envs": list(self.envs),
            **own,
        }


def successes(results: Mapping[str, Any]) -> Table:
    """Return the table of what `Acting.run` found: a row for each task, and where there are several a total."""
    from rich.table import Table

    several = len(results["models"][0]["tasks"]) > 1
    table = Table("model", *["task"] * several, box=None, pad_edge=False)
    for heading in ("success", "95 % interval", "episodes", "mean steps", "ended by"):
        table.add_column(heading, justify="left" if heading == "ended by" else "right")
    for model in results["models"]:
        rows = [(each["task"], each) for each in model["tasks"]]
        for task, each in [*rows, *[("all", model)] * several]:
            low, high = each["interval"]
            rate, interval = f"{each['success_rate']:.1%}", f"{low:.1%} to {high:.1%}"
            ended = ", ".join(f"{ending} {count}" for ending, count in each["ended"].items())
            names = [model["model"], *[task] * several]
            table.add_row(*names, rate, interval, f"{each['episodes']}", f"{each['mean_steps']:.1f}", ended)
    return table


def comparison(evaluations: Sequence[Evaluation]) -> Table:
    """Return one table: over all dimensions, then each dimension, every model teacher-forced and free-running."""
    from rich.table import Table

    table = Table("dimension", "model", "decoding", box=None, pad_edge=False)
    for heading in (*_METRICS.values(), "gripper F1"):
        table.add_column(heading, justify="right", no_wrap=True)
    names = _short_names([each.model for each in evaluations])
    first = evaluations[0].free_running
    for index in range(-1, len(first.dimensions)):
        table.add_section()
        last = index == len(first.dimensions) - 1
        for model, decoding, metrics in _rows(evaluations):
            of = metrics.overall if index < 0 else metrics.dimensions[index]
            f1 = metrics.gripper_f1 if index < 0 or last else None
            table.add_row(of.name, names[model], decoding, *_cells(of), _number(f1, 3))
        if not last:
            table.add_row()
    return table


def by_step(evaluations: Sequence[Evaluation]) -> Table:
    """Return L1 per step of the chunk and dimension, free-running; a model of one action at a time has step 1 alone."""
    from rich.table import Table

    table = Table("step", "model", box=None, pad_edge=False)
    for dimension in ("all", *(each.name for each in evaluations[0].free_running.dimensions)):
        table.add_column(dimension, justify="right", no_wrap=True)
    names = _short_names([each.model for each in evaluations])
    chunks = {each.model: each.free_running.steps or (each.free_running,) for each in evaluations}
    for step in range(max(map(len, chunks.values()))):
        for model, steps in chunks.items():
            if step < len(steps):
                of = steps[step]
                distances = (each.l1_normalized for each in (of.overall, *of.dimensions))
                table.add_row(str(step + 1), names[model], *(_number(each, 4) for each in distances))
    return table


def looking(evaluations: Sequence[Evaluation]) -> Table:
    """Return one table: how far each model's actions move when something that it reads is another moment's."""
    from rich.table import Table

    table = Table("moved by", "model", box=None, pad_edge=False)
    for heading in ("another's", "black", "white"):
        table.add_column(heading, justify="right", no_wrap=True)
    names = _short_names([each.model for each in evaluations])
    for each in evaluations:
        sight = each.sight
        if sight is None or sight.together is None:
            continue
        rows = {f"camera {name}": shares for name, shares in sight.cameras.items()}
        if len(rows) > 1:
            rows["all cameras"] = sight.together
        for what, shares in rows.items():
            swapped = "not tellable" if shares.swapped is None else f"{shares.swapped:.0%}"
            table.add_row(what, names[each.model], swapped, f"{shares.black:.0%}", f"{shares.white:.0%}")
        said = "not tellable" if sight.instruction is None else f"{sight.instruction:.0%}"
        table.add_row("instruction", names[each.model], said, "", "")
        if sight.state is not None:
            table.add_row("state", names[each.model], f"{sight.state:.0%}", "", "")
    return table


def _short_names(models: Sequence[str]) -> dict[str, str]:
    """Name models by their folder, or as they were given where two folders are called the same."""
    folders = [Path(model).name or model for model in models]
    unique = len(set(folders)) == len(folders)
    return {model: folder if unique else model for model, folder in zip(models, folders, strict=True)}


def _rows(evaluations: Sequence[Evaluation]) -> Iterator[tuple[str, str, ActionMetrics]]:
    for evaluation in evaluations:
        if evaluation.teacher_forced is not None:
            yield evaluation.model, "forced", evaluation.teacher_forced
        yield evaluation.model, "free", evaluation.free_running


def _cells(metrics: DimensionMetrics) -> Iterator[str]:
    for name in _METRICS:
        value = getattr(metrics, name)
        yield _number(value, 4) if name.startswith("l1") else "" if value is None else f"{value:.1%}"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:#.{digits}g}" if digits == 4 else f"{value:.{digits}f}"


def _as_dict(evaluation: Evaluation) -> dict[str, Any]:
    named = ("model", "statistics_from", "seconds", "teacher_forced", "free_running")
    sight = None if evaluation.sight is None else evaluation.sight.to_json()
    return {name: getattr(evaluation, name) for name in named} | {"sight": sight}
