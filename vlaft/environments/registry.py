"""Environments by name: `tabletop`, `metaworld:TASK`, `libero:SUITE:INDEX`, or `module:factory` for one's own.

A name stands for one task or for several: `metaworld` for all of Meta-World's, `libero:libero_object` for a suite's.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from vlaft.environments.interface import Environment, described
from vlaft.environments.libero import tasks as libero
from vlaft.environments.metaworld import tasks as metaworld
from vlaft.environments.tabletop.scene import SETUP_A, SETUP_B, SetUp
from vlaft.environments.task import Expert, ExpertEpisode, Task
from vlaft.errors import UsageError, VlaftError, did_you_mean


def tasks_named(name: str) -> tuple[Task, ...]:
    """Return the tasks that a name stands for; nothing is made yet.

    Args:
        name: `tabletop` (or `tabletop-b`, the demo's new robot; `tabletop-a`, where its base comes from);
            `metaworld:TASK`, or `metaworld` for all of its tasks; `libero:SUITE:INDEX`, or `libero:SUITE` for all of
            the suite's; or `module:factory` or `module:factory:argument`, a
            callable that returns an environment (see `vlaft.environments.interface`) and takes no argument, or this
            text; the module is looked for in the working folder too.

    Raises:
        UsageError: there is none of that name.
        VlaftError: its module cannot be imported.
    """
    world, _, argument = name.partition(":")
    if name in _TABLETOPS:
        return (_tabletop(name),)
    if world == "metaworld":
        return _metaworld(name, argument)
    if world == "libero":
        return _libero(name, argument)
    match = _FACTORY.fullmatch(name)
    if match is None:
        raise UsageError(
            f"{name}: there is no such environment{did_you_mean(name, [*_TABLETOPS, 'metaworld', 'libero'])}"
            " (tabletop, tabletop-a, metaworld:TASK, libero:SUITE:INDEX, or your own as module:factory)"
        )
    return (Task(name, _own(name, match)),)


def environment_maker(name: str) -> Callable[[], Environment]:
    """Return what makes an environment of a name, as `tasks_named` takes it; of several tasks, that of the first.

    Raises:
        UsageError: there is none of that name.
        VlaftError: its module cannot be imported.
    """
    return tasks_named(name)[0].make


def shipped_tasks() -> tuple[Task, ...]:
    """Return every task that ships with vlaft."""
    suites = (task for suite in libero.SUITES for task in _libero(f"libero:{suite}", suite))
    return (*map(_tabletop, ("tabletop", "tabletop-a")), *_metaworld("metaworld", ""), *suites)


def _tabletop(name: str) -> Task:
    from vlaft.environments.tabletop.environment import CONTROL_RATE, EPISODE_STEPS, TabletopEnv

    setup = _TABLETOPS[name]
    return Task(
        "tabletop" if setup is SETUP_B else name,  # one name, so that it cannot be counted twice
        lambda: TabletopEnv(setup),
        cameras=("main", "wrist"),
        actions=(OPENVLA_ACTION,),
        unnorm_keys=(setup.name,),
        step_limit=EPISODE_STEPS,
        expert=Expert(
            partial(_tabletop_expert, setup), CONTROL_RATE, OPENVLA_ACTION, ("x", "y", "z", "gripper"), setup.name
        ),
    )


def _tabletop_expert(setup: SetUp, seed: int, disturbed: float | None) -> ExpertEpisode:
    """Return the expert's episode; each of the colours in turn."""
    from vlaft.environments.tabletop.recording import DISTURBED, demonstrate

    colours = list(setup.objects)
    shown = demonstrate(
        setup, seed, colours[seed % len(colours)], disturbed=DISTURBED if disturbed is None else disturbed
    )
    frames = {"main": shown.frames, "wrist": shown.wrist_frames}
    return ExpertEpisode(shown.instruction, shown.success, frames, shown.actions, shown.states)


def _metaworld(name: str, argument: str) -> tuple[Task, ...]:
    known = metaworld.INSTRUCTIONS
    if argument and argument not in known:
        near = did_you_mean(argument, [*known]) or "; --list-envs names them"
        raise UsageError(f"{name}: Meta-World has no task '{argument}'{near}")
    return tuple(_metaworld_task(task) for task in ([argument] if argument else known))


def _metaworld_task(task: str) -> Task:
    from vlaft.environments.metaworld.environment import MetaWorldEnv, as_openvla, demonstrate

    return Task(
        f"metaworld:{task}",
        partial(MetaWorldEnv, task),
        cameras=metaworld.CAMERAS,
        instruction=metaworld.INSTRUCTIONS[task],
        actions=(metaworld.ACTION, OPENVLA_ACTION),
        unnorm_keys=(f"metaworld_{task.replace('-', '_')}", "metaworld"),
        step_limit=metaworld.EPISODE_STEPS,
        memory=metaworld.MEMORY,
        expert=Expert(
            partial(demonstrate, task),
            metaworld.CONTROL_RATE,
            metaworld.ACTION,
            metaworld.STATE,
            "sawyer",
            padded=OPENVLA_ACTION,
            pad=as_openvla,
        ),
    )


def _libero(name: str, argument: str) -> tuple[Task, ...]:
    suite, given, index = argument.partition(":")
    if suite not in libero.SUITES:
        known = ", ".join(libero.SUITES)
        wrong = f"has no suite '{suite}'{did_you_mean(suite, [*libero.SUITES])}" if suite else "has suites; name one"
        raise UsageError(f"{name}: LIBERO {wrong} ({known})")
    count = len(libero.SUITES[suite])
    if given and index not in map(str, range(count)):
        raise UsageError(f"{name}: {suite} has no task '{index}'; its tasks are 0 to {count - 1}, see --list-envs")
    return tuple(_libero_task(suite, number) for number in ([int(index)] if given else range(count)))


def _libero_task(suite: str, index: int) -> Task:
    from vlaft.environments.libero.demonstrations import demonstrate
    from vlaft.environments.libero.environment import LiberoEnv

    expert = Expert(
        partial(demonstrate, suite, index),
        libero.CONTROL_RATE,
        OPENVLA_ACTION,
        libero.STATE,
        "panda",
        fast=partial(demonstrate, suite, index, fast_render=True),
    )
    return Task(
        f"libero:{suite}:{index}",
        partial(LiberoEnv, suite, index),
        cameras=libero.CAMERAS,
        instruction=libero.instruction(libero.SUITES[suite][index]),
        actions=(OPENVLA_ACTION,),
        unnorm_keys=(suite, f"{suite}_no_noops"),
        step_limit=libero.STEP_LIMITS[suite],
        waiting_steps=libero.WAITING_STEPS,
        states=libero.INITIAL_STATES,
        memory=libero.MEMORY,
        expert=expert if index in libero.DEMONSTRATED.get(suite, ()) else None,
    )


def _own(name: str, match: re.Match[str]) -> Callable[[], Environment]:
    """Return a user's factory, with its argument where one is given."""
    if match["module"].endswith(".py"):
        raise UsageError(f"{name}: name the module, not its file: {match['module'][:-3]}:{match['factory']}")
    module = _imported(match["module"], name)
    made = getattr(module, match["factory"], None)
    if made is None:
        hint = did_you_mean(match["factory"], [word for word in vars(module) if not word.startswith("_")])
        raise UsageError(f"{name}: the module has no '{match['factory']}'{hint}")
    if not callable(made):
        raise UsageError(
            f"{name}: '{match['factory']}' cannot be called; name a function or class that makes the environment"
        )
    return made if match["argument"] is None else partial(made, match["argument"])


def _imported(module: str, name: str) -> Any:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        if module == missing or module.startswith(f"{missing}."):
            raise UsageError(f"{name}: there is no module '{missing}'; run from the folder that has it") from error
        raise VlaftError(f"{name}: the module needs '{missing}', which is not installed") from error
    except VlaftError:
        raise
    except Exception as error:
        raise VlaftError(f"{name}: the module failed to load: {described(error)} (--debug shows where)") from error
    finally:
        with contextlib.suppress(ValueError):  # the module may have changed the path itself
            sys.path.remove(here)
        if here not in sys.path:
            sys.path.append(here)  # what the factory imports later; at the end, where it hides nothing


OPENVLA_ACTION = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
_TABLETOPS = {"tabletop": SETUP_B, "tabletop-a": SETUP_A, "tabletop-b": SETUP_B}
_FACTORY = re.compile(r"(?P<module>\w+(\.\w+)*):(?P<factory>\w+)(:(?P<argument>.+))?")
