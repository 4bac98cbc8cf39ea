"""Compare tokens and chunks where things resist: three of Meta-World's tasks, from demonstrations to successes.

    MUJOCO_GL=egl python benchmarks/closed_loop.py --out closed-loop-out

needs `vlaft[metaworld]`, and takes an hour or more on two CPU cores; the same command again goes on where it was
interrupted. One policy is trained for all three tasks and goes by its instruction. Two kinds are compared: the released
OpenVLA's (one camera, one action, token by token) and OpenVLA-OFT's (two cameras and the state, chunks, L1). Both have
the same demonstrations, base, steps, batch, augmentation, schedule, search and episodes, and all weights are trained.
Learning rates are chosen by successes on validation seeds; what is reported is on seeds that nothing was chosen by.

OUT/
  base/                        the demo's base
  demos/, data/                demonstrations of all tasks, recorded once and converted; every training has these
  KIND/search-RATE/            a run, and validation/: what `vlaft evaluate --out` leaves
  KIND/seed-1/ ...             a run of each training seed, and report/
  comparison.json, comparison.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from studies import begin, run, told_apart

from vlaft.cli.console import say
from vlaft.cli.main import main as vlaft
from vlaft.demo.results import Success, mean_interval, write_result
from vlaft.demo.steps import DemoStep, budget, run_steps, train_seconds, trained, training, write_base
from vlaft.files import locked, output_file, read_json
from vlaft.pages.html import between, duration, percent

# Easy ones, for a small model, and unlike each other: to find something small, to push against a spring from the
# front, to push a thing that slides. Each is said in words most of which the base knows.
TASKS = ("reach-v3", "button-press-v3", "drawer-close-v3")
DISTURBED = 0.3  # share of an expert's steps that are knocked aside, so that demonstrations show how to come back
STEP_LIMIT = 150  # Meta-World's own is 500; experts take 23 to 86, and 31 of a pilot's 32 successes at most 107
RATES = (5e-4, 1e-3)  # the second is what the demo's search chose for `full`
# First seeds, far apart. Training seed k is reported on the episodes that begin at EPISODES + PER_SEED * k.
DEMONSTRATIONS, VALIDATION, EPISODES, PER_SEED = 100_000, 500_000, 600_000, 1_000


@dataclass(frozen=True)
class Kind:
    """A kind of policy.

    Attributes:
        name: of its folder.
        words: settings beside `full`'s.
        title: what it reads and writes.
    """

    name: str
    words: tuple[str, ...]
    title: str


KINDS = (
    Kind("tokens", (), "one camera; one action, token by token"),
    Kind(
        "chunks",
        (
            *("policy.head=l1", "policy.chunk=8", "policy.tail=repeat"),
            *("policy.cameras=[main, wrist]", "policy.state=true"),
        ),
        "two cameras and the state; 8 actions, L1 head",
    ),
)
SHARED = ("train.gradient_checkpointing=none", "train.evaluate_every=400")


@dataclass(frozen=True)
class Study:
    """How much of everything.

    Attributes:
        out: folder of all results.
        demonstrations: of each task.
        seeds: number of training seeds.
        steps: of each training.
        batch_size: of each step.
        episodes: of each task and training seed.
        searched: episodes of each task that a learning rate is chosen by.
        rates: learning rates to choose from; a single one is taken without a search.
    """

    out: Path
    demonstrations: int
    seeds: int
    steps: int
    batch_size: int
    episodes: int
    searched: int
    rates: tuple[float, ...] = RATES


@dataclass(frozen=True)
class KindResult:
    """One kind of policy in the comparison.

    Attributes:
        name: as its kind's.
        title: likewise.
        learning_rate: that did best on the validation episodes, or the only one.
        search: learning rate, as text, to success there, over all tasks; empty where there was nothing to choose.
        successes: task to the successes of each training seed; `all` for all tasks together.
        episodes: of each task and training seed.
        train_seconds: mean of one training.
    """

    name: str
    title: str
    learning_rate: float
    search: Mapping[str, float]
    successes: Mapping[str, Sequence[int]]
    episodes: int
    train_seconds: float

    def rates(self, task: str) -> list[float]:
        """Return a task's success of each training seed."""
        episodes = self.episodes * (len(TASKS) if task == "all" else 1)
        return [successes / episodes for successes in self.successes[task]]

    def interval(self, task: str) -> tuple[float, float]:
        """Return the 95 % interval of the mean over training seeds (Student's t); Wilson's where there is one seed."""
        rates = self.rates(task)
        return mean_interval(rates, self.episodes * (len(TASKS) if task == "all" else 1))

    def widest(self, task: str) -> tuple[float, float]:
        """Return what covers both intervals: seeds that came out alike by chance have one of no width."""
        lows, highs = zip(self.interval(task), self.together(task).interval, strict=True)
        return min(lows), max(highs)

    def together(self, task: str) -> Success:
        """Return all training seeds' episodes of a task."""
        episodes = self.episodes * (len(TASKS) if task == "all" else 1)
        return Success(sum(self.successes[task]), episodes * len(self.successes[task]))


