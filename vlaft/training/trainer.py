"""The training loop: read top-down, `train` is the whole of it.

* A step is one update of the optimizer over `batch_size * accumulation * processes` examples.
* Nothing is read back from the device between two logged steps.
* A checkpoint holds everything that the next step depends on, so a continued run does on a CPU, bit for bit, what
  an undisturbed one does. Augmentation draws from a generator seeded by the step, and the learning rate is a
  function of the step, so that neither has a state of its own.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from vlaft.config import RecipeConfig, resolve, to_yaml
from vlaft.errors import ConfigError, Interrupted, VlaftError
from vlaft.model.checkpoint import resolve_checkpoint
from vlaft.training.checkpoints import checkpoint_name
from vlaft.training.events import Banner, EvaluationLine, Listener, RunSummary, StepLine
from vlaft.training.metrics import Metrics, MetricSums
from vlaft.training.run import Run
from vlaft.training.run_folder import RECIPE_FILE, check_same_recipe, command_line, environment
from vlaft.training.signals import StopSignals


def train(recipe: RecipeConfig, out: Path, listener: Listener, *, resume: bool = False) -> RunSummary:
    """Train as `recipe` says and write the run to `out`.

    Args:
        recipe: resolved settings, with `base` and `data.path` given.
        out: the run's folder; what is in it is the caller's question, but for a run that is continued.
        listener: told what happens.
        resume: continue from the newest whole checkpoint in `out`.

    Raises:
        ConfigError: the settings are not those of the run that is continued.
        DataError, CheckpointError: data or base are missing, damaged, or do not fit together.
        Interrupted: SIGINT or SIGTERM, after the step under way was finished and saved.
        VlaftError: the loss is not finite, the disk is full, or the GPU's memory is.
    """
    if not recipe.data.paths:
        raise ConfigError("data.path is missing: name the converted dataset with --data")
    recipe = replace(recipe, data=replace(recipe.data, path=[str(Path(path).resolve()) for path in recipe.data.paths]))
    base = resolve_checkpoint(recipe.base)
    if Path(recipe.base).is_dir():
        recipe = replace(recipe, base=str(base.resolve()))
    if resume and (out / RECIPE_FILE).is_file():
        check_same_recipe(resolve(out / RECIPE_FILE), recipe, out)
    began = time.monotonic()
    run = Run(recipe, out, base, listener)
    status = run.folder.read_status() if resume else {}
    for key, now in (("base_fingerprint", run.base_fingerprint), ("data_fingerprint", run.data.fingerprint)):
        if status.get(key) not in (None, now):
            raise ConfigError(f"{out}: --resume: the {key.split('_')[0]} is no longer the one that the run began with")
    run.folder.create(
        to_yaml(recipe),
        run.data.statistics,
        environment(command_line(), str(run.accelerator.device))
        | {"base_fingerprint": run.base_fingerprint, "data_fingerprint": run.data.fingerprint},
    )
    run.folder.write_status(
        status="running",
        recipe=recipe.name,
        base=recipe.base,
        base_fingerprint=run.base_fingerprint,
        data_fingerprint=run.data.fingerprint,
        inference=run.data.inference,
    )
    if resume:
        run.restore()
    listener.started(_banner(run))
    try:
        with StopSignals() as signals:
            stopped_early = _loop(run, signals)
    except torch.cuda.OutOfMemoryError as error:
        raise VlaftError(
            f"the GPU's memory is full at train.batch_size={recipe.train.batch_size}: halve it and double"
            " train.accumulation, set train.gradient_checkpointing=all, or use --recipe qlora32;"
            " `vlaft report` says what fits"
        ) from error
    seconds = time.monotonic() - began
    peak = peak_memory(run.accelerator.device)
    progress = run.progress
    run.folder.write_status(status="stopped early" if stopped_early else "finished")
    run.folder.replace_json("report.json", _report(run, peak, seconds))
    return RunSummary(
        folder=out,
        steps=progress.step,
        best=progress.best,
        last=checkpoint_name(progress.step),
        best_l1=progress.best_l1,
        seconds=seconds,
        peak_bytes=peak,
        stopped_early=stopped_early,
    )


def _loop(run: Run, signals: StopSignals) -> bool:
    """Do steps until all are done, evaluation stops improving, or a signal comes; say whether it stopped early."""
    train = run.recipe.train
    sums = MetricSums(run.data.actions, run.accelerator.device)
    waited, steps_since, mark = 0.0, 0, time.monotonic()
    saved_step = run.progress.step if run.progress.step else -1
    while run.progress.step < train.steps:
        upcoming = run.progress.step + 1
        final = upcoming == train.steps
        evaluates = train.evaluate_every > 0 and (final or upcoming % train.evaluate_every == 0)
        saves = final or upcoming % train.save_every == 0 or evaluates
        logs = saves or upcoming % train.log_every == 0 or upcoming == 1
        norm, seconds = run.step(sums, want_norm=logs)
        waited += seconds
        steps_since += 1
        stop = run.should_stop(signals)
        if logs or stop:
            metrics = run.read(sums)
            elapsed = time.monotonic() - mark
            _log_step(run, metrics, norm, elapsed, steps_since, waited)
            if not math.isfinite(metrics.loss):
                raise VlaftError(
                    f"the loss is {metrics.loss} at step {upcoming}; the last good checkpoint is untouched: continue"
                    " from it with a lower train.learning_rate or with train.max_grad_norm=1"
                )
            waited, steps_since, mark = 0.0, 0, time.monotonic()
        if evaluates and not stop:
            _evaluate(run)
            mark = time.monotonic()
        if saves or stop:
            run.save()
            saved_step = run.progress.step
            mark = time.monotonic()
        if stop:
            run.folder.write_status(status="interrupted")
            raise Interrupted(
                f"stopped after step {saved_step}, which is saved; continue with --resume --out {run.folder.path}"
            )
        patience = train.early_stopping
        if patience is not None and run.progress.evaluations_since_best >= patience:
            return True
    return False


def _log_step(run: Run, metrics: Metrics, norm: torch.Tensor | None, elapsed: float, steps: int, waited: float) -> None:
    device = run.accelerator.device
    line = StepLine(
        step=run.progress.step,
        loss=metrics.loss,
        action_accuracy=metrics.action_accuracy,
        action_l1=metrics.action_l1,
        learning_rate=run.learning_rate(run.progress.step - 1),
        grad_norm=float("nan") if norm is None else float(norm),
        samples_per_second=steps * run.effective_batch / max(elapsed, 1e-9),
        data_seconds=waited / steps,
        memory_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        seconds_left=elapsed / steps * (run.recipe.train.steps - run.progress.step),
    )
    run.folder.log(asdict(line))
    if run.accelerator.is_main_process:
        run.listener.stepped(line)


def _evaluate(run: Run) -> None:
    metrics = run.evaluate()
    if metrics is None:
        return
    progress = run.progress
    best = progress.best_l1 is None or metrics.action_l1 < progress.best_l1
    if best:
        progress.best, progress.best_l1 = checkpoint_name(progress.step), metrics.action_l1
        progress.evaluations_since_best = 0
    else:
        progress.evaluations_since_best += 1
    line = EvaluationLine(progress.step, metrics.loss, metrics.action_accuracy, metrics.action_l1, best)
    run.folder.log(asdict(line))
    if run.accelerator.is_main_process:
        run.listener.evaluated(line)


def _banner(run: Run) -> Banner:
    return Banner(
        recipe=run.recipe.name or "(unnamed)",
        base=run.recipe.base,
        method=run.recipe.adapt.method,
        train_examples=run.data.train_examples,
        val_examples=run.data.val_examples,
        effective_batch=run.effective_batch,
        trainable=run.trainable,
        total=run.total,
        device=str(run.accelerator.device),
        first_step=run.progress.step,
        steps=run.recipe.train.steps,
    )


def peak_memory(device: torch.device) -> int:
    """Return the peak of what was allocated on a GPU, or of this process's resident memory on a CPU, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _report(run: Run, peak: int, seconds: float) -> dict:
    on_gpu = run.accelerator.device.type == "cuda"
    return {
        "recipe": run.recipe.name,
        "trainable_parameters": run.trainable,
        "total_parameters": run.total,
        "steps": run.progress.step,
        "seconds": seconds,
        "memory": {
            "measured_peak_bytes": peak,
            "measured_as": "torch.cuda.max_memory_allocated" if on_gpu else "resident memory of the process",
        },
    }
