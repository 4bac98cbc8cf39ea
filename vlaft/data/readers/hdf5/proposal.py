"""Which mapping to type for an HDF5 file of unknown layout, or why none would do.

A proposal is checked where that is cheap: its cameras' first frames are decoded and its instruction is looked up.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from glob import escape
from itertools import islice
from pathlib import Path

import h5py

from vlaft.data.layout import likely_action
from vlaft.data.readers.hdf5.access import MAX_STEPS, attribute, datasets, find, guarded, is_numeric, opened, read_array
from vlaft.data.readers.hdf5.dialect import USUAL_ATTRIBUTES, InstructionRule, positive_number
from vlaft.data.readers.hdf5.episode import Hdf5Frames, frame_format, main_first, short_names
from vlaft.data.sentences import word
from vlaft.errors import DataError

_OF_ALIKE = 16  # groups and arrays looked at of those named alike: a file may hold thousands of episodes
_NUMBERED = re.compile(r"(.*?)(\d+)")
_NO_COLOURS = re.compile(r"depth|mask|segm|normals|flow", re.I)
_TELLING = re.compile(r"instruct|lang|task|prompt|goal|descri", re.I)
_RATE = re.compile(r"fps|(.*_)?(hz|freq|frequency)|(.*_)?(control|sampl\w*|frame|record\w*)_?rate", re.I)
_END_TO_END = re.compile(
    r"(^|/)(ep(isode)?|traj(ectory)?|demo)s?_?(end|len|length|start|ind(ex)?|indice|ids?)s?$", re.I
)
_EPISODE = re.compile(r"(^|/)(ep|episode|traj|trajectory|demo|rollout|run|trial)s?[_-]?\d+$", re.I)


_Camera = dict[str, str]  # as a mapping says it: its path, and the range of its values where they do not tell


@dataclass(frozen=True)
class Proposal:
    """What to type: the mapping's words as a shell takes them, and what to know about them (may be empty)."""

    words: tuple[str, ...]
    remark: str = ""


@dataclass(frozen=True)
class _View:
    """The first episode as one choice of `episodes` shows it: its datasets by the names that a mapping gives them."""

    episodes: str
    group: h5py.Group
    datasets: Mapping[str, h5py.Dataset]
    share: float  # of the episodes that have what the first one has

    @property
    def numbers(self) -> dict[str, tuple[int, ...]]:
        # an array reference cuts blanks off, and takes brackets for a slice of columns
        usable = {name: dataset for name, dataset in self.datasets.items() if not re.search(r"^\s|\s$|[\[\]]", name)}
        return {name: dataset.shape for name, dataset in usable.items() if is_numeric(dataset)}


def propose(path: Path) -> Proposal:
    """Return a mapping for the file.

    Raises:
        DataError: nothing that could be typed would read it; the sentence says what it lacks.
    """
    with opened(path) as file:
        where = str(path)
        # a word takes ${ for a reference to another setting
        by_path = {
            name: dataset for name, dataset in datasets(file, where, of_alike=_OF_ALIKE).items() if "${" not in name
        }
        if not by_path:
            raise DataError(f"{path} holds no datasets at all; the recording may have failed")
        chosen: tuple[_View, dict[str, _Camera]] | None = None
        for view in _views(file, by_path, where):
            cameras = _cameras(view, path) if view.share > 0.5 else {}
            told = bool(cameras and likely_action(view.numbers))
            if cameras and (told or chosen is None):
                chosen = view, cameras
            if told:
                break
        if chosen is None:
            raise DataError(f"{path} {_no_images(path, by_path)}")
        if chosen[0].episodes == "file":
            _refuse_many_in_one(path, by_path)
        return _proposal(*chosen, path)


def _proposal(view: _View, cameras: Mapping[str, _Camera], path: Path) -> Proposal:
    remark = ""
    action = likely_action(view.numbers)
    rows = {len(view.datasets[camera["path"]]) for camera in cameras.values()}
    if not action:
        action = [n for n, s in view.numbers.items() if len(s) == 2 and s[0] in rows | {min(rows) - 1} and s[1] < 100][
            :1
        ]
        if not action:
            raise DataError(f"{path} holds images, but no array of numbers with a row for each, so no actions")
        remark = f"no name says what was commanded, '{action[0]}' only stands in for it"
    steps = view.numbers[action[0]][0]
    cut = any(len(view.datasets[camera["path"]]) == steps + 1 for camera in cameras.values())
    cameras = {
        name: camera for name, camera in cameras.items() if len(view.datasets[camera["path"]]) in (steps, steps + cut)
    }
    if not cameras:
        raise DataError(
            f"{path}: the images have {', '.join(map(str, sorted(rows)))} rows where '{action[0]}' has {steps}: bring"
            " frames and actions together first, a row of each for every step"
        )
    named = {name: camera if len(camera) > 1 else camera["path"] for name, camera in cameras.items()}
    instruction = _instruction(view, path)
    if instruction is None:
        remark = "; ".join(filter(None, [remark, "say as the instruction what the robot does"]))
    rate = _rate(view.group, str(path))
    words = [word("episodes", view.episodes), word("action", action), word("cameras", named)]
    words += [word("drop_last_observation", True)] if cut else []
    words += [word("instruction", instruction or "pick up the cup")]
    words += [word("fps", {"attribute": rate})] if rate else []
    return Proposal(tuple(words), remark)


