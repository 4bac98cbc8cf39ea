"""A run under way: its model, optimizer, data and folder, and what can be done with them."""

from __future__ import annotations

import gc
import hashlib
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch.nn.parallel import DistributedDataParallel

from vlaft.action.metrics import Metrics, MetricSums
from vlaft.action.tokens import IGNORED
from vlaft.adapt import pissa
from vlaft.adapt.adapter import adapter_tensors, load_adapter_weights, write_adapter
from vlaft.checksums import cache_folder, content_checksum
from vlaft.data.loader import Batch
from vlaft.documents import read_as
from vlaft.environments.episodes import Rollout
from vlaft.errors import CheckpointError, ConfigError, VlaftError
from vlaft.model.heads.tokens import TokenOutput
from vlaft.observation.augmentation import pixel_values
from vlaft.pages.curves import LOG_FILE
from vlaft.recipe.settings import RecipeConfig, resolve_precision
from vlaft.training.checkpoint_sets import write_checkpoint_set
from vlaft.training.checkpoints import (
    RunProgress,
    checkpoint_step,
    flatten_optimizer,
    list_checkpoints,
    load_trained,
    newest_good,
    places,
    random_state,
    read_checkpoint,
    restore_optimizer,
    restore_random_state,
    rotate_checkpoints,
    set_aside,
    stored,
    trained_tensors,
    write_checkpoint,
    write_trained,
)
from vlaft.training.data import TrainingData, to_inputs
from vlaft.training.events import Listener, Trackers
from vlaft.training.feature_cache import FeatureCache, cacheable, pays
from vlaft.training.folder import RunFolder
from vlaft.training.interrupts import StopSignals
from vlaft.training.model import PRECISIONS, base_model, load_trainable, trained_names, unwrapped
from vlaft.training.optimizer import build_optimizer, learning_rate_factor, set_learning_rate
from vlaft.training.peers import Peers, lost_told
from vlaft.training.sharded_start import load_sharded
from vlaft.training.sharding import (
    copy_to_all,
    gathered,
    is_sharded,
    join_processes,
    local_part,
    mesh_of,
    parallel_style,
    per_node,
    reshard,
    spread_like,
)
from vlaft.training.step import Inputs, Normalization, autocast, forward
from vlaft.weights.layout import fingerprint, tensor_checksums
from vlaft.weights.trained import TRAINED_FILE

# Lets a model act, given its base's folder, what it reads (`inference` of `run.json`), its statistics and its device.
Acting = Callable[[Any, Path, Mapping[str, Any], Mapping[str, Any], torch.device], Rollout]


