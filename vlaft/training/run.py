"""A run under way: its model, optimizer, data and folder, and what can be done with them."""

from __future__ import annotations

import hashlib
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from vlaft.adapt.adapter_files import load_adapter_weights, save_adapter
from vlaft.config import RecipeConfig, resolve_precision
from vlaft.errors import VlaftError
from vlaft.model.checkpoint import fingerprint
from vlaft.training.batches import TrainingData, to_inputs
from vlaft.training.checkpoints import (
    checkpoint_name,
    load_trained,
    newest_good,
    read_checkpoint,
    restore_optimizer,
    restore_random_state,
    rotate,
    write_checkpoint,
    write_trained,
)
from vlaft.training.events import Listener
from vlaft.training.metrics import Metrics, MetricSums
from vlaft.training.optimizer import build_optimizer, learning_rate_factor, set_learning_rate
from vlaft.training.run_folder import RunFolder
from vlaft.training.session import DTYPES, load_trainable, trained_names
from vlaft.training.signals import StopSignals
from vlaft.training.step import Normalization, forward


@dataclass
class Progress:
    """What changes from step to step and is kept in a checkpoint."""

    step: int = 0
    best: str | None = None
    best_l1: float | None = None
    evaluations_since_best: int = 0


class Run:
    """A run under way: the model, its optimizer, its data and its folder."""

    def __init__(self, recipe: RecipeConfig, out: Path, base: Path, listener: Listener) -> None:
        self.accelerator = Accelerator()
        device = self.accelerator.device
        self.recipe = recipe
        self.listener = listener
        self.folder = RunFolder(out, writes=self.accelerator.is_main_process)
        self.precision = resolve_precision(recipe.precision, on_gpu=device.type == "cuda")
        self.compute = DTYPES[self.precision.compute]
        self.data = TrainingData.open(
            recipe, base, rank=self.accelerator.process_index, world_size=self.accelerator.num_processes
        )
        torch.manual_seed(recipe.train.seed)
        self.model = load_trainable(recipe, self.precision, base, device)
        self.trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.total = sum(p.numel() for p in self.model.parameters())
        self.names = trained_names(self.model)
        self.optimizer = build_optimizer(self.model, recipe.train, recipe.adapt.lora.plus_ratio)
        self.normalization = Normalization(self.data.pipeline.means, self.data.pipeline.stds)
        self.progress = Progress()
        self.base_fingerprint = fingerprint(base)
        self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)

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
        """Say whether any process of the run was told to stop."""
        if self.accelerator.num_processes == 1:
            return signals.received
        flag = torch.tensor(int(signals.received), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum"))

    def read(self, sums: MetricSums) -> Metrics:
        """Return the means over all processes and begin anew."""
        sums.sums = self.accelerator.reduce(sums.sums, reduction="sum")
        return sums.read()

    def save(self) -> str:
        """Write a checkpoint of the current step and rotate; return its name."""
        step = self.progress.step
        name = checkpoint_name(step)
        if self.accelerator.is_main_process:
            model = self.accelerator.unwrap_model(self.model)
            if not all(bool(torch.isfinite(p).all()) for p in model.parameters() if p.requires_grad):
                raise VlaftError(
                    f"{self.folder.path}: trained weights are no longer finite at step {step}, so they are not saved;"
                    " continue from the last checkpoint with a lower train.learning_rate or train.max_grad_norm=1"
                )

            def write_weights(target: Path) -> None:
                if self.recipe.adapt.method == "lora":
                    save_adapter(model, target, self.base_fingerprint)
                else:
                    write_trained(model, self.names, target)

            path = write_checkpoint(
                self.folder.checkpoints,
                step,
                write_weights=write_weights,
                optimizer=self.optimizer,
                state={"progress": asdict(self.progress), "loader": self.data.loader.state_dict()},
            )
            self.folder.write_status(last=name, best=self.progress.best, step=step, best_l1=self.progress.best_l1)
            rotate(self.folder.checkpoints, self.recipe.train.keep_checkpoints, self.progress.best)
            self.listener.saved(path)
        self.accelerator.wait_for_everyone()
        return name

    def restore(self) -> None:
        """Continue from the newest whole checkpoint; without one, begin anew."""
        path, warnings = newest_good(self.folder.checkpoints)
        for sentence in warnings:
            self.listener.warned(sentence)
        if path is None:
            self.listener.warned(f"{self.folder.path}: no checkpoint to continue from; beginning at step 0")
            self.folder.truncate_log(0)
            return
        state, tensors, random = read_checkpoint(path)
        if self.recipe.adapt.method == "lora":
            load_adapter_weights(self.model, path)  # type: ignore[arg-type]
        else:
            load_trained(self.model, path)
        restore_optimizer(self.optimizer, tensors, state["optimizer_scalars"])
        self.progress = Progress(**state["progress"])
        self.data.loader.load_state_dict(state["loader"])
        restore_random_state(random)
        self.folder.truncate_log(self.progress.step)

    def step(self, sums: MetricSums, *, want_norm: bool) -> tuple[torch.Tensor | None, float]:
        """Do one update.

        Returns:
            The gradient's global norm before clipping, on the device, where it was computed, and the seconds spent
            waiting for data.
        """
        train = self.recipe.train
        step = self.progress.step
        set_learning_rate(self.optimizer, self.learning_rate(step))
        self.model.train()
        waited = 0.0
        for micro in range(train.accumulation):
            began = time.perf_counter()
            batch = next(self.data.loader)
            waited += time.perf_counter() - began
            inputs = to_inputs(batch, self.accelerator.device)
            last = micro == train.accumulation - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                output = forward(self.model, inputs, self.normalization, self.compute, self._augmentation(step, micro))
                assert output.loss is not None
                (output.loss / train.accumulation).backward()
            sums.add(output)
        norm = None
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if train.max_grad_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(trained, train.max_grad_norm)
        elif want_norm:
            norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        return norm, waited

    def _augmentation(self, step: int, micro: int) -> torch.Generator | None:
        if not self.recipe.data.augment:
            return None
        key = (self.recipe.train.seed, step, micro, self.accelerator.process_index)
        seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "little")
        return torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def evaluate(self) -> Metrics | None:
        """Look at held-out examples, teacher-forced; None when there are none."""
        if not self.data.val_examples:
            return None
        # The bare model: wrapped for several GPUs, processes with fewer batches would be waited for.
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        sums = MetricSums(self.data.actions, self.accelerator.device)
        for batch in self.data.validation():
            inputs = to_inputs(batch, self.accelerator.device)
            sums.add(forward(model, inputs, self.normalization, self.compute))
        return self.read(sums)
