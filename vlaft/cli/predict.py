"""`vlaft predict`: one action for one image and one instruction."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlaft.cli.arguments import AsJson, Base, Device, PolicyWords, parse_policy


def predict(
    model: Annotated[
        str, typer.Argument(help="A checkpoint (folder or Hub id), a run, or an adapter.", show_default=False)
    ],
    image: Annotated[list[Path], typer.Option("--image", help="Image file; may be given again.", show_default=False)],
    instruction: Annotated[str, typer.Option("--instruction", help="What the robot shall do.", show_default=False)],
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
    device: Device = "auto",
    as_json: AsJson = False,
    words: PolicyWords = None,
) -> None:
    """Print the action that a model chooses, in the robot's units."""
    from vlaft.cli.console import print_json, show, warn
    from vlaft.data.codec import decode_image
    from vlaft.errors import DataError
    from vlaft.policy import load

    frames = []
    for path in image:
        try:
            frames.append(decode_image(path.read_bytes(), str(path)))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    policy = load(model, base=base, checkpoint=checkpoint, dtype=dtype, device=device, policy=parse_policy(words))
    predictions = policy.predict(frames, instruction, unnorm_key=unnorm_key, action_ids_only=action_ids_only)
    for path, prediction in zip(image, predictions, strict=True):
        if prediction.non_action_tokens:
            tokens = len(prediction.action_token_ids or ())
            warn(
                f"{path}: {prediction.non_action_tokens} of {tokens} tokens stand for no action; do not send this to a"
                " robot (or choose among action tokens with --action-ids-only)"
            )
    rows = [
        {
            "action": prediction.action,
            "action_token_ids": prediction.action_token_ids,
            "unnorm_key": prediction.unnorm_key,
        }
        for prediction in predictions
    ]
    if as_json:
        print_json(rows[0] if len(rows) == 1 else rows)
        return
    for path, prediction in zip(image, predictions, strict=True):
        values = "  ".join(f"{value:+.5f}" for value in prediction.action)
        show(f"{path}: {values}  ({prediction.unnorm_key})" if len(rows) > 1 else values)