class Run:
    """A run under way: the model, its optimizer, its data and its folder."""

    def __init__(self, recipe: RecipeConfig, out: Path, base: Path, listener: Listener) -> None:
        """Open the data; the model is loaded by `load`."""
        self.style = parallel_style(recipe)
        self.accelerator = join_processes()
        self.recipe = recipe
        self.peers = Peers(self._gather, out) if self.accelerator.num_processes > 1 else None
        if self.style == "hsdp" and len({count for (count,) in self._gather([per_node()])}) > 1:
            raise ConfigError("train.parallel=hsdp needs as many processes on each machine: take train.parallel=fsdp")
        self.base = base
        self.listener = listener if self.accelerator.is_main_process else Listener()
        self.trackers = Trackers(self.listener.warned)
        self.folder = RunFolder(out, writes=self.accelerator.is_main_process)
        self.precision = resolve_precision(recipe.precision, on_gpu=self.device.type == "cuda")
        self.compute = PRECISIONS[self.precision.compute]
        self.data = TrainingData.open(
            recipe, base, rank=self.accelerator.process_index, world_size=self.accelerator.num_processes
        )
        self.normalization = Normalization(self.data.pipeline.means, self.data.pipeline.stds)
        self.base_fingerprint = fingerprint(base)
        # one process of a machine reads all bytes, and the others find its note of them
        with lost_told(lambda: self.peers), self.accelerator.local_main_process_first():
            self.base_checksums = tensor_checksums(base)
        self.progress = RunProgress()
        self.acting: Acting | None = None
        self._told_to_stop: torch.Tensor | None = None

    def load(self, *, start: bool = True) -> None:
        """Load the model and build its optimizer.

        Args:
            start: begin as the recipe says; False where `restore` comes next and brings the adapters' state.
        """
        torch.manual_seed(self.recipe.train.seed)
        sharded = self.style in ("fsdp", "hsdp")
        places = (self.recipe, self.precision, self.base, self.device)
        if sharded:
            mesh = mesh_of(self.style, self.device)
            model, (self.trainable, self.total) = load_sharded(*places, mesh, self.data.policy)
        else:
            model, (self.trainable, self.total) = load_trainable(*places, self.data.policy)
        self.names = trained_names(model)
        self.pissa_start = pissa.initialise(model) if self._uses_pissa and start else None  # type: ignore[arg-type]
        self.model = copy_to_all(model, self.device) if self.style == "ddp" else model
        self.features = self._feature_cache()
        self.optimizer = build_optimizer(self.model, self.recipe.train, self.recipe.adapt.lora.plus_ratio)

    def _feature_cache(self) -> FeatureCache | None:
        """Return where the vision backbone's output is kept, or None where it changes or is not worth keeping."""
        wanted = self.recipe.data.reuse_features
        steady = cacheable(unwrapped(self.model), augment=self.recipe.data.augment) and not is_sharded(self.model)
        steady = steady and not self.recipe.policy.film  # what the ViTs see depends on the instruction then
        if wanted == "never" or not steady:
            if wanted == "always":
                raise ConfigError(
                    "data.reuse_features=always needs a vision backbone that is not trained, and data.augment=false"
                )
            return None
        vision = base_model(self.model).vision_backbone
        size, cameras = self.data.pipeline.size, len(self.recipe.policy.cameras)
        images = torch.zeros(1, cameras, size, size, 3, dtype=torch.uint8)
        sample = self._compute_features(images.to(self.device))
        shape = (self.data.train_examples, cameras * vision.num_patches, vision.embed_dim)
        folder = cache_folder("features")
        examples = self.recipe.train.steps * self.effective_batch
        bytes_per_row = shape[1] * shape[2] * sample.element_size()
        if wanted == "auto" and not pays(shape[0], examples, bytes_per_row, folder):
            return None
        key = {
            "base": [self.base_fingerprint, content_checksum(self.base_checksums)],
            "data": self.data.fingerprint,
            "pipeline": self.data.pipeline.to_json(),
            "cameras": list(self.recipe.policy.cameras),  # whose order is that of the patches
            "windows": [self.recipe.policy.chunk, self.recipe.policy.tail],  # what row a number stands for
            "precision": [self.precision.frozen, self.precision.compute, self.recipe.adapt.quantize],
            "device": self.device.type,
        }
        return FeatureCache(folder, key, shape, sample.dtype)

    @torch.no_grad()
    def _compute_features(self, images: torch.Tensor) -> torch.Tensor:
        pixels = pixel_values(images, self.normalization.means, self.normalization.stds)
        with autocast(self.device, self.compute):
            return base_model(self.model).vision_backbone(pixels)

    def _vision_features(self, batch: Batch, inputs: Inputs) -> torch.Tensor | None:
        if self.features is None:
            return None
        return self.features.features(batch.rows, lambda: self._compute_features(inputs.images), self.device)

    def close(self) -> None:
        """Give back the model and leave the other processes, all at the same time.

        A process that leaves while another still sends, or whose sharded model outlives the group that it sends
        through, may be ended by gloo's threads (SIGABRT) after all its work is done.
        """
        self.data.loader.close()
        self.accelerator.wait_for_everyone()
        del self.model, self.optimizer
        gc.collect()
        self.accelerator.end_training()

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.accelerator.device

    @property
    def _uses_pissa(self) -> bool:
        return self.recipe.adapt.method == "lora" and self.recipe.adapt.lora.init == "pissa"

    @property
    def effective_batch(self) -> int:
        """Examples per step."""
        train = self.recipe.train
        return int(train.batch_size) * train.accumulation * self.accelerator.num_processes

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of update `step`, counted from 0."""
        train = self.recipe.train
        return train.learning_rate * learning_rate_factor(train.schedule, step, train.steps)

    def should_stop(self, signals: StopSignals) -> bool:
        """Say whether any process of the run was told to stop; with several, as of the step before.

        So no process waits for the step under way to end on its GPU.
        """
        if self.accelerator.num_processes == 1:
            return signals.received
        before = self._told_to_stop
        flag = torch.tensor(int(signals.received), device=self.device)
        self._told_to_stop = self.accelerator.reduce(flag, reduction="sum")
        return before is not None and bool(before)

    def _count(self, sums: MetricSums, output: TokenOutput, batch_size: int) -> None:
        assert output.loss is not None
        sums.add(output.loss, base_model(self.model).head.compared(output, batch_size))

    def read(self, sums: MetricSums) -> Metrics:
        """Return the means over all processes and begin anew."""
        sums.sums = self.accelerator.reduce(sums.sums, reduction="sum")
        return sums.read()

    def log(self, line: Mapping[str, Any]) -> None:
        """Add a line to `log.jsonl` and to the curves of the trackers."""
        self.folder.log(line)
        self.trackers.log(line)

    def save(self) -> str:
        """Write a checkpoint of the current step and rotate; return its name.

        Raises:
            VlaftError: trained weights are not finite, or the checkpoint cannot be written; in every process alike.
        """
        reshard(self.model)
        self._check_finite()
        if is_sharded(self.model) and self.recipe.adapt.method != "lora":
            parameters = dict(base_model(self.model).named_parameters())
            path = write_checkpoint_set(
                self.folder.checkpoints,
                self.progress.step,
                parameters={name: parameters[name] for name in self.names},
                optimizer=self.optimizer,
                state=self._state(),
                rank=self.accelerator.process_index,
                gather=self._gather,
            )
        else:
            path = self._write_checkpoint()
        if self.accelerator.is_main_process:
            self._write_progress(path.name)
            self.listener.saved(path)
            keep, best = self.recipe.train.keep_checkpoints, self.progress.best
            for sentence in rotate_checkpoints(self.folder.checkpoints, keep, best):
                self.listener.warned(sentence)
        return path.name

    def _state(self) -> dict[str, Any]:
        return {
            "progress": asdict(self.progress),
            "loader": self.data.loader.state_dict(),
            "effective_batch": self.effective_batch,
        }

    def _gather(self, numbers: list[int]) -> list[list[int]]:
        """Return the numbers of all processes, by rank."""
        told = self.accelerator.gather(torch.tensor([numbers], device=self.device))
        return told.tolist()  # type: ignore[no-any-return]

    def _write_checkpoint(self) -> Path:
        """Let the main process write a checkpoint: whole weights that it has, or adapters, gathered where sharded."""
        model, base = unwrapped(self.model), base_model(self.model)
        adapters = isinstance(model, PeftModel)
        tensors = trained_tensors(base, base.policy_parameters() if adapters else self.names)
        adapter = {}
        if isinstance(model, PeftModel) and self.pissa_start is None:
            adapter = {name: stored(tensor) for name, tensor in adapter_tensors(model).items()}
        error: VlaftError | None = None
        path, _ = places(self.folder.checkpoints, self.progress.step)
        if self.accelerator.is_main_process:
            try:
                write_checkpoint(
                    self.folder.checkpoints,
                    self.progress.step,
                    write_weights=partial(self._write_weights, tensors, adapter),
                    optimizer=self.optimizer,
                    state=self._state(),
                )
            except VlaftError as caught:
                error = caught
        elif is_sharded(self.model):
            flatten_optimizer(self.optimizer)  # to give the main process this one's shards
        if self.accelerator.num_processes > 1:
            failed = self.accelerator.reduce(torch.tensor(int(error is not None), device=self.device), reduction="sum")
            if bool(failed) and error is None:
                error = VlaftError("the main process could not write the checkpoint")
        if error is not None:
            raise error
        return path

    def _write_weights(
        self, tensors: Mapping[str, torch.Tensor], adapter: Mapping[str, torch.Tensor], target: Path
    ) -> None:
        model, base = unwrapped(self.model), (self.base_fingerprint, self.base_checksums)
        if tensors:
            write_trained(tensors, target)
        if isinstance(model, PeftModel) and self.pissa_start is not None:
            pissa.save_converted(model, self.pissa_start, target, *base)
        elif isinstance(model, PeftModel):
            write_adapter(target, adapter, model.peft_config["default"].to_dict(), *base)

    def _write_progress(self, last: str) -> None:
        progress = self.progress
        known: dict[str, Any] = {
            "last": last,
            "best": progress.best,
            "step": progress.step,
            "best_l1": progress.best_l1,
        }
        if self.recipe.train.evaluate_env:
            known["best_success"] = progress.best_success
        self.folder.write_status(**known)

    def _check_finite(self) -> None:
        trained = [local_part(p.detach()) for p in self.model.parameters() if p.requires_grad]
        odd = (~torch.stack([torch.isfinite(p).all() for p in trained])).sum()
        if bool(self.accelerator.reduce(odd, reduction="sum")):
            raise VlaftError(
                f"{self.folder.path}: trained weights are no longer finite at step {self.progress.step}, so they are"
                f" not saved; {self.after_divergence()}"
            )

    def after_divergence(self) -> str:
        """Return what to do once the loss or the weights are not finite."""
        change = "a lower train.learning_rate, or train.max_grad_norm=1"
        saved = list_checkpoints(self.folder.checkpoints)
        if saved:
            return (
                f"the last good checkpoint, {saved[-1].name}, is untouched: continue from it with --resume and {change}"
            )
        return (
            f"nothing was saved yet: begin again with {change}; the same --out will do, and until then its {LOG_FILE}"
            " has the losses"
        )

    def newest_checkpoint(self) -> Path | None:
        """Return the newest whole checkpoint; the main process reads and tells, and all go on with the same one."""
        chosen = None
        if self.accelerator.is_main_process:
            chosen, warnings = newest_good(self.folder.checkpoints)
            for sentence in warnings:
                self.listener.warned(sentence)
        if self.accelerator.num_processes > 1:
            step = -1 if chosen is None else checkpoint_step(chosen)
            step = self._gather([step])[0][0]
            chosen = None if step < 0 else places(self.folder.checkpoints, step)[0]
        return chosen

    def restore(self, checkpoint: Path | None) -> None:
        """Continue from `checkpoint`, a whole one; without one, begin anew.

        Raises:
            CheckpointError: the checkpoint is of another model.
        """
        self.accelerator.wait_for_everyone()  # all have chosen the same one
        if self.folder.writes:
            set_aside(self.folder.checkpoints, checkpoint)
        if checkpoint is None:
            self.folder.truncate_log(0)
            return
        # the main process has seen that its files hold
        state, tensors, random = read_checkpoint(checkpoint, check_files=self.accelerator.is_main_process)
        if missing := [key for key in ("progress", "loader") if state.get(key) is None]:
            raise CheckpointError(f"{checkpoint}: its state.json is of another version of vlaft (no '{missing[0]}')")
        model = unwrapped(self.model)
        if not isinstance(model, PeftModel) or (checkpoint / TRAINED_FILE).is_file():
            load_trained(model, checkpoint)
        if isinstance(model, PeftModel) and self._uses_pissa:
            self.pissa_start = pissa.load_converted(model, checkpoint, self.base)
        elif isinstance(model, PeftModel):
            load_adapter_weights(model, checkpoint, spread_like)
        restore_optimizer(self.optimizer, tensors, state["optimizer_scalars"])
        self.progress = read_as(RunProgress, state["progress"])
        before = state.get("effective_batch", self.effective_batch)
        if before != self.effective_batch:
            self.listener.warned(
                f"{checkpoint}: a step had {before} examples and now has {self.effective_batch}, because the number of"
                " processes is another; the run goes on, but not as it would have"
            )
        best = self.progress.best
        if best is not None and not (self.folder.checkpoints / best).is_dir():
            self.listener.warned(f"{self.folder.path}: the best checkpoint, {best}, is gone; the next best counts")
            self.progress.best = self.progress.best_l1 = self.progress.best_success = None
        self.data.loader.load_state_dict(state["loader"])
        restore_random_state(random)
        self.folder.truncate_log(self.progress.step)
        self._write_progress(checkpoint.name)

    def step(self, sums: MetricSums, *, want_norm: bool) -> tuple[torch.Tensor | None, float]:
        """Do one update.

        The loss is the mean over the labels of all forward passes and processes together, however they are spread:
        each pass counts by its share of the labels.

        Returns:
            The gradient's global norm before clipping, on the device, where it was computed, and the seconds spent
            waiting for data.
        """
        train = self.recipe.train
        step = self.progress.step
        set_learning_rate(self.optimizer, self.learning_rate(step))
        self.model.train()
        began = time.perf_counter()
        batches = [next(self.data.loader) for _ in range(train.accumulation)]
        waited = time.perf_counter() - began
        for micro, (batch, share) in enumerate(zip(batches, self._shares(batches), strict=True)):
            inputs = to_inputs(batch, self.device)
            seed = self._seed(step, micro)
            if self.recipe.adapt.lora.dropout:
                torch.manual_seed(seed)  # so that dropout depends on the step alone, in every process
            generator = torch.Generator().manual_seed(seed) if self.recipe.data.augment else None
            waits = isinstance(self.model, DistributedDataParallel) and micro < train.accumulation - 1
            with self.model.no_sync() if waits else nullcontext():  # type: ignore[operator]
                features = self._vision_features(batch, inputs)
                output = forward(self.model, inputs, self.normalization, self.compute, generator, features)
                assert output.loss is not None
                (share * output.loss).backward()
            self._count(sums, output, len(batch))
        norm = None
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if train.max_grad_norm is not None:
            norm = gathered(torch.nn.utils.clip_grad_norm_(trained, train.max_grad_norm))
        elif want_norm:
            norm = gathered(torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        return norm, waited

    def _shares(self, batches: list[Batch]) -> Sequence[float | torch.Tensor]:
        """Return the factor of each batch's mean loss: its share of the labels of all, times the processes.

        The processes' gradients are averaged, hence the second.
        """
        labels = [int((batch.labels != IGNORED).sum()) for batch in batches]
        processes = self.accelerator.num_processes
        if processes == 1:
            return [count / sum(labels) for count in labels]
        total = torch.tensor(float(sum(labels)), device=self.device)
        total = self.accelerator.reduce(total, reduction="sum")
        return [count * processes / total for count in labels]

    def _seed(self, step: int, micro: int) -> int:
        key = (self.recipe.train.seed, step, micro, self.accelerator.process_index)
        return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "little")

    @torch.no_grad()
    def check_batches(self) -> None:
        """Look at two held-out batches before the long run, so that what is wrong shows at once and not in an hour.

        Raises:
            VlaftError: their loss is not finite.
        """
        if not self.data.val_examples:
            return
        model = unwrapped(self.model)
        model.eval()
        for batch, _ in islice(self._validation(), 2):
            output = forward(model, to_inputs(batch, self.device), self.normalization, self.compute)
            if output.loss is None or not bool(torch.isfinite(output.loss)):
                raise VlaftError(
                    f"{self.base}: the loss on held-out examples is not finite before the first step; are the base's"
                    " weights whole, and does precision.compute suit this device?"
                )

    @torch.no_grad()
    def evaluate(self) -> Metrics | None:
        """Look at held-out examples, teacher-forced; None when there are none."""
        if not self.data.val_examples:
            return None
        # Without the copies' wrapper, which would wait for processes that have fewer batches.
        model = unwrapped(self.model)
        model.eval()
        sums = MetricSums(self.device)
        for batch, counts in self._validation():
            output = forward(model, to_inputs(batch, self.device), self.normalization, self.compute)
            if counts:
                self._count(sums, output, len(batch))
        return self.read(sums)

    def act(self) -> Rollout:
        """Let the model act in its environment; what training draws next is not touched by it.

        Raises:
            DataError, VlaftError: the environment fails, or does not show what the policy reads.
        """
        assert self.acting is not None
        model = base_model(self.model)
        model.eval()
        with _random_kept(), autocast(self.device, self.compute):
            return self.acting(model, self.base, self.data.inference, self.data.statistics, self.device)

    def _validation(self) -> Iterator[tuple[Batch, bool]]:
        """Yield held-out batches, and whether each counts.

        A sharded model runs in all processes or in none: those that run out of batches repeat one.
        """
        if not is_sharded(self.model):
            yield from ((batch, True) for batch in self.data.validation())
            return
        per_process = math.ceil(self.data.val_examples / self.accelerator.num_processes)
        rounds = math.ceil(per_process / int(self.recipe.train.batch_size))
        last = None
        own = self.data.validation()
        for _ in range(rounds):
            batch = next(own, None)
            counts = batch is not None
            if batch is None:
                batch = last if last is not None else self.data.any_validation_batch()
            last = batch
            yield batch, counts


@contextmanager
def _random_kept() -> Iterator[None]:
    """Put all random states back at the end: environments draw from whichever they like."""
    torch_state, python_state, numpy_state = random_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        restore_random_state(torch_state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
