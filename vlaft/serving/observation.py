"""From the body of a request to what the model is asked, with every bound that a stranger's bytes need."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlaft.action.statistics import choose_key
from vlaft.errors import DataError
from vlaft.observation.images import Image
from vlaft.serving import json_numpy
from vlaft.serving.settings import MAX_INSTRUCTION, Refused, ServeSettings

# JSON of this many members has nothing to do with an image; parsed, each costs up to 100 bytes
_MAX_MEMBERS = 10_000


@dataclass(frozen=True)
class Observation:
    """One question to the model.

    Attributes:
        image: uint8 `[H, W, 3]` RGB, read-only.
        instruction: what the robot shall do.
        unnorm_key: name of the statistics; one that the checkpoint has.
        double_encoded: whether the client wants its answer as a string of JSON inside JSON.
    """

    image: Image
    instruction: str
    unnorm_key: str
    double_encoded: bool


def read_observation(body: bytes | bytearray, statistics: Mapping[str, Any], settings: ServeSettings) -> Observation:
    """Read the body of `POST /act`, in either form that upstream's server takes.

    The forms are `{"image": array, "instruction": text, "unnorm_key": text}`, the key being optional, and
    `{"encoded": that object as a string of JSON}`. Other members are ignored, as upstream does.

    Raises:
        Refused: 400 where it is no JSON, 422 where it is JSON of another kind; the sentence says what is wrong.
    """
    payload = _parse(body, "the body")
    double_encoded = "encoded" in payload
    if double_encoded:
        if len(payload) != 1 or not isinstance(payload["encoded"], str):
            raise Refused(422, "'encoded' has to be the only member, and a string that holds the whole request as JSON")
        payload = _parse(payload["encoded"].encode("utf-8", "replace"), "'encoded'")
    if missing := [name for name in ("image", "instruction") if name not in payload]:
        raise Refused(422, f"the request has no {' and no '.join(repr(name) for name in missing)}")
    try:
        image = json_numpy.decode(payload["image"], "'image'")
        key = _text(payload.get("unnorm_key"), "unnorm_key") if payload.get("unnorm_key") is not None else None
        key = choose_key(statistics, key)
    except DataError as error:
        raise Refused(422, str(error)) from None
    _check_image(image, settings.max_image_side)
    return Observation(image, _text(payload["instruction"], "instruction"), key, double_encoded)


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


def _check_image(image: Any, max_side: int) -> None:
    if image.dtype != "uint8" or image.ndim != 3 or image.shape[2] != 3:
        raise Refused(422, f"'image' has to be uint8 [height, width, 3] in RGB, not {image.dtype} {list(image.shape)}")
    if min(image.shape) < 1:
        raise Refused(422, "'image' has no pixels")
    if max(image.shape) > max_side:
        raise Refused(
            422, f"'image' is {image.shape[1]} x {image.shape[0]}; at most {max_side} pixels a side are taken"
        )
