"""The training loop: read top-down, `train` is the whole of it.

* A step is one update of the optimizer over `batch_size * accumulation * processes` examples.
* Nothing is read back from the device between two logged steps.
* A checkpoint holds everything that the next step depends on, so a continued run does on a CPU, bit for bit, what
  an undisturbed one does. Augmentation draws from a generator seeded by the step, and the learning rate is a
  function of the step, so that neither has a state of its own.
"""

from __future__ import annotations

import math
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch

from vlaft.adapt.quantize import quantization_config
from vlaft.config import RecipeConfig, resolve, to_yaml
from vlaft.errors import ConfigError, Interrupted, VlaftError
from vlaft.files import content_checksum
from vlaft.model.checkpoint import check_tensor_checksums, resolve_checkpoint
from vlaft.output_folder import check_apart, joined, locked
from vlaft.trained import BASE_CHECKSUMS, STATISTICS_CHECKSUM
from vlaft.training.checkpoints import checkpoint_name, newest_good
from vlaft.training.distributed import is_first, several
from vlaft.training.events import Banner, EvaluationLine, Listener, RunSummary, StepLine
from vlaft.training.memory import out_of_memory_told, peak_memory
from vlaft.training.metrics import Metrics, MetricSums
from vlaft.training.optimizer import check_installed
from vlaft.training.run import Run
from vlaft.training.run_folder import RECIPE_FILE, RunFolder, check_same_recipe, command_line, environment
from vlaft.training.signals import StopSignals
from vlaft.training.trackers import check_trackers, tracked


def train(
    recipe: RecipeConfig,
    out: Path,
    listener: Listener,
    *,
    resume: bool = False,
    overwrite: bool = False,
    predicted_bytes: int | None = None,
) -> RunSummary:
    """Train as `recipe` says and write the run to `out`.

    Args:
        recipe: resolved settings, with `base` and `data.path` given.
        out: the run's folder.
        listener: told what happens, in the main process.
        resume: continue from the newest whole checkpoint in `out`.
        predicted_bytes: what a step is predicted to allocate on a GPU, for the record.
        overwrite: replace what is in `out`, once the model is loaded and the new run begins.

    Raises:
        ConfigError: the settings are not those of the run that is continued.
        DataError, CheckpointError: data or base are missing, damaged, or do not fit together.
        MissingExtra: the recipe needs a package that is not installed.
        Interrupted: SIGINT or SIGTERM, after the step under way was finished and saved.
        KeyboardInterrupt: either signal, before the first step.
        VlaftError: another process trains into `out`, the loss is not finite, the disk is full, or memory is.
    """
    began = time.monotonic()
    with StopSignals() as signals, ExitStack() as held:
        if is_first():
            held.enter_context(locked(out, shared=several()))
        recipe, base = _located(recipe, out, overwrite=overwrite)
        if resume:
            RunFolder(out).check_resumable()
            if (out / RECIPE_FILE).is_file():
                check_same_recipe(resolve(out / RECIPE_FILE), recipe, out)
        run = Run(recipe, out, base, listener)
        if not is_first():  # the first one has the lock by now, or they would not have found each other
            held.enter_context(joined(out))
        with out_of_memory_told(recipe, "loading the base"):
            _begin(run, resume=resume, overwrite=overwrite)
        signals.defer()
        run.check_batches()
        run.listener.started(_banner(run, predicted_bytes))
        try:
            told = out_of_memory_told(recipe, f"a step of train.batch_size={recipe.train.batch_size}")
            with told, tracked(run.listener, recipe, out, run.progress.step) as run.listener:
                stopped_early = _loop(run, signals)
        except VlaftError as error:
            if not isinstance(error, Interrupted):
                with suppress(VlaftError):  # the disk may be what failed
                    run.folder.write_status(status="failed")
            raise
        summary = _finish(run, time.monotonic() - began, stopped_early, predicted_bytes)
        run.listener.finished(summary)
        run.close()
    return summary


def _located(recipe: RecipeConfig, out: Path, *, overwrite: bool) -> tuple[RecipeConfig, Path]:
    """Return the recipe with absolute paths and the base's local folder; nothing is loaded yet."""
    if not recipe.data.paths:
        raise ConfigError("data.path is missing: name the converted dataset with --data")
    check_installed(recipe.train)
    check_trackers(recipe.train.trackers)
    quantization_config(recipe.adapt, torch.bfloat16)  # raises where bitsandbytes is missing
    recipe = replace(recipe, data=replace(recipe.data, path=[str(Path(path).resolve()) for path in recipe.data.paths]))
    base = resolve_checkpoint(recipe.base)
    if Path(recipe.base).is_dir():
        recipe = replace(recipe, base=str(base.resolve()))
    if overwrite:
        check_apart(out, [base, *map(Path, recipe.data.paths)])
    return recipe, base


