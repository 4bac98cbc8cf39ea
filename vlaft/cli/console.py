r"""What a person sees (stderr) and what a program reads (stdout), kept apart.

Rich honours NO_COLOR and TERM=dumb itself, and writes no colours to a pipe. Texts of data, files and words may hold
what a terminal takes for commands; it is shown written out (`\x1b`), whatever prints it.
"""

from __future__ import annotations

import functools
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlaft.cli import interrupts

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

PIPE_WIDTH = 400  # columns of a table that goes to a file or pipe: wide enough that no cell is folded
LONGEST_LINE = 2000  # characters of a warning or error; a name in it may be as long as a stranger likes
PLAIN_SECONDS = 10.0  # between two progress lines where there is no terminal

Advance = Callable[..., None]
# Control characters but for line ends and tabs, marks that turn the direction of writing, and halves of pairs, which
# cannot be written at all.
_COMMANDS = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")


def visible(text: str) -> str:
    r"""Return a text with what a terminal would obey written out.

    >>> visible("a\x1b[2Jb"), visible("\u202etxt")
    ('a\\x1b[2Jb', '\\u202etxt')
    """
    return _COMMANDS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


@functools.cache
def _console_class() -> type[Console]:
    from rich.console import Console

    class SafeConsole(Console):
        """A console on which only rich itself commands the terminal."""

        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else segment._replace(text=visible(segment.text))

    return SafeConsole


@functools.cache  # one for all, so that a message written during a progress bar does not tear it
def stderr_console() -> Console:
    """Return the console for people: messages, warnings, progress."""
    return _console_class()(stderr=True, emoji=False)


def stdout_console() -> Console:
    """Return the console for results."""
    return _console_class()(file=sys.stdout, emoji=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def say(text: str) -> None:
    """Print one line for people on stderr: no markup, no folding."""
    stderr_console().print(text, markup=False, highlight=False, soft_wrap=True)


def fail(sentence: str) -> None:
    """Print one line that begins with `error:` on stderr."""
    from rich.text import Text

    stderr_console().print(Text.assemble(("error: ", "bold red"), _one_line(sentence)), soft_wrap=True, highlight=False)


def warn(text: str) -> None:
    """Print one line that begins with `warning:` on stderr."""
    from rich.text import Text

    stderr_console().print(Text.assemble(("warning: ", "yellow"), _one_line(text)), highlight=False, soft_wrap=True)


def _one_line(text: str) -> str:
    """Keep what a text holds from looking like a message of its own, and from burying the others."""
    return text.replace("\n", "\\n") if len(text) <= LONGEST_LINE else f"{_one_line(text[:LONGEST_LINE])} ..."


def show(renderable: RenderableType) -> None:
    """Print a result (a text or a rich table) on stdout."""
    stdout_console().print(renderable, highlight=False, markup=False, soft_wrap=isinstance(renderable, str))


def print_json(value: Any) -> None:
    """Print one JSON document on stdout; numbers that JSON lacks (NaN, infinity) become null."""
    text = json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False)
    # json escapes only what is below a blank; the others stand inside texts, where JSON takes \u009b as well
    written = _COMMANDS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    sys.stdout.write(written + "\n")


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(inner) for inner in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy and torch, without importing either
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@contextmanager
def progress(description: str, total: int | None = None, unit: str = "") -> Iterator[Advance]:
    """Show how far long work has come: a bar on a terminal, a plain line every ten seconds elsewhere.

    Yields:
        `advance(count=1, note="")`, to be called as the work proceeds; the note stands beside the bar.
    """
    console = stderr_console()
    if console.is_terminal:
        yield from _bar(console, description, total, unit)
    else:
        yield from _lines(description, total, unit)


@contextmanager
def bytes_progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how many of `total` bytes are done, in MiB; yields a function that takes the bytes of each piece."""
    done = 0
    with progress(description, total=total // 2**20, unit="MiB") as advance:

        def count(written: int) -> None:
            nonlocal done
            before = done // 2**20
            done += written
            advance(done // 2**20 - before)

        yield count


def _bar(console: Console, description: str, total: int | None, unit: str) -> Iterator[Advance]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit, markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(description, total=total, note="")

        def advance(count: int = 1, note: str = "") -> None:
            interrupts.check()
            bar.update(task, advance=count, note=note)

        yield advance


def _lines(description: str, total: int | None, unit: str) -> Iterator[Advance]:
    started = last = time.monotonic()
    done = 0
    printed = -1

    def line(note: str) -> None:
        nonlocal printed
        printed = done
        count = f"{done}/{total}" if total is not None else f"{done}"
        parts = [f"{description}: {count} {unit}".rstrip(), f"{time.monotonic() - started:.0f} s", note]
        say(", ".join(part for part in parts if part))

    def advance(count: int = 1, note: str = "") -> None:
        nonlocal done, last
        interrupts.check()
        done += count
        if time.monotonic() - last >= PLAIN_SECONDS:
            last = time.monotonic()
            line(note)

    yield advance
    if printed != done:
        line("")
