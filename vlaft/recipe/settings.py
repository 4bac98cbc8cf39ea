"""A recipe's settings, and how they are layered: defaults, recipe, `--config` files, `key=value` words.

The dataclasses are the only list of settings; types, choices and defaults are read from them. Their defaults are
those of upstream's LoRA fine-tuning script, except where the comment says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

# Upstream's `all-linear` as its PEFT version understood it: every linear layer, the head and, because `proj` names
# them too, the patch convolutions (newer PEFT leaves the last two out, which changes the parameter count).
LORA_TARGETS = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"),  # language model
    *("qkv", "proj", "fc1", "fc2", "fc3", "q", "kv"),  # ViTs and projector
)

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters; read only where `adapt.method` is `lora`."""

    rank: int = 32  # r, the inner width of an adapter
    alpha: int | None = None  # the update is scaled by alpha / rank; null: min(rank, 16), as upstream
    dropout: float = 0.0  # share of an adapter's input dropped in training, [0, 1)
    init: Literal["gaussian", "pissa", "default"] = "gaussian"  # default is PEFT's Kaiming-uniform A; B = 0 in both
    dora: bool = False  # weight-decomposed LoRA: a trained magnitude per output besides
    rslora: bool = False  # scale by alpha / sqrt(rank) instead
    targets: list[str] = field(default_factory=lambda: list(LORA_TARGETS))  # last name of each adapted module
    plus_ratio: float | None = None  # LoRA+: learning rate of B over that of A; null: the same rate

    @property
    def effective_alpha(self) -> int:
        """`alpha`, or upstream's min(rank, 16) where it is null."""
        return min(self.rank, 16) if self.alpha is None else self.alpha


@dataclass(frozen=True)
class AdaptConfig:
    """Which parameters are trained, and how the others are held."""

    method: Literal["lora", "full", "frozen-vision", "last-layer", "sandwich"] = "lora"  # what is trained
    lora: LoraConfig = field(default_factory=LoraConfig)  # the adapters
    quantize: Literal["none", "nf4", "int8"] = "none"  # how frozen linear weights of the language model are held
    double_quant: bool = False  # nf4 only: quantise the scales too, 0.4 bit less per weight


@dataclass(frozen=True)
class PrecisionConfig:
    """Number formats; `resolve_precision` turns `auto` into a format."""

    frozen: Precision = "auto"  # parameters that stay; auto: bfloat16 on a GPU, float32 on a CPU
    trained: Precision = "auto"  # parameters that learn, and their moments; auto: float32 (upstream: bfloat16)
    compute: Precision = "auto"  # autocast; auto: bfloat16 on a GPU or with bfloat16 weights, else float32 (none)


@dataclass(frozen=True)
class PolicyConfig:
    """What the policy reads and writes; the defaults are the released OpenVLA's."""

    head: Literal["tokens", "l1"] = "tokens"  # what writes actions: the vocabulary's last ids, or a regression
    decoding: Literal["serial", "parallel"] = "serial"  # parallel: all at once, every token sees all; always so with l1
    chunk: int = 1  # K, actions from one forward pass
    cameras: list[str] = field(default_factory=lambda: ["main"])  # names in the converted dataset, in this order
    state: bool = False  # read the robot's state, as one token
    film: bool = False  # let the instruction modulate the ViTs' blocks
    film_mean: Literal["tokens", "padded"] = "tokens"  # the instruction's mean; padded: over padding too, as upstream
    normalization: Literal["q99", "minmax"] = "q99"  # what becomes [-1, 1], of actions and state
    tail: Literal["drop", "repeat"] = "drop"  # frames less than K from the end: left out, or the last action repeated

    @property
    def parallel(self) -> bool:
        """Whether all actions are written at once, under bidirectional attention."""
        return self.head == "l1" or self.decoding == "parallel"


