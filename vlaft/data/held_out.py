"""The held-out examples that models are compared on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlaft.data.codec import decode_image
from vlaft.data.columns import SplitColumns
from vlaft.data.store import SPLITS, ConvertedDataset
from vlaft.data.windows import Windows, cut
from vlaft.errors import ConfigError, DataError

_COLUMNS = ("dataset", "source", "instruction", "episode_index", "frame_index", "action", "prompt_token_ids", "state")


@dataclass(frozen=True)
class HeldOutEpisode:
    """One demonstration of the split.

    Attributes:
        dataset: name of its dataset, the key of its statistics.
        source: where it came from.
        instruction: what the robot was told.
        rows: rows of the split, in the order of its frames.
    """

    dataset: str
    source: str
    instruction: str
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class HeldOut:
    """One split of one or more converted datasets. Actions and prompts are in memory, images on disk.

    Attributes:
        datasets: where the examples lie.
        split: `"val"` or `"train"`.
        names: of the action dimensions.
        gripper: whether the last dimension is a gripper.
        action: float32 `[R, A]`, of every row of the split, in the robot's units.
        dataset: name of each row's dataset, `[R]`.
        prompts: token ids of each row's prompt.
        frame: int64 `[R]`, the step within the episode.
        state: float32 `[R, S]`, of every row, in the robot's units; None where not all of them have one of one width.
        windows: the K actions from each row on, of those rows that have so many.
        episodes: the split's episodes.
        chosen: int64 `[N]`, the rows to evaluate, all of which have K actions.
    """

    datasets: tuple[ConvertedDataset, ...]
    split: str
    names: tuple[str, ...]
    gripper: bool
    action: NDArray[np.float32]
    dataset: NDArray[np.str_]
    prompts: list[list[int]]
    frame: NDArray[np.int64]
    state: NDArray[np.float32] | None
    windows: Windows
    episodes: tuple[HeldOutEpisode, ...]
    chosen: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.chosen)

    @classmethod
    def open(cls, paths: Sequence[Path], split: str = "val", limit: int | None = None, chunk: int = 1) -> HeldOut:
        """Read everything but the images.

        Args:
            paths: converted datasets.
            split: `"val"` or `"train"`.
            limit: evaluate at most so many examples, evenly spread over the split; None takes all.
            chunk: K, the most actions that a model to be evaluated writes at once: every one is then held against the
                same frames, those that have so many actions to come in their episode.

        Raises:
            ConfigError: the split is unknown or the limit is not positive.
            DataError: a dataset is missing or damaged, the split is empty, action dimensions differ, or no episode has
                `chunk` steps.
        """
        if split not in SPLITS:
            raise ConfigError(f"split '{split}' is not known: give {' or '.join(SPLITS)}")
        if limit is not None and limit < 1:
            raise ConfigError(f"a limit of {limit} examples leaves none; give at least 1")
        datasets = tuple(ConvertedDataset(Path(path)) for path in paths)
        rows: dict[str, list] = {name: [] for name in _COLUMNS}
        owner: list[int] = []
        for number, dataset in enumerate(datasets):
            read = _read(dataset, split)
            owner += [number] * len(read["action"])
            for name in _COLUMNS:
                rows[name] += read[name]
        if not owner:
            listed = ", ".join(str(path) for path in paths)
            raise DataError(f"split '{split}' of {listed} is empty; convert with a validation fraction, or --split")
        widths = sorted({len(action) for action in rows["action"]})
        if len(widths) != 1 or widths[0] == 0:
            raise DataError(f"{', '.join(str(p) for p in paths)}: actions of {widths} dimensions cannot be compared")
        action = np.asarray(rows["action"], dtype=np.float32)
        names = _dimension_names(datasets, action.shape[1])
        frame = np.asarray(rows["frame_index"], dtype=np.int64)
        windows = cut(np.asarray(owner), np.asarray(rows["episode_index"], dtype=np.int64), frame, chunk, repeat=False)
        if not len(windows):
            raise DataError(
                f"no episode in split '{split}' of {', '.join(map(str, paths))} has the {chunk} steps that a model"
                f" writes at once (the longest has {windows.lengths.max()}); evaluate on longer ones"
            )
        count = len(windows) if limit is None else min(limit, len(windows))
        return cls(
            datasets=datasets,
            split=split,
            names=names or tuple(str(index) for index in range(action.shape[1])),
            gripper=_has_gripper(names, action),
            action=action,
            dataset=np.asarray([str(name) for name in rows["dataset"]]),
            prompts=rows["prompt_token_ids"],
            frame=frame,
            state=_states(rows["state"]),
            windows=windows,
            episodes=_episodes(owner, rows),
            chosen=windows.rows[np.linspace(0, len(windows) - 1, count).round().astype(np.int64)],
        )

    @property
    def evaluated(self) -> list[int]:
        """Numbers of the episodes that have examples to evaluate."""
        wanted = np.isin(np.arange(len(self.action)), self.chosen)
        return [number for number, episode in enumerate(self.episodes) if wanted[episode.rows].any()]

    def chunks(self, rows: NDArray[np.int64], chunk: int) -> NDArray[np.float32]:
        """Return the actions from some of the chosen rows on, float32 `[B, K, A]`, in the robot's units.

        Raises:
            DataError: there are fewer than `chunk` to each.
        """
        if chunk > self.windows.chunk:
            raise DataError(
                f"a model writes {chunk} actions at once, and examples were chosen for {self.windows.chunk}"
            )
        examples = np.searchsorted(self.windows.rows, rows)
        return self.action[np.stack([self.windows[example][:chunk] for example in examples])]

    def images(self, rows: Sequence[int] | NDArray[np.int64], camera: str = "main") -> NDArray[np.uint8]:
        """Return a camera's frames of some rows, uint8 `[B, H, W, 3]`.

        Raises:
            DataError: there is no such camera, or a row has no image of it, or a damaged one.
        """
        starts = np.cumsum([0, *(dataset.rows(self.split) for dataset in self.datasets)])
        frames = []
        for row in rows:
            number = int(np.searchsorted(starts, row, side="right")) - 1
            dataset = self.datasets[number]
            index = int(row - starts[number])
            columns = dataset.camera_columns
            if camera not in columns:
                raise DataError(
                    f"{dataset.path}: there is no camera '{camera}', which the model reads (there are:"
                    f" {', '.join(columns)}); convert the source again with it"
                )
            image = SplitColumns.of(dataset, self.split).frame(index, columns[camera])
            if image is None:
                missing = "image" if camera == "main" else f"image of camera '{camera}'"
                raise DataError(
                    f"{_where(dataset, self.split, index)}: the row has no {missing}; convert the source again"
                )
            try:
                frame = decode_image(image, "the stored frame", accurate_dct=True)
            except DataError as error:
                raise DataError(f"{_where(dataset, self.split, index)}: {error}; convert the source again") from error
            if frame.shape[:2] != (dataset.pipeline.size, dataset.pipeline.size):
                raise DataError(
                    f"{_where(dataset, self.split, index)}: the frame has {frame.shape[0]} x {frame.shape[1]} pixels"
                    f" where {dataset.pipeline.size} are announced; convert the source again"
                )
            frames.append(frame)
        return np.stack(frames)


def _where(dataset: ConvertedDataset, split: str, row: int) -> str:
    place = dataset.row(split, row)
    return f"{dataset.path}, {place['source']}, step {place['frame_index']}"


def _read(dataset: ConvertedDataset, split: str) -> dict[str, list]:
    """Return the columns of a split as lists.

    Raises:
        DataError: one is missing, or holds no action or no prompt somewhere.
    """
    table = dataset.table(split, _COLUMNS)
    missing = [name for name in _COLUMNS if name not in table.column_names]
    if missing:
        raise DataError(f"{dataset.path}: split '{split}' has no column '{missing[0]}'; convert the source again")
    columns: dict[str, list] = {name: table[name].to_pylist() for name in _COLUMNS}
    for row, (action, prompt) in enumerate(zip(columns["action"], columns["prompt_token_ids"], strict=True)):
        values = [*(action or [None]), *(prompt or [None]), columns["episode_index"][row], columns["frame_index"][row]]
        if any(value is None or not math.isfinite(value) for value in values):
            raise DataError(
                f"{dataset.path}, {columns['source'][row]}, step {columns['frame_index'][row]}: its action, prompt or"
                " place is missing or not finite; convert the source again"
            )
    return columns


def _states(rows: Sequence[Sequence[float] | None]) -> NDArray[np.float32] | None:
    widths = {len(state or ()) for state in rows}
    return np.asarray(rows, dtype=np.float32) if len(widths) == 1 and widths != {0} else None


def _dimension_names(datasets: Sequence[ConvertedDataset], width: int) -> tuple[str, ...]:
    """Return the names that the first source gives the dimensions, if any."""
    try:
        names = datasets[0].info["sources"][0]["action"]["names"]
    except (KeyError, IndexError, TypeError):
        return ()
    return tuple(str(name) for name in names) if isinstance(names, list) and len(names) == width else ()


def _has_gripper(names: Sequence[str], action: NDArray[np.float32]) -> bool:
    """Take the last dimension as a gripper by its name, or, unnamed, by a range of 0 to 1."""
    if names:
        return "grip" in names[-1].lower()
    return bool(((action[:, -1] >= 0) & (action[:, -1] <= 1)).all())


def _episodes(owner: Sequence[int], rows: dict[str, list]) -> tuple[HeldOutEpisode, ...]:
    found: dict[tuple[int, int], list[int]] = {}
    for row, key in enumerate(zip(owner, rows["episode_index"], strict=True)):
        found.setdefault(key, []).append(row)
    episodes = []
    for members in found.values():
        first = members[0]
        ordered = sorted(members, key=lambda row: rows["frame_index"][row])
        dataset, source, instruction = (str(rows[name][first] or "") for name in ("dataset", "source", "instruction"))
        episodes.append(HeldOutEpisode(dataset, source, instruction, np.asarray(ordered, dtype=np.int64)))
    return tuple(episodes)
