"""How often a model succeeds in environments: those that ship with vlaft, or the user's own.

evaluation = evaluate_in("model/", "tabletop", episodes=100)
evaluation.rollout.success_rate
"""

from __future__ import annotations

import gc
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from vlaft.action.execution import Execution
from vlaft.action.statistics import choose_key
from vlaft.environments.episodes import (
    ENDINGS,
    OPEN_LOOP,
    EpisodeOutcome,
    Job,
    Rollout,
    check_counts,
    run_episodes,
)
from vlaft.environments.interface import Moment
from vlaft.environments.registry import tasks_named
from vlaft.environments.seats import how_many, opened_seats
from vlaft.environments.task import Task
from vlaft.errors import ConfigError, DataError, VlaftError
from vlaft.evaluation.journal import Entry, Journal
from vlaft.files import output_files
from vlaft.observation.images import ImagePipeline
from vlaft.observation.prompts import load_base_files, prompt_style_of
from vlaft.policy import Policy, load

USUAL_EPISODES = 100
TRAINING_SEED = 1_000_000  # of the first episode while training: far from those that `evaluate --env` reports on
TRAINING_PARALLEL = 10
KEPT = 3  # successes, and failures, of each task that pictures show
_PICTURES = re.compile(r"episodes(-.+)?\.(gif|png)")
_NOTHING = re.compile(r"(?!)")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RolloutEvaluation:
    """One model in one or several environments.

    Attributes:
        model: as it was named.
        unnorm_keys: of each task, whose statistics turned what it wrote into actions.
        rollout: its episodes.
        tokens: how many it predicted.
        non_action_tokens: how many of these stand for no action; each was acted on as a full move.
    """

    model: str
    unnorm_keys: dict[str, str]
    rollout: Rollout
    tokens: int
    non_action_tokens: int

    def to_json(self) -> dict[str, Any]:
        """Return everything but the frames."""
        return {
            "model": self.model,
            **_counted(self.rollout),
            "tokens": self.tokens,
            "non_action_tokens": self.non_action_tokens,
            "seconds": self.rollout.seconds,
            "tasks": [
                {"task": name, "unnorm_key": self.unnorm_keys[name], **_counted(rollout)}
                for name, rollout in self.rollout.by_task().items()
            ],
            "outcomes": [
                {"task": each.task, "seed": each.seed, "instruction": each.instruction, "success": each.success}
                | {"ended": each.ended, "steps": each.steps, "info": each.info}
                for each in self.rollout.episodes
            ],
        }


def _counted(rollout: Rollout) -> dict[str, Any]:
    count = len(rollout.episodes)
    ends = [each.ended for each in rollout.episodes]
    return {
        "episodes": count,
        "successes": rollout.successes,
        "success_rate": rollout.success_rate,
        "interval": list(rollout.interval),
        "mean_steps": sum(each.steps for each in rollout.episodes) / count,
        "ended": {ending: ends.count(ending) for ending in ENDINGS if ending in ends},
    }


