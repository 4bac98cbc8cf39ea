"""The loop that lets a policy act, with the scripted expert for a policy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from two_steps import MADE, Failing, TwoSteps

from vlaft.action.execution import Execution
from vlaft.environments.episodes import Rollout, roll_out, wilson_interval
from vlaft.environments.interface import Moment
from vlaft.environments.tabletop.environment import TabletopEnv
from vlaft.environments.tabletop.recording import expert_action
from vlaft.environments.tabletop.scene import SETUP_A, SETUP_B, SetUp
from vlaft.errors import ConfigError, DataError, VlaftError


def idle(moments: list[Moment]) -> list[np.ndarray]:
    return [np.zeros((1, 7))] * len(moments)


class Expert:
    """Looks up the scene that a frame and an instruction belong to, and sometimes does nothing."""

    def __init__(self, setup: SetUp, idle: tuple[str, ...] = ()) -> None:
        self.setup, self.idle = setup, idle
        self.environments: list[TabletopEnv] = []
        self.batches: list[int] = []

    def make(self) -> TabletopEnv:
        self.environments.append(TabletopEnv(self.setup))
        return self.environments[-1]

    def __call__(self, moments: list[Moment]) -> list[np.ndarray]:
        self.batches.append(len(moments))
        return [self.action(each.frame, each.instruction)[None] for each in moments]

    def action(self, frame: np.ndarray, instruction: str) -> np.ndarray:
        if instruction in self.idle:
            return np.zeros(7)
        (scene,) = (
            env.scene
            for env in self.environments
            if env.scene is not None
            and self.setup.instruction(env.scene.target) == instruction
            and (env.render() == frame).all()
        )
        return expert_action(scene)

    def roll_out(self, parallel: int, **options: Any) -> Rollout:
        return roll_out(self, self.make, parallel=parallel, **options)


@pytest.mark.parametrize("setup", [SETUP_A, SETUP_B], ids=lambda setup: setup.name)
def test_the_expert_always_succeeds(setup: SetUp) -> None:
    expert = Expert(setup)
    told: list[int] = []
    rollout = expert.roll_out(8, seeds=range(50, 80), advance=told.append)
    assert rollout.success_rate == 1.0 and rollout.successes == 30 and sum(told) == 30
    assert [episode.seed for episode in rollout.episodes] == [*range(50, 80)]
    assert rollout.interval == wilson_interval(30, 30) and rollout.seconds > 0
    assert max(expert.batches) == len(expert.environments) == 8
    for episode in rollout.episodes:
        assert episode.info["picked_up"] in episode.instruction and not episode.frames and not episode.actions


def test_outcomes_do_not_depend_on_how_many_run_side_by_side() -> None:
    idle = (SETUP_B.instruction("red"),)
    rollouts = [Expert(SETUP_B, idle).roll_out(parallel, seeds=range(20), keep=20) for parallel in (1, 7, 50)]
    first = rollouts[0].episodes
    assert 0 < rollouts[0].successes < 20
    for rollout in rollouts[1:]:
        for one, two in zip(first, rollout.episodes, strict=True):
            assert (one.seed, one.instruction, one.success, one.steps) == (
                two.seed,
                two.instruction,
                two.success,
                two.steps,
            )
            assert one.info == two.info
            assert (np.stack(one.frames) == np.stack(two.frames)).all()
            assert (np.stack(one.actions) == np.stack(two.actions)).all()


def test_frames_and_actions_of_the_first_episodes_are_kept() -> None:
    rollout = Expert(SETUP_A).roll_out(3, seeds=range(5), keep=2)
    for number, episode in enumerate(rollout.episodes):
        assert len(episode.frames) == (episode.steps + 1 if number < 2 else 0)
        assert len(episode.actions) == (episode.steps if number < 2 else 0)
    env = TabletopEnv(SETUP_A)
    observation, _ = env.reset(seed=1)
    kept = rollout.episodes[1]
    assert (kept.frames[0] == observation["image"]).all()
    for frame, action in zip(kept.frames[1:], kept.actions, strict=True):
        assert action.dtype == np.float32
        assert (env.step(action)[0]["image"] == frame).all()


def test_frames_of_the_first_successes_and_failures_are_kept_and_of_long_episodes_fewer() -> None:
    rollout = roll_out(idle, TwoSteps, seeds=range(9), parallel=4, keep=2)
    assert [bool(each.frames) for each in rollout.episodes] == [True] * 4 + [False] * 5

    class Counting(TwoSteps):
        def step(self, action: np.ndarray) -> Any:
            super().step(action)
            return self.observation(), 0.0, False, False, {"success": self.steps == 701}

        def observation(self) -> Any:
            return np.full((4, 5, 3), self.steps % 251, np.uint8)

    (episode,) = roll_out(idle, Counting, seeds=[1], keep=1).episodes
    shown = [int(frame[0, 0, 0]) for frame in episode.frames]
    assert shown == [step % 251 for step in [*range(0, 701, 4), 701]] and len(episode.actions) == 701


def test_instructions_are_handed_through_and_may_change() -> None:
    class Changing(TwoSteps):
        def step(self, action: np.ndarray) -> Any:
            observation, *others, info = super().step(action)
            return observation, *others, info | ({"instruction": "now lift it"} if self.steps == 1 else {})

    told: list[list[str]] = []

    def act(moments: list[Moment]) -> list[np.ndarray]:
        assert all(each.frame.shape == (100, 140, 3) for each in moments)
        told.append([each.instruction for each in moments])
        return idle(moments)

    rollout = roll_out(act, Changing, seeds=[4, 5, 6], parallel=2)
    push = "push the red cube {}".format
    assert told == [[push(4), push(5)], ["now lift it"] * 2, [push(6)], ["now lift it"]]
    assert [(each.instruction, each.success) for each in rollout.episodes] == [
        (push(4), True), (push(5), False), (push(6), True)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("execution", "asked", "done"),
    [
        (Execution(), [0, 3, 6], [0, 0.1, 0.2, 3, 3.1, 3.2, 6, 6.1]),
        (Execution(2), [0, 2, 4, 6], [0, 0.1, 2, 2.1, 4, 4.1, 6, 6.1]),
        (Execution(ensemble=True), [*range(8)], None),
    ],
    ids=["whole chunks", "two of three", "ensemble"],
)
def test_chunks_are_executed(execution: Execution, asked: list[int], done: list[float] | None) -> None:
    """The policy's chunk of step t is t, t + 0.1, t + 0.2; each environment keeps to its own."""

    class Counting(TwoSteps):
        def step(self, action: np.ndarray) -> Any:
            super().step(action)
            count = np.full((4, 5, 3), self.steps, np.uint8)
            return {"image": count}, 0.0, self.steps == 8, False, {"success": False}

        def observation(self) -> Any:
            return {"image": np.zeros((4, 5, 3), np.uint8)}

    seen: list[int] = []

    def act(moments: list[Moment]) -> list[np.ndarray]:
        seen.extend(int(each.frame[0, 0, 0]) for each in moments)
        return [np.array([[each.frame[0, 0, 0] + 0.1 * step] for step in range(3)]) for each in moments]

    rollout = roll_out(act, Counting, seeds=[0, 1, 2], parallel=2, execution=execution, keep=3)
    assert sorted(seen) == sorted(asked * 3)
    for episode in rollout.episodes:
        actions = np.concatenate(episode.actions)
        assert np.allclose(actions, done) if done else np.allclose(actions[2:], np.arange(2, 8) - 0.9, atol=0.02)


