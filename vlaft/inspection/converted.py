"""Inspect a folder that `vlaft convert` wrote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlaft.action.statistics import tells_of_state
from vlaft.data.codec import decode_image
from vlaft.data.layout import Layout
from vlaft.data.source import Progress, silent
from vlaft.data.store import DATASET_FILE, SPLITS, ConvertedDataset
from vlaft.errors import DataError
from vlaft.files import restored
from vlaft.inspection.facts import EPISODES_LOOKED_AT, CameraFacts, EpisodeFacts, Inspection, evenly, look_at
from vlaft.observation.images import Image
from vlaft.remote import fetched

_COLUMNS = ("episode_index", "dataset", "source", "instruction", "state", "action")


@dataclass(frozen=True)
class StoredFrames:
    """The frames of one episode in an image column; implements `vlaft.data.episode.Frames`."""

    dataset: ConvertedDataset
    split: str
    rows: tuple[int, ...]
    column: str
    where: str

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: Sequence[int]) -> Iterator[Image]:
        """Decode the frames of `indices`."""
        for index in indices:
            value = self.dataset.row(self.split, self.rows[index])[self.column]
            where = f"{self.where}, column '{self.column}', frame {index}"
            if not isinstance(value, Mapping) or not value.get("bytes"):
                raise DataError(f"{where} is missing")
            yield decode_image(value["bytes"], where, accurate_dct=True)


def is_converted(path: Path) -> bool:
    """Tell whether the folder is a converted dataset."""
    return (restored(fetched(path)) / DATASET_FILE).is_file()


def inspect_converted(
    path: Path,
    *,
    limit: int | None = None,
    frames: bool = True,
    thumbnails: bool = False,
    progress: Progress = silent,
) -> Inspection:
    """Read a converted dataset and measure it; its raw action is the standardized one that it stores.

    Raises:
        DataError: it is damaged, or has no rows.
    """
    dataset = ConvertedDataset(path)
    dataset.verify()
    sources: list[dict[str, Any]] = list(dataset.info.get("sources", []))
    if not sources or not all(isinstance(source, dict) for source in sources):
        raise DataError(f"{path / DATASET_FILE} names no source; convert the source again")
    rates = {source.get("name"): source.get("fps") for source in sources}
    layout = _layout(sources[0])
    episodes: list[EpisodeFacts] = []
    places: list[tuple[str, tuple[int, ...]]] = []
    for split in SPLITS:
        table = {name: column.to_pylist() for name, column in _columns(dataset, split).items()}
        rows_of: dict[int, list[int]] = {}
        for row, number in enumerate(table["episode_index"]):
            rows_of.setdefault(number, []).append(row)
        for rows in list(rows_of.values())[:limit]:
            first = rows[0]
            texts = [table["instruction"][row] or "" for row in rows]
            widths = {len(table["action"][row] or ()) for row in rows}
            if len(widths) != 1 or 0 in widths:
                raise DataError(f"{path}: the actions of episode '{table['source'][first]}' differ in their width")
            action = np.asarray([table["action"][row] for row in rows], dtype=np.float32)
            states = [table["state"][row] for row in rows]
            has_states = all(states) and len({len(state) for state in states}) == 1
            fps = rates.get(table["dataset"][first])
            episodes.append(
                EpisodeFacts(
                    name=f"{table['source'][first]}",
                    split=split,
                    steps=len(rows),
                    instruction=Counter(texts).most_common(1)[0][0],
                    instructions=tuple(dict.fromkeys(texts)) if len(set(texts)) > 1 else (),
                    fps=float(fps) if isinstance(fps, int | float) else None,
                    action=action.astype(np.float64),
                    standardized=action,
                    state=np.asarray(states, dtype=np.float32) if has_states else None,
                    names=layout.action_names,
                )
            )
            places.append((split, tuple(rows)))
    if not episodes:
        raise DataError(f"{path} has no rows; convert the source again")
    widths = {episode.action.shape[1] for episode in episodes}
    if len(widths) > 1:
        raise DataError(f"{path}: episodes differ in their number of action dimensions; convert the source again")
    looked_at = set(evenly(len(episodes), EPISODES_LOOKED_AT)) if frames else set()
    shapes: dict[str, tuple[int, int, int]] = {}
    pictures: dict[str, tuple[Image, Image]] = {}
    for number, (split, numbers) in enumerate(places):
        progress("reading episodes", number, len(places))
        shown: dict[str, CameraFacts] = {}
        for column in dataset.cameras:
            stored = StoredFrames(dataset, split, numbers, column, f"{path}: {episodes[number].name}")
            if column not in shapes:
                try:
                    image = next(iter(stored.read([0])))
                except DataError:  # this source of several has no such camera
                    continue
                shapes[column] = (image.shape[0], image.shape[1], image.shape[2])
                if thumbnails:
                    pictures[column] = (image, image)
            if number in looked_at:
                shown[column] = look_at(stored, thumbnails=thumbnails)
        if shown:
            episodes[number] = replace(episodes[number], cameras=shown)
    progress("reading episodes", len(places), len(places))
    skipped = dataset.info.get("skipped") or []
    told = [str(sentence) for sentence in dataset.info.get("warnings") or []]
    if not dataset.has_checksum:
        told.append(f"an earlier vlaft wrote {DATASET_FILE} without a checksum, so a change in it would not be seen")
    silent = [name for name, entry in dataset.statistics.items() if not tells_of_state(entry)]
    if silent and any(episode.state is not None for episode in episodes):
        told.append(
            f"an earlier vlaft wrote zeros as the state's statistics of {', '.join(silent)}; convert the source again"
            " before a policy reads it (policy.state=true)"
        )
    if skipped:
        told.append(f"the conversion left out {len(skipped)} episodes; dataset.json says which and why")
    return Inspection(
        path=path,
        name=", ".join(str(source.get("name")) for source in sources),
        kind="converted",
        format="vlaft",
        preset=sources[0].get("preset"),
        layout=layout,
        source_steps=layout.steps,
        episodes=tuple(episodes),
        shapes=shapes,
        labels={column: column for column in shapes},
        references={column: column for column in shapes},
        pictures=pictures,
        told=tuple(told),
    )


def _columns(dataset: ConvertedDataset, split: str) -> dict[str, Any]:
    table = dataset.table(split, list(_COLUMNS))
    return {name: table.column(name) for name in _COLUMNS}


def _layout(source: Mapping[str, Any]) -> Layout:
    """Return what `dataset.json` tells about the layout of one source."""
    layout = source.get("layout") or {}
    action = source.get("action") or {}
    if not isinstance(layout, Mapping) or not isinstance(action, Mapping):
        return Layout()
    return Layout(
        action=tuple(layout.get("action") or ()),
        state=tuple(layout.get("state") or ()),
        cameras=dict(layout.get("cameras") or {}),
        steps=tuple(layout.get("steps") or ()),
        action_names=tuple(action.get("names") or ()),
        action_mask=tuple(action.get("mask") or ()),
    )
