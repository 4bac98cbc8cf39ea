"""Standardizing steps: time, dimensions, frames; their names and arguments; nothing changes in place."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from array_frames import ArrayFrames
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vlaft.data.episode import Episode
from vlaft.data.standardize.actions import append_constant, relabel_from_state, scale_action, select_action, take_from
from vlaft.data.standardize.steps import (
    STEPS,
    drop_first,
    drop_last,
    filter_noops,
    flip_rows,
    keep_where,
    parse_steps,
    resample,
    rotate,
    standardize,
    swap_red_blue,
)
from vlaft.errors import ConfigError, DataError

NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")


def make_episode(action: np.ndarray, fps: float | None = 20.0, names: tuple[str, ...] = ()) -> Episode:
    """An episode whose frame t shows the number t, so that what goes together can be seen."""
    steps = len(action)
    frames = np.zeros((steps, 4, 6, 3), np.uint8)
    frames[:] = np.arange(steps, dtype=np.uint8)[:, None, None, None]
    return Episode(
        index=0,
        name="demo_0",
        length=steps,
        arrays={"number": np.arange(steps), "success": np.arange(steps) % 2 == 0, "pose": np.ones((steps, 2))},
        cameras={"primary": ArrayFrames(frames), "wrist": ArrayFrames(frames)},
        fps=fps,
        action=action.astype(np.float32),
        action_names=names,
        state=np.cumsum(np.ones((steps, 7), np.float32), axis=0),
    )


def actions(dims: int = 7, least: int = 2) -> st.SearchStrategy[np.ndarray]:
    shape = st.tuples(st.integers(least, 40), st.just(dims))
    return hnp.arrays(np.float32, shape, elements=st.floats(-1, 1, width=32))


def shown(episode: Episode, camera: str = "primary") -> list[int]:
    return [int(image[0, 0, 0]) for image in episode.cameras[camera].read(range(episode.length))]


def assert_agrees(episode: Episode) -> None:
    assert episode.action is not None and episode.action.dtype == np.float32
    assert len(episode.action) == episode.length
    assert episode.state is None or len(episode.state) == episode.length
    assert all(len(array) == episode.length for array in episode.arrays.values())
    assert all(len(frames) == episode.length for frames in episode.cameras.values())
    assert episode.arrays["number"].tolist() == shown(episode)
    assert not episode.action_names or len(episode.action_names) == episode.action.shape[1]


EVERY_STEP: dict[str, dict[str, object]] = {
    "drop_first": {},
    "drop_last": {},
    "filter_noops": {"threshold": 0.3},
    "keep_where": {"source": "success"},
    "resample": {"fps": 7},
    "relabel_from_state": {},
    "select_action": {"dims": ["gripper", 0, -2]},
    "scale_action": {"factors": [2, 2, 2, 1, 1, 1, 1]},
    "append_constant": {"value": 1, "count": 2, "at": 3},
    "take_from": {"dims": [0, "gripper"], "source": "pose"},
    "delta_from_absolute": {"against": "previous"},
    "axis_angle_to_euler": {},
    "euler_to_axis_angle": {"dims": ["roll", "pitch", "yaw"]},
    "quaternion_to_euler": {},
    "quaternion_to_axis_angle": {"order": "wxyz"},
    "clip_gripper": {},
    "invert_gripper": {},
    "scale_gripper": {},
    "binarize_gripper": {},
    "relative_gripper_to_absolute": {},
    "rotate": {"cameras": ["wrist"]},
    "flip_rows": {},
    "swap_red_blue": {},
}


def test_every_step_is_in_the_table_below() -> None:
    assert list(EVERY_STEP) and set(EVERY_STEP) == set(STEPS)


@pytest.mark.parametrize("name", sorted(EVERY_STEP))
@given(action=actions(least=3))
@settings(max_examples=15, deadline=None)
def test_every_step_keeps_lengths_together_and_changes_nothing_in_place(name: str, action: np.ndarray) -> None:
    action[0] = 1  # so that no step leaves nothing, and no quaternion is zero
    action[:, 3] = 1
    action[::2, 0] = 1
    episode = make_episode(action, names=NAMES)
    assert episode.action is not None and episode.state is not None
    before = episode.action.copy(), episode.state.copy()
    changed = standardize(episode, [{name: EVERY_STEP[name]}])
    assert_agrees(changed)
    np.testing.assert_array_equal(episode.action, before[0])
    np.testing.assert_array_equal(episode.state, before[1])
    assert episode.length == len(action)
    assert shown(episode) == list(range(episode.length))


# --- time ---


def test_drop_first_and_last() -> None:
    episode = make_episode(np.arange(28).reshape(4, 7))
    assert shown(drop_first(episode)) == [1, 2, 3]
    assert shown(drop_last(episode)) == [0, 1, 2]
    assert drop_last(drop_first(make_episode(np.zeros((1, 7))))).length == 0


@given(action=actions(), old=st.floats(5, 60), ratio=st.floats(1, 6))
@settings(max_examples=80, deadline=None)
def test_resampling_preserves_motion_and_gripper(action: np.ndarray, old: float, ratio: float) -> None:
    episode = make_episode(action, fps=old)
    coarse = resample(episode, fps=old / ratio)
    assert_agrees(coarse)
    assert coarse.action is not None and coarse.fps == old / ratio
    np.testing.assert_allclose(coarse.action[:, :6].sum(axis=0), action[:, :6].sum(axis=0), atol=1e-4)
    starts = coarse.arrays["number"].tolist()
    assert starts[0] == 0
    for row, (start, stop) in enumerate(zip(starts, [*starts[1:], len(action)], strict=True)):
        np.testing.assert_allclose(coarse.action[row, :6], action[start:stop, :6].sum(axis=0), atol=1e-5)
        assert coarse.action[row, 6] == action[stop - 1, 6]
        assert 1 <= stop - start <= int(np.ceil(ratio)) + 1
    assert abs(len(starts) - len(action) / ratio) <= 1


def test_resampling_by_whole_and_broken_ratios() -> None:
    action = np.ones((12, 7))
    action[:, 6] = np.arange(12)
    assert shown(resample(make_episode(action, fps=20), fps=5)) == [0, 4, 8]
    coarse = resample(make_episode(action, fps=30), fps=20)
    assert coarse.arrays["number"].tolist() == [0, 2, 3, 5, 6, 8, 9, 11]
    assert coarse.action is not None
    assert coarse.action[:, 0].tolist() == [2, 1, 2, 1, 2, 1, 2, 1]
    assert coarse.action[:, 6].tolist() == [1, 2, 4, 5, 7, 8, 10, 11]
    assert shown(resample(make_episode(action, fps=30), fps=10)) == [0, 3, 6, 9]
    same = resample(make_episode(action, fps=20), fps=20)
    np.testing.assert_array_equal(same.action, action)


def test_resampling_absolute_targets_takes_the_last() -> None:
    action = np.arange(28).reshape(2, 14)
    coarse = resample(make_episode(action, fps=50), fps=25, delta_dims=[])
    np.testing.assert_array_equal(coarse.action, action[1:])


def test_resampling_says_what_is_missing() -> None:
    seven = make_episode(np.zeros((4, 7)), fps=None)
    with pytest.raises(DataError, match="control rate of episode 'demo_0' is not known"):
        resample(seven, fps=5)
    with pytest.raises(DataError, match="cannot be resampled up to 30 Hz"):
        resample(make_episode(np.zeros((4, 7))), fps=30)
    with pytest.raises(DataError, match="which of the 14 action dimensions are deltas"):
        resample(make_episode(np.zeros((4, 14))), fps=5)
    for rate in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="positive"):
            resample(make_episode(np.zeros((4, 7))), fps=rate)


def test_noops_are_compared_with_the_last_kept_step() -> None:
    still = np.zeros(7)
    moving = np.array([0.1, 0, 0, 0, 0, 0, 0])
    closing = np.array([0, 0, 0, 0, 0, 0, 1.0])
    #        first: norm only -> dropped; kept; dropped; kept (gripper); dropped; kept (gripper opens); kept
    action = np.stack([closing, moving, still, closing, closing, still, moving])
    episode = make_episode(action)
    assert shown(filter_noops(episode)) == [1, 3, 5, 6]
    assert shown(filter_noops(episode, gripper=None)) == [0, 1, 3, 4, 6]
    small = np.full((3, 7), 1e-5)
    assert filter_noops(make_episode(small)).length == 0
    assert shown(filter_noops(make_episode(small), threshold=1e-6)) == [0, 1, 2]


@given(actions())
@settings(max_examples=60, deadline=None)
def test_filtering_noops_is_idempotent_and_keeps_the_motion(action: np.ndarray) -> None:
    action[action < 0.5] = 0
    once = filter_noops(make_episode(action))
    assert once.action is not None
    np.testing.assert_array_equal(filter_noops(once).action, once.action)
    np.testing.assert_allclose(once.action[:, :6].sum(axis=0), action[:, :6].sum(axis=0), atol=1e-3)


def test_keep_where_takes_a_mask_of_one_column() -> None:
    episode = make_episode(np.zeros((5, 7)))
    assert shown(keep_where(episode, source="success")) == [0, 2, 4]
    assert shown(keep_where(episode, source="number", above=2)) == [3, 4]
    with pytest.raises(DataError, match=r"pose\[0\]"):
        keep_where(episode, source="pose")
    with pytest.raises(DataError, match="did you mean 'success'"):
        keep_where(episode, source="sucess")


# --- dimensions ---


def test_relabelling_takes_the_motion_of_the_state_and_drops_the_last_step() -> None:
    episode = make_episode(np.full((4, 7), 9.0))
    changed = relabel_from_state(episode)
    assert changed.action is not None and changed.length == 3
    assert (changed.action[:, :6] == 1).all()
    assert (changed.action[:, 6] == 9).all()
    with pytest.raises(DataError, match="cannot be relabelled"):
        relabel_from_state(episode, dims=8)


def test_selecting_and_appending_dimensions_carry_their_names() -> None:
    episode = make_episode(np.arange(14).reshape(2, 7), names=NAMES)
    chosen = select_action(episode, dims=["gripper", 0, -2])
    assert chosen.action is not None
    assert chosen.action.tolist() == [[6, 0, 5], [13, 7, 12]]
    assert chosen.action_names == ("gripper", "x", "yaw")
    wider = append_constant(chosen, value=0.5, count=2, at=1, names=["a", "b"])
    assert wider.action is not None
    assert wider.action[0].tolist() == [6, 0.5, 0.5, 0, 5]
    assert wider.action_names == ("gripper", "a", "b", "x", "yaw")
    back = select_action(wider, dims=["gripper", "x", "yaw"])
    np.testing.assert_array_equal(back.action, chosen.action)
    with pytest.raises(DataError, match="did you mean 'gripper'"):
        select_action(episode, dims=["griper"])
    with pytest.raises(DataError, match="twice"):
        select_action(episode, dims=[6, -1])
    with pytest.raises(ConfigError, match="at least one"):
        select_action(episode, dims=[])
    with pytest.raises(DataError, match="cannot be inserted at 9"):
        append_constant(episode, at=9)
    with pytest.raises(ConfigError, match="1 names are given for 2"):
        append_constant(episode, count=2, names=["a"])


@given(actions(), st.lists(st.sampled_from([0.001, 0.5, 1.0, 2.0, 1000.0]), min_size=7, max_size=7))
@settings(max_examples=40, deadline=None)
def test_scaling_back_gives_the_same(action: np.ndarray, factors: list[float]) -> None:
    episode = make_episode(action)
    back = scale_action(scale_action(episode, factors=factors), factors=[1 / factor for factor in factors])
    np.testing.assert_allclose(back.action, action, rtol=1e-5, atol=1e-37)
    with pytest.raises(DataError, match="2 factors are given for 7"):
        scale_action(episode, factors=[1.0, 2.0])


def test_take_from_replaces_dimensions_by_an_array() -> None:
    episode = make_episode(np.zeros((3, 7)))
    changed = take_from(episode, dims=[-1], source="number")
    assert changed.action is not None
    assert changed.action[:, 6].tolist() == [0, 1, 2]
    assert (changed.action[:, :6] == 0).all()
    with pytest.raises(DataError, match="2 columns for 1"):
        take_from(episode, dims=[-1], source="pose")


# --- frames ---


@given(hnp.arrays(np.uint8, (2, 3, 5, 3)))
@settings(max_examples=30)
def test_turning_flipping_and_swapping_back_give_the_same_frames(pixels: np.ndarray) -> None:
    episode = Episode(index=0, name="demo", length=2, cameras={"primary": ArrayFrames(pixels)})

    def frames(changed: Episode) -> np.ndarray:
        return np.stack(list(changed.cameras["primary"].read([0, 1])))

    np.testing.assert_array_equal(frames(rotate(episode)), pixels[:, ::-1, ::-1])
    np.testing.assert_array_equal(frames(rotate(rotate(episode))), pixels)
    np.testing.assert_array_equal(frames(rotate(rotate(episode, degrees=90), degrees=-90)), pixels)
    np.testing.assert_array_equal(frames(flip_rows(episode)), pixels[:, ::-1])
    np.testing.assert_array_equal(frames(flip_rows(flip_rows(episode))), pixels)
    np.testing.assert_array_equal(frames(swap_red_blue(episode)), pixels[..., [2, 1, 0]])
    np.testing.assert_array_equal(frames(swap_red_blue(swap_red_blue(episode))), pixels)


def test_a_quarter_turn_is_counter_clockwise_and_only_of_the_chosen_camera() -> None:
    pixels = np.zeros((1, 2, 3, 3), np.uint8)
    pixels[0, 0, 2] = 255  # top right
    episode = Episode(index=0, name="demo", length=1, cameras={n: ArrayFrames(pixels) for n in ("primary", "wrist")})
    turned = rotate(episode, degrees=90, cameras=["wrist"])
    (wrist,) = turned.cameras["wrist"].read([0])
    assert wrist.shape == (3, 2, 3)
    assert wrist[0, 0].tolist() == [255, 255, 255]  # top left
    (primary,) = turned.cameras["primary"].read([0])
    np.testing.assert_array_equal(primary, pixels[0])
    with pytest.raises(ConfigError, match="multiples of 90"):
        rotate(episode, degrees=45)
    with pytest.raises(DataError, match="did you mean 'wrist'"):
        rotate(episode, cameras=["wrists"])


# --- names and arguments ---


def test_all_problems_of_the_steps_are_told_together() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_steps(
            [
                "drop_frist",
                {"resample": {"fsp": 5}},
                {"rotate": {"degrees": "half"}},
                {"rotate": 180},
                {"take_from": {"dims": [1.5], "source": "a"}},
                {"filter_noops": {"threshold": True}},
                {"drop_first": {}, "drop_last": {}},
                7,  # type: ignore[list-item]
            ]
        )
    assert caught.value.problems == [
        "step 1: unknown standardizing step 'drop_frist'; did you mean 'drop_first'?",
        "step 2 (resample): unknown argument 'fsp'; did you mean 'fps'?",
        "step 2 (resample): the argument 'fps' is missing",
        "step 3 (rotate): degrees is 'half', which is not a whole number",
        "step 4 (rotate): write its arguments as {rotate: {argument: value}}",
        "step 5 (take_from): dims is [1.5], which is not a list of (a whole number or a text)",
        "step 6 (filter_noops): threshold is True, which is not a number",
        "step 7 is {'drop_first': {}, 'drop_last': {}}: write the name of a step, or {name: {argument: value}}",
        "step 8 is 7: write the name of a step, or {name: {argument: value}}",
    ]
    with pytest.raises(ConfigError, match="list of standardizing steps"):
        parse_steps("drop_first")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*STEPS, "fps", "dims"]), inner, max_size=2)
        ),
        max_leaves=8,
    )
)
@settings(max_examples=100)
def test_whatever_stands_for_steps_is_parsed_or_refused(value: object) -> None:
    try:
        parsed = parse_steps(value)  # type: ignore[arg-type]
    except ConfigError:
        return
    assert all(step.name in STEPS for step in parsed)


def test_arguments_of_the_right_kind_are_accepted() -> None:
    steps = parse_steps([{"resample": {"fps": 5}}, {"drop_first": None}, {"filter_noops": {"gripper": None}}])
    assert [(step.name, dict(step.arguments)) for step in steps] == [
        ("resample", {"fps": 5}),
        ("drop_first", {}),
        ("filter_noops", {"gripper": None}),
    ]


def test_a_step_that_does_not_fit_names_itself_and_the_episode() -> None:
    episode = make_episode(np.zeros((3, 14)))
    with pytest.raises(DataError, match=r"deltas.*standardizing step 'resample' of episode 'demo_0'"):
        standardize(episode, [{"resample": {"fps": 5}}])
    with pytest.raises(DataError, match="no steps left after 'filter_noops'"):
        standardize(episode, ["drop_first", "filter_noops"])
    with pytest.raises(DataError, match="has no action yet"):
        standardize(Episode(index=0, name="demo_0", length=3), [])


def test_values_that_are_not_finite_never_get_through() -> None:
    episode = make_episode(np.ones((3, 7)))
    assert episode.state is not None
    state = episode.state.copy()
    state[1, 2] = np.nan
    with pytest.raises(DataError, match="step 0: the action is not finite after 'relabel_from_state'"):
        standardize(replace(episode, state=state), ["relabel_from_state"])
    with pytest.raises(DataError, match="not finite after 'scale_action'"):
        standardize(episode, [{"scale_action": {"factors": [1e300] * 7}}])
    with pytest.raises(ConfigError, match=r"append_constant.*value is nan, which is not a number"):  # before any step
        standardize(episode, [{"append_constant": {"value": float("nan")}}])