def study_steps(study: Study, base: Path) -> Iterator[DemoStep]:
    """Yield the commands in their order; each is to be done before the next is asked for."""
    out, data = study.out, study.out / "data"
    yield recording(study)
    yield DemoStep(
        ("convert", str(out / "demos"), "--name", "metaworld", "--base", str(base), "--out", str(data)),
        data / "dataset.json",
    )
    for kind in KINDS:
        for rate in study.rates if len(study.rates) > 1 else ():
            folder = search_folder(out, kind, rate)
            yield from trained_and_tried(study, kind, rate, 0, folder, "validation", VALIDATION, study.searched)
    for seed in range(1, study.seeds + 1):  # seed by seed, so that whatever there is compares both kinds
        for kind in KINDS:
            first, folder = EPISODES + PER_SEED * seed, out / kind.name / f"seed-{seed}"
            rate = best_rate(study, kind)
            yield from trained_and_tried(study, kind, rate, seed, folder, "report", first, study.episodes)


def recording(study: Study) -> DemoStep:
    """Return the command that records all demonstrations."""
    words = ("record", *(f"metaworld:{task}" for task in TASKS), "--episodes", str(study.demonstrations))
    more = ("--seed", str(DEMONSTRATIONS), "--disturb", f"{DISTURBED:g}", "--out", str(study.out / "demos"))
    return DemoStep((*words, *more), study.out / "demos")


def trained_and_tried(
    study: Study, kind: Kind, rate: float, seed: int, folder: Path, name: str, first: int, episodes: int
) -> Iterator[DemoStep]:
    """Yield the command that trains into a folder, and the one that lets its policy act from the first seed on."""
    words = (*SHARED, *kind.words, *budget(study.steps, study.batch_size))
    yield training("full", rate, seed, study.out / "base", study.out / "data", folder / "run", words)
    results = folder / name
    asked = ("--episodes", str(episodes), "--seed", str(first), "--step-limit", str(STEP_LIMIT))
    resume = ("--resume",) if results.exists() else ()
    envs = [word for task in TASKS for word in ("--env", f"metaworld:{task}")]
    model = str(trained(folder, study.steps))
    yield DemoStep(("evaluate", model, *envs, *asked, "--out", str(results), *resume), results / "results.json")


def search_folder(out: Path, kind: Kind, rate: float) -> Path:
    """Return where a candidate of the search lies."""
    return out / kind.name / f"search-{rate:g}"


def searched(study: Study, kind: Kind) -> dict[float, float]:
    """Return learning rate to success on the validation episodes, over all tasks; nothing of a single one."""
    if len(study.rates) == 1:
        return {}
    found = {rate: successes(search_folder(study.out, kind, rate) / "validation")["all"] for rate in study.rates}
    return {rate: success.rate for rate, success in found.items()}


def best_rate(study: Study, kind: Kind) -> float:
    """Return a kind's learning rate; of several that do as well, the lowest."""
    found = searched(study, kind)
    return max(study.rates, key=lambda rate: (found.get(rate, 0.0), -rate))


def successes(results: Path) -> dict[str, Success]:
    """Return what `vlaft evaluate --out` found, by task, and over `all` of them."""
    (model,) = read_json(results / "results.json")["models"]
    tasks = {each["task"].partition(":")[2]: each for each in model["tasks"]}
    return {task: Success(each["successes"], each["episodes"]) for task, each in {**tasks, "all": model}.items()}


def read_comparison(study: Study) -> list[KindResult]:
    """Gather what the commands left on disk."""
    results = []
    for kind in KINDS:
        folders = [study.out / kind.name / f"seed-{seed}" for seed in range(1, study.seeds + 1)]
        found = [successes(folder / "report") for folder in folders]
        result = KindResult(
            name=kind.name,
            title=kind.title,
            learning_rate=best_rate(study, kind),
            search={f"{rate:g}": success for rate, success in searched(study, kind).items()},
            successes={task: [each[task].successes for each in found] for task in (*TASKS, "all")},
            episodes=study.episodes,
            train_seconds=sum(train_seconds(folder / "run") for folder in folders) / study.seeds,
        )
        results.append(result)
    return results


