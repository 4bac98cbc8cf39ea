"""`vlaft export`: rewrite a checkpoint for where it will run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlaft.cli.arguments import Out, Overwrite, PolicyWords

if TYPE_CHECKING:
    from vlaft.release.export import ExportResult

_TARGETS = ("huggingface", "nf4", "int8", "oft", "adapter")


def export(
    source: Annotated[
        str,
        typer.Argument(help="A merged checkpoint (folder or Hub id); a run for --to adapter.", show_default=False),
    ],
    out: Out,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="huggingface: the OpenVLA release's layout; nf4, int8: that, quantised; oft: OpenVLA-OFT's own folder;"
            " adapter: for peft.",
        ),
    ] = "huggingface",
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of huggingface: float32, bfloat16 or float16; by default as it is.")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", help="Of a run: best, last or step-000500; best where there is one.")
    ] = None,
    overwrite: Overwrite = False,
    settings: PolicyWords = None,
) -> None:
    """Rewrite a checkpoint for where it will run, and check the result."""
    from vlaft.cli.arguments import check_output_folder, parse_policy
    from vlaft.cli.console import say
    from vlaft.errors import UsageError, did_you_mean

    if to not in _TARGETS:
        raise UsageError(f"--to {to} is not known{did_you_mean(to, list(_TARGETS))}; give {', '.join(_TARGETS)}")
    if dtype is not None and (dtype not in ("float32", "bfloat16", "float16") or to != "huggingface"):
        raise UsageError(f"--dtype {dtype}: give float32, bfloat16 or float16, and only with --to huggingface")
    if checkpoint is not None and to != "adapter":
        raise UsageError("--checkpoint chooses within a run, and only --to adapter takes a run")
    policy = parse_policy(settings)
    if policy and to == "adapter":
        raise UsageError("--to adapter takes a run, which says itself what its policy is; leave policy.* out")
    check_output_folder(out, overwrite=overwrite)
    result = _run(source, out, to, dtype, checkpoint, overwrite, policy)
    ratio = f", {result.bytes / result.source_bytes:.2f} of the source" if to in ("nf4", "int8") else ""
    say(f"{result.bytes / 1e9:.3f} GB{ratio} written to {out} and checked")
    if (found := result.comparison) is not None:
        same = found.identical_tokens if found.unrounded_tokens is None else found.unrounded_tokens
        say(
            f"{same} of {found.tokens} {found.compared} on {found.examples} examples ({found.inputs}) are those of the"
            " source"
        )


def _run(
    source: str,
    out: Path,
    to: str,
    dtype: str | None,
    checkpoint: str | None,
    overwrite: bool,
    policy: dict[str, Any],
) -> ExportResult:
    from vlaft.adapt.policies import policy_folder
    from vlaft.cli.console import bytes_progress, say
    from vlaft.files import check_apart, free_bytes, restored
    from vlaft.release.export import export_huggingface, stored_bytes
    from vlaft.release.layout import open_source
    from vlaft.weights.layout import tensor_table
    from vlaft.weights.trained import is_trained

    if to == "adapter":
        from vlaft.release.adapter import export_adapter
        from vlaft.weights.trained import find_trained

        return export_adapter(find_trained(Path(source), checkpoint), out, overwrite=overwrite)
    place = restored(Path(source))
    check_apart(out, [place])
    folder = place if place.is_dir() and is_trained(place) else policy_folder(source, policy)
    open_source(folder)  # what is wrong with it is said first
    size = stored_bytes(tensor_table(folder).values())
    say(f"{size / 1e9:.2f} GB to read; {free_bytes(out) / 1e9:.1f} GB are free at {out}")
    with bytes_progress("exporting", size) as advance:
        if to == "huggingface":
            return export_huggingface(folder, out, dtype=dtype, overwrite=overwrite, advance=advance)
        if to == "oft":
            from vlaft.release.oft import export_oft

            return export_oft(folder, out, overwrite=overwrite, advance=advance)
        from vlaft.release.quantized import export_quantized

        return export_quantized(folder, out, to, overwrite=overwrite, advance=advance)
