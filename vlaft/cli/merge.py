"""`vlaft merge`: fold what a run trained into its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlaft.cli.arguments import Base, Out, Overwrite


def merge(
    source: Annotated[Path, typer.Argument(help="A run, one of its checkpoints, or an adapter.", show_default=False)],
    out: Out,
    base: Base = None,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", help="Of a run: best, last or step-000500; best where there is one.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; by default as the base has it.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write one plain checkpoint: the base with the trained weights folded in."""
    from vlaft.cli.arguments import check_output_folder
    from vlaft.cli.console import bytes_progress, say
    from vlaft.errors import CheckpointError, UsageError
    from vlaft.merge import merge as run_merge
    from vlaft.model.checkpoint import resolve_checkpoint, tensor_table
    from vlaft.trained import find_trained

    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise UsageError(f"--dtype {dtype}: give float32, bfloat16 or float16")
    check_output_folder(out, overwrite=overwrite)
    trained = find_trained(source, checkpoint)
    name = base or trained.base
    if name is None:
        raise CheckpointError(f"{source} does not say on which base it was trained; give it with --base")
    folder = resolve_checkpoint(name)
    total = sum(entry.end - entry.begin for entry in tensor_table(folder).values())
    with bytes_progress("merging", total) as advance:
        result = run_merge(trained, folder, out, base_name=name, dtype=dtype, advance=advance)
    say(f"{result.changed} of {result.tensors} tensors changed; {result.bytes / 1e9:.2f} GB written to {out}")
    say(f"next: vlaft predict {out} --image frame.png --instruction 'pick up the cup'")
