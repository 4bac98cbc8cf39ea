"""What a run tells while it goes on, and what it came to. The command line prints it; the trainer prints nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class PredictedMemory:
    """What the tensors of a training step are predicted to take.

    Attributes:
        gpu_bytes: what `torch.cuda.max_memory_allocated` would report of a GPU.
        cpu_bytes: main memory on a CPU, mapped weights left out; None where the run is not on one.
        mapped_bytes: besides, weights that lie in the base's files as they are needed and are used in place; None as
            `cpu_bytes`.
    """

    gpu_bytes: int
    cpu_bytes: int | None = None
    mapped_bytes: int | None = None


@dataclass(frozen=True)
class PeakMemory:
    """The memory that a run took at its peak, start and evaluations included.

    Attributes:
        bytes: allocated on a GPU; on a CPU the process's anonymous memory, which nobody else can take back.
        measured_as: how.
        before_bytes: of those, what the process held before the base was loaded; None where not told apart.
        mapped_bytes: on a CPU, the most resident pages of mapped files (the base's, libraries), which the kernel takes
            back when it needs them; None where not told apart.
    """

    bytes: int
    measured_as: str
    before_bytes: int | None = None
    mapped_bytes: int | None = None


@dataclass(frozen=True)
class Banner:
    """What a run is about to do.

    Attributes:
        recipe: its name.
        base: folder or Hub id.
        method: what is trained.
        train_examples: examples of the training split.
        val_examples: held-out examples that an evaluation looks at.
        effective_batch: examples per step.
        trainable: trainable parameters, those that no loss reaches included.
        total: all parameters, adapters included.
        device: where it runs.
        first_step: number of steps done before.
        steps: number of steps in all.
        predicted: memory of a step, or None.
        on_gpu: whether the run is on one.
        feature_cache: file that keeps the features of frozen ViTs, or None.
    """

    recipe: str
    base: str
    method: str
    train_examples: int
    val_examples: int
    effective_batch: int
    trainable: int
    total: int
    device: str
    first_step: int
    steps: int
    predicted: PredictedMemory | None = None
    on_gpu: bool = False
    feature_cache: Path | None = None


@dataclass(frozen=True)
class StepLine:
    """One logged step; also a line of `log.jsonl`.

    Attributes:
        step: finished updates.
        loss: mean since the last line, nats per label.
        action_accuracy: share of action tokens exactly right.
        action_l1: mean distance of decoded actions, normalised units.
        learning_rate: of this step.
        grad_norm: global norm of this step's gradient, before clipping.
        samples_per_second: examples over all processes.
        data_seconds: time per step spent waiting for data.
        memory_bytes: peak memory of the device so far; None on a CPU.
        seconds_left: estimated.
    """

    step: int
    loss: float
    action_accuracy: float
    action_l1: float
    learning_rate: float
    grad_norm: float
    samples_per_second: float
    data_seconds: float
    memory_bytes: int | None
    seconds_left: float


@dataclass(frozen=True)
class EvaluationLine:
    """One evaluation on held-out examples; also a line of `log.jsonl`."""

    step: int
    val_loss: float
    val_action_accuracy: float
    val_action_l1: float
    best: bool


@dataclass(frozen=True)
class RunSummary:
    """What a run came to.

    Attributes:
        folder: the run's folder.
        steps: finished updates.
        best: name of the best checkpoint, or None when nothing was held out.
        last: name of the last checkpoint.
        best_l1: action L1 of the best checkpoint.
        seconds: of this call.
        peak: memory at its peak.
        stopped_early: whether evaluation stopped improving.
        predicted: memory of a step, or None.
        on_gpu: whether it was.
    """

    folder: Path
    steps: int
    best: str | None
    last: str
    best_l1: float | None
    seconds: float
    peak: PeakMemory
    stopped_early: bool
    predicted: PredictedMemory | None = None
    on_gpu: bool = False


class Listener(Protocol):
    """What a run tells while it goes on."""

    def started(self, banner: Banner) -> None:
        """The model is loaded and the first step is next."""

    def stepped(self, line: StepLine) -> None:
        """A step was logged."""

    def evaluated(self, line: EvaluationLine) -> None:
        """Held-out examples were looked at."""

    def saved(self, checkpoint: Path) -> None:
        """A checkpoint is on the disk."""

    def warned(self, sentence: str) -> None:
        """Something is odd but not in the way."""

    def finished(self, summary: RunSummary) -> None:
        """All steps are done, or evaluation stopped improving."""


class Silence:
    """The listener of processes that leave the talking to the main one."""

    def started(self, banner: Banner) -> None:
        """Say nothing."""

    def stepped(self, line: StepLine) -> None:
        """Say nothing."""

    def evaluated(self, line: EvaluationLine) -> None:
        """Say nothing."""

    def saved(self, checkpoint: Path) -> None:
        """Say nothing."""

    def warned(self, sentence: str) -> None:
        """Say nothing."""

    def finished(self, summary: RunSummary) -> None:
        """Say nothing."""
