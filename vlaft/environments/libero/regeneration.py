"""LIBERO's own demonstrations at 256 pixels: replayed in the simulator, as OpenVLA prepared what it was trained on.

    libero_object/<task>_demo.hdf5    LIBERO's: 128 pixels, each observation after the action of its row
    out/<task>_demo.hdf5              256 pixels, each observation before the action of its row, no idle steps
    out/regeneration.json             what was replayed, and what was left out

A demonstration begins in its first recorded state and waits ten steps; idle steps are dropped before they are done, and
what does not end in success is left out. Frames stay as the simulator draws them, upside down. Finished demonstrations
lie in `<out>.partial` until all are there; killed and started again, the same call goes on where it was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from vlaft.data.readers.hdf5.access import (
    attribute,
    child_names,
    find,
    json_attribute,
    need_dataset,
    need_group,
    opened,
    read_array,
)
from vlaft.data.standardize.steps import moving_steps
from vlaft.documents import WrongValue, read_as
from vlaft.environments.errands import Errand, run_errands
from vlaft.environments.libero.environment import SIZE, axis_angle, kept_environment
from vlaft.environments.libero.tasks import CONTROL_RATE, SUITES, WAITING_STEPS, instruction
from vlaft.environments.registry import tasks_named
from vlaft.environments.seats import how_many
from vlaft.environments.unfinished import discard, unfinished
from vlaft.errors import DataError
from vlaft.files import check_apart, disk_errors, locked, read_json, staged, write_json

REPORT = "regeneration.json"
_LONGEST = 1000 - WAITING_STEPS  # steps until the simulator ends any episode
_STORED = {"chunks": (1, SIZE, SIZE, 3), "compression": "gzip", "compression_opts": 1}


@dataclass(frozen=True)
class Source:
    """One of LIBERO's files.

    Attributes:
        path: of it.
        suite: the task's.
        index: of the task in it.
        demos: names of its demonstrations, in their order.
    """

    path: Path
    suite: str
    index: int
    demos: tuple[str, ...]


@dataclass(frozen=True)
class Replay:
    """What came of one demonstration.

    Attributes:
        success: whether its last step ended in success.
        steps: that were done.
        idle: that were dropped.
    """

    success: bool
    steps: int
    idle: int


@dataclass(frozen=True)
class Regeneration:
    """What was replayed.

    Attributes:
        out: folder of the new files.
        replays: file to demonstration to what came of it.
        reused: demonstrations that an earlier call had replayed.
    """

    out: Path
    replays: dict[str, dict[str, Replay]]
    reused: int

    @property
    def all(self) -> list[Replay]:
        """Every demonstration's."""
        return [each for replays in self.replays.values() for each in replays.values()]

    @property
    def failed(self) -> list[str]:
        """Those that are left out, such as `<file>: demo_3`."""
        return [f"{file}: {name}" for file, each in self.replays.items() for name in each if not each[name].success]


def regenerate(
    source: Path,
    out: Path,
    *,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
    told: Callable[[str], None] = lambda sentence: None,
) -> Regeneration:
    """Replay LIBERO's files; the folder appears whole or not at all, and is taken as it is where it is there already.

    Args:
        source: a folder of them, or one.
        out: folder to write.
        workers: processes; None chooses (`seats.how_many`).
        overwrite: replace a folder that was made of something else.
        progress: told of a phase, how many demonstrations are done, and how many there are.
        told: told in a sentence of a process that died; its demonstration is begun again in a new one.

    Raises:
        ConfigError: the output lies around the source.
        DataError: files are damaged, belong to no known task, or none of them succeeds.
        MissingExtra: LIBERO is not installed.
        VlaftError: another process writes there, the output is in the way, the simulator fails, or the disk is full.
    """
    check_apart(out, [source])
    sources = [read_source(path) for path in _files(source)]
    asked = {"regenerate": {each.path.name: _print_of(each.path) for each in sources}}
    total = sum(len(each.demos) for each in sources)
    with locked(out):
        if (made := _made(out, asked)) is not None:
            return made
        if out.is_dir() and any(out.iterdir()):
            if not (out / REPORT).is_file():
                raise DataError(f"{out} holds something that is no replay of LIBERO's files; name another folder")
            if not overwrite:
                raise DataError(
                    f"{out} was made of other files than {source}, or these have changed since; name another folder for"
                    " what is replayed, or give --overwrite"
                )
        with unfinished(out, asked, overwrite=overwrite) as pieces:
            replays = {each.path.name: _finished(pieces, each) for each in sources}
            reused = done = sum(map(len, replays.values()))
            progress("replaying demonstrations", done, total)
            needs = [task for each in sources for task in tasks_named(f"libero:{each.suite}:{each.index}")]
            count, processes = how_many(needs, max(total - done, 1), workers)
            waiting = iter([errand for each in sources for errand in _errands(each, pieces, replays[each.path.name])])
            for (file, name), replay in run_errands(lambda: next(waiting, None), count, processes=processes, told=told):
                replays[file][name], done = replay, done + 1
                progress("replaying demonstrations", done, total)
            replays = {each.path.name: {name: replays[each.path.name][name] for name in each.demos} for each in sources}
            result = Regeneration(out, replays, reused)
            if not any(each.success for each in result.all):
                raise DataError(f"{source}: none of {total} demonstrations ended in success when it was replayed")
            with staged(out, overwrite=overwrite) as partial:
                for each in sources:
                    _gather(partial, pieces, each, replays[each.path.name])
                report = {"replays": {file: _plain(each) for file, each in replays.items()}}
                write_json(partial / REPORT, {**asked, **report}, durable=False)
            discard(pieces, out)
    return result


