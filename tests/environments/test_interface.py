"""What is said of environments that do not keep to the interface, and that all are closed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from two_steps import MADE, Sparing, TwoSteps

from vlaft.environments.interface import begin, step
from vlaft.environments.seats import opened_seats
from vlaft.environments.tabletop.environment import TabletopEnv
from vlaft.environments.task import Task
from vlaft.errors import DataError, VlaftError

ACTION = np.zeros(7, np.float32)
FRAME = np.zeros((4, 5, 3), np.uint8)


def environment(**methods: Callable[..., Any]) -> TwoSteps:
    return type("Other", (TwoSteps,), methods)()


def observing(observation: Any) -> TwoSteps:
    return environment(observation=lambda self: observation)


def answering(**info: Any) -> TwoSteps:
    env = environment(step=lambda self, action: (self.observation(), 0.0, False, False, info))
    env.reset(seed=0)
    return env


def test_what_a_good_one_answers() -> None:
    env = TwoSteps()
    moment = begin(env, 4)
    assert list(moment.frames) == ["main"] and moment.frame.shape == (100, 140, 3)
    assert moment.state is not None and moment.state.tolist() == [0, 0, 0]
    assert moment.instruction == "push the red cube 4"
    first, second = (step(env, ACTION, 4, number, "as before") for number in (1, 2))
    assert (first.ended, first.success, first.moment.instruction) == (False, False, "as before")
    assert (second.ended, second.success) == (True, True)
    assert second.info == {"success": True, "dry": True} and type(second.info["dry"]) is bool


def test_frames_that_nobody_wants_may_be_missing() -> None:
    env = Sparing()
    assert list(begin(env, 4).frames) == ["main", "wrist"]
    assert list(begin(env, 4, ("wrist",)).frames) == ["wrist"]
    blind = step(env, ACTION, 4, 1, "go", ()).moment
    assert not blind.frames and blind.state is not None and blind.instruction == "go"
    assert list(step(env, ACTION, 4, 2, "go").moment.frames) == ["main", "wrist"]
    assert env.drawn == [None, ("wrist",), (), None]
    assert list(begin(TwoSteps(), 4, ()).frames) == ["main"]  # it always draws
    with pytest.raises(DataError, match="have no 'image'"):
        begin(observing({"state": np.zeros(3)}), 4, ("main",))


def test_a_frame_may_be_the_whole_observation_and_is_copied() -> None:
    whole = np.arange(6 * 5 * 3, dtype=np.uint8).reshape(6, 5, 3)
    frame = begin(observing(whole[::-1]), 0).frame
    assert (frame == whole[::-1]).all() and frame.flags.c_contiguous
    whole[:] = 0
    assert frame.any()


def test_cameras_and_state_are_named_as_columns_are() -> None:
    main, wrist = (np.full((4, 5, 3), level, np.uint8) for level in (1, 2))
    observation = {"image_wrist": wrist, "state": np.array([1, 2.5]), "image": main, "depth": None}
    moment = begin(observing(observation), 0)
    assert list(moment.frames) == ["main", "wrist"]
    assert (moment.frames["main"] == main).all() and (moment.frames["wrist"] == wrist).all()
    assert moment.state is not None and moment.state.dtype == np.float32 and moment.state.tolist() == [1, 2.5]


@pytest.mark.parametrize(
    ("observation", "told"),
    [
        ({"rgb": 1, "state": 2}, r"observations have no 'image' \(keys: rgb, state\)"),
        ({}, r"no 'image' \(keys: none\)"),
        ({"image": [[0]]}, r"uint8 \[height, width, 3\], not list"),
        ({"image": np.zeros((4, 5, 3), np.float32)}, r"not ndarray float32 \[4, 5, 3\]"),
        (np.zeros((4, 5), np.uint8), r"not ndarray uint8 \[4, 5\]"),
        (np.zeros((1, 4, 5, 3), np.uint8), r"not ndarray uint8 \[1, 4, 5, 3\]"),
        (np.zeros((3, 4, 5), np.uint8), r"not ndarray uint8 \[3, 4, 5\]"),
        (np.zeros((4, 5, 4), np.uint8), r"not ndarray uint8 \[4, 5, 4\]"),
        (np.zeros((0, 5, 3), np.uint8), r"not ndarray uint8 \[0, 5, 3\]"),
        (torch.zeros(4, 5, 3, dtype=torch.uint8), r"not Tensor torch.uint8 \[4, 5, 3\]"),
        (None, "not NoneType"),
        ({"image": FRAME, "image_wrist": None}, "environment's image_wrist must be .* not NoneType"),
        ({"image": FRAME, "state": [1.0]}, r"environment's state must be a numpy array of numbers \[S\], not list"),
        ({"image": FRAME, "state": np.zeros((1, 3))}, r"not ndarray float64 \[1, 3\]"),
        ({"image": FRAME, "state": np.array([1, np.nan])}, "state has numbers that are not finite"),
    ],
)
def test_other_observations(observation: Any, told: str) -> None:
    with pytest.raises(DataError, match=told):
        begin(observing(observation), 0)


@pytest.mark.parametrize(
    ("reset", "told"),
    [
        (
            lambda self, seed=None: np.zeros((4, 5, 3), np.uint8),
            r"reset\(\) must return observation, info, not ndarray",
        ),
        (lambda self, seed=None: (1, 2, 3), r"reset\(\) must return observation, info, not 3 values"),
        (lambda self, seed=None: (self, None), r"reset\(\) must return info as a mapping, not NoneType"),
        (lambda self, seed=None: (self, {}), r"reset\(\) gives no info\['instruction'\]"),
        (lambda self, seed=None: (self, {"instruction": 7}), r"reset\(\) gives no info\['instruction'\]"),
        (lambda self: None, r"reset\(seed=3\) failed: TypeError: .*unexpected keyword argument 'seed'"),
        (lambda self, seed=None: 1 // 0, r"reset\(seed=3\) failed: ZeroDivisionError: .* \(--debug shows where\)"),
    ],
)
def test_other_resets(reset: Callable[..., Any], told: str) -> None:
    with pytest.raises(VlaftError, match=told):
        begin(environment(reset=reset), 3)


@pytest.mark.parametrize(
    ("info", "told"),
    [
        ({}, r"step\(\) gives no info\['success'\]"),
        ({"success": np.array([True, False])}, r"info\['success'\] must be one truth value, not ndarray"),
    ],
)
def test_other_infos(info: dict, told: str) -> None:
    with pytest.raises(DataError, match=told):
        step(answering(**info), ACTION, 0, 1, "go")


@pytest.mark.parametrize(
    ("info", "success"),
    [
        ({"success": np.bool_(True)}, True),
        ({"success": np.array([1.0])}, True),
        ({"is_success": 0.0}, False),
        ({"success": None, "is_success": True}, False),
    ],
)
def test_ways_to_say_success(info: dict, success: bool) -> None:
    assert step(answering(**info), ACTION, 0, 1, "go").success is success


def test_only_plain_info_is_kept() -> None:
    kept = step(
        answering(success=True, instruction="now the blue", score=np.float32(0.5), grid=np.ones(3)), ACTION, 0, 1, "go"
    )
    assert kept.info == {"success": True, "instruction": "now the blue", "score": 0.5}
    assert kept.moment.instruction == "now the blue"


def test_other_steps() -> None:
    old = environment(step=lambda self, action: (self.observation(), 0.0, False, {}))
    old.reset(seed=0)
    names = "observation, reward, terminated, truncated, info"
    with pytest.raises(DataError, match=rf"step\(\) must return {names}, not 4 values"):
        step(old, ACTION, 0, 1, "go")
    failing = environment(step=lambda self, action: {}["joint"])
    with pytest.raises(VlaftError, match=r"step\(\) 9 of the episode with seed 5 failed: KeyError: 'joint'") as caught:
        step(failing, ACTION, 5, 9, "go")
    assert isinstance(caught.value.__cause__, KeyError)  # for --debug
    tabletop = TabletopEnv()
    begin(tabletop, 0)
    with pytest.raises(DataError, match=r"^the tabletop takes actions of seven"):  # vlaft's own sentence, as it is
        step(tabletop, ACTION[:2], 0, 1, "go")


def test_what_factories_make() -> None:
    one = TwoSteps()
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: None, "makes no environment, but NoneType"),
        (lambda: TwoSteps, "gives the same one twice"),  # the class itself, uncalled
        (lambda: one, "gives the same one twice; make a new one, or use --batch-size 1"),
        (lambda: 1 // 0, "factory failed: ZeroDivisionError"),
        (lambda: gymnasium.vector.SyncVectorEnv([TabletopEnv]), "makes a vector of environments"),
    ]
    for make, told in cases:
        with pytest.raises(VlaftError, match=told), opened_seats(Task("t", make), 2, processes=False):
            pass
    with opened_seats(Task("t", lambda: one), 1, processes=False) as seats:
        assert [seat.environment for seat in seats] == [one]  # type: ignore[union-attr]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_all_are_closed_when_something_fails(error: type[BaseException], caplog: pytest.LogCaptureFixture) -> None:
    MADE.clear()

    def close(self: TwoSteps) -> None:
        self.closed += 1
        raise RuntimeError("stuck")

    kinds = iter([TwoSteps, type("Stuck", (TwoSteps,), {"close": close}), TwoSteps])
    with pytest.raises(error), opened_seats(Task("t", lambda: next(kinds)()), 3, processes=False):
        raise error
    assert [env.closed for env in MADE] == [1, 1, 1]
    assert "an environment could not be closed (RuntimeError: stuck)" in caplog.text


def test_those_made_before_a_factory_fails_are_closed() -> None:
    MADE.clear()
    left = iter([TwoSteps(), TwoSteps()])
    with (
        pytest.raises(VlaftError, match="factory failed: StopIteration"),
        opened_seats(Task("t", lambda: next(left)), 3, processes=False),
    ):
        pass
    assert [env.closed for env in MADE] == [1, 1]
