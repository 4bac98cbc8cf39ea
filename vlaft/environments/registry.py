"""Environments by name: `tabletop`, or `module:factory` for one of the user's own."""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlaft.environments.interface import Environment, described
from vlaft.environments.tabletop.scene import SETUP_A, SETUP_B
from vlaft.errors import UsageError, VlaftError, did_you_mean


def environment_maker(name: str) -> Callable[[], Environment]:
    """Return what makes an environment of a name.

    Args:
        name: `tabletop` (or `tabletop-b`, the demo's new robot; `tabletop-a`, where its base comes from), or
            `module:factory`, a callable without arguments that returns an environment (see
            `vlaft.environments.interface`); the module is looked for in the working folder too.

    Raises:
        UsageError: there is none of that name.
        VlaftError: its module cannot be imported.
    """
    if name in _SHIPPED:
        from vlaft.environments.tabletop.environment import TabletopEnv

        return lambda: TabletopEnv(_SHIPPED[name])
    match = _FACTORY.fullmatch(name)
    if match is None:
        raise UsageError(
            f"--env {name}: there is no such environment{did_you_mean(name, [*_SHIPPED])}"
            " (tabletop, tabletop-a, or your own as module:factory)"
        )
    if match["module"].endswith(".py"):
        raise UsageError(f"--env {name}: name the module, not its file: {match['module'][:-3]}:{match['factory']}")
    module = _imported(match["module"], name)
    made = getattr(module, match["factory"], None)
    if made is None:
        hint = did_you_mean(match["factory"], [word for word in vars(module) if not word.startswith("_")])
        raise UsageError(f"--env {name}: the module has no '{match['factory']}'{hint}")
    if not callable(made):
        raise UsageError(
            f"--env {name}: '{match['factory']}' cannot be called; name a function or class that makes the environment"
        )
    return made


def _imported(module: str, name: str) -> Any:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        if module == missing or module.startswith(f"{missing}."):
            raise UsageError(
                f"--env {name}: there is no module '{missing}'; run from the folder that has it"
            ) from error
        raise VlaftError(f"--env {name}: the module needs '{missing}', which is not installed") from error
    except VlaftError:
        raise
    except Exception as error:
        raise VlaftError(
            f"--env {name}: the module failed to load: {described(error)} (--debug shows where)"
        ) from error
    finally:
        with contextlib.suppress(ValueError):  # the module may have changed the path itself
            sys.path.remove(here)
        if here not in sys.path:
            sys.path.append(here)  # what the factory imports later; at the end, where it hides nothing


_SHIPPED = {"tabletop": SETUP_B, "tabletop-a": SETUP_A, "tabletop-b": SETUP_B}


_FACTORY = re.compile(r"(?P<module>\w+(\.\w+)*):(?P<factory>\w+)")