def evaluate_in(
    model: str,
    env: str | Sequence[str],
    *,
    episodes: int = USUAL_EPISODES,
    seed: int = 0,
    parallel: int = 50,
    workers: int | None = None,
    keep: int = 0,
    execution: Execution = OPEN_LOOP,
    step_limit: int | None = None,
    unnorm_key: str | None = None,
    dtype: str | None = None,
    device: str = "auto",
    base: str | None = None,
    settings: Mapping[str, Any] | None = None,
    center_crop: bool | None = None,
    resize: str | None = None,
    journal: Journal | None = None,
    advance: Callable[[int], None] = lambda count: None,
    task_done: Callable[[str, list[EpisodeOutcome]], None] = lambda task, outcomes: None,
    told: Callable[[str], None] = _log.warning,
) -> RolloutEvaluation:
    """Let a model act in environments.

    Args:
        model: a base, run, checkpoint of a run, adapter, merged or exported checkpoint.
        env: as `tasks_named` takes it, or several.
        episodes: how many of each task; they are reset with the seeds `seed`, `seed + 1`, ...
        seed: of the first.
        parallel: environments at a time in this process, and at most so many of those that have one of their own.
        workers: processes, each with one environment; 0 for none; None chooses (`seats.how_many`).
        keep: keep the frames of so many first successes and failures of each task, for pictures.
        execution: how much of a chunk is done before the next is asked for.
        step_limit: ends an episode after so many steps, where the environment's own limit is higher.
        unnorm_key: name of the statistics; None takes the environment's where the model has them, else its only one.
        dtype: as `vlaft.load` takes it.
        device: likewise.
        base: likewise.
        settings: of the policy, likewise.
        center_crop: likewise.
        resize: likewise.
        journal: where episodes are written as they end; those that it holds of this model are not acted again.
        advance: told of each episode that has ended, and at first of those in the journal.
        task_done: given a task's episodes when the last of them that is acted now has ended; frames are dropped then.
        told: told in a sentence of a worker that died.

    Raises:
        UsageError: no such environment.
        ConfigError: `episodes` or `parallel` is not positive, `seed` is negative, an environment is named twice or
            has fewer first states than `episodes`, or more actions are to be executed than the policy's chunks have.
        CheckpointError: the model is missing or damaged.
        DataError: the statistics cannot be told, an environment does not keep to the interface or lacks what the
            policy reads, or takes actions of another width.
        VlaftError: an environment fails, workers die again and again, or the GPU's memory is full.
    """
    tasks, seeds = tasks_of([env] if isinstance(env, str) else env), range(seed, seed + episodes)
    if step_limit is not None:
        tasks = [replace(task, step_limit=min(task.step_limit, step_limit)) for task in tasks]
    check_counts(seeds, parallel)
    _check_states(tasks, episodes)
    entries = {(entry.task, entry.seed): entry for entry in (journal.of(model) if journal else ())}
    jobs = [Job(task, seed) for task in tasks for seed in seeds]
    missing = [job for job in jobs if (job.task.name, job.seed) not in entries]
    count, processes = how_many(tasks, parallel, workers)
    first = missing[0].task if missing else tasks[0]
    pending = _Pending(missing, task_done)
    try:
        # first, for a model may take minutes to load
        with opened_seats(first, min(count, len(missing)), processes=processes) as seats:
            frames_as = {"center_crop": center_crop, "resize": resize}
            policy = load(model, dtype=dtype, device=device, base=base, policy=settings, **frames_as)  # type: ignore[arg-type]
            execution.check(policy.model.policy.chunk)
            actor = _Actor(
                policy, {task.name: _statistics_key(policy, model, task, unnorm_key) for task in tasks}, model
            )
            if len(missing) < len(jobs):
                advance(len(jobs) - len(missing))

            def finished(outcome: EpisodeOutcome) -> None:
                entry = actor.entry(outcome)
                entries[outcome.task, outcome.seed] = entry
                if journal is not None:
                    journal.add(entry)
                pending.finished(outcome)
                advance(1)

            acted = run_episodes(
                actor,
                seats,
                missing,
                execution=execution,
                keep=keep,
                cameras=policy.model.policy.cameras,
                finished=finished,
                told=told,
            )
    except torch.cuda.OutOfMemoryError as error:
        raise VlaftError(f"the GPU's memory is full at --batch-size {parallel}: halve it") from error
    else:
        outcomes = {(each.task, each.seed): each for each in acted.episodes}
        named = [(job.task.name, job.seed) for job in jobs]
        rollout = Rollout(tuple(outcomes.get(name) or entries[name].outcome() for name in named), acted.seconds)
        tokens, others = ([getattr(entries[name], key) for name in named] for key in ("tokens", "non_action_tokens"))
        return RolloutEvaluation(model, actor.keys, rollout, sum(tokens), sum(others))
    finally:
        policy = actor = None  # type: ignore[assignment]
        gc.collect()  # the next model needs the place of this one
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def acting(
    env: str, episodes: int, seed: int = TRAINING_SEED
) -> Callable[[Any, Path, Mapping[str, Any], Mapping[str, Any], torch.device], Rollout]:
    """Return what lets a model in training act in an environment.

    Args:
        env: as `tasks_named` takes it; one is made and closed again, so that what is wrong shows at once.
        episodes: how many of each task each time, with the same seeds each time.
        seed: of the first.

    Returns:
        A function of the model in eval mode, its base's folder, its `inference` (`run.json`), its statistics and its
        device, as `vlaft.training.run.Run.act` calls it.

    Raises:
        UsageError: no such environment.
        ConfigError: it has fewer first states than `episodes`.
        VlaftError: it fails.
    """
    tasks = tasks_of([env])
    _check_states(tasks, episodes)
    for task in tasks:
        if task.states is not None:
            _log.warning(
                "%s begins in one of %d states, the same for every seed of an evaluation: successes while training are"
                " of states that it reports on",
                task.name,
                task.states,
            )
    jobs = [Job(task, number) for task in tasks for number in range(seed, seed + episodes)]
    count, processes = how_many(tasks, TRAINING_PARALLEL, None)
    with opened_seats(tasks[0], 1, processes=processes):
        pass

    def act(
        model: Any, base: Path, inference: Mapping[str, Any], statistics: Mapping[str, Any], device: torch.device
    ) -> Rollout:
        files = load_base_files(base)
        files = replace(files, config={**files.config, **inference})
        files = replace(files, prompt_style=prompt_style_of(files.config))
        pipeline = ImagePipeline.from_checkpoint(files.config, files.preprocessor)
        policy = Policy(model, files, pipeline, statistics, device)
        actor = _Actor(policy, {task.name: _statistics_key(policy, "the run", task, None) for task in tasks}, "the run")
        with opened_seats(tasks[0], min(count, len(jobs)), processes=processes) as seats:
            return run_episodes(actor, seats, jobs, cameras=policy.model.policy.cameras)

    return act


