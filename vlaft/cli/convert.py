"""`vlaft convert`: demonstrations to tokenized action examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlaft.cli.arguments import AsJson, Out, Overwrite

if TYPE_CHECKING:
    from vlaft.data.convert.run import Conversion
    from vlaft.data.source import Progress, SourceRequest

_SHOWN = 10  # skipped episodes told one by one


def convert(
    out: Out,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE... [KEY=VALUE]...",
            help="Files, folders or Hub ids, then settings of the layout, such as instruction='open the drawer'.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str, typer.Option("--base", help="Checkpoint folder or Hub id that the examples are tokenized for.")
    ] = "openvla/openvla-7b",
    preset: Annotated[
        list[str] | None,
        typer.Option("--preset", help="Dataset preset, a name or a YAML file; once, or once per source."),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option("--name", help="Name and statistics key of a source; once per source.", show_default=False),
    ] = None,
    weight: Annotated[
        list[float] | None,
        typer.Option("--weight", help="How often training samples a source; once per source.", show_default=False),
    ] = None,
    mix: Annotated[
        str | None,
        typer.Option(
            "--mix",
            help="Mix of datasets, a name or a YAML file; SOURCE is then the folder that holds those without a path.",
            show_default=False,
        ),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option("--image-size", help="Edge of the stored frames; by default the base's.")
    ] = None,
    codec: Annotated[str, typer.Option("--image-codec", "--codec", help="jpeg, png or webp-lossless.")] = "jpeg",
    val_fraction: Annotated[
        float, typer.Option("--val-fraction", help="Share of episodes held out where the source has no such split.")
    ] = 0.1,
    seed: Annotated[int, typer.Option("--seed", help="Of the draw of held-out episodes.")] = 0,
    on_error: Annotated[str, typer.Option("--on-error", help="At a damaged episode: stop or skip.")] = "stop",
    limit: Annotated[
        int | None, typer.Option("--limit", help="Only the first episodes of each split.", show_default=False)
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", help="Processes; by default one per CPU.", show_default=False)
    ] = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read all actions, write nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Turn demonstrations into tokenized action examples.

    An interrupted conversion goes on where it was when the same command is given again.

    Example: vlaft convert demos.hdf5 --preset robomimic --out data/ instruction='open the drawer'
    """
    from vlaft.cli.console import print_json
    from vlaft.data.convert.run import ConvertRequest
    from vlaft.data.convert.run import convert as run_conversion
    from vlaft.errors import Interrupted

    request = ConvertRequest(
        sources=_sources(words or [], preset or [], name or [], weight or [], mix),
        base=base,
        out=out,
        image_size=image_size,
        codec=codec,  # type: ignore[arg-type]  # checked by convert
        val_fraction=val_fraction,
        seed=seed,
        on_error=on_error,  # type: ignore[arg-type]
        limit=limit,
        workers=workers,
        overwrite=overwrite,
    )
    try:
        with _phases() as report:
            done = run_conversion(request, dry_run=dry_run, progress=report)
    except KeyboardInterrupt as error:
        raise Interrupted("interrupted; give the same command again to go on, what is finished is kept") from error
    if as_json:
        print_json(done)
    _tell(done, dry_run)


def _sources(
    words: Sequence[str],
    presets: Sequence[str],
    names: Sequence[str],
    weights: Sequence[float],
    mix: str | None = None,
) -> list[SourceRequest]:
    from vlaft.data.mixes import mix_requests
    from vlaft.data.source import SourceRequest
    from vlaft.errors import UsageError

    paths = [word for word in words if "=" not in word or _exists(word)]
    settings = _layout_settings([word for word in words if word not in paths])
    if mix is not None:
        if presets or names or weights:
            raise UsageError("--mix says presets, names and weights itself; leave --preset, --name and --weight out")
        if len(paths) > 1:
            raise UsageError(f"--mix takes one folder that holds its datasets, not {len(paths)} sources")
        return mix_requests(mix, Path(paths[0]) if paths else None, settings)
    if not paths:
        raise UsageError("there is no source: name a file, a folder or a dataset on the Hub")
    for option, given in (("--preset", presets), ("--name", names), ("--weight", weights)):
        if len(given) not in (0, len(paths)) and not (option == "--preset" and len(given) == 1):
            raise UsageError(f"{option} is given {len(given)} times for {len(paths)} sources; give it once per source")
    return [
        SourceRequest(
            path=Path(path),
            preset=None if not presets else presets[0] if len(presets) == 1 else presets[number],
            layout=settings,
            name=names[number] if names else None,
            weight=weights[number] if weights else 1.0,
        )
        for number, path in enumerate(paths)
    ]


