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
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch

from vlaft.action.metrics import Metrics, MetricSums
from vlaft.adapt.methods import quantization_config
from vlaft.adapt.policies import base_folder
from vlaft.checksums import content_checksum
from vlaft.errors import ConfigError, Interrupted, VlaftError
from vlaft.files import check_apart, joined, locked, replaceable
from vlaft.recipe.resolve import resolve, to_yaml
from vlaft.recipe.settings import RecipeConfig
from vlaft.remote import url_of
from vlaft.training.checkpoints import checkpoint_name, examples_per_step
from vlaft.training.events import (
    Banner,
    EvaluationLine,
    Listener,
    PeakMemory,
    PredictedMemory,
    RunSummary,
    StepLine,
    SuccessLine,
    check_trackers,
)
from vlaft.training.folder import RECIPE_FILE, RunFolder, check_same_recipe, command_line, environment
from vlaft.training.interrupts import MemoryWatch, StopSignals, out_of_memory_told
from vlaft.training.optimizer import check_installed
from vlaft.training.peers import lost_told
from vlaft.training.run import Acting, Run
from vlaft.training.sharding import is_first, processes, several
from vlaft.weights.layout import check_tensor_checksums
from vlaft.weights.trained import BASE_CHECKSUMS, STATISTICS_CHECKSUM

# Settings that say where something lies, and the key of `run.json` that says what it held.
_CONTENT = {"base": "base_fingerprint", "data.path": "data_fingerprint"}


def train(
    recipe: RecipeConfig,
    out: Path,
    listener: Listener,
    *,
    resume: bool = False,
    overwrite: bool = False,
    predicted: PredictedMemory | None = None,
    acting: Acting | None = None,
) -> RunSummary:
    """Train as `recipe` says and write the run to `out`.

    Args:
        recipe: resolved settings, with `base` and `data.path` given.
        out: the run's folder.
        listener: told what happens, in the main process.
        resume: continue from the newest whole checkpoint in `out`.
        predicted: what a step is predicted to take, for the record.
        overwrite: replace what is in `out`, once the model is loaded and the new run begins.
        acting: lets the model act in `train.evaluate_env`, where there is one.

    Raises:
        ConfigError: the settings are not those of the run that is continued, or several processes are to act.
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
            if not resume:  # another process may have trained there since the command line looked
                replaceable(out, overwrite=overwrite)
        recipe, base = _located(recipe, out, overwrite=overwrite)
        if resume:
            _check_continues(recipe, out)
        run = Run(recipe, out, base, listener)
        held.enter_context(lost_told(lambda: run.peers))
        run.acting = acting
        if not is_first():  # the first one has the lock by now, or they would not have found each other
            held.enter_context(joined(out))
        with MemoryWatch(run.device) as memory:
            with out_of_memory_told(recipe, "loading the base and a first look at held-out examples"):
                _begin(run, resume=resume, overwrite=overwrite)
            signals.defer()
            run.listener.started(_banner(run, predicted))
            for sentence in run.data.warnings:
                run.listener.warned(sentence)
            try:
                told = out_of_memory_told(recipe, f"a step of train.batch_size={recipe.train.batch_size}")
                with told, closing(run.trackers):
                    run.trackers.start(recipe, out, run.progress.step)
                    stopped_early = _loop(run, signals)
            except VlaftError as error:
                if not isinstance(error, Interrupted):
                    with suppress(VlaftError):  # the disk may be what failed
                        run.folder.write_status(status="failed")
                raise
        summary = _finish(run, time.monotonic() - began, stopped_early, memory.peak(), predicted)
        run.listener.finished(summary)
        run.close()
    return summary


def _located(recipe: RecipeConfig, out: Path, *, overwrite: bool) -> tuple[RecipeConfig, Path]:
    """Return the recipe with absolute paths and the base's local folder; nothing is loaded yet."""
    if not recipe.data.paths:
        raise ConfigError("data.path is missing: name the converted dataset with --data")
    check_installed(recipe.train)
    check_trackers(recipe.train.trackers)
    if recipe.train.evaluate_env and several():
        raise ConfigError(
            "train.evaluate_env: several processes cannot act; train in one, or evaluate --env afterwards"
        )
    quantization_config(recipe.adapt, torch.bfloat16)  # raises where bitsandbytes is missing
    recipe = replace(
        recipe,
        data=replace(recipe.data, path=[url_of(path) or str(Path(path).resolve()) for path in recipe.data.paths]),
    )
    base = base_folder(recipe.base, recipe.policy)
    if Path(recipe.base).is_dir():
        recipe = replace(recipe, base=str(Path(recipe.base).resolve()))
    if overwrite:
        check_apart(out, [base, Path(recipe.base), *map(Path, recipe.data.paths)])
    return recipe, base


