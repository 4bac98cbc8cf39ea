"""`vlaft convert`: demonstrations to tokenized action examples."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlaft.cli.arguments import AsJson, Overwrite

if TYPE_CHECKING:
    from vlaft.data.convert.run import Conversion, ConvertRequest, Part
    from vlaft.data.source import Progress, SourceRequest

_SHOWN = 10  # skipped episodes told one by one
_ANY_STEP = {"plan", "part", "finish", "workers", "as_json"}  # options that a part or the end of a plan takes


def convert(
    context: typer.Context,
    out: Annotated[Path | None, typer.Option("--out", help="Folder or s3:// URL to write.", show_default=False)] = None,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE... [KEY=VALUE]...",
            help="Files, folders, URLs or Hub ids, then settings of the layout, such as instruction='open the drawer'.",
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
    plan: Annotated[
        Path | None,
        typer.Option("--plan", help="Folder of a plan to make, or to carry on in parts.", show_default=False),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option("--part", metavar="I/N", help="Write the plan's part I of N; on any machine.", show_default=False),
    ] = None,
    finish: Annotated[bool, typer.Option("--finish", help="Make the dataset of a plan whose parts are there.")] = False,
    regenerate: Annotated[
        Path | None,
        typer.Option(
            "--regenerate",
            metavar="FOLDER",
            help="First replay LIBERO's own files in its simulator, at 256 pixels; what comes of it is kept here.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Turn demonstrations into tokenized action examples.

    An interrupted conversion goes on where it was when the same command is given again. With --plan it is done in
    parts, on as many machines as there are: the plan first, then its parts in any order, then the end.

    Example: vlaft convert demos.hdf5 --preset robomimic --out data/ instruction='open the drawer'
    """
    from vlaft.cli.console import print_json
    from vlaft.data.convert import run
    from vlaft.data.convert.sending import convert_to_url
    from vlaft.errors import Interrupted, UsageError
    from vlaft.remote import url_of

    given = {name for name in context.params if _is_given(context, name)}
    later = part is not None or finish
    _check_steps(given, plan, part, finish)
    if out is None and not later:
        raise UsageError("--out is missing; name the folder to write")
    if regenerate is not None:
        words = [str(regenerate), *_regenerated(context, words or [], regenerate, workers)]
        preset = preset or ["libero_hdf5"]
    url = None if out is None else url_of(out)
    if url is not None and plan is not None:
        raise UsageError(f"--out {url}: parts of a plan write to a folder that all see; copy it there when it is whole")
    named = {"words", "preset", "name", "weight", "mix"} & given
    request = run.ConvertRequest(
        sources=[] if later and not named else _sources(words or [], preset or [], name or [], weight or [], mix),
        base=base,
        out=out or Path(),
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
            done: Conversion | Part
            if plan is not None and later:
                _check_agrees(plan, request, given)
            if plan is not None and part is not None:
                done = run.convert_part(plan, *_part(part), workers=workers, progress=report)
            elif plan is not None and finish:
                done = run.finish(plan, overwrite=overwrite, workers=workers, progress=report)
            elif plan is not None:
                done = run.make_plan(request, plan, progress=report)
            elif url is not None:
                done = convert_to_url(request, url, dry_run=dry_run, progress=report)
            else:
                done = run.convert(request, dry_run=dry_run, progress=report)
    except KeyboardInterrupt as error:
        raise Interrupted("interrupted; give the same command again to go on, what is finished is kept") from error
    if as_json:
        print_json(done)
    if isinstance(done, run.Part):
        _tell_part(done)
    else:
        _tell(done, dry_run, None if later else plan)


def _regenerated(context: typer.Context, words: Sequence[str], out: Path, workers: int | None) -> list[str]:
    """Replay LIBERO's files; return the settings among the words."""
    from vlaft.cli.arguments import check_output_folder
    from vlaft.cli.console import say, warn
    from vlaft.environments.libero.regeneration import regenerate
    from vlaft.errors import Interrupted, UsageError

    for name in ("part", "finish", "dry_run", "mix"):
        if _is_given(context, name):
            raise UsageError(f"--regenerate replays files before they are converted; leave --{_option(name)} out")
    paths = [word for word in words if "=" not in word or _exists(word)]
    if len(paths) != 1:
        raise UsageError(f"--regenerate takes one folder of LIBERO's files at a time, not {len(paths)} sources")
    overwrite = bool(context.params["overwrite"])
    check_output_folder(context.params["out"], overwrite=overwrite)
    try:
        with _phases() as report:
            done = regenerate(Path(paths[0]), out, workers=workers, overwrite=overwrite, progress=report, told=warn)
    except KeyboardInterrupt as error:
        raise Interrupted("interrupted; give the same command again to go on, what is finished is kept") from error
    kept = [each for each in done.all if each.success]
    again = f" ({done.reused} were replayed before)" if done.reused else ""
    say(
        f"{len(kept)} of {len(done.all)} demonstrations ended in success when replayed and are kept in {out}{again}:"
        f" {sum(each.steps for each in kept):,} steps, without {sum(each.idle for each in kept):,} idle ones"
    )
    for failed in done.failed[:_SHOWN]:
        warn(f"left out {failed}: it did not end in success when it was replayed")
    if len(done.failed) > _SHOWN:
        warn(f"{len(done.failed) - _SHOWN} more did not end in success; {out / 'regeneration.json'} lists them all")
    return [word for word in words if word not in paths]


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")


def _option(name: str) -> str:
    return name.replace("_", "-")


def _check_steps(given: set[str], plan: Path | None, part: str | None, finish: bool) -> None:
    """Refuse options that contradict each other."""
    from vlaft.errors import UsageError

    if part is not None and finish:
        raise UsageError("--part and --finish are two steps; give one of them")
    step = "--part" if part is not None else "--finish" if finish else None
    if step and plan is None:
        raise UsageError(f"{step} belongs to a plan; give --plan FOLDER, or neither to convert all at once")
    if plan is not None and "dry_run" in given:
        raise UsageError("--dry-run writes nothing, and --plan a plan; give one of them")
    if part is not None:
        _part(part)
        if "overwrite" in given:
            raise UsageError("--overwrite belongs to --finish; a part replaces nothing")


def _part(text: str) -> tuple[int, int]:
    """Return number and count for `3/16`."""
    from vlaft.errors import UsageError

    match = re.fullmatch(r"0*(\d{1,9})/0*(\d{1,9})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"--part {text} is no part; write a number and a count, 1/16 to 16/16 for sixteen parts")
    return int(match[1]), int(match[2])


def _check_agrees(plan: Path, request: ConvertRequest, given: set[str]) -> None:
    """Refuse words beside a plan that was made with others; the same ones may be repeated."""
    from vlaft.data.convert.plan_folder import read_plan
    from vlaft.data.convert.planning import settings_of
    from vlaft.errors import UsageError

    words = given - _ANY_STEP - {"overwrite"}
    if not words:
        return
    made, asked = read_plan(plan, (1, 2**31)), settings_of(request)
    if "out" in words and request.out.resolve() != made.out:
        raise UsageError(f"--out {request.out} contradicts {plan}, which is for {made.out}; leave it out")
    if words & {"words", "preset", "name", "weight", "mix"} and asked["sources"] != made.settings["sources"]:
        raise UsageError(
            f"the sources or their settings contradict {plan}, which was made with others; leave them out, or make"
            " another plan"
        )
    for word in sorted(words & asked.keys()):
        if asked[word] != made.settings[word]:
            option = f"--{_option(word)}"
            raise UsageError(
                f"{option} {asked[word]} contradicts {plan}, which was made with {made.settings[word]}; leave it out,"
                " or make another plan"
            )


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
                units = {"reading": "episodes", "replaying": "episodes", "sending": "bytes"}
                unit = units.get(phase.partition(" ")[0], "examples")
                current = (phase, stack.enter_context(progress(phase, total, unit)), 0)
            if done > current[2]:
                current[1](done - current[2])
                current = (phase, current[1], done)

        yield report


def _tell_part(done: Part) -> None:
    from vlaft.cli.console import say

    again = f" ({done.reused} were there already)" if done.reused else ""
    left = f"; {done.damaged} episodes with damaged frames left out" if done.damaged else ""
    say(
        f"part {done.number}/{done.count} of {done.plan}: {done.rows:,} examples, files: {done.shards},"
        f" {done.bytes / 1e6:.1f} MB{again}{left}"
    )


def _tell(done: Conversion, dry_run: bool, plan: Path | None = None) -> None:
    from vlaft.cli.console import say, warn
    from vlaft.data.sentences import folded
    from vlaft.remote import url_of

    for entry in done.skipped[:_SHOWN]:
        warn(f"left out {entry.episode} of {entry.dataset}: {entry.why}")
    if len(done.skipped) > _SHOWN:
        warn(f"{len(done.skipped) - _SHOWN} more episodes were left out; dataset.json lists them all")
    for warning in folded(done.warnings):
        warn(warning)
    counts = ", ".join(
        f"{done.rows[split]:,} examples of {done.episodes[split]} episodes in {split}" for split in done.rows
    )
    if dry_run or plan is not None:
        for source in done.sources:
            _describe(source)
    if dry_run:
        say(f"would write {counts}; nothing was written")
        return
    if plan is not None:
        say(f"{plan}: {counts} in {done.shards} files")
        say(f"next: vlaft convert --plan {plan} --part 1/1, or 1/N to N/N anywhere; then --plan {plan} --finish")
        return
    again = f" ({done.reused} of {done.shards} files were there already)" if done.reused else ""
    out = url_of(done.out) or done.out
    say(f"{counts}; {done.bytes / 1e6:.1f} MB written to {out}{again}")
    say(f"next: vlaft train --recipe lora32 --data {out} --out run/")


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
