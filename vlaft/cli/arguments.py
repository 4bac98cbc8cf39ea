"""Options and arguments that several verbs share, so that they look and mean the same everywhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from vlaft.errors import UsageError

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
Recipe = Annotated[str | None, typer.Option("--recipe", help="Name of a shipped recipe, or path of a recipe file.")]
ConfigFiles = Annotated[
    list[Path] | None, typer.Option("--config", help="YAML file laid over the recipe; may be given again.")
]
Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Settings of the recipe, such as train.batch_size=4.", show_default=False
    ),
]
PolicyWords = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[policy.KEY=VALUE]...",
        help="What a folder of OpenVLA-OFT's does not tell, such as policy.chunk=8.",
        show_default=False,
    ),
]
Data = Annotated[
    list[Path] | None, typer.Option("--data", help="Folder that `vlaft convert` wrote; may be given again.")
]
Base = Annotated[str | None, typer.Option("--base", help="Checkpoint folder or Hub id of the model to start from.")]
Out = Annotated[Path, typer.Option("--out", help="Folder to write.", show_default=False)]
Resume = Annotated[bool, typer.Option("--resume", help="Continue what is in the output folder.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in the output folder.")]
GpuMemory = Annotated[
    str | None, typer.Option("--gpu-memory", help="Memory of the GPU, such as 24GB or 22.5GiB.", show_default=False)
]
CenterCrop = Annotated[
    bool | None,
    typer.Option(
        "--center-crop/--no-center-crop",
        help="Act on the central 90 % of frames, as after training on crops; by default as the checkpoint says.",
        show_default=False,
    ),
]
Resize = Annotated[
    str | None,
    typer.Option("--resize", help="Filter for frames: lanczos or bicubic; by default as the checkpoint says."),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_BINARY_UNITS = {"k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}
_SIZE = re.compile(r"\s*(?P<number>\d+(?:\.\d+)?)\s*(?P<prefix>[kmgt]?)(?P<binary>i?)b?\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return a number of bytes for `24GB` (1e9), `22.5GiB` (2^30) or `24000000000`.

    >>> parse_size("24GB"), parse_size("1.5 GiB"), parse_size("8g")
    (24000000000, 1610612736, 8000000000)

    Raises:
        UsageError: the text is no size.
    """
    match = _SIZE.fullmatch(text)
    if match is None or (match["binary"] and not match["prefix"]) or float(match["number"]) == 0:
        raise UsageError(f"'{text}' is no memory size; write a number and a unit, such as 24GB or 22.5GiB")
    units = _BINARY_UNITS if match["binary"] else _UNITS
    return int(float(match["number"]) * units[match["prefix"].lower()])


def parse_policy(words: list[str] | None) -> dict[str, Any]:
    """Return `{"chunk": 8}` for `policy.chunk=8`: what is said of a policy on a command line.

    Raises:
        ConfigError: a word is no setting of a policy, or holds what it cannot.
    """
    if not words:
        return {}
    from vlaft.recipe.resolve import given_policy, parse_word

    return given_policy({key: value for word in words for key, value in parse_word(word).items()})


def check_output_folder(folder: Path, *, overwrite: bool, resume: bool = False) -> None:
    """Refuse an output folder that holds something, unless the user said what to do with it, or that cannot be made.

    This is said before anything heavy is imported; whoever writes looks again, alone.

    Raises:
        UsageError: both `--resume` and `--overwrite` are given.
        VlaftError: the folder is not empty and neither is given, or no folder can be made there.
    """
    from vlaft.files import replaceable, restored

    if overwrite and resume:
        raise UsageError("--resume and --overwrite contradict each other; give one of them")
    restored(folder)
    if not (resume and folder.is_dir() and any(folder.iterdir())):  # what is continued need not be replaced
        replaceable(folder, overwrite=overwrite)