def _check_continues(recipe: RecipeConfig, out: Path) -> None:
    """Hold the settings against those of the run in `out`, as far as that can be done before anything is opened.

    Where base and data lie may change: `_begin` compares what they hold. A run that diverged would do so again, so it
    may go on with another learning rate or with clipping.
    """
    folder = RunFolder(out)
    folder.check_resumable()
    if not (out / RECIPE_FILE).is_file():
        return
    status = folder.read_status()
    free = {key for key, content in _CONTENT.items() if status.get(content)}
    if status.get("status") == "failed":
        free |= {"train.learning_rate", "train.max_grad_norm"}
    if examples_per_step(folder.checkpoints) == int(recipe.train.batch_size) * recipe.train.accumulation * processes():
        free |= {"train.batch_size", "train.accumulation"}  # the same examples in each step, by other processes
    check_same_recipe(resolve(out / RECIPE_FILE), recipe, out, free)


def _begin(run: Run, *, resume: bool, overwrite: bool) -> None:
    """Load the model, look at two batches, and continue or create the folder.

    Nothing on the disk changes before the model is there and, where the run is a new one, gives a finite loss: what is
    in the folder stays, and there is no folder where there was none.
    """
    status = run.folder.read_status() if resume else {}
    checksums = run.folder.read_base_checksums() if resume else None
    if checksums is not None and checksums != run.base_checksums:
        check_tensor_checksums(run.base, checksums)
    paths = ", ".join(run.recipe.data.paths)
    for kind, where, now in (("base", run.base, run.base_fingerprint), ("data", paths, run.data.fingerprint)):
        if status.get(f"{kind}_fingerprint") not in (None, now):
            raise ConfigError(
                f"{run.folder.path}: --resume: the {kind} is no longer the one that the run began with ({where});"
                f" name that one with --{kind}, wherever it lies now"
            )
    checkpoint = None
    if resume:
        checkpoint = run.newest_checkpoint()
        if checkpoint is None:
            run.listener.warned(f"{run.folder.path}: no checkpoint to continue from; beginning at step 0")
    run.load(start=checkpoint is None)
    if not resume:
        run.check_batches()
    prints = {"base_fingerprint": run.base_fingerprint, "data_fingerprint": run.data.fingerprint}
    run.folder.create(
        to_yaml(run.recipe),
        run.data.statistics,
        environment(command_line(), str(run.device)) | prints | {BASE_CHECKSUMS: run.base_checksums},
        {"status": "running", "recipe": run.recipe.name, "base": run.recipe.base}
        | prints
        | {"inference": run.data.inference, STATISTICS_CHECKSUM: content_checksum(run.data.statistics)},
        resume=resume,
        overwrite=overwrite,
    )
    if resume:
        run.restore(checkpoint)
        run.check_batches()


def _finish(
    run: Run, seconds: float, stopped_early: bool, peak: PeakMemory, predicted: PredictedMemory | None
) -> RunSummary:
    progress = run.progress
    run.folder.write_status(status="stopped early" if stopped_early else "finished")
    run.folder.replace_json("report.json", _report(run, peak, seconds, predicted))
    return RunSummary(
        folder=run.folder.path,
        steps=progress.step,
        best=progress.best,
        last=checkpoint_name(progress.step),
        best_l1=progress.best_l1,
        best_success=progress.best_success,
        seconds=seconds,
        peak=peak,
        stopped_early=stopped_early,
        predicted=predicted,
        on_gpu=run.device.type == "cuda",
    )


