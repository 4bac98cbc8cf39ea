"""From the body of a request to what the model is asked, with every bound that a stranger's bytes need."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vlaft.action.statistics import choose_key
from vlaft.errors import DataError, did_you_mean
from vlaft.observation.images import Image
from vlaft.serving import json_numpy
from vlaft.serving.protocol import MAIN_IMAGE, OFT_IMAGE, OFT_WRIST, image_member
from vlaft.serving.settings import MAX_INSTRUCTION, Refused, ServeSettings

if TYPE_CHECKING:
    from vlaft.model.configuration import Policy as ModelPolicy

# JSON of this many members has nothing to do with an image; parsed, each costs up to 100 bytes
_MAX_MEMBERS = 10_000
_HUGE = 1e300
_SHOWN = 40  # characters of a stranger's name


@dataclass(frozen=True)
class Question:
    """What a client asks of the model.

    Attributes:
        images: camera to frame, uint8 `[H, W, 3]` RGB, read-only: those that the policy reads, in its order.
        state: float32 `[S]`, finite, as recorded; None of a policy that reads none.
        instruction: what the robot shall do.
        unnorm_key: name of the statistics; one that the checkpoint has.
        double_encoded: whether the client wants its answer as a string of JSON inside JSON.
        separately: whether it asks as OpenVLA-OFT's clients do, and wants a list of arrays.
    """

    images: Mapping[str, Image]
    state: NDArray[np.float32] | None
    instruction: str
    unnorm_key: str
    double_encoded: bool
    separately: bool


def read_question(
    body: bytes | bytearray, reads: ModelPolicy, statistics: Mapping[str, Any], settings: ServeSettings
) -> Question:
    """Read the body of `POST /act`, in any form that upstream's servers take, and in vlaft's own.

    They are OpenVLA's `{"image": array, "instruction": text, "unnorm_key": text}`, the key being optional; that with a
    member `image_<camera>` for each further camera, and `state`; OpenVLA-OFT's, which is told by its `full_image`, with
    members that have `wrist` in their names for the other cameras, in order, and `state`; and `{"encoded": any of these
    as a string of JSON}`. Other members are ignored, as upstream does.

    Args:
        body: as it came.
        reads: what the policy reads.
        statistics: dataset name to statistics.
        settings: the limits.

    Raises:
        Refused: 400 where it is no JSON, 422 where it is JSON of another kind; the sentence says what is wrong.
    """
    payload = _parse(body, "the body")
    double_encoded = "encoded" in payload
    if double_encoded:
        if len(payload) != 1 or not isinstance(payload["encoded"], str):
            raise Refused(422, "'encoded' has to be the only member, and a string that holds the whole request as JSON")
        payload = _parse(payload["encoded"].encode("utf-8", "replace"), "'encoded'")
    separately = OFT_IMAGE in payload and MAIN_IMAGE not in payload
    members = _oft_members(payload, reads) if separately else _members(payload, reads)
    wanted = [*members.values(), *(["state"] if reads.state else []), "instruction"]
    if missing := [name for name in wanted if name not in payload]:
        raise Refused(422, f"the request has no {' and no '.join(repr(name) for name in missing)}{_reads(reads)}")
    try:
        images = {camera: json_numpy.decode(payload[name], _named(name)) for camera, name in members.items()}
        key = _text(payload["unnorm_key"], "unnorm_key") if payload.get("unnorm_key") is not None else None
        key = choose_key(statistics, key or settings.unnorm_key)
        state = _state(payload["state"], reads.state_size) if reads.state else None
    except DataError as error:
        raise Refused(422, str(error)) from None
    for camera, image in images.items():
        _check_image(image, _named(members[camera]), settings.max_image_side)
    instruction = _text(payload["instruction"], "instruction")
    return Question(images, state, instruction, key, double_encoded, separately)


def _members(payload: Mapping[str, Any], reads: ModelPolicy) -> dict[str, str]:
    """Return which member holds which camera's frame; a camera that the policy does not have is a mistake."""
    members = {camera: image_member(camera) for camera in reads.cameras}
    for name in payload:
        if name.startswith(f"{MAIN_IMAGE}_") and name not in members.values():
            near = did_you_mean(name[:_SHOWN], list(members.values()))
            raise Refused(422, f"{_named(name)} is no camera of this policy{near}{_reads(reads)}")
    if len(members) == 1 and not payload.keys() & set(members.values()):  # of one camera, nobody need know its name
        members = dict.fromkeys(members, MAIN_IMAGE)
    return members


