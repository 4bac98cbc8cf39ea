"""What a demo found: plain data, read from and written to JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlaft.environments.episodes import wilson_interval
from vlaft.files import output_file
from vlaft.recipe.settings import PolicyConfig


@dataclass(frozen=True)
class Success:
    """How often a model succeeded.

    Attributes:
        successes: number of episodes.
        episodes: of how many.
        model: folder of the model, as it was named to `vlaft evaluate`.
    """

    successes: int
    episodes: int
    model: str = ""

    @property
    def rate(self) -> float:
        """Share of episodes."""
        return self.successes / self.episodes

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson interval of 95 %."""
        return wilson_interval(self.successes, self.episodes)

    @classmethod
    def from_file(cls, path: Path) -> Success:
        """Read what `vlaft evaluate MODEL --env ... --json` printed."""
        (model,) = json.loads(path.read_text(encoding="utf-8"))["models"]
        return cls(model["successes"], model["episodes"], model["model"])


@dataclass(frozen=True)
class Command:
    """A command that was run.

    Attributes:
        line: as one types it.
        seconds: how long it took.
    """

    line: str
    seconds: float


@dataclass(frozen=True)
class Cost:
    """What a recipe costs on the demo's base.

    Attributes:
        trainable: parameters that are trained.
        total: parameters of the base.
        predicted_bytes: most live tensor memory of a training step, predicted.
        measured_bytes: the same, tracked in real steps on this machine.
    """

    trainable: int
    total: int
    predicted_bytes: int
    measured_bytes: int

    @classmethod
    def from_file(cls, path: Path) -> Cost:
        """Read what `vlaft report --recipe NAME --measure --json` printed."""
        (recipe,) = json.loads(path.read_text(encoding="utf-8"))["recipes"]
        measured = recipe["measured"]
        return cls(
            trainable=recipe["trainable_parameters"],
            total=recipe["total_parameters"],
            predicted_bytes=measured["predicted_bytes"],
            measured_bytes=measured["peak_bytes"],
        )


@dataclass(frozen=True)
class SeedResult:
    """One training seed: its own demonstrations, training run and evaluation episodes.

    Attributes:
        seed: its number, from 1.
        folder: with `data/`, `run/` and the other results.
        before: the base in the new set-up.
        after: the adapted model on the same episodes.
        train_seconds: of `vlaft train`.
    """

    seed: int
    folder: Path
    before: Success
    after: Success
    train_seconds: float


@dataclass(frozen=True)
class DemoResult:
    """What `vlaft demo` found.

    Attributes:
        out: the demo's folder.
        recipe: name of the recipe.
        demonstrations: how many were recorded per seed.
        frames: of the first seed's demonstrations.
        cost: of the recipe on the demo's base.
        seeds: at least one.
        merged: the first seed's run, merged.
        exported: that, exported to nf4; None where it could not be (bitsandbytes is missing).
        commands: in their order.
        policy: what the adapted model reads and writes.
    """

    out: Path
    recipe: str
    demonstrations: int
    frames: int
    cost: Cost
    seeds: tuple[SeedResult, ...]
    merged: Success
    exported: Success | None
    commands: tuple[Command, ...]
    policy: PolicyConfig = field(default_factory=PolicyConfig)

    @property
    def described(self) -> str:
        """What the adapted model reads and writes, as a clause."""
        policy = self.policy
        cameras = " and ".join(policy.cameras) + (" camera" if len(policy.cameras) == 1 else " cameras")
        state = " and the robot's state" if policy.state else ""
        writes = "an action token by token"
        if policy.parallel:
            by = "by regression" if policy.head == "l1" else "as tokens"
            writes = f"chunks of {policy.chunk} actions at once, {by}"
        return f"reads the {cameras}{state}, and writes {writes}"


def mean_interval(rates: Sequence[float], episodes: int) -> tuple[float, float]:
    """Return the 95 % interval of a mean of success rates over training seeds, within 0..1 (Student's t).

    Args:
        rates: one per training seed.
        episodes: behind each rate; used for a single seed, whose interval is Wilson's and says nothing of how seeds
            differ.
    """
    from scipy.stats import sem, t

    count = len(rates)
    if count == 1:
        return wilson_interval(round(rates[0] * episodes), episodes)
    mean = sum(rates) / count
    half = float(t.ppf(0.975, count - 1) * sem(rates))
    return max(mean - half, 0.0), min(mean + half, 1.0)


def overlapping(first: tuple[float, float], second: tuple[float, float]) -> bool:
    """Return whether two intervals share a point."""
    return first[0] <= second[1] and second[0] <= first[1]


def write_result(path: Path, value: Any) -> None:
    """Write a dataclass, or a list of them, as JSON; the file appears whole or not at all."""
    plain = [asdict(each) for each in value] if isinstance(value, list | tuple) else asdict(value)
    with output_file(path) as partial:
        partial.write_text(json.dumps(plain, indent=2, default=str) + "\n", encoding="utf-8")
