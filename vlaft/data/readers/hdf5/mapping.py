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

import h5py

from vlaft.data.episode import Episode
from vlaft.data.layout import Layout
from vlaft.data.readers import EpisodeRef
from vlaft.data.readers.hdf5.access import (
    MAX_STEPS,
    child_names,
    datasets,
    find,
    is_numeric,
    listing,
    nearest_attribute,
    need_group,
    opened,
)
from vlaft.data.readers.hdf5.episode import (
    FrameFormat,
    Hdf5Source,
    build_episode,
    dataset_name,
    folder_split,
    is_camera,
    main_first,
    short_names,
)
from vlaft.data.readers.hdf5.options import (
    CameraRule,
    InstructionRule,
    camera_rules,
    drop_last_of,
    instruction_rule,
    positive_number,
    refuse,
    refuse_unknown,
)
from vlaft.data.readers.hdf5.proposal import advice, propose
from vlaft.errors import DataError, did_you_mean

OPTIONS = ("episodes", "action", "state", "cameras", "instruction", "fps", "drop_last_observation")
_NUMBERED = re.compile(r"(.*?)(\d+)")


@dataclass(kw_only=True)
class MappedSource(Hdf5Source):
    """Episodes of HDF5 files of a free layout."""

    action: tuple[str, ...]
    cameras: Mapping[str, CameraRule]  # by path
    rule: InstructionRule | None
    fps: float | str | None  # a number, or the name of an attribute

    def read(self, ref: EpisodeRef) -> Episode:
        """Read one episode; see `vlaft.data.readers.Source.read`."""
        path = self.file_of(ref)
        group_path, number = str(ref.location[1]), str(ref.location[2])
        where = f"{path}: {ref.name}" if group_path or number else str(path)
        with opened(path) as file:
            group = need_group(file, group_path, str(path)) if group_path else file["/"]
            found = _templated(datasets(group, where), number)
            # a camera that is absent here is told about by build_episode
            formats = {
                name: rule.format_of(found[name]) if name in found else FrameFormat()
                for name, rule in self.cameras.items()
            }
            length = _length(found, self.action[0], where)
            return build_episode(
                ref,
                path,
                where,
                length=length,
                found=found,
                cameras=formats,
                strict="\0",  # a free layout may hold anything beside what is per step
                shift=0,
                texts=self.rule.resolve(group, path, where, length) if self.rule else [],
                drop_last=self.drop_last,
                fps=_rate(self.fps, group, where),
                warnings=self.warnings,
            )


def is_mapping(options: Mapping[str, object]) -> bool:
    """Tell whether the options describe a layout, rather than an option of a known dialect."""
    return any(key in options for key in ("episodes", "action", "state", "cameras"))


