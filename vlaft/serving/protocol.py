"""The names and shapes on the wire, which server and client share; neither torch nor HTTP is needed for them.

A policy that writes one action at a time answers it as OpenVLA's server does, `[A]`; one that writes K, the chunk
`[K, A]`. OpenVLA-OFT's clients are told by the member `full_image`, which no other request has, and get a list of K
arrays `[A]`: one server answers them and its own at the same time, and nobody has to start it in another mode.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlaft.errors import DataError
from vlaft.serving import json_numpy

# In a header, since the body is the bare action that upstream's clients expect.
NON_ACTION_HEADER = "vlaft-non-action-tokens"

MAIN_IMAGE = "image"
OFT_IMAGE = "full_image"  # OpenVLA-OFT's main camera; its others have `OFT_WRIST` in their names, and come in order
OFT_WRIST = "wrist"


def image_member(camera: str) -> str:
    """Return the member of a request that holds a camera's frame: its column in a converted dataset.

    >>> image_member("main"), image_member("wrist"), image_member("image_main")
    ('image', 'image_wrist', 'image_main')
    """
    if camera == "main":
        return MAIN_IMAGE
    return camera if camera.startswith(f"{MAIN_IMAGE}_") else f"{MAIN_IMAGE}_{camera}"


def encode_actions(actions: NDArray[np.float64], *, separately: bool) -> Any:
    """Return a chunk for `json.dumps`.

    Args:
        actions: `[K, A]`.
        separately: as OpenVLA-OFT's server does: a list of K arrays, also where K is 1.
    """
    if separately:
        return [json_numpy.encode(action) for action in actions]
    return json_numpy.encode(actions[0] if len(actions) == 1 else actions)


def decode_actions(value: object) -> NDArray[np.float64]:
    """Return what `encode_actions` wrote in one array, as it was sent: `[A]` or `[K, A]`.

    Raises:
        DataError: it is no such array, or holds what is not finite.
    """
    actions = json_numpy.decode(value, "the action").astype(np.float64)
    if actions.ndim not in (1, 2) or not actions.size or not np.isfinite(actions).all():
        raise DataError(f"the action has shape {list(actions.shape)} or numbers that are not finite")
    return actions