def test_an_action_without_its_chunk_is_refused() -> None:
    with pytest.raises(DataError, match=r"a chunk has to be \[K, A\], K actions of A numbers, not \[7\]"):
        roll_out(lambda moments: [np.zeros(7)], TwoSteps, seeds=[0])


def test_success_and_max_steps_end_episodes() -> None:
    class Endless(TwoSteps):
        def step(self, action: np.ndarray) -> Any:
            observation, *_, info = super().step(action)
            return observation, 0.0, False, False, info

    rollout = roll_out(idle, Endless, seeds=[0, 1], max_steps=9)
    found = [(each.success, each.steps, each.ended) for each in rollout.episodes]
    assert found == [(True, 2, "success"), (False, 9, "step limit")]
    assert [each.ended for each in roll_out(idle, TwoSteps, seeds=[0, 1]).episodes] == ["success", "environment"]
    assert roll_out(idle, lambda: TabletopEnv(SETUP_A), seeds=[0]).episodes[0].ended == "step limit"  # its own


def test_large_frames_are_kept_smaller() -> None:
    class Large(TwoSteps):
        def observation(self) -> Any:
            return np.arange(600 * 1300 * 3, dtype=np.uint64).astype(np.uint8).reshape(600, 1300, 3)

    seen: list[tuple[int, ...]] = []

    def act(moments: list[Moment]) -> list[np.ndarray]:
        seen.append(moments[0].frame.shape)
        return idle(moments)

    (episode,) = roll_out(act, Large, seeds=[1], keep=1).episodes
    assert set(seen) == {(600, 1300, 3)}
    assert (episode.frames[0] == Large.observation(None)[::3, ::3]).all()  # type: ignore[arg-type]


