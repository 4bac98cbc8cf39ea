"""robomimic files, LIBERO's and Isaac Lab's dialects of them: many demonstrations in one file, `/data/demo_N`.

What is peculiar:

* Row order: robomimic stores frames upright, LIBERO bottom row first. OpenVLA turns LIBERO's frames by 180 degrees (not
  a mere flip), in its data and in its evaluation, so LIBERO's default layout has that step.
* LIBERO's own files hold the observation *after* the action of the same row; files made by OpenVLA's regenerating
  script hold the one before it, without any attribute: their instruction is in the file's name.
* What an action means is the environment's affair, which `env_args` names: robosuite's controllers close a gripper at
  +1, Isaac Lab's binary joint action (`Isaac-...`, type 2, which robomimic itself gives to gym) opens it at +1. Of any
  other environment nothing is assumed.
* The format has no field for language; robocasa writes `ep_meta.lang`, LIBERO `problem_info.language_instruction`.

Options: `filter_key` (a name under `/mask`: only its demonstrations), `shift_action` (k: step t gets the action of step
t + k), `instruction` (a text, or `{attribute | dataset | file_name: ...}`), `drop_last_observation` (true cuts the
observation after the last action).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from vlaft.data.layout import Layout, StepSpec
from vlaft.data.readers.hdf5.access import (
    MAX_STEPS,
    attribute,
    child_names,
    datasets,
    find,
    guarded,
    json_attribute,
    listing,
    need_dataset,
    need_group,
    numeric_order,
    opened,
    read_array,
)
from vlaft.data.readers.hdf5.dialect import (
    USUAL_ATTRIBUTES,
    Hdf5Reader,
    StoredEpisode,
    count_steps,
    folder_split,
    name_in,
    positive_number,
    read_options,
    refuse,
)
from vlaft.data.readers.hdf5.episode import FrameFormat, is_camera, main_first, short_names
from vlaft.data.readers.hdf5.proposal import refuse_other_frames
from vlaft.data.readers.reader import EpisodeRef
from vlaft.errors import DataError, did_you_mean

OPTIONS = ("drop_last_observation", "filter_key", "instruction", "shift_action")
_RENDER_FIRST = (
    "render the images first (robomimic's dataset_states_to_obs.py replays the states), then give the file it writes"
)
_RECORD_AGAIN = (
    "it comes from Isaac Lab, so record or generate it again in a task with cameras (those called Visuomotor) and with"
    " --enable_cameras"
)
_ACTION_NAMES = ("x", "y", "z", "axis_x", "axis_y", "axis_z", "gripper")
_STATES = (
    ("obs/ee_states", "obs/gripper_states"),
    ("obs/robot0_eef_pos", "obs/robot0_eef_quat", "obs/robot0_gripper_qpos"),
    ("obs/eef_pos", "obs/eef_quat", "obs/gripper_pos"),  # Isaac Lab; its quaternions put w first
)
ISAAC = "isaac-lab"
_ROBOSUITE_TYPE = 1  # of robomimic's kinds of environments; 2 is gym, 3 iGibson
_POSE_CONTROLLERS = ("OSC_POSE", "IK_POSE")  # robosuite's: six dimensions of a pose, then the gripper


@dataclass(kw_only=True)
class RobomimicReader(Hdf5Reader):
    """Demonstrations of one or more robomimic or LIBERO files."""

    observed = "obs/"

    def find(self, file: h5py.File, ref: EpisodeRef) -> StoredEpisode:
        """Find a demonstration below the group `data`."""
        path = self.file_of(ref)
        where = f"{path}: {ref.location[1]}"
        data = need_group(file, "data", str(path))
        demo = need_group(data, str(ref.location[1]), str(path))
        length = count_steps(need_dataset(demo, "actions", where), "actions", where)
        texts = [] if self.options.rule else [_instruction(data, demo, path, where)]
        stored = datasets(demo, where, skip=("next_obs",))
        return StoredEpisode(
            where=where,
            group=demo,
            length=length,
            datasets=stored,
            cameras=dict.fromkeys(_cameras(stored), FrameFormat()),
            texts=texts,
            fps=_control_rate(data, where),
        )


def looks_like_robomimic(file: h5py.File, where: str) -> bool:
    """Tell by the group `data` whose members are demonstrations with `actions`, or by its attributes."""
    data = find(file, "data", where)
    if not isinstance(data, h5py.Group):
        return False
    with guarded(where):
        if "env_args" in data.attrs or "env_info" in data.attrs or "total" in data.attrs:
            return True
    names = child_names(data, where)
    return not names or all(re.fullmatch(r"demo_?\d+", name) for name in names)


def open_robomimic(root: Path, files: list[Path], options: Mapping[str, object]) -> RobomimicReader:
    """Open robomimic or LIBERO files; `files` lie in `root`, or are `root` itself.

    Raises:
        ConfigError: an unknown option.
        DataError: damaged, no demonstrations, or none with images.
    """
    problems: list[str] = []
    shared = read_options(options, OPTIONS, "a robomimic file", problems, shift_when_true=1)
    refuse(problems)
    warnings: list[str] = []
    refs: list[EpisodeRef] = []
    layouts: list[tuple[str, Layout]] = []
    for path in files:
        relative = name_in(root, path)
        with opened(path) as file:
            data = need_group(file, "data", str(path))
            names = _demonstrations(data, path, warnings)
            splits = _splits(file, names, path, warnings, options.get("filter_key"))
            prefix = f"{relative.removesuffix(path.suffix)}/" if relative else ""
            for name in splits:
                split = splits[name] or folder_split(relative)
                refs.append(EpisodeRef(len(refs), prefix + name, split, (relative, name)))
            if splits:
                layouts.append(_layout(data, next(iter(splits)), path, warnings, shared.shift))
    if not refs:
        key = options.get("filter_key")
        chosen = f" in the filter key '{key}'" if key else ""
        raise DataError(f"{root} holds no demonstrations{chosen}: record or convert some first")
    format, layout = layouts[0]
    if any(other[0] != format or other[1].steps != layout.steps for other in layouts):
        raise DataError(f"{root} mixes files whose frames or actions are stored differently; open them one by one")
    return RobomimicReader(path=root, format=format, layout=layout, warnings=warnings, refs=refs, options=shared)


def _demonstrations(data: h5py.Group, path: Path, warnings: list[str]) -> list[str]:
    """The demonstrations that have steps; what the attributes claim otherwise becomes a warning."""
    names, total = [], 0
    for name in child_names(data, str(path)):
        demo = find(data, name, str(path))
        if not isinstance(demo, h5py.Group):
            continue
        where = f"{path}: {name}"
        actions = find(demo, "actions", where)
        rows = len(actions) if isinstance(actions, h5py.Dataset) and actions.shape else None
        claimed = attribute(demo, "num_samples", where)
        if rows is not None and isinstance(claimed, float) and claimed != rows:
            warnings.append(f"{where}: num_samples says {claimed:.0f} steps, the actions have {rows}; the data decide")
        if rows == 0:
            warnings.append(f"{where} has no steps and is left out")
            continue
        total += rows or 0
        names.append(name)
    claimed = attribute(data, "total", str(path))
    if isinstance(claimed, float) and claimed != total:
        warnings.append(
            f"{path}: the attribute 'total' says {claimed:.0f} steps, the data have {total}; the data decide"
        )
    return names


def _splits(
    file: h5py.File, names: list[str], path: Path, warnings: list[str], filter_key: object
) -> dict[str, str | None]:
    """Map the demonstrations to keep to their split, from the filter keys `train` and `valid` under `/mask`."""
    mask = find(file, "mask", str(path))
    keys = child_names(mask, str(path)) if isinstance(mask, h5py.Group) else []
    members: dict[str, list[str]] = {}
    for key in keys if isinstance(mask, h5py.Group) else []:
        dataset = find(mask, key, str(path))
        if key not in ("train", "valid", filter_key) or not isinstance(dataset, h5py.Dataset):
            continue
        with guarded(f"{path}: filter key '{key}'"):
            if dataset.ndim != 1 or dataset.dtype.kind not in "SO" or len(dataset) > MAX_STEPS:
                raise DataError(f"{path}: filter key '{key}' is no list of names")
            texts = [text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text) for text in dataset[()]]
        members[key] = texts
        absent = sorted(set(texts) - set(names), key=numeric_order)
        if absent:
            warnings.append(f"{path}: filter key '{key}' names demonstrations that are not there: {listing(absent, 5)}")
    if filter_key is not None:
        if filter_key not in members:
            hint = did_you_mean(str(filter_key), keys)
            raise DataError(f"{path} has no filter key '{filter_key}'{hint} (it has: {listing(keys)})")
        names = [name for name in names if name in set(members[str(filter_key)])]
    train, valid = set(members.get("train", ())), set(members.get("valid", ()))
    both = train & valid
    if both:
        warnings.append(f"{path}: {listing(sorted(both), 5)} are in 'train' and in 'valid'; they count as 'valid'")
    return {name: "valid" if name in valid else "train" if name in train else None for name in names}


def _layout(data: h5py.Group, name: str, path: Path, warnings: list[str], shift: int) -> tuple[str, Layout]:
    """The default layout, from the first demonstration, and the dialect's name."""
    where = f"{path}: {name}"
    demo = need_group(data, name, str(path))
    actions = need_dataset(demo, "actions", where)
    stored = datasets(demo, where, skip=("next_obs",))
    cameras = _cameras(stored)
    if not cameras:
        observed = sorted(key for key in stored if key.startswith("obs/"))
        what = f"only {listing(observed, 5)}" if observed else "no observations, only " + listing(sorted(stored), 5)
        refuse_other_frames(path, "robomimic does")
        isaac = _environment(data, demo, where) == ISAAC
        raise DataError(f"{path} holds no camera images ({what}): {_RECORD_AGAIN if isaac else _RENDER_FIRST}")
    told = [attribute(data, key, where) for key in ("problem_info", "bddl_file_name")]
    libero = "obs/agentview_rgb" in cameras or any(text is not None for text in told)
    format = "libero" if libero else _environment(data, demo, where)
    wide = actions.ndim == 2 and actions.shape[1] == 7
    steps: list[StepSpec] = []
    if libero:
        convention = attribute(data, "macros_image_convention", where)
        if convention not in (None, "opengl"):
            warnings.append(f"{path}: images are said to be upright ({convention}), so they are not rotated")
        else:
            steps.append({"rotate": {"degrees": 180}})
        if told[0] is not None and not shift:
            warnings.append(
                f"{path}: LIBERO's own recorder stores the observation after the action of the same step; if this file"
                " comes from it unchanged, give shift_action=1 (OpenVLA trained on regenerated files instead)"
            )
    arm = wide and _is_arm(format, data, actions, where)
    pose = arm and _is_pose(format, data, path, warnings)
    if wide and not arm:
        warnings.append(
            f"{path}: {_named(data, where)} does not tell what the 7 dimensions of the action mean; if the last one is"
            " a gripper, give action_names='[x, y, z, axis_x, axis_y, axis_z, gripper]', action_mask='[true, true,"
            " true, true, true, true, false]' and the steps that make it 1 = open, such as steps='[scale_gripper]'"
        )
    if arm:
        # LIBERO's values are clipped as OpenVLA's transform does; continuous ones are scaled
        steps.append("clip_gripper" if libero else "scale_gripper")
        if format != ISAAC:
            steps.append("invert_gripper")
    state = next((names for names in _STATES if all(key in stored for key in names)), ())
    layout = Layout(
        action=("actions",),
        state=state,
        cameras=short_names(cameras),
        steps=tuple(steps),
        action_names=_ACTION_NAMES if pose else (),
        action_mask=(True,) * 6 + (False,) if arm else (),
    )
    return format, layout


