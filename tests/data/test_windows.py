"""Windows of actions: against upstream's own, never across episodes, one conversion for every K."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from converted_sets import ramp, write_episodes
from hypothesis import given, settings
from hypothesis import strategies as st
from repository import ROOT
from safetensors.numpy import load_file

from vlaft.action.tokens import ActionTokenizer, normalize, unnormalize
from vlaft.data.loader import ExampleLoader, batches_in_order
from vlaft.data.store import ConvertedDataset
from vlaft.data.windows import cut
from vlaft.errors import DataError
from vlaft.recipe.settings import PolicyConfig

GOLDEN = ROOT / "tests/golden/oft-tiny/data"  # OpenVLA-OFT's own data pipeline on made-up episodes
KINDS = {"bounds_q99": "q99", "bounds": "minmax"}


@pytest.fixture(scope="module")
def short_ones(tmp_path_factory: pytest.TempPathFactory) -> ConvertedDataset:
    """Episodes of 5, 3 and 4 steps; the state's second dimension never changes."""
    episodes = [(ramp(steps, steps), np.stack([[step, 0.25, -step] for step in range(steps)])) for steps in (5, 3, 4)]
    return write_episodes(tmp_path_factory.mktemp("windows") / "data", [(a, s.astype(np.float32)) for a, s in episodes])


