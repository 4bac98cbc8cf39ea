"""The demo's commands: a new robot's demonstrations to an adapted, merged and exported policy, in one folder.

OUT/
  demo.json                 what was asked for; a demo is resumed with the same
  base/                     the small base that ships with vlaft
  tabletop_b.hdf5, data/    demonstrations, recorded and converted
  cost.json                 predicted and measured cost of the recipe
  before.json, before/      the base in the new set-up: successes, films
  run/, after.json, after/  the adapted model
  held-out.json, held-out/  predicted against demonstrated actions
  model/, merged.json       merged
  model-nf4/, exported.json exported
  seed-2/ ...               demonstrations, run and evaluation of further training seeds
  report.html

Each step is a command with a result on disk; a step whose result is there is not run again. The commands themselves are
the command line's, which hands in how to run one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import shlex
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path

from safetensors import safe_open

from vlaft.demo.results import Command, Cost, DemoResult, SeedResult, Success
from vlaft.environments.tabletop import recording as recorder
from vlaft.errors import VlaftError
from vlaft.files import output_file, output_folder, read_json
from vlaft.recipe.resolve import resolve
from vlaft.recipe.settings import PolicyConfig
from vlaft.weights.trained import ADAPTER_WEIGHTS, TRAINED_FILE

DATASET = "tabletop_b"
EVALUATION_EPISODES = 100
# Seeds of scenes, so many to one training seed. They are used for nothing else: settings were chosen on other scenes.
_DEMONSTRATIONS, _EPISODES, _PER_SEED = 100_000, 200_000, 1_000

# How the demo trains: short, on a CPU, at a scale where large learning rates are right. Chosen on validation seeds
# (docs/demo.md), as were the learning rates.
STEPS, BATCH = 300, 32
BATCH_WORD = f"train.batch_size={BATCH}"
TRAINING = (
    f"train.steps={STEPS}",
    BATCH_WORD,
    "train.accumulation=1",
    "train.schedule.name=cosine",
    "train.schedule.step_size=null",
    "train.schedule.warmup_steps=20",
    "train.evaluate_every=100",
    "train.log_every=20",
    "data.workers=0",
)
LEARNING_RATES = {
    "full": 1e-3,
    "frozen-vision": 1e-3,
    "sandwich": 1e-3,
    "last-layer": 2e-3,
    "lora8": 5e-3,
    "lora16": 5e-3,
    "lora32": 5e-3,
    "lora64": 5e-3,
    "rslora64": 2e-3,
    "qlora32": 5e-3,
    "oft": 2e-3,
    "oft-state": 2e-3,
    "qoft": 2e-3,
}
# What the demo says to recipes that write chunks. The tabletop acts at 5 Hz, so that 5 actions are a second, as
# `vlaft inspect` recommends; an episode has about 11. The last 4 frames of each, where the object is grasped and
# lifted, are examples only if the last action, to go on lifting, is repeated.
CHUNK = 5
CHUNK_WORDS = (f"policy.chunk={CHUNK}", "policy.tail=repeat")
# The base has never written several actions at once: it takes many updates, of few examples each (docs/demo.md).
CHUNK_STEPS, CHUNK_BATCH = 1000, 8
EXECUTE = 1  # of a chunk before the next is asked for: so little training makes its later actions vague (docs/demo.md)


@dataclass(frozen=True)
class DemoSettings:
    """What was asked of a demo.

    Attributes:
        recipe: name of a shipped recipe.
        demonstrations: per training seed.
        seeds: number of training seeds, each with demonstrations and evaluation episodes of its own.
    """

    recipe: str = "lora32"
    demonstrations: int = 50
    seeds: int = 1


@dataclass(frozen=True)
class DemoStep:
    """One command of the demo.

    Attributes:
        words: what follows `vlaft`; or, where `module` is set, what follows `python -m module`.
        result: file or folder that is there when it has been done.
        output: file that its stdout goes to, or None.
        module: a module of vlaft that is run instead of the `vlaft` command.
    """

    words: tuple[str, ...]
    result: Path
    output: Path | None = None
    module: str | None = None

    @property
    def line(self) -> str:
        """The command as one types it."""
        command = ["python", "-m", self.module] if self.module else ["vlaft"]
        return shlex.join([*command, *self.words]) + (f" > {shlex.quote(str(self.output))}" if self.output else "")

    @property
    def done(self) -> bool:
        """Whether its result is there."""
        return self.result.exists()


def write_base(out: Path) -> Path:
    """Copy the base that ships with vlaft to `out/base`, where it is a checkpoint like any other.

    Raises:
        VlaftError: this installation lacks it.
    """
    base = out / "base"
    if not base.exists():
        shipped = files("vlaft.environments.tabletop") / "base"
        if not (shipped / "model.safetensors").is_file():
            raise VlaftError(
                "this installation lacks the demo's base (vlaft/environments/tabletop/base); install vlaft again"
            )
        with as_file(shipped) as folder, output_folder(base) as partial:
            shutil.copytree(folder, partial, dirs_exist_ok=True)
    return base


def seed_folder(out: Path, seed: int) -> Path:
    """Return where the results of a training seed lie: the first one's at the top."""
    return out if seed == 1 else out / f"seed-{seed}"


