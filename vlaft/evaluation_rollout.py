"""How often a model succeeds in an environment: the simulator that ships with vlaft, or the user's own.

evaluation = evaluate_in("model/", "tabletop", episodes=100)
evaluation.rollout.success_rate
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlaft.errors import UsageError, VlaftError, did_you_mean
from vlaft.inference import Policy, load
from vlaft.sim.rollout import Environment, Rollout, roll_out
from vlaft.sim.scene import SETUP_A, SETUP_B, SETUPS

_SHIPPED = {"tabletop": SETUP_B, "tabletop-a": SETUP_A, "tabletop-b": SETUP_B}
KEPT = 6  # episodes whose frames are kept for pictures


@dataclass(frozen=True)
class RolloutEvaluation:
    """One model in one environment.

    Attributes:
        model: as it was named.
        unnorm_key: whose statistics turned its tokens into actions.
        rollout: its episodes.
    """

    model: str
    unnorm_key: str
    rollout: Rollout

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
            "seconds": rollout.seconds,
            "outcomes": [
                {"seed": each.seed, "instruction": each.instruction, "success": each.success, "steps": each.steps}
                | {"info": each.info}
                for each in rollout.episodes
            ],
        }


def environment_maker(name: str) -> Callable[[], Environment]:
    """Return what makes an environment of a name.

    Args:
        name: `tabletop` (or `tabletop-b`, the demo's new robot; `tabletop-a`, where its base comes from), or
            `module:factory`, a callable without arguments that returns an environment (see `vlaft.sim.rollout`);
            the module is looked for in the working folder too.

    Raises:
        UsageError: there is none of that name.
    """
    if name in _SHIPPED:
        from vlaft.sim.tabletop import TabletopEnv

        return lambda: TabletopEnv(_SHIPPED[name])
    module_name, colon, factory = name.partition(":")
    if not (colon and module_name and factory):
        raise UsageError(
            f"--env {name}: there is no such environment{did_you_mean(name, [*_SHIPPED])}"
            " (tabletop, tabletop-a, or one's own as module:factory)"
        )
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        made = getattr(importlib.import_module(module_name), factory)
    except ModuleNotFoundError as error:
        raise UsageError(f"--env {name}: there is no module '{error.name}'; run from the folder that has it") from error
    except AttributeError as error:
        raise UsageError(f"--env {name}: the module has no '{factory}'") from error
    finally:
        sys.path.remove(here)
    if not callable(made):
        raise UsageError(
            f"--env {name}: '{factory}' cannot be called; name a function or class that makes the environment"
        )
    return made


def evaluate_in(
    model: str,
    env: str,
    *,
    episodes: int = 100,
    seed: int = 0,
    parallel: int = 50,
    unnorm_key: str | None = None,
    dtype: str | None = None,
    device: str = "auto",
    base: str | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> RolloutEvaluation:
    """Let a model act in an environment.

    Args:
        model: a base, run, checkpoint of a run, adapter, merged or exported checkpoint.
        env: as `environment_maker` takes it.
        episodes: how many; they are reset with the seeds `seed`, `seed + 1`, ...
        seed: of the first.
        parallel: environments at a time.
        unnorm_key: name of the statistics; None takes the environment's where the model has them, else its only one.
        dtype: as `vlaft.load` takes it.
        device: likewise.
        base: likewise.
        advance: told of each episode that has ended.

    Raises:
        UsageError: no such environment.
        CheckpointError: the model is missing or damaged.
        DataError: the statistics cannot be told, or the environment does not keep to the interface.
    """
    make = environment_maker(env)
    policy = load(model, dtype=dtype, device=device, base=base)
    key = unnorm_key or _own_key(policy, env)

    def act(frames: list[Any], instructions: list[str]) -> list[Any]:
        return [each.action for each in policy.predict(frames, instructions, unnorm_key=key)]

    seeds = range(seed, seed + episodes)
    rollout = roll_out(act, make, seeds=seeds, parallel=parallel, keep=KEPT, advance=advance)
    used = key or next(iter(policy.statistics))
    del policy, act
    gc.collect()
    return RolloutEvaluation(model, used, rollout)


def write_pictures(folder: Path, evaluations: Sequence[RolloutEvaluation]) -> list[Path]:
    """Write a film (GIF) and a contact sheet (PNG) of each model's first episodes; return the files.

    Raises:
        VlaftError: the folder cannot be written.
    """
    from vlaft.sim.film import write_contact_sheet, write_film

    files = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, evaluation in enumerate(evaluations):
            name = "episodes" if len(evaluations) == 1 else f"{number + 1}-{Path(evaluation.model).name}"
            shown = [episode for episode in evaluation.rollout.episodes if episode.frames]
            files += [folder / f"{name}.gif", folder / f"{name}.png"]
            write_film(files[-2], shown)
            write_contact_sheet(files[-1], shown)
    except OSError as error:
        raise VlaftError(f"{folder}: the pictures cannot be written ({error.strerror or error})") from error
    return files


def _own_key(policy: Policy, env: str) -> str | None:
    name = _SHIPPED[env].name if env in _SHIPPED else None
    return name if name in policy.statistics and name in SETUPS else None
