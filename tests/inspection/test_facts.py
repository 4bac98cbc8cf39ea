"""What inspection measures and finds, on episodes made up for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_frames import ArrayFrames
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from vlaft.data.layout import Layout
from vlaft.data.standardize.evidence import gripper_dims
from vlaft.data.standardize.steps import parse_steps
from vlaft.errors import DataError
from vlaft.inspection.facts import CameraFacts, EpisodeFacts, Inspection, evenly, look_at, thumbnail
from vlaft.inspection.measures import (
    HISTOGRAM_BINS,
    clipped_shares,
    duplicates,
    guess_gripper,
    histograms,
    looks_absolute,
    motion,
    odd_lengths,
    statistics,
)
from vlaft.inspection.summary import policy_words, summarize
from vlaft.inspection.warnings import Findings, find, steps_word

NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
MASK = (True,) * 6 + (False,)


def arm(length: int, seed: int) -> NDArray[np.float64]:
    """Deltas of six dimensions, then a gripper that closes half way."""
    random = np.random.default_rng(seed)
    deltas = random.normal(0, 0.02, (length, 6)).clip(-0.05, 0.05) + 0.01
    gripper = (np.arange(length) < length // 2).astype(np.float64)
    return np.concatenate([deltas, gripper[:, None]], axis=1)


def seen(**changes: Any) -> CameraFacts:
    return replace(CameraFacts(steps=(0, 5, 9)), **changes)


def facts(number: int, action: NDArray[np.float64], **changes: Any) -> EpisodeFacts:
    base = EpisodeFacts(
        name=f"demo_{number}",
        split=None,
        steps=len(action),
        instruction="lift the cup",
        fps=10.0,
        action=action,
        standardized=action.astype(np.float32),
        names=NAMES if action.shape[1] == 7 else (),
        cameras={"front": seen()},
    )
    return replace(base, **changes)


def inspection(episodes: Sequence[EpisodeFacts], **changes: Any) -> Inspection:
    layout = Layout(cameras={"primary": "obs/front"}, action_names=NAMES, action_mask=MASK)
    base = Inspection(
        path=Path("demos"),
        name="demos",
        kind="source",
        format="hdf5",
        preset=None,
        layout=layout,
        episodes=tuple(episodes),
        shapes={"front": (48, 64, 3)},
        labels={"front": "primary"},
        references={"front": "obs/front"},
    )
    return replace(base, **changes)


def healthy(count: int = 6) -> list[EpisodeFacts]:
    return [facts(number, arm(40 + number, number)) for number in range(count)]


def only(findings: Findings, word: str) -> str:
    """Return the one warning, which has to hold `word`; healthy data have no other."""
    assert len(findings.warnings) == 1, findings.warnings
    assert word in findings.warnings[0], findings.warnings
    return findings.warnings[0]


def changed(edit: Any, count: int = 6) -> list[EpisodeFacts]:
    """Healthy episodes with their actions edited in place."""
    result = []
    for number in range(count):
        action = arm(40 + number, number)
        edit(action)
        result.append(facts(number, action))
    return result


def test_healthy_demonstrations_have_no_warnings() -> None:
    found = find(inspection(healthy()))
    assert found.warnings == ()
    assert found.idle_share == 0 and found.clipped[6] == 0 and 0 < found.clipped[0] <= 0.03
    [gripper] = found.grippers
    assert (gripper.open_at, gripper.kind, gripper.steps) == (1.0, "binary", ())


def test_what_the_reader_told_is_passed_on() -> None:
    assert only(find(inspection(healthy(), told=("info.json lies",))), "info.json lies")


@pytest.mark.parametrize(
    ("low", "high", "steps"),
    [
        (-1.0, 1.0, "steps='[scale_gripper]'"),
        (0.0, 0.08, "steps='[{scale_gripper: {from_range: [0.0, 0.08]}}]'"),
        (1.0, 0.0, "steps='[invert_gripper]'"),
        (1.0, -1.0, "steps='[{scale_gripper: {from_range: [1.0, -1.0]}}]'"),
    ],
)
def test_a_gripper_of_another_convention_is_told_with_the_step_that_mends_it(
    low: float, high: float, steps: str
) -> None:
    def edit(action: NDArray[np.float64]) -> None:
        action[:, 6] = np.where(action[:, 6] == 1, high, low)  # opens with `high`

    warning = only(find(inspection(changed(edit))), "gripper")
    assert _normal(steps) in _normal(warning), warning


def _normal(text: str) -> str:
    return text.replace("{scale_gripper: {from_range: [-1.0, 1.0]}}", "scale_gripper")


def test_the_proposed_gripper_steps_give_open_1_closed_0() -> None:
    from vlaft.data.episode import Episode
    from vlaft.data.standardize.steps import standardize

    for low, high, opens in ((-1, 1, -1), (-1, 1, 1), (0, 1, 0), (0, 1, 1), (0.01, 0.08, 0.08), (2, 9, 2)):
        commands = [np.array([opens, low, high, opens], float) for _ in range(4)]
        guess = guess_gripper(commands, 6, "gripper", 7, "hdf5")
        assert guess.steps is not None and guess.open_at == opens
        action = np.zeros((4, 7), np.float32)
        action[:, 6] = commands[0]
        result = standardize(Episode(index=0, name="e", length=4, action=action), guess.steps).action
        assert result is not None
        np.testing.assert_allclose(result[0, 6], 1, atol=1e-6)
        np.testing.assert_allclose(sorted(set(result[:, 6].round(6))), [0, 1], atol=1e-6)


def test_a_gripper_is_guessed_by_name_then_format_then_habit() -> None:
    both = [np.array([1.0, -1.0]), np.array([-1.0, 1.0])] * 3
    assert guess_gripper(both, 6, "gripper", 7, "hdf5").steps is None
    assert guess_gripper(both, 6, "gripper", 7, "libero").open_at == -1
    assert guess_gripper(both, 6, "gripper_close", 7, "hdf5").open_at == -1
    assert guess_gripper(both, 6, "gripper_open", 7, "libero").open_at == 1
    relative = [np.array([0, 0, 0, 1, 0, 0, -1, 0], float)] * 3
    assert guess_gripper(relative, 6, "gripper", 7, "rlds").steps == ("relative_gripper_to_absolute",)
    assert guess_gripper([np.ones(5)] * 3, 6, "gripper", 7, "rlds").kind == "constant"
    assert gripper_dims(14, [f"joint_{i}" for i in range(6)] + ["left_gripper"]) == [6]
    assert gripper_dims(7, ()) == [6] and gripper_dims(2, ()) == []


def test_an_undecided_gripper_gets_both_ways() -> None:
    def edit(action: NDArray[np.float64]) -> None:
        action[:, 6] = 2 * action[:, 6] - 1

    episodes = changed(edit)
    half = [replace(e, action=e.action[::-1].copy(), standardized=e.standardized[::-1]) for e in episodes[:3]]  # type: ignore[index]
    warning = only(find(inspection([*half, *episodes[3:]])), "if 1 is open")
    assert "[-1.0, 1.0]" in warning and "[1.0, -1.0]" in warning


def test_a_gripper_that_would_be_normalised_is_told_with_the_mask() -> None:
    layout = Layout(cameras={"primary": "obs/front"}, action_names=NAMES)
    assert "action_mask='[true, true, true, true, true, true, false]'" in only(
        find(inspection(healthy(), layout=layout)), "normalised"
    )


def test_first_and_last_actions() -> None:
    def still_at_first(action: NDArray[np.float64]) -> None:
        action[0, :6] = 1e-8

    def padded(action: NDArray[np.float64]) -> None:
        action[-1] = action[-2]

    assert "steps='[drop_first]'" in only(find(inspection(changed(still_at_first))), "first action")
    assert "steps='[drop_last]'" in only(find(inspection(changed(padded))), "last action")


def test_idle_steps_are_those_that_filter_noops_would_drop() -> None:
    from vlaft.data.episode import Episode
    from vlaft.data.standardize.steps import standardize

    def edit(action: NDArray[np.float64]) -> None:
        action[10:16, :6] = 1e-6

    found = find(inspection(changed(edit)))
    warning = only(found, "idle")
    threshold = float(warning.split("threshold: ")[1].split("}")[0])
    total = kept = 0
    for episode in changed(edit):
        result = standardize(
            Episode(index=0, name="e", length=episode.steps, action=episode.standardized),
            [{"filter_noops": {"threshold": threshold}}],
        )
        total, kept = total + episode.steps, kept + result.length
    assert found.idle_share == pytest.approx(1 - kept / total) and found.idle_share == pytest.approx(36 / total)


def test_proposed_steps_keep_the_layouts_own_and_come_in_one_word_too() -> None:
    def edit(action: NDArray[np.float64]) -> None:
        action[0, :6] = 0
        action[:, 6] = 1 - action[:, 6]

    layout = Layout(cameras={"primary": "obs/front"}, steps=({"rotate": {"degrees": 180}},), action_mask=MASK)
    warnings = find(inspection(changed(edit), layout=layout)).warnings
    assert "steps='[drop_first, {rotate: {degrees: 180}}]'" in warnings[1]
    assert warnings[-1].endswith("type steps='[drop_first, {rotate: {degrees: 180}}, invert_gripper]'")


def test_dimensions_that_never_or_hardly_change_or_reach_far_out() -> None:
    def constant(action: NDArray[np.float64]) -> None:
        action[:, 3] = 0

    def rare(action: NDArray[np.float64]) -> None:
        action[:, 3] = 0
        action[5 if len(action) == 40 else 0, 3] = 0 if len(action) != 40 else 0.1

    def far(action: NDArray[np.float64]) -> None:
        if len(action) == 42:
            action[7, 0] = 3.0

    assert "dims: [0, 1, 2, 4, 5, 6]" in only(find(inspection(changed(constant))), "3 (roll)")
    assert "action_mask='[true, true, true, false, true, true, false]'" in only(
        find(inspection(changed(rare))), "3 (roll)"
    )
    assert "demo_2" in only(find(inspection(changed(far, 12))), "0 (x)")

    def stuck(action: NDArray[np.float64]) -> None:
        action[:, :6] = 0.5

    assert "action='[...]'" in only(find(inspection(changed(stuck))), "no dimension of the arm's action")


def test_instructions_and_rates() -> None:
    silent = [replace(episode, instruction=" ") for episode in healthy()]
    assert "instruction='what the robot does'" in only(find(inspection(silent)), "no episode has")
    assert "2 of 6" in only(find(inspection([*silent[:2], *healthy()[2:]])), "demo_0, demo_1")
    unknown = [replace(episode, fps=None) for episode in healthy()]
    assert "fps=10" in only(find(inspection(unknown)), "rate")
    mixed = [replace(episode, fps=5.0 if number else 10.0) for number, episode in enumerate(healthy())]
    assert "{resample: {fps: 5.0}}" in only(find(inspection(mixed)), "differ in their control rate")


def test_copies_and_lengths() -> None:
    episodes = healthy(7)
    copy = replace(episodes[0], name="again")
    assert "again = demo_0" in only(find(inspection([*episodes, copy])), "1 of 8 episodes")
    across = [*(replace(episode, split="train") for episode in episodes), replace(copy, split="val")]
    assert "validation says nothing" in only(find(inspection(across)), "again = demo_0")
    long = facts(9, arm(400, 9))
    assert "demo_9 with 400" in only(find(inspection([*episodes, long])), "far from the usual 44 steps")
    short = facts(9, arm(1, 9))
    assert "fewer than two steps: demo_9" in only(find(inspection([*episodes, short])), "take them out")


def test_damaged_episodes_are_named_and_the_others_measured() -> None:
    found = find(inspection(healthy(), unreadable=(("demo_9", "shard 3 is cut off"),)))
    assert "--on-error skip" in only(found, "1 of 7 episodes cannot be read (the first: shard 3 is cut off)")
    bad = healthy()
    action = bad[0].action.copy()
    action[3, 2] = np.nan
    bad[0] = replace(bad[0], action=action, standardized=None, refused="the action is not finite")
    summary = summarize(inspection(bad), find(inspection(bad)))
    assert len(summary["warnings"]) == 1 and "not finite, in demo_0;" in summary["warnings"][0]
    assert np.isfinite(summary["action"]["stats"]["mean"]).all() and summary["steps"] == sum(range(40, 46))
    assert summary["standardized"]["rows"] == sum(range(41, 46))
    nothing = [replace(episode, standardized=None, refused="no such camera") for episode in healthy()]
    summary = summarize(inspection(nothing), find(inspection(nothing)))
    assert summary["standardized"] is None and "no such camera" in summary["warnings"][0]


def test_cameras() -> None:
    def with_front(*shown: CameraFacts) -> list[EpisodeFacts]:
        return [
            replace(episode, cameras={"front": entry})
            for episode, entry in zip(healthy(len(shown)), shown, strict=True)
        ]

    dark = seen(black=3, flat=3)
    assert "no other camera" in only(find(inspection(with_front(dark, dark, dark))), "black in every frame")
    two: Mapping[str, Any] = {
        "shapes": {"front": (4, 4, 3), "wrist": (4, 4, 3)},
        "labels": {"front": "primary", "wrist": "wrist"},
        "references": {"front": "obs/front", "wrist": "obs/wrist"},
    }
    warning = only(find(inspection(with_front(dark, dark, dark), **two)), "black in every frame")
    assert "cameras='{wrist: obs/wrist}'" in warning
    assert "demo_1" in only(find(inspection(with_front(seen(), seen(flat=2), seen()))), "of one colour in 2 of 9")
    assert "demo_2" in only(find(inspection(with_front(seen(), seen(), seen(frozen=True)))), "same picture")
    assert "always" in only(find(inspection(with_front(*[seen(frozen=True)] * 3))), "same picture")
    assert "step 4" in only(find(inspection(with_front(seen(), seen(error="step 4 is damaged"), seen()))), "decoded")
    # a camera that the layout leaves out may be black
    assert find(inspection(with_front(dark, dark, dark), labels={})).warnings == ()
    turned = only(find(inspection(healthy(), source_steps=({"rotate": {"degrees": 180}},))), "upside down")
    assert "steps='[{rotate: {degrees: 180}}]'" in turned


def test_a_converted_dataset_is_to_be_converted_again() -> None:
    silent = [replace(episode, instruction="") for episode in healthy()]
    warning = only(find(inspection(silent, kind="converted")), "no episode has")
    assert "convert the source again with instruction=" in warning


def filmed(every: int = 1, stops: tuple[int, int] | None = None, length: int = 60) -> CameraFacts:
    """Frames of which only every so many is new, or that stop between two steps."""
    frames = np.random.default_rng(0).integers(0, 255, (length, 12, 16, 3), dtype=np.uint8)[
        np.arange(length) // every * every
    ]
    if stops is not None:
        frames[stops[0] : stops[1]] = frames[stops[0]]
    return look_at(ArrayFrames(frames))


def test_frames_that_repeat_while_the_arm_moves() -> None:
    def episodes(*shown: CameraFacts) -> list[EpisodeFacts]:
        return [facts(n, arm(60, n), cameras={"front": each}) for n, each in enumerate(shown)]

    assert filmed().repeated == () and len(filmed().paired) == 7 and filmed().still is None
    assert find(inspection(episodes(*[filmed()] * 6))).warnings == ()
    warning = only(find(inspection(episodes(*[filmed(every=2)] * 6))), "repeats its last picture while the arm moves")
    assert "slower than the control rate" in warning and "steps='[{resample: {fps: " in warning
    fps = float(warning.split("fps: ")[1].split("}")[0])
    assert 3 <= fps <= 7  # of 10, where five are new; seven frames of each episode tell so much
    stopped = filmed(stops=(16, 50))
    assert stopped.still is not None and 16 <= stopped.still[0] < stopped.still[1] < 50
    warning = only(find(inspection(episodes(filmed(), stopped, filmed()))), "stands still while the arm moves")
    assert f"demo_1, steps {stopped.still[0]} to {stopped.still[1]} of 60" in warning


def test_frames_may_repeat_while_the_arm_waits() -> None:
    def waiting(number: int) -> NDArray[np.float64]:
        action = arm(60, number)
        action[16:50, :6] *= 1e-4
        return action

    shown = filmed(stops=(16, 50))
    assert shown.still is not None
    found = find(inspection([facts(n, waiting(n), cameras={"front": shown}) for n in range(6)]))
    assert not [text for text in found.warnings if "camera" in text]
    targets = Layout(cameras={"primary": "obs/front"}, action_names=NAMES, action_mask=MASK)
    positions = [facts(n, waiting(n).cumsum(axis=0), cameras={"front": shown}) for n in range(6)]
    absolute = [replace(e, state=(e.action[:, :6] + 1e-3).astype(np.float32)) for e in positions]
    found = find(inspection(absolute, layout=targets))  # targets that stay where they are do not move
    assert found.absolute and not [text for text in found.warnings if "stands still" in text]


def test_frames_are_looked_at_from_first_to_last() -> None:
    random = np.random.default_rng(0)
    moving = random.integers(0, 255, (20, 48, 64, 3), dtype=np.uint8)
    found = look_at(ArrayFrames(moving), thumbnails=True)
    assert found.steps[0] == 0 and found.steps[-1] == 19 and len(found.steps) == 8
    assert (found.black, found.flat, found.frozen, len(found.thumbnails)) == (0, 0, False, 8)
    dark = look_at(ArrayFrames(np.zeros((20, 8, 8, 3), np.uint8)))
    assert (dark.black, dark.flat, dark.frozen) == (8, 8, True) and dark.thumbnails == ()
    blue = look_at(ArrayFrames(np.full((3, 8, 8, 3), (0, 0, 255), np.uint8)))
    assert (blue.black, blue.flat) == (0, 3)
    still = look_at(ArrayFrames(np.repeat(moving[:1], 5, axis=0)))
    assert still.frozen and still.flat == 0
    assert not look_at(ArrayFrames(moving[:1])).frozen  # one frame cannot move
    assert look_at(ArrayFrames(moving[:0])) == CameraFacts()

    class Damaged(ArrayFrames):
        def read(self, indices: Sequence[int]) -> Any:
            raise DataError("episode 'demo_0', step 0 is damaged")

    assert look_at(Damaged(moving)).error == "episode 'demo_0', step 0 is damaged"
    assert thumbnail(np.zeros((480, 640, 3), np.uint8)).shape == (96, 128, 3)
    assert thumbnail(moving[0]).shape == (48, 64, 3)
    assert [evenly(150, 48)[0], evenly(150, 48)[-1], len(evenly(150, 48))] == [0, 149, 48]


def test_absolute_targets_follow_the_state() -> None:
    random = np.random.default_rng(0)
    states = [np.cumsum(random.normal(0, 0.02, (50, 6)), axis=0) + random.normal(0, 0.1, 6) for _ in range(5)]
    targets = [np.vstack([state[1:], state[-1:] + 0.01]) for state in states]
    deltas = [np.diff(state, axis=0, append=state[-1:]) for state in states]
    assert looks_absolute(targets, states, []) is True
    assert looks_absolute(deltas, states, []) is False
    assert looks_absolute(targets, [None] * 5, []) is None
    pairs = enumerate(zip(targets, states, strict=True))
    episodes = [facts(number, target, state=state.astype(np.float32)) for number, (target, state) in pairs]
    layout = Layout(cameras={"primary": "obs/front"})
    warning = only(find(inspection(episodes, layout=layout)), "absolute targets")
    word = warning.split("steps='")[1].split("'")[0]
    assert word == "[{delta_from_absolute: {against: previous}}]"
    assert parse_steps([{"delta_from_absolute": {"against": "previous"}}])


def test_joint_targets_that_the_state_does_not_show_are_neither_absolute_nor_deltas() -> None:
    random = np.random.default_rng(0)
    targets = [np.cumsum(random.normal(0, 0.02, (50, 7)), axis=0) for _ in range(8)]
    poses = [np.sin(target[:, :6] ** 2 * 40) for target in targets]  # no linear function of the joints
    assert looks_absolute(targets, poses, []) is None
    noise = [random.normal(size=(50, 6)) for _ in range(8)]
    assert looks_absolute(noise, poses, []) is None
    turned_back = [-0.1 * pose for pose in poses]  # a controller's deltas go against the state, targets with it
    assert looks_absolute(turned_back, poses, []) is None


def test_what_demonstrations_show_of_a_gripper_outweighs_its_name_and_format() -> None:
    from vlaft.inspection.measures import guess_gripper as guess

    begin_high = [np.array([1.0, 1, -1, -1])] * 4
    opening = [np.array([0.08, 0.08, 0.08, 0.02])] * 4
    assert guess(begin_high, 6, "gripper", 7, "isaac-lab").open_at == 1
    for label, format in (("gripper", "libero"), ("gripper_close", "hdf5")):
        denied = guess(begin_high, 6, label, 7, format)
        assert denied.open_at is None and denied.steps is None and "4 of 4 episodes begin with 1" in denied.why
    seen = guess([-command for command in begin_high], 6, "gripper", 7, "hdf5", opening)
    assert seen.open_at == -1 and "fingers" in seen.why
    relative = [np.array([0, 0, -1, 0, 0, 0, 1, 0], float)] * 3
    assert guess(relative, 6, "gripper", 7, "rlds").steps == ("relative_gripper_to_absolute", "invert_gripper")
    either = [*relative[:2], *(-command for command in relative[:2])]
    assert guess(either, 6, "gripper", 7, "rlds").steps is None
    shut_later = [np.array([0.08, 0.08, 0.08, 0.06, 0.04, 0.02, 0.02, 0.06])] * 3
    assert guess([-command for command in relative], 6, "gripper", 7, "rlds", shut_later).steps == (
        "relative_gripper_to_absolute",
    )


def test_a_gripper_of_0_to_1_whose_open_end_nothing_tells_is_asked_about() -> None:
    def edit(action: NDArray[np.float64]) -> None:
        if len(action) % 2:
            action[:, 6] = 1 - action[:, 6]

    warning = only(find(inspection(changed(edit))), "do not tell which end is open")
    assert "nothing to type if 1 is open, else type steps='[invert_gripper]'" in warning

    def relative(action: NDArray[np.float64]) -> None:
        action[:, 6] = 0
        action[5, 6], action[30, 6] = (1, -1) if len(action) % 2 else (-1, 1)

    warning = only(find(inspection(changed(relative))), "whether + closes or opens")
    assert "steps='[relative_gripper_to_absolute]' if + closes, or" in warning
    assert "steps='[relative_gripper_to_absolute, invert_gripper]' if + opens" in warning


def test_steps_are_written_as_the_command_line_reads_them() -> None:
    from vlaft.recipe.resolve import parse_word

    steps: list[Any] = [
        "drop_first",
        {"filter_noops": {"threshold": 1e-05, "gripper": None}},
        {"rotate": {"degrees": 180}},
    ]
    [word] = [steps_word(steps)]
    assert parse_word(word.replace("'", "")) == {"steps": steps}


@settings(max_examples=60, deadline=None)
@given(arrays(np.float64, st.tuples(st.integers(1, 60), st.integers(1, 5)), elements=st.floats(-1e3, 1e3, width=32)))
def test_statistics_hold_for_any_numbers(values: NDArray[np.float64]) -> None:
    found = {name: np.asarray(numbers) for name, numbers in statistics(values).items()}
    slack = 1e-9 * (1 + np.abs(values).max())
    assert (found["min"] <= found["q01"] + slack).all() and (found["q01"] <= found["q99"] + slack).all()
    assert (found["q99"] <= found["max"] + slack).all()
    np.testing.assert_allclose(found["std"], values.std(axis=0), atol=slack)
    assert (np.asarray(clipped_shares(values)) <= 0.02 + 2 / len(values)).all()
    assert clipped_shares(values, [False] * values.shape[1]) == [0.0] * values.shape[1]
    for histogram in histograms(values):
        assert sum(histogram.counts) == len(values) and len(histogram.counts) == HISTOGRAM_BINS
        assert all(low < high for low, high in zip(histogram.edges, histogram.edges[1:], strict=False))
    moved = motion([values], [], False)
    assert 0 <= moved.idle_share <= 1 and len(moved.idle[0]) == len(values)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), max_size=8))
def test_duplicates_are_exactly_the_equal_ones(contents: list[list[int]]) -> None:
    actions = [np.asarray(content, dtype=np.float64)[:, None] for content in contents]
    groups = duplicates(actions)
    together = {(a, b) for group in groups for a in group for b in group if a < b}
    pairs = [(first, second) for second in range(len(contents)) for first in range(second)]
    assert together == {(first, second) for first, second in pairs if contents[first] == contents[second]}


def test_statistics_without_a_finite_row() -> None:
    assert np.isnan(statistics(np.full((3, 2), np.nan))["mean"]).all()
    assert odd_lengths([10, 10, 500]) == [] and odd_lengths([10, 11, 10, 9, 30]) == [4]
    assert odd_lengths([10, 10, 10, 10, 11]) == []


def with_state(count: int = 3, length: int = 40, **changes: Any) -> list[EpisodeFacts]:
    """Episodes whose frames, and a state that moves, can be read."""
    cameras = {"front": seen(), "hand": seen(), "dark": seen(flat=3)}
    state = np.arange(2 * length, dtype=np.float32).reshape(length, 2)
    return [
        facts(number, arm(length, number), **{"state": state, "cameras": cameras} | changes) for number in range(count)
    ]


THREE = {"front": "primary", "hand": "wrist", "dark": "low"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ["policy.chunk=10", "policy.cameras='[main, wrist]'", "policy.state=true"]),
        ({"fps": 14.99}, ["policy.chunk=15", "policy.cameras='[main, wrist]'", "policy.state=true"]),
        ({"fps": 29.97}, ["policy.chunk=20", "policy.cameras='[main, wrist]'", "policy.state=true"]),
        ({"fps": 100.0}, ["policy.chunk=20", "policy.cameras='[main, wrist]'", "policy.state=true"]),
        ({"fps": None}, ["policy.cameras='[main, wrist]'", "policy.state=true"]),
        ({"fps": 1.0, "state": np.ones((40, 2), np.float32), "cameras": {"hand": seen(flat=3)}},
         ["policy.cameras='[main, low]'"]),
        ({"state": None, "cameras": {}}, ["policy.chunk=10", "policy.cameras='[main, wrist, low]'"]),
    ],
)  # fmt: skip
def test_chunk_cameras_and_state_are_recommended_from_what_is_there(changes: dict[str, Any], words: list[str]) -> None:
    shapes = dict.fromkeys(THREE, (48, 64, 3))
    assert policy_words(inspection(with_state(**changes), labels=THREE, shapes=shapes)) == words


def test_one_still_camera_at_one_hertz_is_what_the_released_policy_reads() -> None:
    assert policy_words(inspection([facts(0, arm(40, 0), fps=1.0)])) == []
    assert policy_words(inspection([facts(0, arm(40, 0), standardized=None)])) == []
    half = [*with_state(2), facts(2, arm(40, 2))]
    assert "policy.state=true" not in policy_words(inspection(half))
