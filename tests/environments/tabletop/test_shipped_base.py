"""The base that ships with vlaft: it knows its own set-up, reads the instruction, and is small."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from vlaft.environments.episodes import Rollout, roll_out
from vlaft.environments.interface import Moment
from vlaft.environments.tabletop.environment import TabletopEnv
from vlaft.environments.tabletop.scene import SETUP_A, SETUP_B
from vlaft.policy import Policy, load

BASE = Path(str(files("vlaft.environments.tabletop") / "base"))
SEEDS = range(810_000, 810_040)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load(BASE)


class Misled(TabletopEnv):
    """Says the colour of another object than the one that it rewards."""

    def _info(self) -> dict[str, Any]:
        info = super()._info()
        assert self.scene is not None
        other = next(colour for colour in self.scene.colours if colour != self.scene.target)
        return info | {"instruction": self.setup.instruction(other), "other": other}


def outcomes(policy: Policy, make: Any) -> Rollout:
    def act(moments: list[Moment]) -> list:
        answers = policy.predict([each.frames for each in moments], [each.instruction for each in moments])
        return [each.actions for each in answers]

    return roll_out(act, make, seeds=SEEDS, parallel=len(SEEDS))


def test_it_succeeds_where_it_was_trained(policy: Policy) -> None:
    assert outcomes(policy, lambda: TabletopEnv(SETUP_A)).success_rate >= 0.8


def test_another_instruction_makes_it_do_another_thing(policy: Policy) -> None:
    """The same scenes with another colour named: it picks up that one, not the one that it picked up before."""
    rollout = outcomes(policy, lambda: Misled(SETUP_A))
    followed = sum(each.info["picked_up"] == each.info["other"] for each in rollout.episodes)
    assert followed / len(SEEDS) >= 0.8
    assert rollout.success_rate <= 0.1


def test_it_does_not_know_the_new_robot(policy: Policy) -> None:
    assert outcomes(policy, lambda: TabletopEnv(SETUP_B)).success_rate <= 0.2


def test_it_is_small_and_complete() -> None:
    weights = sum(path.stat().st_size for path in BASE.glob("*.safetensors"))
    assert weights <= 6_000_000
    config = json.loads((BASE / "config.json").read_text())
    assert list(config["norm_stats"]) == [SETUP_A.name]
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "README.md"):
        assert (BASE / name).is_file()