def _environment(data: h5py.Group, demo: h5py.Group, where: str) -> str:
    """Tell whose conventions hold: `robomimic` stands for robosuite's, which is taken where nothing is said."""
    arguments = json_attribute(data, "env_args", where)
    name, kind = arguments.get("env_name"), arguments.get("type", arguments.get("env_type"))
    if isinstance(name, str) and re.search(r"\bIsaac-", name):
        return ISAAC
    if not arguments and find(demo, "initial_state/articulation", where) is not None:
        return ISAAC
    return "robomimic" if kind in (None, _ROBOSUITE_TYPE) else "robomimic-other"


def _is_arm(format: str, data: h5py.Group, actions: h5py.Dataset, where: str) -> bool:
    """Tell whether an action of seven dimensions ends in a gripper.

    Isaac Lab records seven joints as well, and absolute poses without a gripper: there the environment is called
    relative, or the last dimension is never anything but -1 and 1.
    """
    if format != ISAAC:
        return format != "robomimic-other"
    if _is_relative(json_attribute(data, "env_args", where)):
        return True
    return bool(np.isin(read_array(actions, where)[:, 6], (-1, 1)).all())


def _is_relative(arguments: Mapping[str, object]) -> bool:
    """Tell whether Isaac Lab's environment is called one of relative poses, such as `Isaac-...-IK-Rel-v0`."""
    return re.search(r"\bRel\b", str(arguments.get("env_name"))) is not None