def _views(file: h5py.File, by_path: Mapping[str, h5py.Dataset], where: str) -> Iterator[_View]:
    """Yield what could be an episode: groups alike, the deepest first, then flat names, then the whole file."""
    for pattern in sorted(_patterns(by_path), key=lambda pattern: -pattern.count("/")):
        inside = _inside(by_path, pattern)
        if inside:
            first, members = next(iter(inside.items()))
            group = find(file, first, where)
            if isinstance(group, h5py.Group):
                like_it = sum(members.keys() <= others.keys() for others in inside.values())
                yield _View(pattern, group, members, like_it / len(inside))
    yield from _flat(file, by_path, where)
    yield _View("file", file["/"], by_path, 1.0)


def _patterns(by_path: Mapping[str, h5py.Dataset]) -> list[str]:
    """Groups that differ in a number, and groups side by side that hold the same arrays."""
    patterns: dict[str, None] = {}
    children: dict[str, dict[str, set[str]]] = {}
    for name in by_path:
        *folders, _ = name.split("/")
        general: list[str] = []
        for depth, part in enumerate(folders):
            match = re.match(r"(\D*)\d", part)
            if match:
                patterns["/".join([*general, escape(match[1]) + "*"])] = None
            parent = "/".join(general)
            children.setdefault(parent, {}).setdefault(part, set()).add("/".join(name.split("/")[depth + 1 :]))
            general.append(escape(match[1]) + "*" if match else escape(part))
    for parent, members in children.items():
        # a hand with two fingers is no two episodes: more than one array each
        [(same, count)] = Counter(frozenset(names) for names in members.values()).most_common(1)
        if count > 1 and len(same) > 1:
            first, *rest = [part for part, names in members.items() if names == same]
            until = next(
                (n for n in range(len(first)) if any(part[n : n + 1] != first[n] for part in rest)), len(first)
            )
            prefix = re.sub(r"\d+$", "", first[:until])
            patterns[f"{parent}/{escape(prefix)}*".lstrip("/")] = None
    return list(patterns)


def _inside(by_path: Mapping[str, h5py.Dataset], pattern: str) -> dict[str, dict[str, h5py.Dataset]]:
    """Return what lies in each group that the pattern names: path of the group to its datasets by their names there."""
    from fnmatch import fnmatchcase

    wanted = pattern.split("/")
    inside: dict[str, dict[str, h5py.Dataset]] = {}
    for name, dataset in by_path.items():
        parts = name.split("/")
        if len(parts) > len(wanted) and all(map(fnmatchcase, parts, wanted)):
            inside.setdefault("/".join(parts[: len(wanted)]), {})["/".join(parts[len(wanted) :])] = dataset
    return inside


def _flat(file: h5py.File, by_path: Mapping[str, h5py.Dataset], where: str) -> Iterator[_View]:
    """Yield flat episodes: `actions_0`, `images_0`, `actions_1` ..., the number at the end of every name."""
    for folder in dict.fromkeys(name.rpartition("/")[0] for name in by_path):
        numbered: dict[str, dict[str, h5py.Dataset]] = {}
        for name, dataset in by_path.items():
            match = _NUMBERED.fullmatch(name.removeprefix(f"{folder}/")) if name.startswith(folder) else None
            if match:
                numbered.setdefault(match[2], {})[match[1] + "{i}"] = dataset
        members = next(iter(numbered.values()), {})
        action = likely_action({name: dataset.shape for name, dataset in members.items() if is_numeric(dataset)})
        group = find(file, folder, where) if folder else file["/"]
        if action and "/" not in action[0] and isinstance(group, h5py.Group):
            like_it = sum(members.keys() <= others.keys() for others in numbered.values())
            yield _View(f"{folder}/{action[0]}".lstrip("/"), group, members, like_it / len(numbered))


def _cameras(view: _View, file: Path) -> dict[str, _Camera]:
    """Return the cameras by the names to propose, the main one first."""
    cameras: dict[str, _Camera] = {}
    for name, dataset in view.datasets.items():
        camera = None if _NO_COLOURS.search(name) else _camera(name, dataset, file)
        if camera is not None:
            cameras[name] = camera
    short = short_names(main_first(list(cameras)))
    plain = {re.sub(r"[_-]?\{i\}", "", name) or name: path for name, path in short.items()}
    return {name: cameras[path] for name, path in (plain if len(plain) == len(short) else short).items()}


