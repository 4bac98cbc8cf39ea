"""`vlaft export`: rewrite a checkpoint for where it will run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlaft.cli.arguments import Out, Overwrite


def export(
    source: Annotated[Path, typer.Argument(help="A merged checkpoint.", show_default=False)],
    out: Out,
    to: Annotated[str, typer.Option("--to", help="huggingface: the layout of the OpenVLA release.")] = "huggingface",
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; by default as it is.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Rewrite a merged checkpoint for where it will run, and check the result."""
    from vlaft.cli.arguments import check_output_folder
    from vlaft.cli.console import bytes_progress, say
    from vlaft.errors import UsageError
    from vlaft.export import export_huggingface
    from vlaft.model.checkpoint import resolve_checkpoint, tensor_table

    if to != "huggingface":
        raise UsageError(f"--to {to} is not known; give huggingface")
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise UsageError(f"--dtype {dtype}: give float32, bfloat16 or float16")
    check_output_folder(out, overwrite=overwrite)
    folder = source if source.is_dir() else resolve_checkpoint(str(source))
    with bytes_progress("exporting", sum(e.end - e.begin for e in tensor_table(folder).values())) as advance:
        export_huggingface(folder, out, dtype=dtype, advance=advance)
    say(f"written to {out} and checked")