def steps(out: Path, settings: DemoSettings) -> Iterator[DemoStep]:
    """Yield the demo's commands in their order; the first is to be done before the next is asked for."""
    base, recipe = out / "base", settings.recipe
    chunked = bool(chunk_words(recipe))
    execute, last = (EXECUTE, CHUNK_STEPS) if chunked else (None, STEPS)
    for seed in range(1, settings.seeds + 1):
        folder = seed_folder(out, seed)
        demonstrations_from, episodes_from = scene_seeds(seed)
        yield recording(folder, settings.demonstrations, demonstrations_from)
        yield converting(folder, base)
        if seed == 1:
            words = ("report", "--base", str(base), "--recipe", recipe, "--measure", "--json", BATCH_WORD)
            yield DemoStep((*words, *chunk_words(recipe)), out / "cost.json", out / "cost.json")
        yield acting(base, folder, "before", episodes_from, films=True)
        run = folder / "run"
        yield training(recipe, LEARNING_RATES[recipe], seed, base, folder / "data", run, chunk_words(recipe))
        yield acting(trained(folder, last), folder, "after", episodes_from, execute=execute, films=True)
    compared = ("evaluate", str(base), str(trained(out, last)), "--data", str(out / "data"))
    pictures = ("--plots", str(out / "held-out"), "--overwrite", "--json")
    yield DemoStep((*compared, *pictures), out / "held-out.json", out / "held-out.json")
    yield DemoStep(("merge", str(out / "run"), "--checkpoint", "last", "--out", str(out / "model")), out / "model")
    yield acting(out / "model", out, "merged", scene_seeds(1)[1], execute=execute)
    if importlib.util.find_spec("bitsandbytes") is not None:
        yield DemoStep(
            ("export", str(out / "model"), "--out", str(out / "model-nf4"), "--to", "nf4"), out / "model-nf4"
        )
        yield acting(out / "model-nf4", out, "exported", scene_seeds(1)[1], execute=execute)


def chunk_words(recipe: str) -> tuple[str, ...]:
    """Return what is said to a recipe that writes chunks; nothing to others."""
    return (*CHUNK_WORDS, *budget(CHUNK_STEPS, CHUNK_BATCH)) if resolve(recipe).policy.chunk > 1 else ()


def budget(steps: int, batch_size: int) -> tuple[str, str]:
    """Return the words for so many updates of so many examples."""
    return f"train.steps={steps}", f"train.batch_size={batch_size}"


def recording(folder: Path, demonstrations: int, seed: int) -> DemoStep:
    """Return the command that records demonstrations of the new robot."""
    file = folder / f"{DATASET}.hdf5"
    words = ("--out", str(file), "--episodes", str(demonstrations), "--seed", str(seed))
    return DemoStep(words, file, module="vlaft.environments.tabletop.recording")


def converting(folder: Path, base: Path) -> DemoStep:
    """Return the command that converts them."""
    words = ("convert", str(folder / f"{DATASET}.hdf5"), "--preset", "tabletop", "--base", str(base))
    return DemoStep((*words, "--out", str(folder / "data")), folder / "data" / "dataset.json")


def training(
    recipe: str, rate: float, seed: int, base: Path, data: Path, run: Path, more: Sequence[str] = ()
) -> DemoStep:
    """Return the command that trains; `more` are further settings."""
    words = ("train", "--recipe", recipe, "--base", str(base), "--data", str(data), "--out", str(run))
    resume = ("--resume",) if run.exists() else ()
    settings = (*TRAINING, f"train.learning_rate={rate:g}", f"train.seed={seed}", *more)
    return DemoStep((*words, *resume, *settings), run / "report.json")


def trained(folder: Path, steps: int | None = None) -> Path:
    """Return the last checkpoint of the run in a folder, of the demo's number of steps or of another.

    Not the best by held-out L1: of five demonstrations that is mostly noise, and on the validation seeds the last one
    succeeded more often (docs/demo.md).
    """
    return folder / "run" / "checkpoints" / f"step-{steps or STEPS:06d}"