def tasks_of(names: Sequence[str]) -> list[Task]:
    """Return the tasks that environments' names stand for.

    Raises:
        UsageError: there is none of a name.
        ConfigError: one is named twice.
        VlaftError: its module cannot be imported.
    """
    tasks = [task for name in names for task in tasks_named(name)]
    for number, task in enumerate(tasks):
        if any(task.name == other.name for other in tasks[:number]):
            raise ConfigError(f"--env {task.name} is named twice")
    return tasks


def usual_episodes(tasks: Sequence[Task]) -> int:
    """Return how many episodes of each task are acted where nobody says: 100, or as many as there are to begin with."""
    return min(USUAL_EPISODES, *(task.states or USUAL_EPISODES for task in tasks))


def _check_states(tasks: Sequence[Task], episodes: int) -> None:
    """Refuse to count an episode twice."""
    for task in tasks:
        if task.states is not None and episodes > task.states:
            raise ConfigError(
                f"{task.name} has {task.states} first states, and {episodes} episodes would count some of them twice;"
                f" ask for {task.states} episodes or fewer"
            )


class _Pending:
    """Counts down the episodes of each task."""

    def __init__(self, jobs: Sequence[Job], done: Callable[[str, list[EpisodeOutcome]], None]) -> None:
        self._left: dict[str, int] = {}
        for job in jobs:
            self._left[job.task.name] = self._left.get(job.task.name, 0) + 1
        self._several = len(self._left) > 1
        self._done = done
        self._outcomes: dict[str, list[EpisodeOutcome]] = {}

    def finished(self, outcome: EpisodeOutcome) -> None:
        outcomes = self._outcomes.setdefault(outcome.task, [])
        outcomes.append(outcome)
        self._left[outcome.task] -= 1
        if not self._left[outcome.task]:
            outcomes.sort(key=lambda each: each.seed)
            self._done(outcome.task, outcomes)
            for each in outcomes if self._several else ():  # of fifty tasks they would not fit in memory
                each.frames, each.actions = [], []


@contextmanager
def pictures(folder: Path, *, keep: bool = False) -> Iterator[Pictures]:
    """Give pictures to draw, which replace those of an earlier evaluation in a folder when the block ends well.

    Args:
        folder: where they go.
        keep: replace only those of the same names, as where the earlier evaluation is gone on with.

    Raises:
        VlaftError: the folder cannot be written, or another process writes there.
    """
    with output_files(folder, _NOTHING if keep else _PICTURES) as partial:
        yield Pictures(partial)