def read_source(path: Path) -> Source:
    """Return of which task a file is, and its demonstrations.

    Raises:
        DataError: it is damaged, no file of LIBERO's, or regenerated already, or its task cannot be told.
    """
    with opened(path) as file:
        data = need_group(file, "data", str(path))
        names = child_names(data, str(path))
        for name in names:
            if not name.removeprefix("demo_").isdecimal() or name == name.removeprefix("demo_"):
                raise DataError(
                    f"{path}: '{name}' is no demonstration of LIBERO's, which are called demo_0, demo_1, ..."
                )
            seen = find(data, f"{name}/obs/agentview_rgb", str(path))
            if isinstance(seen, h5py.Dataset) and seen.shape[1:3] == (SIZE, SIZE):
                raise DataError(f"{path}: its frames have {SIZE} pixels already; convert it without --regenerate")
        if not names:
            raise DataError(f"{path} holds no demonstrations")
        suite, index = _task_of(data, path)
    return Source(path, suite, index, tuple(names))


def replay_demonstration(source: Source, name: str, pieces: Path) -> Replay:
    """Replay a demonstration into the folder of pieces.

    Raises:
        DataError: it is damaged, or of another task.
        VlaftError: the simulator fails, or the disk is full.
    """
    where = f"{source.path}: {name}"
    with opened(source.path) as file:
        demo = need_group(file, f"data/{name}", str(source.path))
        actions = _numbers(demo, "actions", where)
        states = _numbers(demo, "states", where)
        robot = find(demo, "robot_states", where)
        first = _numbers(demo, "robot_states", where)[0] if robot is not None else None
    if actions.shape[1] != 7:
        raise DataError(f"{where}: its actions have {actions.shape[1]} numbers, LIBERO's have 7")
    if first is not None and len(first) != 9:
        raise DataError(f"{where}: its robot_states have {len(first)} numbers, LIBERO's have 9")
    kept = moving_steps(actions)
    if len(kept) > _LONGEST:
        raise DataError(f"{where} has {len(kept)} steps; the simulator ends an episode after {_LONGEST}")
    env = kept_environment(source.suite, source.index)
    try:
        seen = env.restore(states[0], source.demos.index(name))
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    rows: list[dict[str, NDArray[Any]]] = []
    done = False
    for step in kept:
        # the first row has the recorded state, from before the waiting, as upstream's files have it
        state = states[0] if not rows else env.world.get_sim_state()
        rows.append(_row(seen, state, first if not rows else None) | {"actions": actions[step]})
        seen, done = env.act(actions[step])
    replay = Replay(done, len(kept), len(actions) - len(kept))
    with disk_errors(pieces):
        _write_piece(pieces, source, name, rows, replay)
    return replay


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    files = sorted(path for path in source.glob("*") if path.suffix in (".hdf5", ".h5") and path.is_file())
    if not files:
        raise DataError(f"{source}: there are no HDF5 files; name the folder of a suite of LIBERO's demonstrations")
    return files


def _task_of(data: h5py.Group, path: Path) -> tuple[str, int]:
    """Return suite and number, by the task's own file, the name of this one, or what is said to be done."""
    told = attribute(data, "bddl_file_name", str(path))
    named = [PurePosixPath(told.replace("\\", "/").removesuffix(".bddl"))] if isinstance(told, str) else []
    named.append(PurePosixPath(path.absolute().parent.name, path.stem.removesuffix("_demo")))
    for name in named:
        fitting = [suite for suite, tasks in SUITES.items() if name.name in tasks]
        chosen = fitting if len(fitting) == 1 else [suite for suite in fitting if suite == name.parent.name]
        if chosen:
            return chosen[0], SUITES[chosen[0]].index(name.name)
    said = json_attribute(data, "problem_info", str(path)).get("language_instruction")
    words = " ".join(map(str, said)) if isinstance(said, list) else str(said)
    same = [(suite, n) for suite, tasks in SUITES.items() for n, each in enumerate(tasks) if instruction(each) == words]
    if len(same) == 1:
        return same[0]
    raise DataError(
        f"{path}: neither its attribute bddl_file_name nor its name tells the task; name it TASK_demo.hdf5, with the"
        " task's name in LIBERO's benchmark, in a folder that is called as the suite"
    )


