"""`vlaft serve`: the robot asks for actions over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlaft.cli.arguments import Base, CenterCrop, Device, PolicyWords, Resize, parse_policy


def serve(
    model: Annotated[
        str, typer.Argument(help="A checkpoint (folder or Hub id), a run, or an adapter.", show_default=False)
    ],
    host: Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 is the whole network.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", help="File with the bearer token that clients must send (or VLAFT_SERVE_TOKEN)."),
    ] = None,
    base: Base = None,
    checkpoint: Annotated[str | None, typer.Option("--checkpoint", help="Of a run: best, last or step-000500.")] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; by default by the device.")
    ] = None,
    unnorm_key: Annotated[
        str | None, typer.Option("--unnorm-key", help="Statistics to use where a request names none.")
    ] = None,
    action_ids_only: Annotated[
        bool, typer.Option("--action-ids-only", help="Choose among action tokens only.")
    ] = False,
    max_batch: Annotated[int, typer.Option("--max-batch", help="Requests that share a forward pass at most.")] = 8,
    queue_length: Annotated[int, typer.Option("--queue-length", help="Further requests are answered 503.")] = 32,
    max_body: Annotated[str, typer.Option("--max-body", help="Largest request.")] = "20MiB",
    max_image_side: Annotated[int, typer.Option("--max-image-side", help="Largest image, in pixels a side.")] = 2048,
    center_crop: CenterCrop = None,
    resize: Resize = None,
    device: Device = "auto",
    words: PolicyWords = None,
) -> int:
    """Serve a model to robots: POST /act as OpenVLA's and OpenVLA-OFT's servers have it, GET /health, GET /info."""
    import os
    import signal

    from vlaft.cli.arguments import parse_size
    from vlaft.cli.console import say, warn
    from vlaft.errors import MissingExtra
    from vlaft.serving.settings import TOKEN_VARIABLE, ServeSettings, read_token

    settings = ServeSettings(
        token=read_token(token_file, os.environ),
        action_ids_only=action_ids_only,
        unnorm_key=unnorm_key,
        max_batch=max_batch,
        queue_length=queue_length,
        max_body=parse_size(max_body),
        max_image_side=max_image_side,
    )
    try:
        from vlaft.serving.server import Server, bind
    except ImportError as error:
        raise MissingExtra("vlaft serve", error.name or "fastapi", "serve") from None

    with bind(host, port) as bound:  # before the model is loaded, which takes minutes
        address = bound.getsockname()
        if settings.token is None and not address[0].startswith("127.") and address[0] != "::1":
            warn(f"whoever reaches {host} can use this model; ask for a token with --token-file or {TOKEN_VARIABLE}")
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
        shown = f"[{address[0]}]" if ":" in address[0] else address[0]
        server = Server(policy, Path(model).name, settings)
        server.run(bound, lambda: say(f"serving {model} on http://{shown}:{address[1]} (POST /act); Ctrl-C stops"))
    return 130 if server.received == signal.SIGINT else 0
