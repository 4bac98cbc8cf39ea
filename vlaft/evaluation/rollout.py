"""How often a model succeeds in an environment: the simulator that ships with vlaft, or the user's own.

evaluation = evaluate_in("model/", "tabletop", episodes=100)
evaluation.rollout.success_rate
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from vlaft.action.execution import Execution
from vlaft.action.statistics import choose_key
from vlaft.environments.episodes import OPEN_LOOP, Rollout, check_counts, run_episodes
from vlaft.environments.interface import Moment, opened_environments
from vlaft.environments.registry import _SHIPPED, environment_maker
from vlaft.errors import DataError, VlaftError
from vlaft.files import output_files
from vlaft.observation.images import ImagePipeline
from vlaft.observation.prompts import load_base_files, prompt_style_of
from vlaft.policy import Policy, load

TRAINING_SEED = 1_000_000  # of the first episode while training: far from those that `evaluate --env` reports on
TRAINING_PARALLEL = 10
KEPT = 6  # episodes that pictures show
_PICTURES = re.compile(r"episodes(-\d+-.+)?\.(gif|png)")


@dataclass(frozen=True)
class RolloutEvaluation:
    """One model in one environment.

    Attributes:
        model: as it was named.
        unnorm_key: whose statistics turned its tokens into actions.
        rollout: its episodes.
        tokens: how many it predicted.
        non_action_tokens: how many of these stand for no action; each was acted on as a full move.
    """

    model: str
    unnorm_key: str
    rollout: Rollout
    tokens: int
    non_action_tokens: int

    def to_json(self) -> dict[str, Any]:
        """Return everything but the frames."""
        rollout = self.rollout
        return {
            "model": self.model,
            "unnorm_key": self.unnorm_key,
            "episodes": len(rollout.episodes),
            "successes": rollout.successes,
            "success_rate": rollout.success_rate,
            "interval": list(rollout.interval),
            "tokens": self.tokens,
            "non_action_tokens": self.non_action_tokens,
            "seconds": rollout.seconds,
            "outcomes": [
                {"seed": each.seed, "instruction": each.instruction, "success": each.success, "steps": each.steps}
                | {"info": each.info}
                for each in rollout.episodes
            ],
        }


def evaluate_in(
    model: str,
    env: str,
    *,
    episodes: int = 100,
    seed: int = 0,
    parallel: int = 50,
    keep: int = 0,
    execution: Execution = OPEN_LOOP,
    unnorm_key: str | None = None,
    dtype: str | None = None,
    device: str = "auto",
    base: str | None = None,
    settings: Mapping[str, Any] | None = None,
    center_crop: bool | None = None,
    resize: str | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> RolloutEvaluation:
    """Let a model act in an environment.

    Args:
        model: a base, run, checkpoint of a run, adapter, merged or exported checkpoint.
        env: as `environment_maker` takes it.
        episodes: how many; they are reset with the seeds `seed`, `seed + 1`, ...
        seed: of the first.
        parallel: environments at a time.
        keep: keep the frames of so many first episodes, for pictures.
        execution: how much of a chunk is done before the next is asked for.
        unnorm_key: name of the statistics; None takes the environment's where the model has them, else its only one.
        dtype: as `vlaft.load` takes it.
        device: likewise.
        base: likewise.
        settings: of the policy, likewise.
        center_crop: likewise.
        resize: likewise.
        advance: told of each episode that has ended.

    Raises:
        UsageError: no such environment.
        ConfigError: `episodes` or `parallel` is not positive, `seed` is negative, or more actions are to be executed
            than the policy's chunks have.
        CheckpointError: the model is missing or damaged.
        DataError: the statistics cannot be told, or the environment does not keep to the interface or lacks what the
            policy reads.
        VlaftError: the environment fails, or the GPU's memory is full.
    """
    make, seeds = environment_maker(env), range(seed, seed + episodes)
    check_counts(seeds, parallel)
    try:
        # first, for a model may take minutes to load
        with opened_environments(make, min(parallel, episodes)) as environments:
            frames_as = {"center_crop": center_crop, "resize": resize}
            policy = load(model, dtype=dtype, device=device, base=base, policy=settings, **frames_as)  # type: ignore[arg-type]
            execution.check(policy.model.policy.chunk)
            actor = _Actor(policy, _statistics_key(policy, model, env, unnorm_key), model, env)
            rollout = run_episodes(actor, environments, seeds=seeds, execution=execution, keep=keep, advance=advance)
        return RolloutEvaluation(model, actor.key, rollout, actor.tokens, actor.non_action_tokens)
    except torch.cuda.OutOfMemoryError as error:
        raise VlaftError(f"the GPU's memory is full at --batch-size {parallel}: halve it") from error
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
        env: as `environment_maker` takes it; one is made and closed again, so that what is wrong shows at once.
        episodes: how many each time, with the same seeds each time.
        seed: of the first.

    Returns:
        A function of the model in eval mode, its base's folder, its `inference` (`run.json`), its statistics and its
        device, as `vlaft.training.run.Run.act` calls it.

    Raises:
        UsageError: no such environment.
        VlaftError: it fails.
    """
    make = environment_maker(env)
    with opened_environments(make, 1):
        pass

    def act(
        model: Any, base: Path, inference: Mapping[str, Any], statistics: Mapping[str, Any], device: torch.device
    ) -> Rollout:
        files = load_base_files(str(base))
        files = replace(files, config={**files.config, **inference})
        files = replace(files, prompt_style=prompt_style_of(files.config))
        pipeline = ImagePipeline.from_checkpoint(files.config, files.preprocessor)
        policy = Policy(model, files, pipeline, statistics, device)
        actor = _Actor(policy, _statistics_key(policy, "the run", env, None), "the run", env)
        with opened_environments(make, min(TRAINING_PARALLEL, episodes)) as environments:
            return run_episodes(actor, environments, seeds=range(seed, seed + episodes))

    return act