@pytest.mark.parametrize("platform", ["libero", "aloha", "bridge"])
def test_windows_and_normalization_are_upstreams(platform: str, tmp_path: Path) -> None:
    told = json.loads((GOLDEN / "windows.json").read_text())[platform]
    tensors = load_file(GOLDEN / "windows.safetensors")
    count = len(told["lengths"])
    episodes = [(tensors[f"{platform}.{n}.action"], tensors[f"{platform}.{n}.state"]) for n in range(count)]
    dataset = write_episodes(tmp_path / "data", episodes, told["mask"])
    for part in ("action", "proprio"):
        for name, values in told["statistics"][part].items():
            np.testing.assert_allclose(dataset.statistics["toy"][part][name], values, atol=1e-6, rtol=0, err_msg=name)
    kind = KINDS[told["normalization"]]
    policy = PolicyConfig(head="l1", chunk=told["chunk"], state=True, normalization=kind)  # type: ignore[arg-type]
    batches = list(batches_in_order(dataset, 7, "train", policy=policy))
    actions, states = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("action", "state"))
    for name, ours in (("chunks", actions), ("chunk_state", states)):
        expected = np.concatenate([tensors[f"{platform}.{n}.{name}"] for n in range(count)])
        assert ours.dtype == torch.float32
        np.testing.assert_allclose(ours.numpy(), expected, atol=1e-6, rtol=0)
    frames = torch.cat([batch.images[:, 0, 0, 0, 1] for batch in batches]).tolist()
    assert frames == [*np.concatenate([tensors[f"{platform}.{n}.frame_index"] for n in range(count)])]
    for batch in batches:  # with either normalization, the tokens are those of the values
        ids = ActionTokenizer(600).encode(batch.action.numpy()).reshape(len(batch), -1)
        assert [row[row >= 0].tolist() for row in batch.labels] == [[*row, 2] for row in ids.tolist()]
    statistics = dataset.statistics["toy"]["action"]
    np.testing.assert_allclose(
        unnormalize(normalize(episodes[0][0], statistics, "minmax"), statistics, "minmax"),
        np.where(np.equal(statistics["min"], statistics["max"]) & ~np.array(told["mask"]), 0, episodes[0][0]),
        atol=1e-6,
    )


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    chunk=st.integers(1, 10),
    repeat=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_windows_never_cross_episodes(lengths: list[int], chunk: int, repeat: bool, seed: int) -> None:
    """However the rows are stored, and where episodes of two sources bear the same number."""
    episode = np.repeat([number // 2 for number in range(len(lengths))], lengths)
    source = np.repeat([number % 2 for number in range(len(lengths))], lengths)
    frame = np.concatenate([np.arange(length) for length in lengths])
    stored = np.random.default_rng(seed).permutation(len(frame))
    episode, source, frame = episode[stored], source[stored], frame[stored]
    windows = cut(source, episode, frame, chunk, repeat=repeat)
    expected = sum(lengths) if repeat else sum(max(0, length - chunk + 1) for length in lengths)
    assert len(windows) == expected and windows.short == sum(length < chunk for length in lengths)
    assert (np.diff(windows.rows) > 0).all()  # in the order in which they are stored
    for example in range(len(windows)):
        rows = windows[example]
        assert len(rows) == chunk and rows[0] == windows.rows[example]
        assert len({(source[row], episode[row]) for row in rows}) == 1
        last = lengths[2 * episode[rows[0]] + source[rows[0]]] - 1
        assert frame[rows].tolist() == [min(frame[rows[0]] + step, last) for step in range(chunk)]


def test_a_missing_frame_ends_an_episode() -> None:
    windows = cut(np.zeros(5, int), np.zeros(5, int), np.array([0, 1, 3, 4, 5]), 3, repeat=False)
    assert len(windows) == 1 and windows[0].tolist() == [2, 3, 4] and windows.short == 1


def test_one_conversion_serves_every_chunk_and_set_of_cameras(short_ones: ConvertedDataset) -> None:
    for chunk, expected in ((1, 12), (3, 6), (5, 1)):
        for cameras in (["main"], ["wrist", "main"]):
            policy = PolicyConfig(head="l1", chunk=chunk, cameras=cameras)
            [batch] = batches_in_order(short_ones, 99, policy=policy)
            assert batch.images.shape == (expected, len(cameras), 4, 4, 3)
            assert batch.images[0, :, 0, 0, 2].tolist() == [{"main": 0, "wrist": 2}[camera] for camera in cameras]
            assert batch.action.shape == (expected, chunk, 2) and batch.state is None
            assert batch.input_ids.shape == (expected, 3 + 2 * chunk + 1)
            assert batch.rows.tolist() == list(range(expected))


def test_with_a_chunk_of_one_nothing_changes(short_ones: ConvertedDataset) -> None:
    """With state and cameras the examples come in the order in which they come without."""
    plain, richer = (
        ExampleLoader(short_ones, 5, seed=3, policy=policy)
        for policy in (PolicyConfig(), PolicyConfig(head="l1", state=True, cameras=["main", "left"]))
    )
    assert plain.state_dict()["data"] == f"{short_ones.fingerprint}/train" != richer.state_dict()["data"]
    for _ in range(4):
        one, other = next(plain), next(richer)
        assert torch.equal(one.rows, other.rows) and torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.images[:, 0], other.images[:, 0]) and torch.equal(one.action, other.action)


def test_states_are_normalized_and_constant_ones_are_zero(short_ones: ConvertedDataset) -> None:
    statistics = short_ones.statistics["toy"]["proprio"]
    for kind, ends in (("q99", ("q01", "q99")), ("minmax", ("min", "max"))):
        policy = PolicyConfig(head="l1", state=True, normalization=kind)  # type: ignore[arg-type]
        [batch] = batches_in_order(short_ones, 99, policy=policy)
        assert batch.state is not None and batch.state.shape == (12, 3) and (batch.state[:, 1] == 0).all()
        low, high = (statistics[end][0] for end in ends)
        expected = np.clip(2 * (batch.images[:, 0, 0, 0, 1].numpy() - low) / (high - low) - 1, -1, 1)
        np.testing.assert_allclose(batch.state[:, 0].numpy(), expected, atol=1e-6)


def test_the_last_action_is_repeated_on_request(short_ones: ConvertedDataset) -> None:
    [batch] = batches_in_order(short_ones, 99, policy=PolicyConfig(head="l1", chunk=4, tail="repeat"))
    assert len(batch) == 12
    alone = next(batches_in_order(short_ones, 99)).action[:, 0]
    assert torch.equal(batch.action[4], alone[[4, 4, 4, 4]]) and torch.equal(batch.action[6], alone[[6, 7, 7, 7]])


def test_resuming_continues_at_the_exact_window(short_ones: ConvertedDataset) -> None:
    policy = PolicyConfig(head="l1", chunk=3)
    loader = ExampleLoader(short_ones, 4, seed=1, policy=policy)
    assert loader.epoch_length == 6
    next(loader)
    state = loader.state_dict()
    resumed = ExampleLoader(short_ones, 4, seed=1, policy=policy)
    resumed.load_state_dict(state)
    assert torch.equal(next(resumed).action, next(loader).action)
    with pytest.raises(DataError, match="other data"):
        ExampleLoader(short_ones, 4, seed=1, policy=PolicyConfig(head="l1", chunk=2)).load_state_dict(state)


def test_what_is_not_there_is_one_sentence(short_ones: ConvertedDataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'toy' has no camera 'rist' \(there are: main, left, wrist\)"):
        ExampleLoader(short_ones, 1, policy=PolicyConfig(cameras=["main", "rist"]))
    with pytest.raises(DataError, match=r"no episode in split 'val' .* 6 steps .* \(the longest has 5\)"):
        next(batches_in_order(short_ones, 1, policy=PolicyConfig(head="l1", chunk=6)))
    state = np.ones((5, 2), np.float32)
    zeros = {name: [0.0] * 2 for name in ("mean", "std", "max", "min", "q01", "q99")}
    old = write_episodes(tmp_path / "old", [(ramp(5), state)], cameras=["image"], proprio=zeros)
    without = write_episodes(tmp_path / "without", [(ramp(5), None)], cameras=["image"])
    reads_state = PolicyConfig(head="l1", state=True)
    for dataset, sentence in ((old, r"zeros for the state of 'toy'.*convert"), (without, "5 of its 5 rows have no")):
        with pytest.raises(DataError, match=sentence):
            ExampleLoader(dataset, 1, policy=reads_state)
    wider = write_episodes(tmp_path / "wider", [(ramp(5), np.ones((5, 4), np.float32))], cameras=["image"])
    with pytest.raises(DataError, match="have 3 and 4 dimensions"):
        ExampleLoader([short_ones, wider], 1, policy=reads_state)


def test_episodes_that_are_stored_one_after_another_take_a_few_numbers_each() -> None:
    lengths = [7, 3, 12]
    episode = np.repeat([5, 2, 9], lengths)  # in any order of their numbers
    frame = np.concatenate([np.arange(length) for length in lengths])
    source = np.zeros(len(frame), int)
    windows = cut(source, episode, frame, 4, repeat=False)
    assert windows.order is None and windows.edges.tolist() == [0, 7, 10, 22]
    assert [windows[example].tolist() for example in range(4)] == [[row + k for k in range(4)] for row in range(4)]
    assert windows[4].tolist() == [10, 11, 12, 13] and len(windows) == 13
    # a second stretch of the same episode, with steps between those of the first, has to be sorted in
    frame[7:10], episode[7:10] = [2, 3, 4], 5
    assert cut(source, episode, frame, 4, repeat=False).order is not None
