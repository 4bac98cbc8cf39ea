"""Simulators that draw without a screen: how they are told to, and the sentence where nothing here can."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from vlaft.environments.interface import described
from vlaft.errors import VlaftError


@contextmanager
def drawing(world: str) -> Iterator[None]:
    """Import or make what draws, by EGL unless `MUJOCO_GL` says otherwise.

    Args:
        world: the simulator, for the sentence.

    Raises:
        VlaftError: MuJoCo or PyOpenGL find no OpenGL library.
    """
    os.environ.setdefault("MUJOCO_GL", "egl")  # read when MuJoCo is imported
    try:
        yield
    except (VlaftError, ModuleNotFoundError):
        raise
    except Exception as error:
        raise VlaftError(
            f"{world} cannot draw with MUJOCO_GL={os.environ.get('MUJOCO_GL')} ({described(error)[:150]}): install"
            " the libraries (Debian: apt-get install libegl1 libgl1-mesa-dri), or libosmesa6 and set MUJOCO_GL=osmesa"
        ) from error
