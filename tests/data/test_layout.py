"""Layouts: which arrays and cameras an episode is made of, by reference."""

from __future__ import annotations

import numpy as np
import pytest
from array_frames import ArrayFrames
from hypothesis import given, settings
from hypothesis import strategies as st

from vlaft.data.episode import Episode
from vlaft.data.layout import Layout, apply_layout, read_reference
from vlaft.errors import DataError


def make_episode(**arrays: np.ndarray) -> Episode:
    frames = ArrayFrames(np.zeros((4, 2, 2, 3), np.uint8))
    return Episode(
        index=0,
        name="demo_3",
        length=4,
        arrays={"vector": np.arange(28).reshape(4, 7), "closed": np.arange(4) > 1, **arrays},
        cameras={"front": frames},
        fps=10,
        instruction="push",
    )


def test_references_slice_columns_and_scalars_become_one() -> None:
    episode = make_episode(nested=np.arange(4 * 10 * 3).reshape(4, 10, 3))
    assert read_reference(episode, "vector[0:6]").shape == (4, 6)
    assert read_reference(episode, "vector[-2:]")[0].tolist() == [5, 6]
    assert read_reference(episode, "vector[:-1]")[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert read_reference(episode, "vector[-1]")[0].tolist() == [6]
    assert read_reference(episode, "closed").tolist() == [[0], [0], [1], [1]]
    assert read_reference(episode, "closed[0]").dtype == np.float32
    assert read_reference(episode, "nested[0:3]")[1].tolist() == [30, 31, 32]


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("vecto", "has no array 'vecto'; did you mean 'vector'"),
        ("vector[7]", "only 7"),
        ("vector[-8]", "only 7"),
        ("vector[3:3]", "selects nothing"),
        ("vector[]", "no array reference"),
        ("vector[-]", "no array reference"),
        ("vector[1", "no array reference"),
        ("vector[" + "9" * 5000 + "]", "no array reference"),
        ("short", "has 3 rows where 4 steps"),
        ("scalar", "has 1 rows where 4 steps"),
        ("text", "not numbers"),
    ],
)
def test_wrong_references_are_refused(reference: str, sentence: str) -> None:
    episode = make_episode(short=np.zeros((3, 2)), scalar=np.float32(3), text=np.array(["a"] * 4))
    with pytest.raises(DataError, match=sentence):
        read_reference(episode, reference)


@given(st.text(alphabet="vector[]:-0123456789", max_size=20))
@settings(max_examples=100)
def test_any_text_is_a_reference_or_refused(reference: str) -> None:
    try:
        values = read_reference(make_episode(), reference)
    except DataError:
        return
    assert values.shape[0] == 4 and values.shape[1] >= 1


def test_a_layout_joins_arrays_and_renames_cameras() -> None:
    layout = Layout(
        action=("vector[0:2]", "closed"),
        state=("vector",),
        cameras={"primary": "front"},
        fps=5.0,
        action_names=("x", "y", "gripper"),
        state_names=tuple("abcdefg"),
    )
    episode = apply_layout(make_episode(), layout)
    assert episode.action is not None and episode.state is not None
    assert episode.action[2].tolist() == [14, 15, 1]
    assert episode.state.shape == (4, 7)
    assert list(episode.cameras) == ["primary"]
    assert (episode.fps, episode.instruction, episode.action_names) == (5.0, "push", ("x", "y", "gripper"))


@pytest.mark.parametrize(
    ("layout", "sentence"),
    [
        (Layout(action=()), r"which arrays are the action is not known.*closed, huge, vector"),
        (Layout(action=("vector",), cameras={"primary": "frnt"}), "no camera 'frnt'; did you mean 'front'"),
        (Layout(action=("vector",), action_names=("x",)), "1 action_names are given for the 7 dimensions"),
        (Layout(action=("vector",), state=("vector",), state_names=("x",)), "1 state_names are given for the 7"),
        (Layout(action=("vector",), state_names=("x",)), "1 state_names are given for the 0 dimensions of its state"),
        (Layout(action=("huge",)), "step 2: the action is not finite"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(layout: Layout, sentence: str) -> None:
    huge = np.array([0, 0, 1e300, 0])
    with pytest.raises(DataError, match=sentence):
        apply_layout(make_episode(huge=huge), layout)