@dataclass(frozen=True)
class DataConfig:
    """The converted dataset that is trained on."""

    path: str | list[str] | None = None  # folder(s) that `vlaft convert` wrote, or null until --data names them
    augment: bool = True  # random crop and colour changes of training images
    val_examples: int | None = 512  # held-out examples per evaluation, evenly spread; null: all of them
    reuse_features: Literal["auto", "always", "never"] = "auto"  # keep frozen ViTs' output on disk; auto: where it pays
    workers: int = 4  # threads that decode images ahead; 0: none

    @property
    def paths(self) -> list[str]:
        """`path` as a list, empty where it is null."""
        return [self.path] if isinstance(self.path, str) else list(self.path or [])


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over optimizer steps."""

    name: Literal["constant", "cosine", "linear", "step"] = "constant"  # shape after the warm-up
    warmup_steps: int = 0  # optimizer steps of linear rise from 0
    step_size: int | None = None  # `step` only: optimizer steps between two decays
    gamma: float = 0.1  # `step` only: factor of one decay
    min_ratio: float = 0.0  # `cosine`, `linear`: last learning rate over the peak, [0, 1]


@dataclass(frozen=True)
class TrainConfig:
    """The optimizer and the loop. A step is one update of the optimizer."""

    steps: int = 5000  # updates in all (upstream: 200,000, made to be stopped by hand)
    batch_size: int | Literal["auto"] = 16  # examples per device and forward pass; auto: what the memory holds
    accumulation: int = 1  # forward passes per update
    optimizer: Literal["adamw", "paged-adamw-8bit"] = "adamw"  # the second needs bitsandbytes and a GPU
    learning_rate: float = 5e-4  # peak
    weight_decay: float = 0.01  # decoupled, as PyTorch's AdamW
    betas: tuple[float, float] = (0.9, 0.999)  # decay of the two moments, [0, 1)
    eps: float = 1e-8  # added to the second moment's root
    max_grad_norm: float | None = None  # clip the gradient's global norm to this; null: no clipping
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)  # learning rate over steps
    gradient_checkpointing: int | Literal["none", "vision", "all"] = "none"  # recomputed; k: vision, every k-th block
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"  # of several processes; auto: fsdp for whole weights
    compile: bool = False  # torch.compile each decoder block; a minute at the start
    seed: int = 7  # of initialisation, order and augmentation
    log_every: int = 10  # steps
    save_every: int = 500  # steps; the last step is always saved
    evaluate_every: int = 500  # steps; 0: never
    evaluate_env: str | None = None  # environment to act in as well, such as tabletop, in which successes are counted
    evaluate_env_every: int = 500  # steps; the last step counts
    evaluate_env_episodes: int = 20  # each time, always the same
    best_by: Literal["l1", "success"] = "l1"  # what the best checkpoint is chosen by: held-out L1, or `evaluate_env`
    keep_checkpoints: int = 2  # newest checkpoints kept, besides the best
    early_stopping: int | None = None  # stop after so many evaluations without a better one; null: never
    overfit: int = 0  # train on the first so many examples only, as a test that the loss can reach 0; 0: off
    trackers: list[str] = field(default_factory=list)  # besides log.jsonl: tensorboard, trackio, wandb


@dataclass(frozen=True)
class RecipeConfig:
    """Everything that `vlaft train` needs to know besides the place of its output."""

    name: str = ""  # of the recipe; empty: its file's name
    description: str = ""  # what it is for; empty: its file's first comment line
    base: str = "openvla/openvla-7b"  # checkpoint folder or Hub id that training starts from
    policy: PolicyConfig = field(default_factory=PolicyConfig)  # what is read and written
    adapt: AdaptConfig = field(default_factory=AdaptConfig)  # what is trained
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)  # in which number formats
    data: DataConfig = field(default_factory=DataConfig)  # on what
    train: TrainConfig = field(default_factory=TrainConfig)  # how


def resolve_precision(precision: PrecisionConfig, on_gpu: bool) -> PrecisionConfig:
    """Return the number formats with no `auto` left.

    Weights in bfloat16 are computed with in bfloat16: without autocast, float32 images do not go with them.
    """
    trained = "float32" if precision.trained == "auto" else precision.trained
    stated = (precision.frozen, trained)
    compute = precision.compute
    if compute == "auto":
        compute = "bfloat16" if on_gpu or "bfloat16" in stated else "float32"
    frozen = precision.frozen
    if frozen == "auto":
        frozen = "bfloat16" if on_gpu and compute == "bfloat16" else "float32"
    return PrecisionConfig(frozen=frozen, trained=trained, compute=compute)