def markdown(study: Study, comparison: Sequence[KindResult]) -> str:
    """Return the table, and what of it is certain."""
    columns = ("task", "policy", "success", "each seed", "all episodes together", "learning rate", "training")
    tokens, chunks = comparison
    told = [
        f"{each.name}: " + ", ".join(f"{rate}: {percent(success)}" for rate, success in each.search.items())
        for each in comparison
    ]
    lines = [
        f"{study.demonstrations} demonstrations of each task, one policy for all three; training seeds: {study.seeds},"
        f" of {study.steps} steps of {study.batch_size} examples; {study.episodes} episodes of each task and seed, of"
        f" {STEP_LIMIT} steps at most. In brackets: intervals of 95 %, Student's t over training seeds, and Wilson's of"
        " all episodes together, which says nothing of how seeds differ. Below the table the wider end of both counts.",
        "",
        *(f"- {each.name}: {each.title}" for each in comparison),
        "",
        f"| {' | '.join(columns)} |",
        "| --- " * len(columns) + "|",
        *(f"| {' | '.join(_row(each, task))} |" for task in (*TASKS, "all") for each in comparison),
        "",
        *(f"- {task}: {_pair(tokens, chunks, task)}" for task in (*TASKS, "all")),
        "",
        f"Success on validation episodes ({study.searched} of each task), by learning rate: {'; '.join(told)}."
        if len(study.rates) > 1
        else "The learning rate was not searched.",
    ]
    return "\n".join(lines) + "\n"


def _row(result: KindResult, task: str) -> list[str]:
    rates, together = result.rates(task), result.together(task)
    return [
        task,
        result.name,
        f"{percent(sum(rates) / len(rates))} ({between(result.interval(task))})",
        ", ".join(percent(rate) for rate in rates),
        f"{together.successes} of {together.episodes} ({between(together.interval)})",
        f"{result.learning_rate:g}",
        duration(result.train_seconds),
    ]


def _pair(one: KindResult, other: KindResult, task: str) -> str:
    better = one.together(task).rate > other.together(task).rate
    return told_apart(one.name, one.widest(task), other.name, other.widest(task), first_is_better=better)


def compare(study: Study) -> str:
    """Run what is not done yet and write the results; return them as Markdown.

    Raises:
        StepFailed: one of the commands did.
        VlaftError: the folder cannot be used.
    """
    out = study.out
    with locked(out):
        asked = {"demos": study.demonstrations, "steps": study.steps, "batch-size": study.batch_size}
        asked |= {"episodes": study.episodes, "searched": study.searched, "rates": [*study.rates]}
        begin(out, asked, "study in Meta-World")
        run_steps(study_steps(study, write_base(out)), out, vlaft, say)
        comparison = read_comparison(study)
        text = markdown(study, comparison)
        write_result(out / "comparison.json", comparison)
        with output_file(out / "comparison.md") as partial:
            partial.write_text(text, encoding="utf-8")
    return text


def main() -> int:
    """Return the exit code: 0 done, 1 user error, 130 interrupted, or that of the command that failed."""
    parser = argparse.ArgumentParser(description="Compare tokens and chunks in three of Meta-World's tasks.")
    parser.add_argument("--out", type=Path, default=Path("closed-loop-out"), help="folder to write, or to go on with")
    parser.add_argument("--demos", type=int, default=50, help="demonstrations of each task")
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 10), help="training seeds")
    parser.add_argument("--steps", type=int, default=800, help="of each training, above the warm-up's 20")
    parser.add_argument("--batch-size", type=int, default=16, help="examples of a step")
    parser.add_argument("--episodes", type=int, default=20, help="of each task and training seed")
    parser.add_argument("--searched", type=int, default=10, help="episodes of each task that choose a learning rate")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=RATES, help="learning rates to choose from; one is taken as it is"
    )
    given = parser.parse_args()
    amounts = (given.demos, given.seeds, given.steps, given.batch_size, given.episodes, given.searched, (*given.rates,))
    return run(lambda: compare(Study(given.out, *amounts)))


if __name__ == "__main__":
    sys.exit(main())
