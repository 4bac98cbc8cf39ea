"""One source as conversions and inspections read it: its reader, the layout that applies, what an episode must have."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlaft.data.episode import Episode
from vlaft.data.layout import Layout, apply_layout, merge_options, separate_options
from vlaft.data.presets import known_datasets, layout_fields, load_preset, preset_of_dataset, with_fields
from vlaft.data.readers.opening import open_reader
from vlaft.data.readers.reader import EpisodeRef, Reader
from vlaft.data.standardize.steps import parse_steps, standardize
from vlaft.errors import ConfigError, DataError
from vlaft.files import read_yaml

Progress = Callable[[str, int, int], None]  # phase, done, total


def silent(phase: str, done: int, total: int) -> None:
    """Report nothing: the `Progress` of whoever wants none."""


@dataclass(frozen=True, kw_only=True)
class SourceRequest:
    """One source to convert.

    Attributes:
        path: file, folder or Hub id, as `open_reader` takes it.
        preset: name or file of a dataset preset, or None for the reader's own layout.
        layout: single fields of the layout that win over preset and reader, as a preset's YAML would set them
            (`{"instruction": "open the drawer"}`); `"steps+"` adds steps behind those of the preset.
        name: the dataset's name and its key in the statistics; None takes the source's own.
        weight: how often training samples it: times its number of steps, as in OpenVLA's mixtures.
    """

    path: Path
    preset: str | None = None
    layout: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None
    weight: float = 1.0


class MissingInstruction(DataError):
    """An episode does not say what the robot does."""


@dataclass(frozen=True)
class OpenedSource:
    """A source with the layout that applies to it."""

    request: SourceRequest
    reader: Reader
    layout: Layout

    @property
    def name(self) -> str:
        """The dataset's name and its key in the statistics."""
        return self.request.name or self.reader.name

    @property
    def warnings(self) -> list[str]:
        """What the reader did not believe, and whether a preset was overlooked; each a sentence."""
        return self.warnings_with(self.reader.warnings)

    def warnings_with(self, told: Sequence[str]) -> list[str]:
        """As `warnings`, where readers in other processes `told` what this one did not believe."""
        known = None if self.request.preset else preset_of_dataset(self.reader.name)
        hint = [f"a preset is made for this dataset: give --preset {known} unless its actions are as you want them"]
        return [*told, *(hint if known else [])]

    @property
    def steps_given(self) -> bool:
        """Whether the user wrote the standardizing steps: as a word, in a mix, or in a preset of their own."""
        preset = self.request.preset
        own = preset is not None and preset not in known_datasets()
        return "steps" in self.request.layout or (own and "steps" in read_yaml(Path(str(preset)), "a preset"))

    @property
    def preset_is_for_it(self) -> bool:
        """Whether the preset was made for the dataset of this very name, rather than for a format or another one."""
        preset = self.request.preset
        if preset is None:
            return False
        made_for = preset_of_dataset(self.reader.name)
        if made_for is None and self.reader.format == "rlds":  # some presets are called as their dataset is published
            made_for = self.reader.name
        return made_for == (preset_of_dataset(preset) or preset)

    def read(self, ref: EpisodeRef) -> Episode:
        """Return a standardized episode; its frames are not decoded yet.

        Raises:
            DataError: it is damaged, or lacks what the layout or training needs.
        """
        stored = self.reader.read(ref)
        self._check_cameras(stored)
        episode = standardize(apply_layout(stored, self.layout), self.layout.steps)
        if episode.action is None or not len(episode.action):
            raise DataError(f"episode '{episode.name}' of {self.request.path} has no steps")
        for what, values in (("action", episode.action), ("state", episode.state)):
            if values is not None and not np.isfinite(values).all():
                step = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
                raise DataError(
                    f"episode '{episode.name}' of {self.request.path}, step {step}: the {what} is not finite;"
                    " repair or drop the episode"
                )
        if not episode.instruction.strip():
            raise MissingInstruction(
                f"episode '{episode.name}' of {self.request.path} has no instruction;"
                " give one with instruction='what the robot does'"
            )
        return episode

    def _check_cameras(self, episode: Episode) -> None:
        """Refuse an episode without the cameras that are asked for, and pass on why the reader left them out."""
        lost = [camera for camera in self.layout.cameras.values() if camera not in episode.cameras]
        whys = [text for text in self.reader.warnings if re.match("(only .* of )?camera ", text)]
        if not episode.cameras:
            why = "; ".join(whys) or "the source holds no images, record with cameras"
            raise DataError(
                f"episode '{episode.name}' of {self.request.path} has no camera, and examples need images: {why}"
            )
        whys = [why for why in whys if any(f"'{camera}'" in why for camera in lost)]
        if whys:
            raise DataError(
                f"episode '{episode.name}' of {self.request.path} lacks a camera that is asked for: {'; '.join(whys)}"
            )


def open_request(request: SourceRequest) -> OpenedSource:
    """Open a source and settle its layout: the reader's, then the preset's, then the request's own fields.

    Raises:
        DataError: the source cannot be opened.
        ConfigError: the preset or a field of the layout is wrong.
    """
    preset = {} if request.preset is None else load_preset(request.preset).options
    settings = layout_fields(separate_options(request.layout, mapped="episodes" in preset), "settings")
    if not request.weight > 0 or not np.isfinite(request.weight):
        raise ConfigError(f"the weight of {request.path} is {request.weight}; it has to be a positive number")
    reader = open_reader(request.path, merge_options(preset, settings.get("options", {})))
    layout = reader.layout if request.preset is None else load_preset(request.preset, reader.layout)
    layout = with_fields(layout, settings)
    parse_steps(layout.steps)
    return OpenedSource(request, reader, layout)


def first_of_splits(refs: Sequence[EpisodeRef], limit: int | None) -> list[EpisodeRef]:
    """Return the first `limit` episodes of every split of a source; all without a limit."""
    counts: Counter[str | None] = Counter()
    kept = []
    for ref in refs:
        counts[ref.split] += 1
        if limit is None or counts[ref.split] <= limit:
            kept.append(ref)
    return kept