def acting(
    model: Path, folder: Path, name: str, seed: int, *, execute: int | None = None, films: bool = False
) -> DemoStep:
    """Return the command that lets a model act in the new set-up; `execute` actions of each chunk, by default all."""
    words = ["evaluate", str(model), "--env", "tabletop", "--episodes", str(EVALUATION_EPISODES), "--seed", str(seed)]
    words += ["--batch-size", "50"]
    if execute is not None:
        words += ["--execute", str(execute)]
    if films:
        words += ["--plots", str(folder / name), "--overwrite"]
    return DemoStep((*words, "--json"), folder / f"{name}.json", folder / f"{name}.json")


def scene_seeds(seed: int) -> tuple[int, int]:
    """Return the first seed of demonstrations and of episodes of a training seed."""
    return _DEMONSTRATIONS + _PER_SEED * seed, _EPISODES + _PER_SEED * seed


class StepFailed(Exception):
    """A command failed, and has said why.

    Attributes:
        exit_code: that it ended with.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"the command ended with exit code {exit_code}")
        self.exit_code = exit_code


def run_steps(
    steps: Iterable[DemoStep], out: Path, vlaft: Callable[[Sequence[str]], int], say: Callable[[str], None]
) -> list[Command]:
    """Run what has not been done yet, in this process, which has imported torch already.

    Args:
        steps: each is asked for when the one before it is done.
        out: folder of all results; its `commands.json` keeps what was run, so that a resumed demo can tell all.
        vlaft: runs the command line with these words and returns its exit code.
        say: told each command before it runs.

    Returns:
        All commands as they were run, with the times that they took.

    Raises:
        StepFailed: one of them did.
    """
    file = out / "commands.json"
    known: dict[str, dict] = read_json(file) if file.is_file() else {}
    commands = []
    for step in steps:
        key = step.result.relative_to(out).as_posix()
        if step.done:
            say(f"\n$ {step.line}\n(done earlier)")
        else:
            say(f"\n$ {step.line}")
            began = time.monotonic()
            _run_step(step, vlaft)
            known[key] = {"line": step.line, "seconds": time.monotonic() - began}
            with output_file(file) as partial:
                partial.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
        commands.append(Command(**known.get(key, {"line": step.line, "seconds": 0.0})))
    return commands


def _run_step(step: DemoStep, vlaft: Callable[[Sequence[str]], int]) -> None:
    step.result.parent.mkdir(parents=True, exist_ok=True)
    run = vlaft if step.module is None else recorder.main
    captured = io.StringIO()
    with contextlib.nullcontext() if step.output is None else contextlib.redirect_stdout(captured):
        code = run(step.words)
    if code:
        raise StepFailed(code)
    if step.output is not None:
        with output_file(step.output) as partial:
            partial.write_text(captured.getvalue(), encoding="utf-8")


def read_result(out: Path, settings: DemoSettings, commands: Sequence[Command]) -> DemoResult:
    """Gather what the commands left on disk."""
    policy = resolve(settings.recipe, words=chunk_words(settings.recipe)).policy
    data = read_json(out / "data" / "dataset.json")
    return DemoResult(
        out=out,
        recipe=settings.recipe,
        demonstrations=settings.demonstrations,
        frames=sum(data["counts"]["rows"].values()),
        cost=_cost(out, policy),
        seeds=tuple(_seed_result(out, seed) for seed in range(1, settings.seeds + 1)),
        merged=Success.from_file(out / "merged.json"),
        exported=Success.from_file(out / "exported.json") if (out / "exported.json").is_file() else None,
        commands=tuple(commands),
        policy=policy,
    )


def _cost(out: Path, policy: PolicyConfig) -> Cost:
    """Return what the report says, with this robot's state: the report counts one of the usual width."""
    cost = Cost.from_file(out / "cost.json")
    if not policy.state:
        return cost
    kept = 0
    for name in (ADAPTER_WEIGHTS, TRAINED_FILE):
        with safe_open(trained(out, CHUNK_STEPS) / name, framework="numpy") as file:
            kept += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    return replace(cost, trainable=kept, total=cost.total - cost.trainable + kept)


def _seed_result(out: Path, seed: int) -> SeedResult:
    folder = seed_folder(out, seed)
    return SeedResult(
        seed=seed,
        folder=folder,
        before=Success.from_file(folder / "before.json"),
        after=Success.from_file(folder / "after.json"),
        train_seconds=train_seconds(folder / "run"),
    )


def train_seconds(run: Path) -> float:
    """Return how long a run trained, as it says itself."""
    return float(read_json(run / "report.json")["seconds"])