def _is_pose(format: str, data: h5py.Group, path: Path, warnings: list[str]) -> bool:
    """Tell whether the first six dimensions are a pose; where the controller takes absolute ones, warn."""
    arguments = json_attribute(data, "env_args", str(path))
    if format == ISAAC:  # six joints and a gripper are as wide
        return "env_name" not in arguments or _is_relative(arguments)
    inner = arguments.get("env_kwargs")
    controller = inner.get("controller_configs") if isinstance(inner, dict) else None
    parts = controller.get("body_parts") if isinstance(controller, dict) else None
    if isinstance(parts, dict):  # robosuite 1.5 has one controller per part of the body
        controller = parts.get("right")
    if not isinstance(controller, dict):
        return True
    kind = controller.get("type")
    if isinstance(kind, str) and kind not in _POSE_CONTROLLERS:
        warnings.append(
            f"{path}: env_args names the controller {kind[:60]}, so the action is no motion of the end effector, which"
            " OpenVLA's is; keep it if the robot is to receive such commands"
        )
        return False
    if controller.get("control_delta") is False or controller.get("input_type") == "absolute":
        warnings.append(
            f"{path}: env_args says that the controller takes absolute poses, where OpenVLA's actions are deltas per"
            " step: keep them if the robot is to receive targets, else give the steps, beginning with"
            " {delta_from_absolute: {against: previous, rotation: axis_angle}}"
        )
    return True