def _loop(run: Run, signals: StopSignals) -> bool:
    """Do steps until all are done, evaluation stops improving, or a signal comes; say whether it stopped early."""
    train = run.recipe.train
    sums = MetricSums(run.device)
    waited, steps_since, mark = 0.0, 0, time.monotonic()
    while run.progress.step < train.steps and not _patience_lost(run):
        upcoming = run.progress.step + 1
        final = upcoming == train.steps
        evaluates = train.evaluate_every > 0 and (final or upcoming % train.evaluate_every == 0)
        acts = run.acting is not None and (final or upcoming % train.evaluate_env_every == 0)
        saves = final or upcoming % train.save_every == 0 or evaluates or acts
        logs = saves or upcoming % train.log_every == 0 or upcoming == 1
        norm, seconds = run.step(sums, want_norm=logs)
        waited += seconds
        steps_since += 1
        stop = run.should_stop(signals)
        if logs or stop:
            metrics = run.read(sums)
            _log_step(run, metrics, norm, time.monotonic() - mark, steps_since, waited)
            _check_loss(run, metrics.loss)
            waited, steps_since = 0.0, 0
        if evaluates and not stop:
            _evaluate(run)
        if acts and not stop:
            _act(run)
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


def _check_loss(run: Run, loss: float) -> None:
    if not math.isfinite(loss):
        raise VlaftError(f"the loss is {loss} at step {run.progress.step}; {run.after_divergence()}")


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
        first_action_l1=metrics.first_action_l1,
        later_actions_l1=metrics.later_actions_l1,
    )
    run.log(line.to_json())
    run.listener.stepped(line)


def _evaluate(run: Run) -> None:
    metrics = run.evaluate()
    if metrics is None:
        return
    _check_loss(run, metrics.loss)
    progress = run.progress
    chosen = run.recipe.train.best_by == "l1"
    best = chosen and (progress.best_l1 is None or metrics.action_l1 < progress.best_l1)
    if best:
        progress.best_l1 = metrics.action_l1
    if chosen:
        _count_best(run, best)
    line = EvaluationLine(
        step=progress.step,
        val_loss=metrics.loss,
        val_action_accuracy=metrics.action_accuracy,
        val_action_l1=metrics.action_l1,
        best=best,
        val_first_action_l1=metrics.first_action_l1,
        val_later_actions_l1=metrics.later_actions_l1,
    )
    run.log(line.to_json())
    run.listener.evaluated(line)


def _act(run: Run) -> None:
    """Count successes; an environment that fails costs the figure, not the run."""
    try:
        rollout = run.act()
    except VlaftError as error:
        run.listener.warned(f"train.evaluate_env: nothing was counted at step {run.progress.step}: {error}")
        return
    progress, rate = run.progress, rollout.success_rate
    chosen = run.recipe.train.best_by == "success"
    best = chosen and (progress.best_success is None or rate > progress.best_success)
    if best:
        progress.best_success = rate
    if chosen:
        _count_best(run, best)
    line = SuccessLine(progress.step, rate, *rollout.interval, len(rollout.episodes), best)
    run.log(asdict(line))
    run.listener.acted(line)


def _count_best(run: Run, best: bool) -> None:
    progress = run.progress
    if best:
        progress.best = checkpoint_name(progress.step)
    progress.evaluations_since_best = 0 if best else progress.evaluations_since_best + 1


def _banner(run: Run, predicted: PredictedMemory | None) -> Banner:
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
        predicted=predicted,
        on_gpu=run.device.type == "cuda",
        feature_cache=run.features.path if run.features else None,
    )


def _report(run: Run, peak: PeakMemory, seconds: float, predicted: PredictedMemory | None) -> dict:
    return {
        "recipe": run.recipe.name,
        "trainable_parameters": run.trainable,
        "total_parameters": run.total,
        "steps": run.progress.step,
        "seconds": seconds,
        "memory": {
            "device": run.device.type,
            "predicted_gpu_peak_bytes": predicted.gpu_bytes if predicted else None,
            "predicted_cpu_peak_bytes": predicted.cpu_bytes if predicted else None,
            "predicted_mapped_bytes": predicted.mapped_bytes if predicted else None,
            "measured_peak_bytes": peak.bytes,
            "measured_as": peak.measured_as,
            "measured_before_the_base_bytes": peak.before_bytes,
            "measured_mapped_bytes": peak.mapped_bytes,
        },
    }
