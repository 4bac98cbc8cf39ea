"""Compare what a policy reads and writes on the demo's new robot: tokens one by one, all at once, and L1 chunks.

    python benchmarks/tabletop_policies.py --out policies-out

takes an hour or more on two CPU cores; the same command again goes on where it was interrupted. The same for every
policy are demonstrations, base, rank, number of steps, batch, augmentation, schedule, and the episodes that are
reported, whose scenes nothing was chosen by. Learning rates are chosen on validation scenes: for tokens with `lora32`,
for L1 heads with `oft`; `parallel` and `oft-state` take theirs.

OUT/
  base/                     the demo's base
  validation/               demonstrations that the learning rate is chosen on
  POLICY/search-RATE/       a run on them, and validation.json: its successes; of `lora32` and `oft`
  seed-1/ ...               demonstrations of each training seed
  POLICY/seed-1/ ...        a run on these, and its successes on scenes used for nothing else: report.json of whole
                            chunks, every-step.json of a chunk asked for at every step
  comparison.json, comparison.md
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
from studies import begin, run, told_apart

from vlaft.cli.console import say
from vlaft.cli.main import main as vlaft
from vlaft.demo.results import Success, mean_interval, write_result
from vlaft.demo.steps import (
    CHUNK_BATCH,
    CHUNK_STEPS,
    CHUNK_WORDS,
    DemoStep,
    acting,
    budget,
    converting,
    recording,
    run_steps,
    scene_seeds,
    train_seconds,
    trained,
    training,
    write_base,
)
from vlaft.environments.tabletop.environment import TabletopEnv
from vlaft.files import locked, output_file
from vlaft.pages.html import between, duration, percent
from vlaft.policy import Policy, load


@dataclass(frozen=True)
class Contender:
    """A kind of policy.

    Attributes:
        name: of its folder.
        recipe: that trains it.
        words: settings beside the demo's.
        title: what it reads and writes.
    """

    name: str
    recipe: str
    words: tuple[str, ...]
    title: str

    @property
    def searched(self) -> str:
        """Whose learning rate it has: that of the policy with its kind of head that was searched."""
        return "lora32" if self.recipe == "lora32" else "oft"


CONTENDERS = (
    Contender("lora32", "lora32", (), "one camera; one action, token by token"),
    Contender(
        "parallel", "lora32", ("policy.decoding=parallel", *CHUNK_WORDS), "one camera; 5 actions, tokens at once"
    ),
    Contender("oft", "oft", CHUNK_WORDS, "one camera; 5 actions, L1 head"),
    # recomputing gives the same gradients, later
    Contender(
        "oft-state",
        "oft-state",
        (*CHUNK_WORDS, "train.gradient_checkpointing=none"),
        "two cameras and the state; 5 actions, L1 head",
    ),
)
RATES = (2e-3, 5e-3)
# First scenes of demonstrations and of episodes for choosing the learning rate; no training seed is near them.
VALIDATION = (500_000, 550_000)
ROUNDS = 15


@dataclass(frozen=True)
class PolicyResult:
    """One policy in the comparison.

    Attributes:
        name: as its contender's.
        title: likewise.
        learning_rate: that it was trained with.
        rates: success of each training seed, each chunk done whole.
        every_step: likewise, a chunk asked for at every step and its first action done.
        episodes: of each of these.
        train_seconds: mean of one training.
        actions_per_second: of one robot, each forward pass acted on whole.
    """

    name: str
    title: str
    learning_rate: float
    rates: Sequence[float]
    every_step: Sequence[float]
    episodes: int
    train_seconds: float
    actions_per_second: float

    @property
    def interval(self) -> tuple[float, float]:
        """Interval of 95 % of the mean of `every_step` (Student's t); Wilson's where there is one seed."""
        return mean_interval(self.every_step, self.episodes)


def study_steps(
    out: Path, base: Path, demonstrations: int, seeds: int, steps: int, batch_size: int
) -> Iterator[DemoStep]:
    """Yield the commands in their order; each is to be done before the next is asked for.

    Args:
        out: folder of all results.
        base: the demo's base.
        demonstrations: per seed.
        seeds: number of training seeds.
        steps: of each training.
        batch_size: of each step.
    """
    yield recording(out / "validation", demonstrations, VALIDATION[0])
    yield converting(out / "validation", base)
    for each in CONTENDERS:
        for rate in RATES if each.name == each.searched else ():
            folder, words = search_folder(out, each.name, rate), (*each.words, *budget(steps, batch_size))
            yield training(each.recipe, rate, 0, base, out / "validation" / "data", folder / "run", words)
            yield acting(trained(folder, steps), folder, "validation", VALIDATION[1], execute=1)
    for seed in range(1, seeds + 1):  # seed by seed, so that whatever there is compares all policies
        data, (demonstrations_from, episodes_from) = out / f"seed-{seed}", scene_seeds(seed)
        yield recording(data, demonstrations, demonstrations_from)
        yield converting(data, base)
        for each in CONTENDERS:
            folder, words = out / each.name / f"seed-{seed}", (*each.words, *budget(steps, batch_size))
            yield training(each.recipe, rate_of(out, each), seed, base, data / "data", folder / "run", words)
            yield acting(trained(folder, steps), folder, "report", episodes_from)
            if each.words:  # it writes chunks
                yield acting(trained(folder, steps), folder, "every-step", episodes_from, execute=1)


def search_folder(out: Path, name: str, rate: float) -> Path:
    """Return where a candidate of the search lies."""
    return out / name / f"search-{rate:g}"


def searched(out: Path, name: str) -> dict[float, float]:
    """Return learning rate to success on the validation scenes."""
    return {rate: Success.from_file(search_folder(out, name, rate) / "validation.json").rate for rate in RATES}


def rate_of(out: Path, contender: Contender) -> float:
    """Return a contender's learning rate; of several that do as well, the lowest."""
    found = searched(out, contender.searched)
    return max(RATES, key=lambda rate: (found[rate], -rate))


def read_comparison(out: Path, seeds: int, steps: int) -> list[PolicyResult]:
    """Gather what the commands left on disk, and time the first seed's policies."""
    speeds = actions_per_second([trained(out / each.name / "seed-1", steps) for each in CONTENDERS])
    results = []
    for each, speed in zip(CONTENDERS, speeds, strict=True):
        folders = [out / each.name / f"seed-{seed}" for seed in range(1, seeds + 1)]
        found = [Success.from_file(folder / "report.json") for folder in folders]
        asked = [Success.from_file(folder / "every-step.json") for folder in folders] if each.words else found
        seconds = sum(train_seconds(folder / "run") for folder in folders) / seeds
        whole, every_step = ([success.rate for success in successes] for successes in (found, asked))
        result = PolicyResult(
            name=each.name,
            title=each.title,
            learning_rate=rate_of(out, each),
            rates=whole,
            every_step=every_step,
            episodes=found[0].episodes,
            train_seconds=seconds,
            actions_per_second=speed,
        )
        results.append(result)
    return results


def actions_per_second(models: Sequence[Path]) -> list[float]:
    """Return how many actions each model writes in a second for one robot, in one thread.

    Models take turns, round by round, so that whatever else the machine does slows all of them; medians count.
    """
    torch.set_num_threads(1)
    policies = [load(str(model), device="cpu") for model in models]
    times: list[list[float]] = [[] for _ in policies]
    env = TabletopEnv()
    for number in range(ROUNDS + 1):  # the first one warms up
        observation, info = env.reset(seed=number)
        for policy, taken in zip(policies, times, strict=True):
            began = time.perf_counter()
            count = _predict(policy, observation, info["instruction"])
            taken.append((time.perf_counter() - began) / count)
    return [1 / statistics.median(taken[1:]) for taken in times]


def _predict(policy: Policy, observation: dict, instruction: str) -> int:
    """Predict for one robot; return the number of actions."""
    reads = policy.model.policy
    columns = {camera: "image" if camera == "main" else f"image_{camera}" for camera in reads.cameras}
    frames = {camera: observation[column] for camera, column in columns.items()}
    state = observation["state"] if reads.state else None
    return len(policy.predict(frames, instruction, state=state).actions)


def markdown(comparison: Sequence[PolicyResult], search: Mapping[str, Mapping[float, float]], trained_for: str) -> str:
    """Return the table, and what of it is certain."""
    first, seeds = comparison[0], len(comparison[0].rates)
    told = [
        f"{name}: " + ", ".join(f"{rate:g}: {percent(success)}" for rate, success in found.items())
        for name, found in search.items()
    ]
    columns = (
        *("policy", "reads; writes", "success, asked at every step", "each seed", "success, whole chunks", "each seed"),
        *("learning rate", "training", "actions per second, whole chunks"),
    )
    lines = [
        f"Training seeds: {seeds}, of {trained_for}; {first.episodes} episodes each. In brackets: intervals of 95 %,"
        " Student's t over training seeds. Actions per second are those of one robot on one thread.",
        "",
        f"| {' | '.join(columns)} |",
        "| --- " * len(columns) + "|",
        *(f"| {' | '.join(_row(each, first.actions_per_second))} |" for each in comparison),
        "",
        "Asked at every step:",
        "",
        *(f"- {_pair(*pair)}" for pair in combinations(comparison, 2)),
        "",
        f"Success on validation scenes, asked at every step, by learning rate: {'; '.join(told)}.",
    ]
    return "\n".join(lines) + "\n"


def _row(result: PolicyResult, serial: float) -> list[str]:
    return [
        result.name,
        result.title,
        *_success(result.every_step, result.episodes),
        *_success(result.rates, result.episodes),
        f"{result.learning_rate:g}",
        duration(result.train_seconds),
        f"{result.actions_per_second:.1f} (x {result.actions_per_second / serial:.1f})",
    ]


def _success(rates: Sequence[float], episodes: int) -> tuple[str, str]:
    mean = percent(sum(rates) / len(rates))
    return f"{mean} ({between(mean_interval(rates, episodes))})", ", ".join(percent(rate) for rate in rates)


def _pair(one: PolicyResult, other: PolicyResult) -> str:
    """Say whether two policies' intervals tell them apart."""
    better = sum(one.every_step) > sum(other.every_step)
    return told_apart(one.name, one.interval, other.name, other.interval, first_is_better=better)


def compare(out: Path, demonstrations: int, seeds: int, steps: int, batch_size: int) -> str:
    """Run what is not done yet and write the results; return them as Markdown.

    Raises:
        StepFailed: one of the commands did.
        VlaftError: the folder cannot be used.
    """
    with locked(out):
        begin(out, {"demos": demonstrations, "steps": steps, "batch-size": batch_size}, "comparison of policies")
        run_steps(study_steps(out, write_base(out), demonstrations, seeds, steps, batch_size), out, vlaft, say)
        comparison = read_comparison(out, seeds, steps)
        search = {name: searched(out, name) for name in ("lora32", "oft")}
        text = markdown(comparison, search, f"{steps} steps of {batch_size} examples")
        write_result(out / "comparison.json", comparison)
        with output_file(out / "comparison.md") as partial:
            partial.write_text(text, encoding="utf-8")
    return text


def main() -> int:
    """Return the exit code: 0 done, 1 user error, 130 interrupted, or that of the command that failed."""
    parser = argparse.ArgumentParser(description="Compare what a policy reads and writes on the demo's new robot.")
    parser.add_argument("--out", type=Path, default=Path("policies-out"), help="folder to write, or to go on with")
    parser.add_argument("--demos", type=int, default=50, help="demonstrations per training seed")
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 10), help="training seeds")
    parser.add_argument("--steps", type=int, default=CHUNK_STEPS, help="of each training, above the warm-up's 20")
    parser.add_argument("--batch-size", type=int, default=CHUNK_BATCH, help="examples of a step")
    options = parser.parse_args()
    return run(lambda: compare(options.out, options.demos, options.seeds, options.steps, options.batch_size))


if __name__ == "__main__":
    sys.exit(main())