def _camera(name: str, dataset: h5py.Dataset, file: Path) -> _Camera | None:
    """Return how to read the dataset as a camera, or None where none of its first frames is a picture that way."""
    shape: tuple[int, ...] = dataset.shape or ()
    # [T, 2, 4, 4] floats are poses
    pixels = len(shape) == 4 and (
        dataset.dtype.kind == "u" or (dataset.dtype.kind == "f" and sorted(shape[1:])[1] >= 8)
    )
    rows = len(shape) in (1, 2) and (not is_numeric(dataset) or (len(shape) == 2 and dataset.dtype.kind in "u"))
    if not (pixels or rows) or not shape[0]:
        return None
    for said in ({}, {"range": "uint8"}) if dataset.dtype.kind == "f" else ({},):
        frames = Hdf5Frames(file, str(dataset.name), shape[0], str(file), frame_format(dataset, said))
        for index in (0, shape[0] // 2):
            try:
                next(iter(frames.read([index])))
                return {"path": name, **said}
            except DataError:
                continue
    return None


def _no_images(path: Path, by_path: Mapping[str, h5py.Dataset]) -> str:
    single = [name for name, dataset in by_path.items() if dataset.ndim == 3 and dataset.shape[2] in (3, 4)]
    if len(single) > 1 and all(min(by_path[name].shape[:2]) >= 16 for name in single):
        return (
            f"holds its frames one by one ('{single[0]}' is one of {len(single)}), where they are read as one array per"
            " episode and camera, [T, height, width, 3]: put them together"
        )
    videos = islice((file for depth in ("*", "*/*") for file in path.parent.glob(f"{depth}.mp4")), 1)
    beside = next(
        (f"; the video files beside it, such as {video.name}, are not read with HDF5" for video in videos), ""
    )
    return (
        "holds no images at all, neither frames [T, height, width, 3] nor encoded ones: examples need images, so record"
        f" with cameras, or write the frames into the file{beside}"
    )


def advice(path: Path) -> str:
    """Return what to type about the file, or why nothing would do, as the end of a sentence."""
    try:
        proposal = propose(path)
    except DataError as error:
        return str(error)
    return f"type for example{f' ({proposal.remark})' if proposal.remark else ''}: {' '.join(proposal.words)}"


def refuse_other_frames(path: Path, than: str) -> None:
    """Propose a mapping for frames that a dialect's reader does not take: encoded, channels first, floats, elsewhere.

    Raises:
        DataError: there are such frames.
    """
    try:
        words = propose(path).words
    except DataError:
        return
    raise DataError(
        f"{path} stores its frames in another way than {than}; describe it with a mapping, for example:"
        f" {' '.join(words)}"
    )


def _refuse_many_in_one(path: Path, by_path: Mapping[str, h5py.Dataset]) -> None:
    """Refuse a file that would be taken for one episode although its names tell of many."""
    ends = next(
        (name for name, dataset in by_path.items() if _END_TO_END.search(name) and _differs(dataset, path)), None
    )
    if ends is not None:
        raise DataError(
            f"{path} holds its episodes end to end in the same arrays ('{ends}' seems to tell them apart), where each"
            " is read from a group or a file of its own: cut the arrays there first"
        )
    leaves = [name for name in by_path if _EPISODE.search(name)]
    if leaves:
        raise DataError(
            f"{path} holds one array per episode below each name ('{leaves[0]}'), where an episode is read from a group"
            " of its own: turn that round, to episode_0/actions beside episode_0/images"
        )


def _differs(dataset: h5py.Dataset, path: Path) -> bool:
    if not is_numeric(dataset) or dataset.ndim != 1 or len(dataset) > MAX_STEPS:
        return False
    values = read_array(dataset, str(path))
    return bool((values != values[:1]).any())


def _instruction(view: _View, path: Path) -> dict[str, str] | None:
    """Return where the file itself says what the robot does, or None."""
    where = str(path)
    texts: list[str] = []
    group = view.group
    while True:
        with guarded(where):
            texts += [name for name in group.attrs if isinstance(name, str) and _TELLING.search(name)]
            if group.name == "/":
                break
            group = group.parent
    usual = [name for name in USUAL_ATTRIBUTES if name in texts]
    rules = [InstructionRule("attribute", name) for name in [*usual, *texts]]
    rules += [
        InstructionRule("dataset", n) for n, d in view.datasets.items() if _TELLING.search(n) and not is_numeric(d)
    ]
    for rule in rules:
        try:
            text = rule.resolve(view.group, path, where, 1)[0]  # of several, one per step, the first will tell
        except DataError:
            continue
        if 3 <= len(text) <= 300 and text[0] not in "{[":  # JSON describes an environment
            return {rule.kind: rule.value}
    return None


def _rate(group: h5py.Group, where: str) -> str | None:
    """Return the attribute that seems to hold the control rate in Hz."""
    while True:
        with guarded(where):
            for name in group.attrs:
                rate = positive_number(attribute(group, name, where)) if _RATE.fullmatch(str(name)) else None
                if rate is not None and 0.5 <= rate <= 1000:
                    return str(name)
            if group.name == "/":
                return None
            group = group.parent
