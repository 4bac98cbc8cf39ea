"""The command line's frame: the verbs, the global options, and what the user sees when something goes wrong.

Verbs are imported here, so their modules must be light: what is heavy (torch, transformers, pyarrow) is imported
inside their functions, and `vlaft --help` stays fast.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated, TextIO

import typer

from vlaft.cli import (
    convert,
    demo,
    doctor,
    evaluate,
    export,
    inspect,
    interrupts,
    merge,
    plot,
    predict,
    recipes,
    record,
    report,
    serve,
    train,
)
from vlaft.cli.console import fail
from vlaft.documents import is_text
from vlaft.errors import Assumed, ConfigError, Fetching, Unchecked, VlaftError
from vlaft.version import __version__

app = typer.Typer(
    name="vlaft",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(recipes.app, name="recipes")
app.command("demo")(demo.demo)
app.command("record")(record.record)
app.command("convert")(convert.convert)
app.command("inspect")(inspect.inspect)
app.command("report")(report.report)
app.command("doctor")(doctor.doctor)
app.command("train")(train.train)
app.command("merge")(merge.merge)
app.command("export")(export.export)
app.command("evaluate")(evaluate.evaluate)
app.command("plot")(plot.plot)
app.command("predict")(predict.predict)
app.command("serve")(serve.serve)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vlaft {__version__}")
        raise typer.Exit


@app.callback()
def vlaft(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of known errors too (or set VLAFT_DEBUG=1).")
    ] = False,
) -> None:
    """Adapt an OpenVLA model to a new robot from 10 to 150 demonstrations."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 user error, 2 usage, 3 a check failed, 130 interrupted.

    Known errors become sentences on stderr; anything else is a defect and keeps its traceback.
    """
    with interrupts.interruptible():
        return _run(arguments)


def _run(arguments: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words or os.environ.get("VLAFT_DEBUG", "0") not in ("", "0")
    words = [word for word in words if word != "--debug"]  # accepted after the verb as well
    if odd := [word for word in words if not is_text(word)]:
        fail(f"'{odd[0]}' is no text in UTF-8, in which paths and instructions are kept; write it in UTF-8")
        return 1
    with warnings.catch_warnings():
        _tell_what_is_taken_on_trust()
        return _run_words(words, debug)


def _tell_what_is_taken_on_trust() -> None:
    """Show what cannot be checked, or is assumed, as sentences, each once; all other warnings stay as they are."""
    show, told = warnings.showwarning, set[str]()

    def show_warning(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not issubclass(category, Unchecked | Assumed | Fetching):
            show(message, category, filename, lineno, file, line)
        elif str(message) not in told:
            from vlaft.cli.console import say, warn

            told.add(str(message))
            (warn if issubclass(category, Unchecked) else say)(str(message))

    warnings.simplefilter("always", Unchecked)
    warnings.simplefilter("always", Assumed)
    warnings.showwarning = show_warning


def _run_words(words: list[str], debug: bool) -> int:
    try:
        # `obj` is how a command that runs other commands (`demo`) gets at them without importing this module
        result = app(words or ["--help"], prog_name="vlaft", standalone_mode=False, obj=main)
        sys.stdout.flush()  # a closed pipe must show here, not while the interpreter shuts down
    except VlaftError as error:
        if debug:
            traceback.print_exc()
        problems = error.problems if isinstance(error, ConfigError) else [str(error)]
        for problem in problems:
            fail(problem)
        return error.exit_code
    except typer.TyperException as error:  # an unknown option, a missing argument, a value of the wrong type
        fail(_usage_sentence(error, words))
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        fail("interrupted")
        return 130
    except BrokenPipeError:  # `vlaft recipes | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a file that may not be read, a disk that fails: what no verb has words of its own for
        if error.filename is None:
            raise
        if debug:
            traceback.print_exc()
        fail(f"{error.filename}: cannot be read or written ({error.strerror})")
        return 1
    except Exception:
        if not interrupts.was_interrupted():  # some packages make an ImportError of an interrupted import
            raise
        fail("interrupted")
        return 130
    if result == 130:
        fail("interrupted")
    return result if isinstance(result, int) else 0


def _usage_sentence(error: typer.TyperException, words: Sequence[str]) -> str:
    """Tell those who type `--train.steps=4` that settings are plain words; name the help page to all others."""
    message = error.format_message()
    for word in words:
        key = word.partition("=")[0]
        if key.startswith("--") and "." in key and key in message:
            return f"'{word}' is no option; write key=value, no dashes: {word.lstrip('-')}"
    context = getattr(error, "ctx", None)
    return f"{message} (see '{context.command_path} --help')" if context else message