def test_environments_are_closed_also_when_one_fails() -> None:
    MADE.clear()
    with pytest.raises(VlaftError, match=r"step\(\) 1 of the episode with seed 1 failed: RuntimeError: a motor is hot"):
        roll_out(idle, Failing, seeds=range(5), parallel=3)
    assert [env.closed for env in MADE] == [1, 1, 1]
    MADE.clear()

    def interrupted(moments: list[Moment]) -> list[np.ndarray]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        roll_out(interrupted, TwoSteps, seeds=range(5), parallel=2)
    assert [env.closed for env in MADE] == [1, 1]
    MADE.clear()
    roll_out(idle, TwoSteps, seeds=range(5), parallel=2)
    assert [env.closed for env in MADE] == [1, 1] and sorted(MADE[0].seeds + MADE[1].seeds) == [*range(5)]


def test_actions_of_another_robot_are_refused_by_the_tabletop() -> None:
    with pytest.raises(DataError, match=r"seven finite numbers, not \[0\.0, 0\.0\]"):
        roll_out(lambda moments: [np.zeros((1, 2))] * len(moments), TabletopEnv, seeds=[0])


@pytest.mark.parametrize(
    ("seeds", "parallel", "told"),
    [([], 5, "no episodes"), ([3, -1], 5, "-1 is no seed"), ([1], 0, "0 environments at a time are too few")],
)
def test_counts_are_checked(seeds: list[int], parallel: int, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        roll_out(lambda moments: [], TwoSteps, seeds=seeds, parallel=parallel)


@given(data=st.data(), trials=st.integers(1, 2000))
def test_wilson_interval(data: st.DataObject, trials: int) -> None:
    successes = data.draw(st.integers(0, trials))
    low, high = wilson_interval(successes, trials)
    share = successes / trials
    for bound in (low, high):  # where a test of the share as large as the bound just fails to reject it
        z = 1.959964 * math.sqrt(bound * (1 - bound) / trials)
        assert abs(share - bound) == pytest.approx(z, abs=1e-6)
    assert 0 <= low <= successes / trials + 1e-12 and successes / trials - 1e-12 <= high <= 1
    mirrored = wilson_interval(trials - successes, trials)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)
    if successes < trials:
        above = wilson_interval(successes + 1, trials)
        assert above[0] > low and above[1] > high
    narrower = wilson_interval(10 * successes, 10 * trials)
    assert narrower[1] - narrower[0] < high - low
