"""`vlaft train`: adapt a base to demonstrations, as a recipe says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlaft.cli.arguments import Base, ConfigFiles, Data, GpuMemory, Out, Overwrite, Recipe, Resume, Settings
from vlaft.training.events import Listener

if TYPE_CHECKING:
    from vlaft.accounting.plan import Plan
    from vlaft.recipe.settings import RecipeConfig
    from vlaft.training.events import Banner, EvaluationLine, RunSummary, StepLine, SuccessLine
    from vlaft.training.run import Acting


def train(
    out: Out,
    recipe: Recipe = None,
    data: Data = None,
    base: Base = None,
    config: ConfigFiles = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done and what it costs.")] = False,
    gpu_memory: GpuMemory = None,
    settings: Settings = None,
) -> None:
    """Adapt a base to demonstrations.

    With --recipe auto, recipe, recomputation and micro-batch are chosen for the GPU that is here, or for --gpu-memory.

    Example: vlaft train --recipe lora32 --data data/ --base openvla/openvla-7b --out run/ train.steps=2000
    """
    from vlaft.cli.arguments import check_output_folder, parse_size
    from vlaft.training.folder import RunFolder
    from vlaft.training.launch import settle_launch

    if not dry_run:
        settle_launch()
    again = not resume and RunFolder(out).holds_nothing()  # after a divergence: its log was all there was to keep
    check_output_folder(out, overwrite=overwrite or again, resume=resume)
    resolved = resolve_recipe(recipe, config, settings, data, base, gpu_memory, run=out if resume else None)
    memory = parse_size(gpu_memory) if gpu_memory else None
    from vlaft.accounting.plan import plan_run, present_gpu, runs_on_cpu
    from vlaft.errors import ConfigError, VlaftError

    if not resolved.data.paths:
        raise ConfigError("data.path is missing: name the converted dataset with --data")
    if resume:
        _check_there(resolved, out)
    acting = _acting(resolved)
    plan = plan_run(resolved, memory or present_gpu(), on_cpu=runs_on_cpu())
    if dry_run:
        _show_plan(plan)
        if not plan.fits:
            raise VlaftError(
                f"this does not fit {(plan.gpu_memory or 0) / 1e9:.0f} GB: a step is predicted to need"
                f" {plan.prediction.peak / 1e9:.1f} GB; `vlaft report` says what fits"
            )
        return
    from vlaft.training.events import PredictedMemory
    from vlaft.training.trainer import train as run_training

    cpu = plan.main_memory
    predicted = PredictedMemory(plan.prediction.allocated, cpu.own if cpu else None, cpu.mapped if cpu else None)
    run_training(
        plan.recipe,
        out,
        _Printer(),
        resume=resume,
        overwrite=overwrite or again,
        predicted=predicted,
        acting=acting,
    )


def _acting(recipe: RecipeConfig) -> Acting | None:
    """Return what lets the model act while it is trained, or None where no environment is named."""
    env = recipe.train.evaluate_env
    if not env:
        return None
    from vlaft.evaluation.rollout import acting

    return acting(env, recipe.train.evaluate_env_episodes)


def _check_there(recipe: RecipeConfig, run: Path) -> None:
    """Say of a run to be continued whether its data or base has moved; what they hold is compared later.

    Raises:
        ConfigError: one of them is not where it was.
    """
    from vlaft.errors import ConfigError
    from vlaft.remote import url_of

    places = [("data", path) for path in recipe.data.paths]
    places += [("base", recipe.base)] if Path(recipe.base).is_absolute() else []
    for kind, path in places:
        if url_of(path) is None and not Path(path).exists():
            raise ConfigError(f"{path}: the {kind} of {run} is not here; if it moved, say where to with --{kind}")


def resolve_recipe(
    recipe: str | None,
    config: list[Path] | None,
    settings: list[str] | None,
    data: list[Path] | None,
    base: str | None,
    gpu_memory: str | None = None,
    run: Path | None = None,
) -> RecipeConfig:
    """Lay the command's words over the recipe; a run that is continued brings its own recipe."""
    from vlaft.adapt.policies import policy_on_base
    from vlaft.recipe.resolve import resolve
    from vlaft.training.folder import RECIPE_FILE

    words = list(settings or [])
    options: dict[str, Any] = {"base": base} if base is not None else {}
    if data:
        options["data.path"] = [str(path) for path in data]
    name: str | Path | None = recipe
    if recipe in (None, "auto") and run is not None and (run / RECIPE_FILE).is_file():
        name = run / RECIPE_FILE
    elif recipe == "auto":
        return _choose_recipe(config or [], words, options, gpu_memory)
    resolved = resolve(name or "lora32", config or [], words, options, policy_on_base)
    if resolved.train.batch_size == "auto" and run is not None and (run / RECIPE_FILE).is_file():
        from dataclasses import replace

        before = resolve(run / RECIPE_FILE).train  # what was settled then, also where the GPU is another now
        train = replace(resolved.train, batch_size=before.batch_size, accumulation=before.accumulation)
        resolved = replace(resolved, train=train)
    return resolved