def open_mapped(root: Path, files: list[Path], options: Mapping[str, object]) -> MappedSource:
    """Open files through a mapping; `files` lie in `root`, or are `root` itself.

    Raises:
        ConfigError: the mapping has unknown keys or wrong values, all told together.
        DataError: it names nothing that is there, or the files are damaged.
    """
    problems = refuse_unknown(options, OPTIONS, "an HDF5 mapping")
    action = _references(options.get("action"), "action", problems)
    state = _references(options.get("state"), "state", problems)
    cameras = camera_rules(options.get("cameras"), problems)
    rule = instruction_rule(options.get("instruction"), problems)
    fps = _rate_option(options.get("fps"), problems)
    drop_last = drop_last_of(options, problems)
    episodes = options.get("episodes", "file")
    if not isinstance(episodes, str) or not episodes.strip("/"):
        problems.append(f"'episodes' is {episodes!r}; write 'file', a pattern of groups, or a name with {{i}}")
    refuse(problems)
    warnings: list[str] = []
    refs: list[EpisodeRef] = []
    for path in files:
        relative = "" if path == root else path.relative_to(root).as_posix()
        with opened(path) as file:
            places = _episodes(file, str(episodes).strip("/"), path)
            for group_path, number in places:
                group = need_group(file, group_path, str(path)) if group_path else file["/"]
                name = _name(path, relative, group_path, number)
                where = f"{path}: {name}" if group_path or number else str(path)
                found = _templated(datasets(group, where), number)
                action = action or (_guess_action(found, where),)
                if not refs and not cameras:
                    cameras = {
                        key: CameraRule(path=key) for key in main_first([k for k in found if is_camera(found[k])])
                    }
                    if not cameras:
                        raise DataError(f"{where} shows no camera by itself; {advice(path)}")
                if _length(found, action[0], where) == 0:
                    warnings.append(f"{where} has no steps and is left out")
                    continue
                refs.append(EpisodeRef(len(refs), name, folder_split(relative), (relative, group_path, number)))
    if not refs:
        raise DataError(f"{root}: the mapping's episodes have no steps; nothing is left to read")
    named = {key: value.path for key, value in cameras.items()}
    if options.get("cameras") is None:
        named = short_names(list(named))
    return MappedSource(
        path=root, name=dataset_name(root), format="hdf5", warnings=warnings, refs=refs,
        layout=Layout(action=action, state=state, cameras=named, options=dict(options)),
        action=action, cameras={value.path: value for value in cameras.values()}, rule=rule, fps=fps,
        drop_last=drop_last,
    )  # fmt: skip


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
    found = [("", "")]
    if "{i}" in episodes:
        folder, _, last = episodes.rpartition("/")
        parent = find(file, folder, str(path))
        names = child_names(parent, str(path)) if isinstance(parent, h5py.Group) else []
        head, _, tail = last.partition("{i}")
        matches = [re.fullmatch(re.escape(head) + r"(\d+)" + re.escape(tail), name) for name in names]
        found = [(folder, match[1]) for match in matches if match]
    else:
        for part in episodes.split("/"):
            below: list[tuple[str, str]] = []
            for prefix, _ in found:
                group = find(file, prefix, str(path))
                names = child_names(group, str(path)) if isinstance(group, h5py.Group) else []
                chosen = [f"{prefix}/{name}".lstrip("/") for name in names if fnmatchcase(name, part)]
                below += [(name, "") for name in chosen if isinstance(find(file, name, str(path)), h5py.Group)]
            found = below
    if not found:
        raise DataError(f"{path}: the mapping's episodes='{episodes}' names nothing; {advice(path)}")
    return found


def _templated(found: dict[str, h5py.Dataset], number: str) -> dict[str, h5py.Dataset]:
    """In a flat file, keep the episode's datasets, with `{i}` for its number."""
    if not number:
        return found
    result = {}
    for name, dataset in found.items():
        match = _NUMBERED.fullmatch(name)
        if match and match[2] == number:
            result[match[1] + "{i}"] = dataset
    return result


def _name(path: Path, relative: str, group_path: str, number: str) -> str:
    inner = number or group_path.rsplit("/", 1)[-1]
    if not inner:
        return relative or path.name
    return f"{relative}/{inner}" if relative else inner


def _length(found: Mapping[str, h5py.Dataset], reference: str, where: str) -> int:
    path = reference.partition("[")[0]
    dataset = found.get(path)
    if dataset is None:
        raise DataError(
            f"{where} has no array '{path}'{did_you_mean(path, list(found))} (it has: {listing(sorted(found))})"
        )
    if not is_numeric(dataset) or len(dataset) > MAX_STEPS:
        raise DataError(f"{where}: '{path}' has shape {dataset.shape} and type {dataset.dtype}, not [T, A] numbers")
    return len(dataset)


def _guess_action(found: Mapping[str, h5py.Dataset], where: str) -> str:
    for name in ("action", "actions", "action{i}", "actions{i}", "action_{i}", "actions_{i}"):
        if name in found:
            return name
    raise DataError(f"{where}: the mapping names no action; give action=[...] of: {listing(sorted(found))}")


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