def write_pictures(folder: Path, evaluations: Sequence[RolloutEvaluation]) -> list[Path]:
    """Write a film (GIF) and a contact sheet (PNG) of each model's kept episodes; earlier ones are removed.

    Returns:
        The files.

    Raises:
        VlaftError: the folder cannot be written, or another process writes there.
    """
    from vlaft.environments.film import write_contact_sheet, write_film

    files = []
    with output_files(folder, _PICTURES) as partial:
        for number, evaluation in enumerate(evaluations, 1):
            model = Path(evaluation.model).resolve().name
            name = "episodes" if len(evaluations) == 1 else f"episodes-{number}-{model}"
            shown = [episode for episode in evaluation.rollout.episodes if episode.frames]
            write_film(partial / f"{name}.gif", shown)
            write_contact_sheet(partial / f"{name}.png", shown)
            files += [folder / f"{name}.gif", folder / f"{name}.png"]
    return files


@dataclass
class _Actor:
    policy: Policy
    key: str
    model: str
    env: str
    tokens: int = 0
    non_action_tokens: int = 0

    def __call__(self, moments: list[Moment]) -> list[NDArray[Any]]:
        for moment in moments:
            self._check(moment)
        predictions = self.policy.predict(
            [moment.frames for moment in moments],
            [moment.instruction for moment in moments],
            state=[moment.state for moment in moments] if self.policy.model.policy.state else None,  # type: ignore[arg-type]
            unnorm_key=self.key,
        )
        self.tokens += sum(len(each.action_token_ids or ()) for each in predictions)
        self.non_action_tokens += sum(each.non_action_tokens for each in predictions)
        return [each.actions for each in predictions]

    def _check(self, moment: Moment) -> None:
        """Refuse an environment that does not observe what the policy reads."""
        reads = self.policy.model.policy
        for camera in reads.cameras:
            if camera not in moment.frames:
                there = ", ".join(moment.frames)
                raise DataError(
                    f"{self.model}: it reads the camera '{camera}', which {self.env} lacks (it has: {there})"
                )
        if reads.state and (moment.state is None or len(moment.state) != reads.state_size):
            found = "none" if moment.state is None else f"one of {len(moment.state)}"
            raise DataError(
                f"{self.model}: it reads a state of {reads.state_size} numbers, and {self.env} observes {found}"
            )


def _statistics_key(policy: Policy, model: str, env: str, wanted: str | None) -> str:
    """Return what was asked for, else the environment's own where the model has it, else the model's only one."""
    own = _SHIPPED[env].name if env in _SHIPPED else None
    try:
        return choose_key(policy.statistics, wanted or (own if own in policy.statistics else None))
    except DataError as error:
        raise DataError(f"{model}: {error}" + ("" if wanted else " (--unnorm-key)")) from None
