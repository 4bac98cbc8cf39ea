"""Dataset statistics: against numpy, against upstream's own on Bridge, and what a file has to hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vlaft.action import statistics
from vlaft.action.statistics import (
    FIELDS,
    check_statistics,
    choose_key,
    compute_statistics,
    read_statistics,
    write_statistics,
)
from vlaft.data.layout import apply_layout
from vlaft.data.presets import load_preset
from vlaft.data.readers.rlds.source import RldsReader
from vlaft.data.standardize.steps import standardize
from vlaft.errors import DataError

MASK = [True] * 6 + [False]


def statistics_of(dims: int = 7) -> dict[str, object]:
    return compute_statistics([np.arange(4 * dims, dtype=np.float32).reshape(4, dims)], mask=[True] * dims)


episodes = st.lists(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 20), st.just(3)), elements=st.floats(-100, 100, width=32)),
    min_size=1,
    max_size=5,
)


@given(episodes)
@settings(max_examples=80)
def test_statistics_are_numpys_over_all_steps(actions: list[np.ndarray]) -> None:
    joined = np.concatenate(actions).astype(np.float64)
    found = compute_statistics(actions, mask=[True, True, False], states=[action[:, :2] for action in actions])
    expected = {
        "mean": joined.mean(axis=0),
        "std": joined.std(axis=0),
        "max": joined.max(axis=0),
        "min": joined.min(axis=0),
        "q01": np.quantile(joined, 0.01, axis=0),
        "q99": np.quantile(joined, 0.99, axis=0),
    }
    assert set(found["action"]) == {*FIELDS, "mask"}
    for name, values in expected.items():
        np.testing.assert_allclose(found["action"][name], values, rtol=1e-5, atol=2e-5, err_msg=name)
        np.testing.assert_allclose(found["proprio"][name], values[:2], rtol=1e-5, atol=2e-5, err_msg=name)
    assert found["action"]["mask"] == [True, True, False]
    assert set(found["proprio"]) == set(FIELDS)
    assert (found["num_transitions"], found["num_trajectories"]) == (len(joined), len(actions))
    for low, high in (("min", "q01"), ("q01", "q99"), ("q99", "max")):
        assert (np.float32(found["action"][low]) <= np.float32(found["action"][high]) + 1e-4).all()


def test_millions_of_steps_lose_no_digits() -> None:
    ones = np.ones((18_000_000, 1), np.float32)  # a float32 sum stops growing at 2 ** 24
    assert compute_statistics([ones])["action"]["mean"] == [1.0]


def test_without_states_proprio_is_zeros_shaped_like_the_action() -> None:
    found = compute_statistics([np.ones((2, 7), np.float32)])
    assert all(found["proprio"][name] == [0.0] * 7 for name in FIELDS)
    assert found["action"]["mask"] == [True] * 7


def test_what_has_no_statistics_is_refused() -> None:
    seven, eight = np.ones((2, 7), np.float32), np.ones((2, 8), np.float32)
    with pytest.raises(DataError, match="no steps"):
        compute_statistics([])
    with pytest.raises(DataError, match="no steps"):
        compute_statistics([seven[:0]])
    with pytest.raises(DataError, match=r"action dimensions \(7, 8\)"):
        compute_statistics([seven, eight])
    with pytest.raises(DataError, match="mask has 6 entries for 7"):
        compute_statistics([seven], mask=[True] * 6)
    with pytest.raises(DataError, match="state dimension 1 is not finite in 2 places"):
        compute_statistics([np.zeros((2, 7), np.float32)], states=[np.float32([[0, np.nan], [0, np.inf]])])


def test_a_written_file_is_read_back_the_same(tmp_path: Path) -> None:
    both = {"one": statistics_of(), "two": statistics_of(14)}
    write_statistics(tmp_path / "dataset_statistics.json", both)
    assert read_statistics(tmp_path) == both
    assert read_statistics(tmp_path / "dataset_statistics.json") == both
    assert [path.name for path in tmp_path.iterdir()] == ["dataset_statistics.json"]
    with pytest.raises(DataError, match=r"one\.action is missing"):
        write_statistics(tmp_path / "other.json", {"one": {}})
    assert not (tmp_path / "other.json").exists()


def damaged(key: str, value: object) -> dict[str, object]:
    entry = json.loads(json.dumps(statistics_of()))
    target, *path = entry, *key.split(".")
    for part in path[:-1]:
        target = target[part]
    if value is None:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    return {"bridge": entry}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([], "must hold a JSON object"),
        ({}, "holds no dataset statistics"),
        ({"bridge": 3}, r"bridge\.action is missing"),
        (damaged("action.q01", None), r"bridge\.action\.q01 has to be a list of finite numbers"),
        (damaged("action.q99", [float("nan")] * 7), r"bridge\.action\.q99 has to be"),
        (damaged("action.std", ["a"] * 7), r"bridge\.action\.std has to be"),
        (damaged("action.std", [10**400] * 7), r"bridge\.action\.std has to be"),
        (damaged("action.max", [1.0] * 6), r"bridge\.action\.max has 6 numbers where mean has 7"),
        (damaged("action.mask", [1] * 7), r"bridge\.action\.mask has to be a list of 7"),
        (damaged("action.mask", [True]), r"bridge\.action\.mask has to be a list of 7"),
        (damaged("proprio", 3), r"bridge\.proprio has to be"),
        (damaged("proprio.min", []), r"bridge\.proprio\.min has to be"),
        (damaged("num_transitions", -1), r"bridge\.num_transitions has to be"),
        (damaged("num_trajectories", 1.5), r"bridge\.num_trajectories has to be"),
    ],
)
def test_a_wrong_file_is_refused_by_its_key(tmp_path: Path, content: object, sentence: str) -> None:
    file = tmp_path / "dataset_statistics.json"
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=sentence) as caught:
        read_statistics(file)
    assert str(file) in str(caught.value)


def test_a_file_that_is_no_json_or_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is missing; it is written by vlaft convert"):
        read_statistics(tmp_path)
    file = tmp_path / "dataset_statistics.json"
    for content in (b"{", b"\xff\xfe\x00", b"[" * 100_000):
        file.write_bytes(content)
        with pytest.raises(DataError, match="cannot be read as JSON"):
            read_statistics(file)


def test_a_missing_mask_means_all_and_older_files_may_lack_proprio() -> None:
    content = damaged("action.mask", None)
    del content["bridge"]["proprio"]  # type: ignore[attr-defined]
    checked = check_statistics(content, "config.json")
    assert checked["bridge"]["action"]["mask"] == [True] * 7
    assert "proprio" not in checked["bridge"]
    assert "mask" not in content["bridge"]["action"]  # type: ignore[index]


def test_choosing_the_key_follows_openvlas_rule() -> None:
    one, two = {"bridge_orig": statistics_of()}, {"bridge_orig": statistics_of(), "viola": statistics_of()}
    assert choose_key(one) == "bridge_orig"
    assert choose_key(two, "viola") == "viola"
    with pytest.raises(DataError, match="hold 2 datasets; choose one by its key: bridge_orig, viola"):
        choose_key(two)
    with pytest.raises(DataError, match="no statistics for 'bridge_org'; did you mean 'bridge_orig'"):
        choose_key(two, "bridge_org")


def test_upstreams_files_are_read(golden_folder: Path, tiny: Path) -> None:
    for file in (golden_folder / "bridge/dataset_statistics.json", tiny / "checkpoint"):
        content = json.loads((file / "dataset_statistics.json" if file.is_dir() else file).read_text())
        content = content if "action" not in content else {"bridge_dataset": content}
        assert check_statistics(content, "golden") == content


def bridge_actions(samples: Path) -> tuple[list[np.ndarray], list[str]]:
    """Standardized actions and instructions of both splits, read by the RLDS reader with the preset `bridge`."""
    source = RldsReader(samples / "rlds/bridge_dataset/1.0.0")
    layout = load_preset("bridge", source.layout)
    episodes = [standardize(apply_layout(source.read(ref), layout), layout.steps) for ref in source.episodes()]
    return [np.asarray(episode.action) for episode in episodes], [episode.instruction for episode in episodes]


def test_bridge_read_from_rlds_with_its_preset_has_upstreams_statistics(samples: Path, golden_folder: Path) -> None:
    """Upstream computed them over `train` and `val`, from the same records."""
    actions, _ = bridge_actions(samples)
    found = compute_statistics(actions, mask=load_preset("bridge").action_mask)
    golden = json.loads((golden_folder / "bridge/dataset_statistics.json").read_text())
    assert found["num_transitions"] == golden["num_transitions"] == 400
    assert found["num_trajectories"] == golden["num_trajectories"] == 50
    assert found["action"]["mask"] == golden["action"]["mask"]
    assert found["proprio"] == golden["proprio"]
    for name in ("max", "min"):
        assert found["action"][name] == golden["action"][name]
    for name in FIELDS:
        np.testing.assert_allclose(found["action"][name], golden["action"][name], rtol=0, atol=1e-6, err_msg=name)


def test_bridge_read_from_rlds_with_its_preset_has_upstreams_actions(samples: Path, golden_folder: Path) -> None:
    """Every trajectory that upstream standardized is found among ours, step by step; upstream's are normalised."""
    actions, instructions = bridge_actions(samples)
    bounds = json.loads((golden_folder / "bridge/dataset_statistics.json").read_text())["action"]
    low, high, mask = (np.asarray(bounds[name]) for name in ("q01", "q99", "mask"))
    normalized = [np.where(mask, np.clip(2 * (a - low) / (high - low + 1e-8) - 1, -1, 1), a) for a in actions]
    rows = [json.loads(line) for line in (golden_folder / "bridge/examples.jsonl").read_text().splitlines()]
    trajectories: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        trajectories.setdefault(row["trajectory"], []).append(row)
    assert len(trajectories) == 25
    for trajectory in trajectories.values():
        expected = np.array([row["normalized_action"] for row in sorted(trajectory, key=lambda row: row["step"])])
        distances = [np.abs(found - expected).max() for found in normalized]
        nearest = int(np.argmin(distances))
        assert distances[nearest] < 1e-5
        assert instructions[nearest] == trajectory[0]["instruction"]


@pytest.mark.parametrize(("rows", "size"), [(1, 7), (999, 1), (1000, 2), (5003, 7), (2001, 14), (77, 900)])
def test_rows_in_a_file_give_what_rows_in_memory_give(
    rows: int, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit what numpy gives of all rows at once, though few are looked at together."""
    rng = np.random.default_rng(rows)
    values = (rng.normal(size=(rows, size)) * rng.uniform(0.1, 9, size)).astype(np.float32)
    values.tofile(tmp_path / "rows")
    monkeypatch.setattr(statistics, "_BLOCK", 100)
    mapped = np.memmap(tmp_path / "rows", np.float32, mode="r", shape=values.shape)
    found = statistics.statistics_of_rows(mapped, 3)["action"]
    for name, expected in {
        "mean": values.mean(axis=0, dtype=np.float64),
        "std": values.std(axis=0, dtype=np.float64),
        "max": values.max(axis=0),
        "min": values.min(axis=0),
        "q01": np.quantile(values, 0.01, axis=0),
        "q99": np.quantile(values, 0.99, axis=0),
    }.items():
        assert found[name] == expected.astype(np.float32).astype(np.float64).tolist(), name
