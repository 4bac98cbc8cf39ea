"""What a run tells while it goes on, and what it came to. The command line prints it; the trainer prints nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlaft.errors import MissingExtra, VlaftError
from vlaft.recipe.settings import RecipeConfig

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker


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


_CHUNKS = ("first_action_l1", "later_actions_l1")  # how the keys end that only policies with chunks log


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
        first_action_l1: `action_l1` of each chunk's first action; None, and not in the log, of one action at a time.
        later_actions_l1: likewise, of those behind it.
    """

    step: int
    loss: float
    action_accuracy: float | None
    action_l1: float
    learning_rate: float
    grad_norm: float
    samples_per_second: float
    data_seconds: float
    memory_bytes: int | None
    seconds_left: float
    first_action_l1: float | None = None
    later_actions_l1: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the line of `log.jsonl`."""
        return _without_chunks(asdict(self))


@dataclass(frozen=True)
class EvaluationLine:
    """One evaluation on held-out examples; also a line of `log.jsonl`."""

    step: int
    val_loss: float
    val_action_accuracy: float | None
    val_action_l1: float
    best: bool
    val_first_action_l1: float | None = None
    val_later_actions_l1: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the line of `log.jsonl`."""
        return _without_chunks(asdict(self))


def _without_chunks(line: dict[str, Any]) -> dict[str, Any]:
    """Leave out what one action at a time has no value of."""
    return {key: value for key, value in line.items() if value is not None or not key.endswith(_CHUNKS)}


@dataclass(frozen=True)
class SuccessLine:
    """One look at how often the model succeeds in `train.evaluate_env`; also a line of `log.jsonl`.

    Attributes:
        step: finished updates.
        success_rate: share of the episodes.
        success_low: lower end of its 95 % interval.
        success_high: upper end.
        episodes: how many.
        best: whether this is the best so far, where the best is chosen by success.
    """

    step: int
    success_rate: float
    success_low: float
    success_high: float
    episodes: int
    best: bool


@dataclass(frozen=True)
class RunSummary:
    """What a run came to.

    Attributes:
        folder: the run's folder.
        steps: finished updates.
        best: name of the best checkpoint, or None when nothing was held out.
        last: name of the last checkpoint.
        best_l1: action L1 of the best checkpoint, where it was chosen by that.
        best_success: its success rate, likewise.
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
    best_success: float | None = None


class Listener:
    """What a run tells while it goes on, to nobody: whoever wants to hear something overrides the method."""

    def started(self, banner: Banner) -> None:
        """The model is loaded and the first step is next."""

    def stepped(self, line: StepLine) -> None:
        """A step was logged."""

    def evaluated(self, line: EvaluationLine) -> None:
        """Held-out examples were looked at."""

    def acted(self, line: SuccessLine) -> None:
        """The model acted in its environment."""

    def saved(self, checkpoint: Path) -> None:
        """A checkpoint is on the disk."""

    def warned(self, sentence: str) -> None:
        """Something is odd but not in the way."""

    def finished(self, summary: RunSummary) -> None:
        """All steps are done, or evaluation stopped improving."""


PROJECT = "vlaft"


def check_trackers(names: Sequence[str]) -> None:
    """See whether every tracker's package is installed, before anything is loaded; it is called as the tracker is.

    Raises:
        MissingExtra: one is not.
    """
    for name in names:
        if find_spec(name) is None:
            raise MissingExtra(f"train.trackers=[{name}]", name, name)


class Trackers:
    """accelerate's trackers of a run; one that fails is left out from then on, and training goes on."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        """Have none yet; `warn` is told when one fails."""
        self._warn = warn
        self._started: list[GeneralTracker] = []

    def start(self, recipe: RecipeConfig, folder: Path, first_step: int) -> None:
        """Start what `recipe.train.trackers` names, in the main process.

        Args:
            recipe: resolved settings, stored with the curves.
            folder: the run's; its name is the curves' name, and tensorboard's files go to `folder/tensorboard`.
            first_step: number of steps done before. What tensorboard has of later ones is hidden: they are done
                again. In wandb a continued run is a new run of the same name.

        Raises:
            MissingExtra: as `check_trackers`.
            VlaftError: a tracker cannot start: no network, or no account.
        """
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        if not PartialState().is_main_process:
            return
        check_trackers(recipe.train.trackers)
        plain = str | float | int | bool
        flat = flat_settings(asdict(recipe))
        settings = {key: value if isinstance(value, plain) else str(value) for key, value in flat.items()}
        name = folder.resolve().name
        options: dict[str, dict[str, Any]] = {
            "tensorboard": {"run_name": "tensorboard", "logging_dir": str(folder), "purge_step": first_step + 1},
            "trackio": {"run_name": PROJECT, "name": name, "resume": "allow"},
            "wandb": {"run_name": PROJECT, "name": name, "dir": str(folder)},
        }
        for each in dict.fromkeys(recipe.train.trackers):
            try:
                tracker = LOGGER_TYPE_TO_CLASS[each](**options[each])
                tracker.start()
                self._started.append(tracker)
                if each != "tensorboard":  # its table of hyperparameters would be a run of its own beside the curves
                    tracker.store_init_configuration(settings)
            except Exception as error:  # whatever the package raises, training has not begun
                raise VlaftError(f"train.trackers: {each} cannot start ({_reason(error)}); train without it") from error

    def log(self, line: Mapping[str, Any]) -> None:
        """Send the numbers of a line of `log.jsonl`."""
        values = {key: float(value) for key, value in line.items() if _is_number(value) and key != "step"}
        for tracker in list(self._started):
            try:
                tracker.log(values, step=int(line["step"]))
            except Exception as error:  # a network that is gone is no reason to lose a night's run
                self._started.remove(tracker)
                self._warn(f"{tracker.name} gets no more curves ({_reason(error)}); log.jsonl goes on")

    def close(self) -> None:
        """Close every tracker."""
        while self._started:
            tracker = self._started.pop(0)
            try:
                tracker.finish()
            except Exception as error:  # as in `log`
                self._warn(f"{tracker.name} could not be closed ({_reason(error)}); log.jsonl has all")


def flat_settings(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings under keys with dots.

    >>> flat_settings({"train": {"steps": 4, "betas": (0.9, 0.99)}})
    {'train.steps': 4, 'train.betas': (0.9, 0.99)}
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flat_settings(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