def _named(data: h5py.Group, where: str) -> str:
    name = json_attribute(data, "env_args", where).get("env_name")
    return f"the environment '{name[:60]}'" if isinstance(name, str) else "the environment that env_args names"


def _cameras(stored: Mapping[str, h5py.Dataset]) -> list[str]:
    return main_first([name for name, dataset in stored.items() if name.startswith("obs/") and is_camera(dataset)])


def _control_rate(data: h5py.Group, where: str) -> float | None:
    arguments = json_attribute(data, "env_args", where)
    inner = arguments.get("env_kwargs")
    rate = inner.get("control_freq") if isinstance(inner, dict) else None
    return positive_number(rate) or positive_number(arguments.get("control_freq")) or _isaac_rate(arguments)


def _isaac_rate(arguments: Mapping[str, object]) -> float | None:
    """Isaac Lab's rate: one action every `decimation` steps of `dt` seconds of its physics."""
    simulation = arguments.get("sim_args")
    if not isinstance(simulation, dict):
        return None
    step, every = positive_number(simulation.get("dt")), positive_number(simulation.get("decimation"))
    between = step * every if step and every else 0.0
    return positive_number(1 / between) if between > 0 else None


def _instruction(data: h5py.Group, demo: h5py.Group, path: Path, where: str) -> str:
    language = json_attribute(demo, "ep_meta", where).get("lang")
    if isinstance(language, str) and language.strip():
        return language.strip()
    language = json_attribute(data, "problem_info", where).get("language_instruction")
    if isinstance(language, list):  # some LIBERO files hold it as a list of characters
        language = ("" if all(len(str(part)) == 1 for part in language) else " ").join(map(str, language))
    if isinstance(language, str) and language.strip():
        return language.strip()
    for node in (demo, data):
        for name in USUAL_ATTRIBUTES:
            text = attribute(node, name, where)
            if isinstance(text, str) and text.strip():
                return text.strip()
    return instruction_of_libero_name(path.name) if find(demo, "obs/agentview_rgb", where) is not None else ""


def instruction_of_libero_name(file_name: str) -> str:
    """Return the instruction in a LIBERO file's name, or nothing where it isn't named like one.

    >>> instruction_of_libero_name("KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5")
    'turn on the stove'
    >>> instruction_of_libero_name("demo.hdf5")
    ''
    """
    stem = file_name.removesuffix(".hdf5").removesuffix(".h5")
    if not stem.endswith("_demo"):
        return ""
    words = stem.removesuffix("_demo").split("_")
    scene = max((i for i, word in enumerate(words) if "SCENE" in word), default=-1)
    return " ".join(word for word in words[scene + 1 :] if word)