class Pictures:
    """Films (GIF) and contact sheets (PNG), one of each for a model's kept episodes of a task.

    Args:
        folder: where they are written.
    """

    def __init__(self, folder: Path) -> None:
        self.names: list[str] = []
        self._folder = folder

    def add(self, name: str, episodes: Sequence[EpisodeOutcome]) -> None:
        """Draw those of the episodes whose frames were kept, if there are any; `name` tells their files from others."""
        from vlaft.environments.film import write_contact_sheet, write_film

        shown = [episode for episode in episodes if episode.frames]
        if not shown:
            return
        stem = re.sub(r"[^\w.-]+", "-", f"episodes-{name}" if name else "episodes")
        write_film(self._folder / f"{stem}.gif", shown)
        write_contact_sheet(self._folder / f"{stem}.png", shown)
        self.names += [f"{stem}.gif", f"{stem}.png"]


class _Actor:
    """A policy, asked for chunks, that remembers how many of an episode's tokens stood for no action."""

    def __init__(self, policy: Policy, keys: dict[str, str], model: str) -> None:
        self.keys = keys
        self._policy = policy
        self._model = model
        self._tokens: Counter[tuple[str, int]] = Counter()  # of each episode under way
        self._others: Counter[tuple[str, int]] = Counter()

    def __call__(self, moments: list[Moment]) -> list[NDArray[Any]]:
        """Return a chunk `[K, A]` for each moment; those whose statistics differ are asked for apart."""
        chunks: dict[int, NDArray[Any]] = {}
        for key in dict.fromkeys(self.keys[moment.task] for moment in moments):
            rows = [row for row, moment in enumerate(moments) if self.keys[moment.task] == key]
            chunks |= zip(rows, self._ask([moments[row] for row in rows], key), strict=True)
        return [chunks[row] for row in range(len(moments))]

    def entry(self, outcome: EpisodeOutcome) -> Entry:
        """Return an ended episode's line."""
        episode = (outcome.task, outcome.seed)
        return Entry(
            self._model,
            outcome.task,
            outcome.seed,
            outcome.instruction,
            outcome.success,
            outcome.ended,
            outcome.steps,
            self._tokens.pop(episode, 0),
            self._others.pop(episode, 0),
            outcome.info,
        )

    def _ask(self, moments: list[Moment], key: str) -> list[NDArray[Any]]:
        for moment in moments:
            self._check(moment)
        predictions = self._policy.predict(
            [moment.frames for moment in moments],
            [moment.instruction for moment in moments],
            state=[moment.state for moment in moments] if self._policy.model.policy.state else None,  # type: ignore[arg-type]
            unnorm_key=key,
        )
        for moment, each in zip(moments, predictions, strict=True):
            self._tokens[moment.task, moment.seed] += len(each.action_token_ids or ())
            self._others[moment.task, moment.seed] += each.non_action_tokens
        return [each.actions for each in predictions]

    def _check(self, moment: Moment) -> None:
        """Refuse an environment that does not observe what the policy reads."""
        reads = self._policy.model.policy
        for camera in reads.cameras:
            if camera not in moment.frames:
                there = ", ".join(moment.frames)
                raise DataError(
                    f"{self._model}: it reads the camera '{camera}', which {moment.task} lacks (it has: {there})"
                )
        if reads.state and (moment.state is None or len(moment.state) != reads.state_size):
            found = "none" if moment.state is None else f"one of {len(moment.state)}"
            raise DataError(
                f"{self._model}: it reads a state of {reads.state_size} numbers, and {moment.task} observes {found}"
            )


def _statistics_key(policy: Policy, model: str, task: Task, wanted: str | None) -> str:
    """Return what was asked for, else the task's own where the model has it, else the model's only one.

    Raises:
        DataError: it cannot be told, or actions in its range have another width than the environment's.
    """
    own = next((key for key in task.unnorm_keys if key in policy.statistics), None)
    try:
        key = choose_key(policy.statistics, wanted or own)
    except DataError as error:
        raise DataError(f"{model}: {error}" + ("" if wanted else " (--unnorm-key)")) from None
    width = len(policy.statistics[key]["action"]["q01"])
    if task.actions and width not in map(len, task.actions):
        takes = " or ".join(f"{len(names)} ({', '.join(names)})" for names in task.actions)
        raise DataError(f"{model}: its actions in '{key}' have {width} numbers, and {task.name} takes {takes}")
    return key
