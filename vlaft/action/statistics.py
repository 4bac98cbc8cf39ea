"""Dataset statistics in OpenVLA's layout: `dataset_statistics.json`, and `norm_stats` of a checkpoint's config.

`{name: {"action": {mean, std, max, min, q01, q99, mask}, "proprio": {the same without mask, of the
state}, "num_transitions", "num_trajectories"}}`. Lists hold one number per dimension, in the units of the standardized
action; `mask` is True where normalisation applies. Where there is no state, `proprio` is zeros, as OpenVLA writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlaft.errors import DataError, did_you_mean
from vlaft.files import read_json, write_json

DatasetStatistics = dict[str, Any]  # one dataset: action, proprio, num_transitions, num_trajectories
Statistics = dict[str, DatasetStatistics]

FIELDS = ("mean", "std", "max", "min", "q01", "q99")
BOUNDS = ("q01", "q99")  # of those, what actions are scaled by
STATISTICS_FILE = "dataset_statistics.json"
_BLOCK = 2**17  # rows that are looked at together


def compute_statistics(
    actions: Sequence[NDArray[np.float32]],
    mask: Sequence[bool] = (),
    states: Sequence[NDArray[np.float32]] = (),
) -> DatasetStatistics:
    """Return the statistics over all steps of all episodes.

    As OpenVLA: standard deviation with ddof 0, 1 % and 99 % quantiles by linear interpolation, and without states
    zeros shaped like the action for `proprio`. Sums run in float64 (upstream's run in float32, which loses digits over
    millions of steps and agrees to 1e-6 over thousands); results are rounded to float32.

    Args:
        actions: per episode `[T, A]` float32, standardized.
        mask: one per action dimension; empty means that all are normalised.
        states: per episode `[T, S]` float32; empty where there are none.

    Raises:
        DataError: no steps, differing dimensions, values that are not finite, or a mask of another length.
    """
    joined = _join(actions, "action")
    return statistics_of_rows(joined, len(actions), mask, _join(states, "state") if states else None)


def statistics_of_rows(
    actions: NDArray[np.float32],
    episodes: int,
    mask: Sequence[bool] = (),
    states: NDArray[np.float32] | None = None,
) -> DatasetStatistics:
    """As `compute_statistics`, of rows that lie behind each other, maybe in a file that is mapped into memory.

    Beside them it takes four bytes per row of memory, for the quantiles of one dimension at a time.

    Args:
        actions: `[N, A]` float32, the steps of all episodes.
        episodes: their number.
        mask: one per action dimension; empty means that all are normalised.
        states: `[N, S]` float32, or None where there are none.

    Raises:
        DataError: no steps, values that are not finite, or a mask of another length.
    """
    size = actions.shape[1]
    if mask and len(mask) != size:
        raise DataError(f"the action mask has {len(mask)} entries for {size} action dimensions; give one for each")
    action: dict[str, Any] = dict(_moments(actions, "action"))
    action["mask"] = [bool(entry) for entry in mask] if mask else [True] * size
    return {
        "action": action,
        "proprio": {name: [0.0] * size for name in FIELDS} if states is None else _moments(states, "state"),
        "num_transitions": len(actions),
        "num_trajectories": episodes,
    }


def tells_of_state(statistics: Mapping[str, Any]) -> bool:
    """Say whether `proprio` of a dataset's statistics is of real states, not the zeros that stand for none."""
    return any(any(values) for values in (statistics.get("proprio") or {}).values())


def _join(episodes: Sequence[NDArray[np.float32]], what: str) -> NDArray[np.float32]:
    sizes = {episode.shape[1:] for episode in episodes}
    if sum(len(episode) for episode in episodes) == 0:
        raise DataError("there are no steps to compute statistics of")
    if len(sizes) != 1:
        listed = ", ".join(str(size[0] if size else 0) for size in sorted(sizes))
        raise DataError(f"episodes differ in their number of {what} dimensions ({listed}); convert them separately")
    return np.concatenate([np.asarray(episode, dtype=np.float32) for episode in episodes])


def _moments(values: NDArray[np.float32], what: str) -> dict[str, list[float]]:
    if not len(values):
        raise DataError("there are no steps to compute statistics of")
    bad = [0, 0]  # places, and the first one's dimension
    for block in _blocks(values):
        places = np.argwhere(~np.isfinite(block))
        bad = [bad[0] + len(places), int(places[0][1]) if len(places) and not bad[0] else bad[1]]
    if bad[0]:
        raise DataError(f"{what} dimension {bad[1]} is not finite in {bad[0]} places; repair or drop the episode")
    mean = _sum(values, lambda block: block) / len(values)
    std = np.sqrt(_sum(values, lambda block: np.square(block - mean)) / len(values))
    # one by one: numpy interpolates in float64 where it is asked for several, and the last digit is another
    columns = (np.array(values[:, number]) for number in range(values.shape[1]))  # each read once: they may be a file's
    quantiles = list(zip(*([_quantile(column, share) for share in (0.01, 0.99)] for column in columns), strict=True))
    results = {
        "mean": mean,
        "std": std,
        "max": np.asarray(values.max(axis=0)),
        "min": np.asarray(values.min(axis=0)),
        "q01": np.asarray(quantiles[0]),
        "q99": np.asarray(quantiles[1]),
    }
    return {name: result.astype(np.float32).astype(np.float64).tolist() for name, result in results.items()}