def _begin(run: Run, *, resume: bool, overwrite: bool) -> None:
    """Load the model, and continue or create the folder; nothing on the disk changes before the model is there."""
    status = run.folder.read_status() if resume else {}
    checksums = run.folder.read_base_checksums() if resume else None
    if checksums is not None and checksums != run.base_checksums:
        check_tensor_checksums(run.base, checksums)
    for key, now in (("base_fingerprint", run.base_fingerprint), ("data_fingerprint", run.data.fingerprint)):
        if status.get(key) not in (None, now):
            raise ConfigError(
                f"{run.folder.path}: --resume: the {key.split('_')[0]} is no longer the one that the run began with"
            )
    checkpoint = None
    if resume:
        checkpoint, warnings = newest_good(run.folder.checkpoints)
        for sentence in warnings:
            run.listener.warned(sentence)
        if checkpoint is None:
            run.listener.warned(f"{run.folder.path}: no checkpoint to continue from; beginning at step 0")
    run.load(start=checkpoint is None)
    prints = {"base_fingerprint": run.base_fingerprint, "data_fingerprint": run.data.fingerprint}
    run.folder.create(
        to_yaml(run.recipe),
        run.data.statistics,
        environment(command_line(), str(run.device)) | prints | {BASE_CHECKSUMS: run.base_checksums},
        {"status": "running", "recipe": run.recipe.name, "base": run.recipe.base}
        | prints
        | {"inference": run.data.inference, STATISTICS_CHECKSUM: content_checksum(run.data.statistics)},
        overwrite=overwrite,
    )
    if resume:
        run.restore(checkpoint)


def _finish(run: Run, seconds: float, stopped_early: bool, predicted_bytes: int | None) -> RunSummary:
    peak = peak_memory(run.device)
    progress = run.progress
    run.folder.write_status(status="stopped early" if stopped_early else "finished")
    run.folder.replace_json("report.json", _report(run, peak, seconds, predicted_bytes))
    return RunSummary(
        folder=run.folder.path,
        steps=progress.step,
        best=progress.best,
        last=checkpoint_name(progress.step),
        best_l1=progress.best_l1,
        seconds=seconds,
        peak_bytes=peak,
        stopped_early=stopped_early,
        predicted_bytes=predicted_bytes,
        on_gpu=run.device.type == "cuda",
    )


def _loop(run: Run, signals: StopSignals) -> bool:
    """Do steps until all are done, evaluation stops improving, or a signal comes; say whether it stopped early."""
    train = run.recipe.train
    sums = MetricSums(run.data.actions, run.device)
    waited, steps_since, mark = 0.0, 0, time.monotonic()
    while run.progress.step < train.steps and not _patience_lost(run):
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
            _log_step(run, metrics, norm, time.monotonic() - mark, steps_since, waited)
            _check_loss(metrics.loss, upcoming)
            waited, steps_since = 0.0, 0
        if evaluates and not stop:
            _evaluate(run)
        if saves or stop:
            name = run.save()
        if stop and not final:
            run.folder.write_status(status="interrupted")
            raise Interrupted(
                f"stopped after step {run.progress.step}, which is saved as {name};"
                f" continue with --resume --out {run.folder.path}"
            )
        if logs or stop:
            mark = time.monotonic()
    return run.progress.step < train.steps


def _patience_lost(run: Run) -> bool:
    patience = run.recipe.train.early_stopping
    return patience is not None and run.progress.evaluations_since_best >= patience


def _check_loss(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise VlaftError(
            f"the loss is {loss} at step {step}; the last good checkpoint is untouched: continue from it with a lower"
            " train.learning_rate or with train.max_grad_norm=1"
        )


def _log_step(run: Run, metrics: Metrics, norm: torch.Tensor | None, elapsed: float, steps: int, waited: float) -> None:
    device = run.device
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
    run.listener.stepped(line)


def _evaluate(run: Run) -> None:
    metrics = run.evaluate()
    if metrics is None:
        return
    _check_loss(metrics.loss, run.progress.step)
    progress = run.progress
    best = progress.best_l1 is None or metrics.action_l1 < progress.best_l1
    if best:
        progress.best, progress.best_l1 = checkpoint_name(progress.step), metrics.action_l1
        progress.evaluations_since_best = 0
    else:
        progress.evaluations_since_best += 1
    line = EvaluationLine(progress.step, metrics.loss, metrics.action_accuracy, metrics.action_l1, best)
    run.folder.log(asdict(line))
    run.listener.evaluated(line)


def _banner(run: Run, predicted_bytes: int | None) -> Banner:
    return Banner(
        recipe=run.recipe.name or "(unnamed)",
        base=run.recipe.base,
        method=run.recipe.adapt.method,
        train_examples=run.data.train_examples,
        val_examples=run.data.val_examples,
        effective_batch=run.effective_batch,
        trainable=run.trainable,
        total=run.total,
        device=str(run.device),
        first_step=run.progress.step,
        steps=run.recipe.train.steps,
        predicted_bytes=predicted_bytes,
        feature_cache=run.features.path if run.features else None,
    )


def _report(run: Run, peak: int, seconds: float, predicted_bytes: int | None) -> dict:
    on_gpu = run.device.type == "cuda"
    return {
        "recipe": run.recipe.name,
        "trainable_parameters": run.trainable,
        "total_parameters": run.total,
        "steps": run.progress.step,
        "seconds": seconds,
        "memory": {
            "predicted_gpu_peak_bytes": predicted_bytes,
            "measured_peak_bytes": peak,
            "measured_as": "torch.cuda.max_memory_allocated" if on_gpu else "resident memory of the process",
        },
    }