def _oft_members(payload: Mapping[str, Any], reads: ModelPolicy) -> dict[str, str]:
    """Do the same for a client of OpenVLA-OFT's: one main camera, and others on wrists; a policy of one looks at none.

    Its server takes the others in the order of the request. Where their names are those of the policy's cameras, they
    count instead.
    """
    cameras = list(reads.cameras)
    if OFT_WRIST in cameras[0]:
        asked = f"'{image_member(cameras[0])}'"
        raise Refused(422, f"'{OFT_IMAGE}' is a main camera, and the policy's first is '{cameras[0]}': send {asked}")
    others = [name for name in payload if OFT_WRIST in name and name != OFT_IMAGE]
    named = {name.removesuffix("_image"): name for name in others}
    if named.keys() == set(cameras[1:]):
        others = [named[camera] for camera in cameras[1:]]
    found = [OFT_IMAGE, *others]
    if len(cameras) > 1 and len(found) != len(cameras):
        wanted = f"'{OFT_IMAGE}' and {len(cameras) - 1} with '{OFT_WRIST}' in the name"
        raise Refused(422, f"the request has {len(found)} images; the policy reads {len(cameras)}: {wanted}")
    return dict(zip(cameras, found, strict=False))


def _reads(reads: ModelPolicy) -> str:
    """Return the end of a sentence that says what a policy reads; nothing of one that is as the released OpenVLA."""
    if len(reads.cameras) == 1 and not reads.state:
        return ""
    state = f" and a state of {reads.state_size} numbers" if reads.state else ""
    return f" (the policy reads the cameras {', '.join(reads.cameras)}{state})"


def _named(name: str) -> str:
    """Return a stranger's name of a member as a sentence can hold it: not long, with nothing that cannot be sent."""
    return f"'{name[:_SHOWN].encode('unicode_escape').decode('ascii')}'"


def _state(value: object, size: int | None) -> NDArray[np.float32]:
    """Return the robot's state `[S]`; numbers of a list, or an array."""
    if isinstance(value, list):
        if not all(type(number) in (int, float) for number in value):
            raise DataError("'state' has to be a list of numbers, or an array as json_numpy writes it")
        given = np.array([min(max(number, -_HUGE), _HUGE) for number in value], np.float64)  # some fit none
    else:
        given = json_numpy.decode(value, "'state'")
    if given.shape != (size,):
        raise DataError(f"'state' has shape {list(given.shape)}; the policy reads a state of {size} numbers")
    with np.errstate(over="ignore"):
        state = given.astype(np.float32)
    if not np.isfinite(state).all():
        raise DataError("'state' holds a number that is not finite, or too large for a float32")
    return state


def _parse(text: bytes | bytearray, what: str) -> dict[str, Any]:
    if text.count(b",") + text.count(b"[") + text.count(b"{") > _MAX_MEMBERS:
        raise Refused(400, f"{what} has more than {_MAX_MEMBERS} members; send the image in json_numpy's form")
    try:
        value = json.loads(text.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = "it nests too deep" if isinstance(error, RecursionError) else str(error).split("\n")[0][:100]
        raise Refused(400, f"{what} is no JSON: {reason}") from None
    if not isinstance(value, dict):
        raise Refused(422, f"{what} has to be a JSON object with 'image' and 'instruction'")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _text(value: object, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise Refused(422, f"'{name}' has to be a text")
    if len(value) > MAX_INSTRUCTION:
        raise Refused(422, f"'{name}' has {len(value)} characters; at most {MAX_INSTRUCTION} are taken")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write and no tokenizer reads
        raise Refused(422, f"'{name}' holds a character that is no Unicode text") from None
    return value


def _check_image(image: Any, what: str, max_side: int) -> None:
    if image.dtype != "uint8" or image.ndim != 3 or image.shape[2] != 3:
        raise Refused(422, f"{what} has to be uint8 [height, width, 3] in RGB, not {image.dtype} {list(image.shape)}")
    if min(image.shape) < 1:
        raise Refused(422, f"{what} has no pixels")
    if max(image.shape) > max_side:
        raise Refused(422, f"{what} is {image.shape[1]} x {image.shape[0]}; at most {max_side} pixels a side are taken")