def _quantile(column: NDArray[np.float32], share: float) -> np.float32:
    """Return a quantile; the column's order is lost."""
    return np.float32(np.quantile(column, share, overwrite_input=True))


def _blocks(values: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    for start in range(0, len(values), _BLOCK):
        yield np.asarray(values[start : start + _BLOCK])


def _sum(
    values: NDArray[np.float32], function: Callable[[NDArray[np.float64]], NDArray[np.float64]]
) -> NDArray[np.float64]:
    """Return the sum over all rows, added one after the other as numpy does over the first axis."""
    total: NDArray[np.float64] | None = None
    for block in _blocks(values):
        terms = function(block.astype(np.float64))
        total = np.add.reduce(terms if total is None else np.concatenate([total[None], terms]), axis=0)
    assert total is not None
    return total


def write_statistics(path: Path, statistics: Mapping[str, DatasetStatistics]) -> None:
    """Write `dataset_statistics.json`; `path` is the file.

    Raises:
        DataError: `statistics` is not in OpenVLA's layout.
    """
    write_json(path, check_statistics(statistics, str(path)))


def read_statistics(path: Path, needed: Sequence[str] = FIELDS) -> Statistics:
    """Read and check `dataset_statistics.json`; `path` is the file or the folder that holds it.

    Args:
        path: as said.
        needed: as `check_statistics` takes it.

    Raises:
        DataError: no such file, no JSON, or not in OpenVLA's layout; the sentence names the file and the key.
    """
    file = path / STATISTICS_FILE if path.is_dir() else path
    if not file.exists():
        raise DataError(f"{file} is missing; it is written by vlaft convert and by OpenVLA's fine-tuning")
    return check_statistics(read_json(file), str(file), needed)


def check_statistics(value: object, where: str, needed: Sequence[str] = FIELDS) -> Statistics:
    """Return `value` as statistics when it is in OpenVLA's layout.

    A missing `mask` stands for all True, as upstream reads it. `proprio` and the two counts may be missing.

    Args:
        value: the parsed JSON, or `norm_stats` of a checkpoint's config.
        where: the file, for the message.
        needed: what has to be there; `BOUNDS` is enough for turning tokens into an action.

    Raises:
        DataError: it is not; the sentence names the first key that is wrong.
    """
    if not isinstance(value, Mapping) or not value:
        raise DataError(f"{where} holds no dataset statistics: a dictionary of datasets is expected")
    return {str(name): _check_dataset(entry, f"{where}: {name}", needed) for name, entry in value.items()}


def _check_dataset(entry: object, where: str, needed: Sequence[str]) -> DatasetStatistics:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("action"), Mapping):
        raise DataError(f"{where}.action is missing: these are no dataset statistics")
    checked = dict(entry)
    action = dict(entry["action"])
    size = _check_lists(action, f"{where}.action", needed)
    mask = action.setdefault("mask", [True] * size)
    if not isinstance(mask, list) or len(mask) != size or not all(isinstance(part, bool) for part in mask):
        raise DataError(f"{where}.action.mask has to be a list of {size} true or false")
    checked["action"] = action
    if "proprio" in entry:
        if not isinstance(entry["proprio"], Mapping):
            raise DataError(f"{where}.proprio has to be a dictionary of {', '.join(FIELDS)}")
        _check_lists(entry["proprio"], f"{where}.proprio", needed)
        checked["proprio"] = dict(entry["proprio"])
    for name in ("num_transitions", "num_trajectories"):
        count = entry.get(name, 0)
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise DataError(f"{where}.{name} has to be a whole number")
    return checked


def _check_lists(values: Mapping[str, Any], where: str, needed: Sequence[str]) -> int:
    first, size = "", None
    for name in FIELDS:
        if name not in needed and name not in values:
            continue
        numbers = values.get(name)
        if not isinstance(numbers, list) or not numbers or not all(_is_finite(number) for number in numbers):
            raise DataError(f"{where}.{name} has to be a list of finite numbers")
        if size is not None and len(numbers) != size:
            raise DataError(f"{where}.{name} has {len(numbers)} numbers where {first} has {size}")
        first, size = first or name, len(numbers)
    return size or 0


def _is_finite(number: object) -> bool:
    try:
        return isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
    except OverflowError:  # a whole number beyond float's range
        return False


def choose_key(statistics: Mapping[str, DatasetStatistics], key: str | None = None) -> str:
    """Return whose statistics to use: `key`, or the only dataset there is (OpenVLA's rule for `unnorm_key`).

    Raises:
        DataError: no `key` is given and there are several datasets, or there is none of this name.
    """
    known = list(statistics)
    if key is None:
        if len(known) == 1:
            return known[0]
        raise DataError(f"the statistics hold {len(known)} datasets; choose one by its key: {', '.join(known)}")
    if key not in statistics:
        raise DataError(
            f"there are no statistics for '{key}'{did_you_mean(key, known)} (there are: {', '.join(known)})"
        )
    return key
