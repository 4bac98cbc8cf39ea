"""`vlaft record`: demonstrations of scripted experts in the simulators."""

from __future__ import annotations

from typing import Annotated

import typer

from vlaft.cli.arguments import AsJson, Out, Overwrite


def record(
    envs: Annotated[
        list[str],
        typer.Argument(
            metavar="ENV...", help="tabletop, metaworld:TASK, libero:SUITE:INDEX, or several.", show_default=False
        ),
    ],
    out: Out,
    episodes: Annotated[int, typer.Option("--episodes", help="Successful episodes of each task.", min=1)] = 50,
    seed: Annotated[int, typer.Option("--seed", help="Of the first episode; the others follow.", min=0)] = 100_000,
    disturb: Annotated[
        float | None,
        typer.Option(
            "--disturb",
            help="Share of steps at which the robot is knocked aside, so that demonstrations show how to come back.",
            min=0,
            show_default=False,
        ),
    ] = None,
    pad_action: Annotated[
        bool, typer.Option("--pad-action", help="Write OpenVLA's seven numbers instead of the simulator's own.")
    ] = False,
    fast_render: Annotated[
        bool,
        typer.Option("--fast-render", help="LIBERO without smooth edges and reflections, unlike evaluate."),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", help="Processes, 0 for none; by default by the environment.", min=0, show_default=False
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Record demonstrations of a scripted expert as a LeRobot v3.0 dataset.

    Failures are left out and counted. Killed and started again, the same command goes on where it was.

    Example: vlaft record metaworld:push-v3 --episodes 50 --out demos/
    """
    from vlaft.cli.arguments import check_output_folder
    from vlaft.cli.console import print_json, progress, say, warn
    from vlaft.environments.recording import RecordRequest, tasks_to_record
    from vlaft.environments.recording import record as run
    from vlaft.errors import Interrupted

    check_output_folder(out, overwrite=overwrite)
    request = RecordRequest(
        tuple(envs),
        out,
        episodes=episodes,
        seed=seed,
        disturbed=disturb,
        pad=pad_action,
        fast_render=fast_render,
        workers=workers,
        overwrite=overwrite,
    )
    tasks = tasks_to_record(request)
    try:
        with progress(f"recording {', '.join(envs)}", total=episodes * len(tasks), unit="episodes") as advance:
            done = run(request, advance=advance, told=warn)
    except KeyboardInterrupt as error:
        raise Interrupted("interrupted; give the same command again to go on, what is finished is kept") from error
    if as_json:
        print_json(done)
    if fast_render:
        warn(
            "drawn without smooth edges and reflections (--fast-render), unlike what evaluate shows: for demonstrations"
            " of your own, never beside upstream's; meta/recording.json says so too"
        )
    failed = sum(done.failures.values())
    left_out = f"; {failed} of {failed + done.episodes} failed and were left out" if failed else ""
    kept = f" ({done.reused} were there already)" if done.reused else ""
    say(f"{done.episodes} episodes, {done.steps:,} steps written to {done.out}{kept}{left_out}")
    say(f"next: vlaft inspect {done.out}")