def _exists(word: str) -> bool:
    try:
        return Path(word).exists()
    except (OSError, ValueError):  # no name of a file: too long, as an instruction may be
        return False


def _layout_settings(words: Sequence[str]) -> dict[str, Any]:
    """Return `{"cameras": {"primary": "image"}}` for `cameras.primary=image`; one text stands for a list of one."""
    from vlaft.errors import ConfigError
    from vlaft.recipe.resolve import parse_word

    settings: dict[str, Any] = {}
    problems: list[str] = []
    for word in words:
        try:
            [(key, value)] = parse_word(word).items()
        except ConfigError as error:
            problems += error.problems
            continue
        lists = ("action", "state", "steps", "steps+", "action_names", "state_names")
        if key in lists and isinstance(value, str | dict):
            value = [value]
        *parents, last = key.split(".")
        place = settings
        for parent in parents:
            inner = place.setdefault(parent, {})
            if not isinstance(inner, dict):
                problems.append(f"'{word}': {parent} is already set to {inner!r}")
                inner = {}
            place = inner
        place[last] = value
    if problems:
        raise ConfigError(problems)
    return settings


@contextmanager
def _phases() -> Iterator[Progress]:
    """Show one progress bar per phase of the conversion."""
    from vlaft.cli.console import Advance, progress

    with ExitStack() as stack:
        current: tuple[str, Advance, int] | None = None

        def report(phase: str, done: int, total: int) -> None:
            nonlocal current
            if current is None or current[0] != phase:
                stack.close()
                unit = "episodes" if phase.startswith("reading") else "examples"
                current = (phase, stack.enter_context(progress(phase, total, unit)), 0)
            if done > current[2]:
                current[1](done - current[2])
                current = (phase, current[1], done)

        yield report


def _tell(done: Conversion, dry_run: bool) -> None:
    from vlaft.cli.console import say, warn
    from vlaft.data.sentences import folded

    for entry in done.skipped[:_SHOWN]:
        warn(f"left out {entry.episode} of {entry.dataset}: {entry.why}")
    if len(done.skipped) > _SHOWN:
        warn(f"{len(done.skipped) - _SHOWN} more episodes were left out; dataset.json lists them all")
    for warning in folded(done.warnings):
        warn(warning)
    counts = ", ".join(
        f"{done.rows[split]:,} examples of {done.episodes[split]} episodes in {split}" for split in done.rows
    )
    if dry_run:
        for source in done.sources:
            _describe(source)
        say(f"would write {counts}; nothing was written")
        return
    again = f" ({done.reused} of {done.shards} files were there already)" if done.reused else ""
    say(f"{counts}; {done.bytes / 1e6:.1f} MB written to {done.out}{again}")
    say(f"next: vlaft train --recipe lora32 --data {done.out} --out run/")


def _describe(source: Mapping[str, Any]) -> None:
    """Say in a few lines what was found in a source."""
    from vlaft.cli.console import say

    action, rate = source["action"], f"{source['fps']:g} Hz" if source["fps"] else "rate unknown"
    names = f" ({', '.join(action['names'])})" if action["names"] else ""
    cameras = [f"{camera} as {column}" for column, camera in source["cameras"].items()]
    texts = source["instructions"]
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    say(f"{source['name']} ({source['format']}, {source['path']}, preset {source['preset'] or 'none'})")
    say(f"  {source['episodes']} episodes, {source['steps']:,} steps, {rate}, weight {source['weight']:g}")
    say(f"  action: {action['dimensions']} dimensions{names}; cameras: {', '.join(cameras)}")
    say(f"  instructions: {'; '.join(texts[:_SHOWN])}{more}")
