"""`vlaft predict`: what a model does at one moment, or at each of several."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlaft.cli.arguments import AsJson, Base, CenterCrop, Device, PolicyWords, Resize, parse_policy

if TYPE_CHECKING:
    from rich.table import Table

    from vlaft.policy import Policy, Prediction

_NAMED = re.compile(r"(?P<camera>\w+)=(?P<path>.+)", re.DOTALL)  # a file's name that looks so is given as ./a=b.png


def predict(
    model: Annotated[
        str, typer.Argument(help="A checkpoint (folder or Hub id), a run, or an adapter.", show_default=False)
    ],
    image: Annotated[
        list[str],
        typer.Option(
            "--image",
            metavar="[CAMERA=]FILE",
            help="Image file; given again, another moment. Of several cameras, one each: main=a.png, wrist=b.png.",
            show_default=False,
        ),
    ],
    instruction: Annotated[str, typer.Option("--instruction", help="What the robot shall do.", show_default=False)],
    state: Annotated[
        str | None,
        typer.Option(
            "--state",
            help="The robot's state, of a policy that reads it: numbers, as in 0.1,0.2,-3.",
            show_default=False,
        ),
    ] = None,
    unnorm_key: Annotated[
        str | None, typer.Option("--unnorm-key", help="Statistics to use, where the checkpoint has several.")
    ] = None,
    base: Base = None,
    checkpoint: Annotated[str | None, typer.Option("--checkpoint", help="Of a run: best, last or step-000500.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", help="float32, bfloat16, float16, int8 or nf4; by default by the device, or as it was saved."
        ),
    ] = None,
    action_ids_only: Annotated[
        bool, typer.Option("--action-ids-only", help="Choose among action tokens only.")
    ] = False,
    center_crop: CenterCrop = None,
    resize: Resize = None,
    device: Device = "auto",
    as_json: AsJson = False,
    words: PolicyWords = None,
) -> None:
    """Print the action that a model chooses, or its chunk of them, in the robot's units.

    Example: vlaft predict model/ --image main=a.png --image wrist=b.png --state 0.1,-0.2 --instruction 'lift the cup'
    """
    from vlaft.cli.console import print_json, show, warn
    from vlaft.errors import DataError

    moments = _moments(image)
    numbers = None if state is None else _numbers(state, len(moments))
    frames = [_frames(files) for _, files in moments]
    from vlaft.policy import load

    policy = load(
        model,
        base=base,
        checkpoint=checkpoint,
        dtype=dtype,
        device=device,
        policy=parse_policy(words),
        center_crop=center_crop,
        resize=resize,
    )
    if numbers is not None and not policy.model.policy.state:
        raise DataError(f"{model}: the policy reads no state; leave --state out")
    predictions = policy.predict(
        [_seen(each, policy) for each in frames],
        instruction,
        state=None if numbers is None else [numbers],
        unnorm_key=unnorm_key,
        action_ids_only=action_ids_only,
    )
    for (name, _), prediction in zip(moments, predictions, strict=True):
        if prediction.non_action_tokens:
            tokens = len(prediction.action_token_ids or ())
            warn(
                f"{name}: {prediction.non_action_tokens} of {tokens} tokens stand for no action; do not send this to a"
                " robot (or choose among action tokens with --action-ids-only)"
            )
    if as_json:
        rows = [_row(prediction) for prediction in predictions]
        print_json(rows[0] if len(rows) == 1 else rows)
        return
    for (name, _), prediction in zip(moments, predictions, strict=True):
        several = len(predictions) > 1
        if len(prediction.actions) > 1:
            if several:
                show(f"{name}  ({prediction.unnorm_key})")
            show(_chunk(prediction))
            continue
        values = "  ".join(_number(value) for value in prediction.action)
        show(f"{name}: {values}  ({prediction.unnorm_key})" if several else values)


def example_of(folder: Path) -> str:
    """Return the options with which a checkpoint is asked, as somebody would type them."""
    from vlaft.files import read_json
    from vlaft.model.configuration import Policy as ModelPolicy

    reads = ModelPolicy.of(read_json(folder / "config.json"), str(folder))
    if len(reads.cameras) == 1:
        images = "--image frame.png"
    else:
        images = " ".join(f"--image {camera}={camera}.png" for camera in reads.cameras)
    state = f" --state {','.join(['0.1'] * (reads.state_size or 0))}" if reads.state else ""
    return f"{images}{state} --instruction 'pick up the cup'"


def _moments(given: Sequence[str]) -> list[tuple[str, dict[str | None, Path]]]:
    """Return the files of each moment by camera, and what to call it; without names, each file is a moment."""
    from vlaft.errors import UsageError

    named = [found for word in given if (found := _NAMED.fullmatch(word))]
    if not named:
        return [(word, {None: Path(word)}) for word in given]
    if len(named) < len(given):
        plain = next(word for word in given if not _NAMED.fullmatch(word))
        raise UsageError(f"--image {plain}: others say which camera they are from; write CAMERA={plain}")
    files: dict[str | None, Path] = {}
    for found in named:
        if found["camera"] in files:
            raise UsageError(f"--image {found['camera']}=... is given twice; one moment has one frame of a camera")
        files[found["camera"]] = Path(found["path"])
    return [(", ".join(given), files)]


def _numbers(text: str, moments: int) -> list[float]:
    from vlaft.errors import UsageError

    if moments > 1:
        raise UsageError(f"--state is of one moment, and {moments} are given with --image; predict one at a time")
    try:
        return [float(word) for word in re.split(r"[,\s]+", text.strip())]
    except ValueError as error:
        raise UsageError(f"--state: {error}; write numbers, as in 0.1,0.2,-3") from None


def _frames(files: Mapping[str | None, Path]) -> dict[str | None, Any]:
    from vlaft.data.codec import decode_image
    from vlaft.errors import DataError

    frames = {}
    for camera, path in files.items():
        try:
            frames[camera] = decode_image(path.read_bytes(), str(path))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    return frames


def _seen(frames: Mapping[str | None, Any], policy: Policy) -> Any:
    """Return what `Policy.predict` takes, or say how to type what the policy reads."""
    from vlaft.errors import DataError, did_you_mean

    cameras = list(policy.model.policy.cameras)
    typed = " ".join(f"--image {camera}=FILE" for camera in cameras)
    if None in frames:
        if len(cameras) > 1:
            raise DataError(f"the policy looks through {len(cameras)} cameras: give {typed}")
        return frames[None]
    for camera in frames:
        if camera not in cameras:
            raise DataError(f"the policy has no camera '{camera}'{did_you_mean(str(camera), cameras)}: give {typed}")
    return frames


def _row(prediction: Prediction) -> dict[str, Any]:
    row: dict[str, Any] = {"action": prediction.action}
    if len(prediction.actions) > 1:
        row["actions"] = prediction.actions
    return row | {"action_token_ids": prediction.action_token_ids, "unnorm_key": prediction.unnorm_key}


def _chunk(prediction: Prediction) -> Table:
    """Return the K actions, one a line, beside their step."""
    from rich.table import Table

    table = Table("step", box=None, pad_edge=False)
    for dimension in range(prediction.actions.shape[1]):
        table.add_column(str(dimension), justify="right", no_wrap=True)
    for step, action in enumerate(prediction.actions):
        table.add_row(str(step), *(_number(value) for value in action))
    return table


def _number(value: float) -> str:
    return f"{value:+.5f}"