def _choose_recipe(
    config: list[Path], words: list[str], options: dict[str, Any], gpu_memory: str | None
) -> RecipeConfig:
    """Choose for the card, and say why."""
    from vlaft.accounting.choose import choose
    from vlaft.accounting.plan import on_local_base, present_gpu
    from vlaft.adapt.policies import policy_on_base
    from vlaft.cli.arguments import parse_size
    from vlaft.cli.console import say
    from vlaft.errors import UsageError
    from vlaft.model.load import base_config
    from vlaft.recipe.resolve import resolve

    memory = parse_size(gpu_memory) if gpu_memory else present_gpu()
    if memory is None:
        raise UsageError("--recipe auto: no GPU is here; say for which one to choose with --gpu-memory, such as 24GB")

    def resolved(name: str, chosen: Sequence[str] = ()) -> RecipeConfig:
        return resolve(name, config, [*chosen, *words], options, policy_on_base)

    model = base_config(on_local_base(resolved("lora32")).base)
    choice = choose(resolved, model, memory)
    for reason in choice.reasons:
        say(f"auto   {reason}")
    return choice.recipe


def _show_plan(plan: Plan) -> None:
    from vlaft.cli.console import show
    from vlaft.recipe.resolve import to_yaml

    train, counted = plan.recipe.train, plan.counted
    show(to_yaml(plan.recipe).rstrip())
    for data in plan.data:
        counts = ", ".join(f"{data['examples'][name]:,} {name}" for name in data["examples"])
        shape = "/".join(map(str, data["action dimensions"]))
        show(f"data    {data['path']}: {counts} examples, {shape}-D actions, cameras {', '.join(data['cameras'])}")
    show(
        f"params  {counted.trainable:,} of {counted.total:,} are trained, {counted.reached_by_gradient:,} of them"
        " reached by a gradient"
    )
    show(f"batch   {train.batch_size} x {train.accumulation} examples per step and GPU")
    show(f"memory  {plan.prediction.peak / 1e9:.1f} GB of a GPU, predicted; most at: {plan.prediction.moment}")
    if plan.main_memory is not None:
        show(
            f"memory  {_main_memory(plan.main_memory.own, plan.main_memory.mapped)}, predicted;"
            f" most at: {plan.main_memory.moment}"
        )


def _main_memory(own: int, mapped: int) -> str:
    """Say what the tensors of a step take on a CPU."""
    besides = f" and {mapped / 1e9:.2f} GB of the base's files, mapped," if mapped else ""
    return f"{own / 1e9:.2f} GB of main memory{besides} for the tensors of a step on this CPU"


def _accuracy(share: float | None) -> str:
    return "" if share is None else f" | accuracy {share:.3f}"