def _numbers(demo: h5py.Group, name: str, where: str) -> NDArray[np.float64]:
    values = read_array(need_dataset(demo, name, where), where)
    if values.ndim != 2 or not len(values) or not np.isfinite(values).all():
        raise DataError(f"{where}: its {name} are {[*values.shape]} or not all finite, and must be [steps, numbers]")
    return values.astype(np.float64)


def _row(
    seen: dict[str, NDArray[Any]], state: NDArray[np.float64], robot: NDArray[np.float64] | None
) -> dict[str, NDArray[Any]]:
    place, turned, fingers = (seen[f"robot0_{name}"] for name in ("eef_pos", "eef_quat", "gripper_qpos"))
    axis = axis_angle(turned)
    return {
        "states": state,
        "robot_states": np.concatenate([fingers, place, turned]) if robot is None else robot,
        "obs/gripper_states": fingers,
        "obs/joint_states": seen["robot0_joint_pos"],
        "obs/ee_states": np.concatenate([place, axis]),
        "obs/ee_pos": place,
        "obs/ee_ori": axis,
        "obs/agentview_rgb": seen["agentview_image"],
        "obs/eye_in_hand_rgb": seen["robot0_eye_in_hand_image"],
    }


def _write_piece(pieces: Path, source: Source, name: str, rows: list[dict[str, NDArray[Any]]], replay: Replay) -> None:
    """Write a demonstration that succeeded, and of any how it went; it appears whole or not at all."""
    folder = _piece(pieces, source, name)
    aside = folder.with_name(f".{folder.name}")
    if aside.is_dir():
        shutil.rmtree(aside)
    aside.mkdir()
    if replay.success:
        with h5py.File(aside / "demo.hdf5", "w") as file:
            for key in rows[0]:
                stored = _STORED if key.endswith("_rgb") else {}
                file.create_dataset(key, data=np.stack([row[key] for row in rows]), **stored)
            last = np.zeros(len(rows), np.uint8)
            last[-1] = 1
            for key in ("rewards", "dones"):
                file.create_dataset(key, data=last)
    write_json(aside / "replay.json", asdict(replay), durable=False)
    aside.rename(folder)


def _gather(out: Path, pieces: Path, source: Source, replays: dict[str, Replay]) -> None:
    """Put a file's demonstrations together, if any has succeeded."""
    names = [name for name in source.demos if replays[name].success]
    if not names:
        return
    with h5py.File(out / source.path.name, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": CONTROL_RATE}})
        data.attrs["language_instruction"] = instruction(SUITES[source.suite][source.index])
        for name in names:
            with h5py.File(_piece(pieces, source, name) / "demo.hdf5", "r") as piece:
                demo = data.create_group(name)
                for key in piece:
                    piece.copy(key, demo)


def _errands(source: Source, pieces: Path, finished: dict[str, Replay]) -> Iterator[Errand]:
    for name in source.demos:
        if name not in finished:
            key = (source.path.name, name)
            yield Errand(f"{source.path}, {name}", key, replay_demonstration, (source, name, pieces))


def _finished(pieces: Path, source: Source) -> dict[str, Replay]:
    """Return the demonstrations of a file that an earlier call has replayed."""
    found = {}
    for name in source.demos:
        path = _piece(pieces, source, name) / "replay.json"
        if path.is_file():
            found[name] = _replay(path, read_json(path))
    return found


def _made(out: Path, asked: dict[str, Any]) -> Regeneration | None:
    """Return what was made of the same files, if it is there."""
    path = out / REPORT
    if not path.is_file():
        return None
    report = read_json(path)
    if any(report.get(key) != value for key, value in asked.items()) or not isinstance(report.get("replays"), dict):
        return None
    replays = {
        file: {name: _replay(path, each) for name, each in demos.items()} for file, demos in report["replays"].items()
    }
    return Regeneration(out, replays, sum(map(len, replays.values())))


def _replay(path: Path, content: Any) -> Replay:
    try:
        return read_as(Replay, content)
    except WrongValue as error:
        raise DataError(f"{path}: {error}; remove it, and what it tells of is replayed again") from None


def _plain(replays: dict[str, Replay]) -> dict[str, dict[str, Any]]:
    return {name: asdict(each) for name, each in replays.items()}


def _piece(pieces: Path, source: Source, name: str) -> Path:
    return pieces / f"{source.path.name}-{name}"


def _print_of(path: Path) -> list[int]:
    """Return what changes where a file does, most likely."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
