"""`vlaft merge`: fold what a run trained into its base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlaft.cli.arguments import Base, Out, Overwrite, PolicyWords

if TYPE_CHECKING:
    from vlaft.adapt.rounding import Mode, Rounding
    from vlaft.weights.trained import Trained


def merge(
    source: Annotated[
        Path,
        typer.Argument(
            help="A run, one of its checkpoints, an adapter, or a folder of OpenVLA-OFT's.", show_default=False
        ),
    ],
    out: Out,
    base: Base = None,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", help="Of a run: best, last or step-000500; best where there is one.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; by default as the base has it.")
    ] = None,
    rounding: Annotated[
        str,
        typer.Option(
            "--rounding", help="Of what training changed: nearest, or stochastic where small changes would be lost."
        ),
    ] = "nearest",
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify/--no-verify",
            help="Let base with adapter and merged model act on a few examples; by default where one fits in memory.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    settings: PolicyWords = None,
) -> None:
    """Write one plain checkpoint: the base with the trained weights folded in."""
    from vlaft.adapt.policies import base_folder
    from vlaft.adapt.rounding import MODES
    from vlaft.cli.arguments import check_output_folder, parse_policy
    from vlaft.cli.console import bytes_progress, say
    from vlaft.cli.predict import example_of
    from vlaft.errors import UsageError
    from vlaft.files import free_bytes
    from vlaft.release.merge import merge as run_merge
    from vlaft.release.merge import merged_bytes
    from vlaft.weights.oft import is_oft
    from vlaft.weights.trained import base_name, find_trained

    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise UsageError(f"--dtype {dtype}: give float32, bfloat16 or float16")
    mode = next((mode for mode in MODES if mode == rounding), None)
    if mode is None:
        raise UsageError(f"--rounding {rounding}: give {' or '.join(MODES)}")
    check_output_folder(out, overwrite=overwrite)
    policy = parse_policy(settings)
    if is_oft(source):
        asked = {"--dtype": dtype, "--checkpoint": checkpoint, "--verify": verify, "--rounding": mode != "nearest"}
        if odd := [option for option, value in asked.items() if value]:
            raise UsageError(f"{odd[0]} is for what vlaft trained; {source} is a policy of OpenVLA-OFT's")
        _merge_oft(source, out, policy, base, overwrite)
        return
    if policy:
        raise UsageError(f"policy.* is for a folder of OpenVLA-OFT's; {source} says itself what its policy is")
    trained = find_trained(source, checkpoint)
    name = base_name(trained, base)
    folder = base_folder(name, trained.inference.get("policy"))
    total = merged_bytes(folder, dtype)
    say(f"{total / 1e9:.2f} GB will be written to {out}; {free_bytes(out) / 1e9:.1f} GB are free there")
    check = _check(trained, folder, verify, mode)
    with bytes_progress("merging", total) as advance:
        result = run_merge(
            trained,
            folder,
            out,
            base_name=name,
            dtype=dtype,
            rounding=mode,
            overwrite=overwrite,
            advance=advance,
            check=check,
        )
    say(f"{result.changed} of {result.tensors} tensors changed; {result.bytes / 1e9:.2f} GB written to {out}")
    _tell_rounding(result.rounding)
    say(f"next: vlaft predict {out} {example_of(out)}")


def _merge_oft(source: Path, out: Path, policy: dict[str, Any], base: str | None, overwrite: bool) -> None:
    """Write a folder of OpenVLA-OFT's as a plain policy."""
    from vlaft.cli.console import bytes_progress, say
    from vlaft.release.oft import merge_oft, merged_oft_bytes

    with bytes_progress("merging", merged_oft_bytes(source, base)) as advance:
        result = merge_oft(source, out, policy, base=base, overwrite=overwrite, advance=advance)
    say(f"{result.bytes / 1e9:.2f} GB written to {out} and checked; it says itself what it reads and writes")


def _tell_rounding(rounding: Rounding) -> None:
    """Say how much of the learned change survived rounding, and what to do where that is too little."""
    from vlaft.adapt.rounding import ENOUGH
    from vlaft.cli.console import say, warn

    if not rounding.types:
        return
    types = " and ".join(sorted(rounding.types))
    say(
        f"rounded to {types} ({rounding.mode}): {rounding.survives:.1%} of the learned change survives;"
        f" {rounding.kept / max(rounding.changed, 1):.0%} of the numbers that training changed differ from the base"
    )
    if rounding.survives < ENOUGH:
        warn(
            f"rounding to {types} loses {1 - rounding.survives:.0%} of what was learned: merge again with --rounding"
            " stochastic, which keeps it on average, or with --dtype float32 where it will also be run in float32"
        )


def _check(trained: Trained, base: Path, wanted: bool | None, mode: Mode) -> Callable[[Path], Mapping[str, Any]] | None:
    """Return the check of the merged folder, or None where it is not wanted or does not fit."""
    from vlaft.cli.console import say
    from vlaft.errors import VlaftError

    if wanted is False:
        return None
    from vlaft.release.verify import choose_dtype, merge_check

    place = choose_dtype(base)
    if place is None:
        if wanted:
            raise VlaftError(
                f"--verify loads {base}, which does not fit into free memory; give --no-verify to merge only"
            )
        say("not verified: the model does not fit into free memory (merging itself does not need it there)")
        return None
    run = merge_check(trained, base, *place, mode, _look(trained))

    def check(folder: Path) -> Mapping[str, Any]:
        say("verifying: base with adapter, then the merged model, on the same examples")
        found = run(folder)
        of = "logit " if found["compared"] == "tokens" else ""
        ties = f" ({found['ties']} between choices that rounding cannot tell apart)" if found["ties"] else ""
        say(
            f"verified on {found['examples']} examples ({found['inputs']}): {found['identical_tokens']} of"
            f" {found['tokens']} {found['compared']} are the same{ties}; largest {of}difference"
            f" {found['largest_logit_difference']:.3g} of a range of {found['logit_range']:.3g}"
        )
        if found["unrounded_tokens"] is not None:
            say(
                f"both are rounded alike; with the learned weights as they are, {found['unrounded_tokens']} of"
                f" {found['tokens']} {found['compared']} are the same; largest {of}difference"
                f" {found['unrounded_logit_difference']:.3g}"
            )
        _tell_sight(found.get("sight"))
        return found

    return check


def _look(trained: Trained) -> Callable[[Any, Path], dict[str, Any] | None] | None:
    """Return what says of the merged model whether it looks, or None where its training data are gone."""
    from vlaft.evaluation.offline import look_at_merged
    from vlaft.release.record import data_paths

    data = data_paths(trained)

    def look(model: Any, folder: Path) -> dict[str, Any] | None:
        sight = look_at_merged(model, folder, data)
        return None if sight is None else sight.to_json()

    return look if data else None


def _tell_sight(sight: Mapping[str, Any] | None) -> None:
    """Say whether the merged model looks at its frames."""
    from vlaft.cli.console import say, warn

    if sight is None:
        return
    for sentence in sight["warnings"]:
        warn(f"the merged model {sentence}")
    if sight["looks"]:
        share = sight["together"]["swapped"]
        say(
            f"it looks: with the frames of other moments its actions move by {share:.0%} of what they differ by between"
            f" moments ({sight['examples']} examples)"
        )