def _l1(over_all: float, first: float | None, later: float | None) -> str:
    """Say the distance to the demonstrations, and of chunks that of the first action apart from those behind it."""
    chunk = "" if first is None or later is None else f" (first {first:.4f}, later {later:.4f})"
    return f" | L1 {over_all:.4f}{chunk}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _peak(summary: RunSummary) -> str:
    """Say what a run took, beside what was predicted for the device that it was on."""
    peak, predicted = summary.peak, summary.predicted
    if summary.on_gpu:
        beside = f" ({predicted.gpu_bytes / 1e9:.2f} GB were predicted)" if predicted else ""
        return f"{peak.bytes / 1e9:.2f} GB allocated on the GPU{beside}"
    beside = ""
    if predicted and predicted.cpu_bytes is not None:
        beside = f" ({predicted.cpu_bytes / 1e9:.2f} GB were predicted for the tensors of a step"
        if peak.before_bytes is not None:
            beside += f"; {peak.before_bytes / 1e9:.2f} GB were taken before the base was loaded"
        beside += ")"
    if peak.mapped_bytes is None:
        return f"{peak.bytes / 1e9:.2f} GB of main memory{beside}"
    return (
        f"{peak.bytes / 1e9:.2f} GB of main memory{beside}, and up to {peak.mapped_bytes / 1e9:.2f} GB of pages of"
        " mapped files, which the kernel takes back when it needs them"
    )


class _Printer(Listener):
    """Tells a person on stderr how the run goes, a line per logged step."""

    def started(self, banner: Banner) -> None:
        from vlaft.cli.console import say

        share = 100 * banner.trainable / banner.total
        say(f"recipe {banner.recipe} ({banner.method}) on {banner.base}, {banner.device}")
        say(f"data   {banner.train_examples:,} training and {banner.val_examples:,} held-out examples")
        say(f"params {banner.trainable:,} of {banner.total:,} are trained ({share:.2f} %)")
        if (predicted := banner.predicted) and banner.on_gpu:
            say(f"memory {predicted.gpu_bytes / 1e9:.2f} GB allocated at the peak of a step, predicted for a GPU")
        elif predicted and predicted.cpu_bytes is not None:
            say(f"memory {_main_memory(predicted.cpu_bytes, predicted.mapped_bytes or 0)}, predicted")
        if banner.feature_cache is not None:
            say(f"cache  features of the frozen ViTs are kept in {banner.feature_cache}")
        say(f"steps  {banner.first_step:,} of {banner.steps:,} done, {banner.effective_batch} examples each")

    def stepped(self, line: StepLine) -> None:
        from vlaft.cli.console import say

        memory = f" | {line.memory_bytes / 1e9:.2f} GB" if line.memory_bytes is not None else ""
        say(
            f"step {line.step:>6} | loss {line.loss:.4f}{_accuracy(line.action_accuracy)}"
            f"{_l1(line.action_l1, line.first_action_l1, line.later_actions_l1)}"
            f" | lr {line.learning_rate:.2e} | grad {line.grad_norm:.3f} | {line.samples_per_second:.1f} samples/s"
            f" | data {line.data_seconds:.3f} s{memory} | {_duration(line.seconds_left)} left"
        )

    def evaluated(self, line: EvaluationLine) -> None:
        from vlaft.cli.console import say

        mark = " (best so far)" if line.best else ""
        say(
            f"step {line.step:>6} | held out: loss {line.val_loss:.4f}{_accuracy(line.val_action_accuracy)}"
            f"{_l1(line.val_action_l1, line.val_first_action_l1, line.val_later_actions_l1)}{mark}"
        )

    def acted(self, line: SuccessLine) -> None:
        from vlaft.cli.console import say

        mark = " (best so far)" if line.best else ""
        say(
            f"step {line.step:>6} | acted: {line.success_rate:.0%} of {line.episodes} episodes succeeded"
            f" ({line.success_low:.0%} to {line.success_high:.0%}){mark}"
        )

    def saved(self, checkpoint: Path) -> None:
        from vlaft.cli.console import say

        say(f"saved {checkpoint}")

    def finished(self, summary: RunSummary) -> None:
        from vlaft.cli.console import say

        stopped = ", stopped early" if summary.stopped_early else ""
        by = f"held-out action L1 {summary.best_l1:.4f}" if summary.best_l1 is not None else ""
        by = f"{summary.best_success:.0%} succeeded" if summary.best_success is not None else by
        best = f"; best: {summary.best} ({by})" if summary.best else ""
        say(f"{summary.steps} steps in {_duration(summary.seconds)}{stopped}; last: {summary.last}{best}")
        say(f"peak memory {_peak(summary)}; written to {summary.folder}")
        say(f"next: vlaft merge {summary.folder} --out {summary.folder}-merged")

    def warned(self, sentence: str) -> None:
        from vlaft.cli.console import warn

        warn(sentence)
