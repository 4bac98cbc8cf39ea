"""HDF5 files of any layout, read through a mapping that the user gives (YAML, or `key=value` words).

    episodes: episodes/traj_*            which groups are episodes: a pattern; or `file`, one episode per file;
                                         or a name with `{i}`, such as `actions_{i}`, for flat files whose episodes
                                         differ in a number at the end of every name
    action: [cmd/ee_delta, cmd/gripper]  array references below the episode, joined in this order (see Layout.action)
    state: [proprio]                     likewise; may be absent
    cameras:                             the first is the main camera; a bare path stands for {path: ...}
      front:
        path: camera/front_jpeg          below the episode
        encoding: raw | jpeg             default: jpeg for rows of bytes, raw for pixels
        layout: HWC | CHW                raw pixels; default: by where the 3 is
        range: uint8 | float01           raw pixels; default: float01 where the values are floats
        rotate: 0 | 90 | 180 | 270       turned counter-clockwise, as the standardizing step does
        swap_rb: true | false            exchange red and blue
    instruction: a text                  or {attribute: name} | {dataset: path} | {file_name: expression}
    fps: 10                              or {attribute: name}
    drop_last_observation: true          cut the observation after the last action, where there is one more of them

Attributes are looked up at the episode's group, then at the groups around it. `action` may be left out where the
episode has an array `action` or `actions`, `cameras` where there are uint8 arrays `[T, height, width, 3]`, and
`episodes` means `file` when absent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_type_hints

import h5py

from vlaft.data.layout import Layout
from vlaft.data.readers.hdf5.access import (
    child_names,
    datasets,
    find,
    listing,
    nearest_attribute,
    need_group,
    opened,
)
from vlaft.data.readers.hdf5.dialect import (
    Hdf5Reader,
    StoredEpisode,
    count_steps,
    folder_split,
    name_in,
    positive_number,
    read_options,
    refuse,
)
from vlaft.data.readers.hdf5.episode import FrameFormat, frame_format, is_camera, main_first, short_names
from vlaft.data.readers.hdf5.proposal import advice, propose
from vlaft.data.readers.reader import EpisodeRef
from vlaft.documents import fits, in_words, shown
from vlaft.errors import DataError, did_you_mean

OPTIONS = ("episodes", "action", "state", "cameras", "instruction", "fps", "drop_last_observation")
_NUMBERED = re.compile(r"(.*?)(\d+)")


@dataclass(kw_only=True)
class MappedReader(Hdf5Reader):
    """Episodes of HDF5 files of a free layout."""

    action: tuple[str, ...]
    cameras: Mapping[str, Mapping[str, Any]]  # by path, what is said of how their frames are stored
    fps: float | str | None  # a number, or the name of an attribute
    observed = "\0"  # no prefix: a free layout may hold anything beside what is per step

    def find(self, file: h5py.File, ref: EpisodeRef) -> StoredEpisode:
        """Find the group of the episode, or its datasets in a flat file."""
        path = self.file_of(ref)
        place = _Place(file, path, str(ref.location[1]), str(ref.location[2]), ref.name)
        # a camera that is absent here is told about when its frames are looked for
        formats = {
            name: frame_format(place.datasets[name], said) if name in place.datasets else FrameFormat()
            for name, said in self.cameras.items()
        }
        return StoredEpisode(
            where=place.where,
            group=place.group,
            length=_count_steps(place, self.action[0]),
            datasets=place.datasets,
            cameras=formats,
            fps=_rate(self.fps, place.group, place.where),
        )


class _Place:
    """Where one episode lies: its group in an opened file, and in a flat file its number."""

    def __init__(self, file: h5py.File, path: Path, group: str, number: str, name: str) -> None:
        self.where = f"{path}: {name}" if group or number else str(path)
        self.group = need_group(file, group, str(path)) if group else file["/"]
        self.datasets = datasets(self.group, self.where)
        if number:  # `{i}` stands for it in their names
            matches = [(_NUMBERED.fullmatch(name), dataset) for name, dataset in self.datasets.items()]
            self.datasets = {match[1] + "{i}": dataset for match, dataset in matches if match and match[2] == number}


def is_mapping(options: Mapping[str, object]) -> bool:
    """Tell whether the options describe a layout, rather than an option of a known dialect."""
    return any(key in options for key in ("episodes", "action", "state", "cameras"))


def open_mapped(root: Path, files: list[Path], options: Mapping[str, object]) -> MappedReader:
    """Open files through a mapping; `files` lie in `root`, or are `root` itself.

    Raises:
        ConfigError: the mapping has unknown keys or wrong values, all told together.
        DataError: it names nothing that is there, or the files are damaged.
    """
    problems: list[str] = []
    shared = read_options(options, OPTIONS, "an HDF5 mapping", problems)
    action = _references(options.get("action"), "action", problems)
    state = _references(options.get("state"), "state", problems)
    cameras = _camera_rules(options.get("cameras"), problems)
    fps = _rate_option(options.get("fps"), problems)
    episodes = options.get("episodes", "file")
    if not isinstance(episodes, str) or not episodes.strip("/"):
        problems.append(f"'episodes' is {episodes!r}; write 'file', a pattern of groups, or a name with {{i}}")
    refuse(problems)
    warnings: list[str] = []
    refs: list[EpisodeRef] = []
    for path in files:
        relative = name_in(root, path)
        with opened(path) as file:
            for group, number in _episodes(file, str(episodes).strip("/"), path):
                name = _name(path, relative, group, number)
                place = _Place(file, path, group, number, name)
                action = action or (_guess_action(place),)
                if not refs and not cameras:
                    shown_as_such = [key for key, dataset in place.datasets.items() if is_camera(dataset)]
                    cameras = {key: {"path": key} for key in main_first(shown_as_such)}
                    if not cameras:
                        raise DataError(f"{place.where} shows no camera by itself; {advice(path)}")
                if _count_steps(place, action[0]) == 0:
                    warnings.append(f"{place.where} has no steps and is left out")
                    continue
                refs.append(EpisodeRef(len(refs), name, folder_split(relative), (relative, group, number)))
    if not refs:
        raise DataError(f"{root}: the mapping's episodes have no steps; nothing is left to read")
    named = {name: fields["path"] for name, fields in cameras.items()}
    if options.get("cameras") is None:
        named = short_names(list(named))
    return MappedReader(
        path=root,
        format="hdf5",
        layout=Layout(action=action, state=state, cameras=named, options=dict(options)),
        warnings=warnings,
        refs=refs,
        options=shared,
        action=action,
        cameras={
            fields["path"]: {key: value for key, value in fields.items() if key != "path"}
            for fields in cameras.values()
        },
        fps=fps,
    )


def unmapped(path: Path) -> DataError:
    """Return an error that says which mapping to type for a file of unknown layout, or why none would do."""
    proposal = propose(path)
    remark = f" ({proposal.remark})" if proposal.remark else ""
    return DataError(
        f"{path} has a layout that vlaft doesn't know; describe it with a mapping, for example{remark}:"
        f" {' '.join(proposal.words)}"
    )


def _episodes(file: h5py.File, episodes: str, path: Path) -> list[tuple[str, str]]:
    """List (group path, number) of the episodes; the number is used for flat files only."""
    if episodes == "file":
        return [("", "")]
    places = [("", "")]
    if "{i}" in episodes:
        folder, _, last = episodes.rpartition("/")
        parent = find(file, folder, str(path))
        names = child_names(parent, str(path)) if isinstance(parent, h5py.Group) else []
        head, _, tail = last.partition("{i}")
        matches = [re.fullmatch(re.escape(head) + r"(\d+)" + re.escape(tail), name) for name in names]
        places = [(folder, match[1]) for match in matches if match]
    else:
        for part in episodes.split("/"):
            below: list[tuple[str, str]] = []
            for prefix, _ in places:
                group = find(file, prefix, str(path))
                names = child_names(group, str(path)) if isinstance(group, h5py.Group) else []
                chosen = [f"{prefix}/{name}".lstrip("/") for name in names if fnmatchcase(name, part)]
                below += [(name, "") for name in chosen if isinstance(find(file, name, str(path)), h5py.Group)]
            places = below
    if not places:
        raise DataError(f"{path}: the mapping's episodes='{episodes}' names nothing; {advice(path)}")
    return places


def _name(path: Path, relative: str, group_path: str, number: str) -> str:
    inner = number or group_path.rsplit("/", 1)[-1]
    if not inner:
        return relative or path.name
    return f"{relative}/{inner}" if relative else inner


def _count_steps(place: _Place, reference: str) -> int:
    path = reference.partition("[")[0]
    dataset = place.datasets.get(path)
    if dataset is None:
        known = sorted(place.datasets)
        raise DataError(f"{place.where} has no array '{path}'{did_you_mean(path, known)} (it has: {listing(known)})")
    return count_steps(dataset, path, place.where, dimensions=())


def _guess_action(place: _Place) -> str:
    for name in ("action", "actions", "action{i}", "actions{i}", "action_{i}", "actions_{i}"):
        if name in place.datasets:
            return name
    known = listing(sorted(place.datasets))
    raise DataError(f"{place.where}: the mapping names no action; give action=[...] of: {known}")


def _references(value: object, key: str, problems: list[str]) -> tuple[str, ...]:
    if value is None:
        return ()
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not parts or not all(isinstance(p, str) and p.strip() for p in parts):
        problems.append(f"'{key}' is {value!r}; write a list of array names, such as [\"pose[0:6]\", gripper]")
        return ()
    return tuple(part.strip().strip("/") for part in parts)


def _rate_option(value: object, problems: list[str]) -> float | str | None:
    if value is None or positive_number(value):
        return positive_number(value)
    if isinstance(value, Mapping) and list(value) == ["attribute"] and isinstance(value["attribute"], str):
        return str(value["attribute"])
    problems.append(f"'fps' is {value!r}; write a number in Hz, or {{attribute: name}}")
    return None


def _rate(fps: float | str | None, group: h5py.Group, where: str) -> float | None:
    if not isinstance(fps, str):
        return fps
    rate = positive_number(nearest_attribute(group, fps, where))
    if rate is None:
        raise DataError(f"{where} has no attribute '{fps}' with a rate in Hz; give fps as a number")
    return rate


def _camera_rules(value: object, problems: list[str]) -> dict[str, dict[str, Any]]:
    """Check `cameras`; return by our name, in order, each one's path and what is said of how its frames are stored."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not value:
        problems.append(f"'cameras' is {value!r}; write {{name: {{path: ...}}}}")
        return {}
    hints = get_type_hints(FrameFormat)
    known = ["path", *hints]
    rules: dict[str, dict[str, Any]] = {}
    for name, entry in value.items():
        place = f"cameras.{name}"
        fields = {"path": entry} if isinstance(entry, str) else entry
        if not isinstance(fields, Mapping):
            problems.append(f"'{place}' is {entry!r}; write {{path: ...}}")
            continue
        count = len(problems)
        for key, choice in fields.items():
            if key not in known:
                hint = did_you_mean(str(key), known) or f" (known: {', '.join(known)})"
                problems.append(f"unknown key '{place}.{key}'{hint}")
            elif key != "path" and not fits(choice, hints[key]):
                problems.append(f"'{place}.{key}' is {shown(choice)}; it is {in_words(hints[key])}")
        path = fields.get("path")
        if not isinstance(path, str) or not path.strip("/"):
            problems.append(f"'{place}.path' is missing: the dataset that holds its frames")
        elif any(rule["path"] == path.strip("/") for rule in rules.values()):
            problems.append(f"'{place}.path' names '{path}', which another camera has already")
        elif len(problems) == count:
            rules[str(name)] = {**fields, "path": path.strip("/")}
    return rules
