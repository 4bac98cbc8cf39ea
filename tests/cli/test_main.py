"""The frame of the command line: exit codes, sentences, pipes, colours, shared options, and what it imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from repository import ROOT

from vlaft import __version__
from vlaft.cli import console
from vlaft.cli import main as frame
from vlaft.cli.arguments import Settings, check_output_folder, parse_size
from vlaft.cli.main import main
from vlaft.errors import CheckFailed, ConfigError, DataError, Interrupted, UsageError, VlaftError
from vlaft.recipe.resolve import resolve
from vlaft.recipe.settings import RecipeConfig


def run(*words: str, code: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "vlaft"]
    clean = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "VLAFT_DEBUG")}
    return subprocess.run(
        [*command, *words], capture_output=True, text=True, timeout=60, cwd=ROOT, env={**clean, **environment}
    )


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that gives the command line a verb `probe` that raises or returns what it is told."""

    def install(outcome: object) -> None:
        app = typer.Typer(pretty_exceptions_enable=False)

        @app.callback()
        def root() -> None:
            pass

        @app.command()
        def probe(words: Settings = None) -> object:
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome(words) if callable(outcome) else outcome

        monkeypatch.setattr(frame, "app", app)

    return install


HEAVY = ("torch", "transformers", "peft", "numpy", "pyarrow", "h5py", "av", "omegaconf")


@pytest.mark.parametrize("words", [["--help"], ["recipes", "--help"], ["recipes"]])
def test_light_commands_import_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys; from vlaft.cli.main import main; result = main(sys.argv[1:]);"
        f"print([name for name in {HEAVY[:-1]} if name in sys.modules], result, file=sys.stderr)"
    )
    done = run(*words, code=code)
    assert done.stderr == "[] 0\n" and done.stdout


def test_resolving_a_recipe_does_not_import_torch() -> None:
    code = "import sys; from vlaft.recipe.resolve import resolve; resolve('lora32'); print('torch' in sys.modules)"
    assert run(code=code).stdout == "False\n"


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vlaft {__version__}\n"
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "recipes" in text and "--debug" in text
    assert main([]) == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (VlaftError("a [b] c"), 1, "error: a [b] c\n"),
        (DataError("x" * 300), 1, f"error: {'x' * 300}\n"),
        (UsageError("both"), 2, "error: both\n"),
        (CheckFailed("no"), 3, "error: no\n"),
        (Interrupted("saved step 3"), 130, "error: saved step 3\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (ConfigError(["one", "two"]), 1, "error: one\nerror: two\n"),
    ],
)
def test_known_errors_are_sentences(
    verb: Any, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, text: str
) -> None:
    verb(error)
    assert main(["probe"]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.strip() == text.strip()


def test_unknown_errors_keep_their_traceback(verb: Any) -> None:
    verb(ZeroDivisionError("defect"))
    with pytest.raises(ZeroDivisionError):
        main(["probe"])


@pytest.mark.parametrize("words", [["--debug", "probe"], ["probe", "--debug"]])
def test_debug_shows_the_traceback_and_keeps_the_code(
    verb: Any, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    verb(CheckFailed("no"))
    assert main(words) == 3
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.endswith("error: no\n")


def test_debug_by_environment(verb: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    verb(DataError("no"))
    monkeypatch.setenv("VLAFT_DEBUG", "1")
    assert main(["probe"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_usage_errors_are_two(capsys: pytest.CaptureFixture[str]) -> None:
    for words, part in (
        (["nonsense"], "No such command 'nonsense'"),
        (["recipes", "show"], "Missing argument 'name'. (see 'vlaft recipes show --help')"),
        (["recipes", "list", "--jsn"], "No such option: --jsn"),
    ):
        assert main(words) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and part in err and "Traceback" not in err


def test_dashed_settings_are_explained(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    verb(None)
    assert main(["probe", "--train.steps=4"]) == 2
    assert capsys.readouterr().err == (
        "error: '--train.steps=4' is no option; write key=value, no dashes: train.steps=4\n"
    )


def test_settings_are_collected_after_the_options(verb: Any) -> None:
    seen: list[RecipeConfig] = []
    verb(lambda words: seen.append(resolve(words=words)))
    assert main(["probe", "train.steps=4", "adapt.lora.rank=8"]) == 0
    assert (seen[0].train.steps, seen[0].adapt.lora.rank) == (4, 8)


def test_a_closed_pipe_is_quiet() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "vlaft", "recipes"],
            stdout=closed, stderr=subprocess.PIPE, text=True, timeout=60, cwd=ROOT,
        )  # fmt: skip
    assert done.stderr == "" and done.returncode == 1


def test_no_color_is_honoured() -> None:
    terminal = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    assert "\x1b[" in run("recipes", "show", "x", **terminal).stderr
    assert "\x1b[31m" not in run("recipes", "show", "x", NO_COLOR="1", **terminal).stderr
    assert "\x1b[" not in run("recipes", "show", "x").stderr


def test_json_is_json_whatever_it_holds(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json(
        {"array": np.array([1.0, np.nan], np.float32), "path": Path("a"), 3: float("inf"), "recipe": RecipeConfig()}
    )
    out, err = capsys.readouterr()
    value = json.loads(out)
    assert value["array"] == [1.0, None] and value["path"] == "a" and value["3"] is None
    assert value["recipe"]["train"]["betas"] == [0.9, 0.999]
    assert err == ""


def test_progress_is_plain_lines_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "PLAIN_SECONDS", 0.0)
    with console.progress("reading", total=2, unit="episodes") as advance:
        advance()
        advance(note="loss 0.5")
    out, err = capsys.readouterr()
    assert err.splitlines() == ["reading: 1/2 episodes, 0 s", "reading: 2/2 episodes, 0 s, loss 0.5"]
    assert out == ""


def test_progress_ends_with_the_count(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("reading") as advance:
        advance(5)
    assert capsys.readouterr().err == "reading: 5, 0 s\n"


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 10**9), ("22.5GiB", 45 * 2**29), ("8g", 8 * 10**9), ("512 MB", 512 * 10**6), ("1000", 1000)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "lots", "-3GB", "0GB", "3XB", "3iB", "1e9"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="no memory size"):
        parse_size(text)


def test_output_folders(tmp_path: Path) -> None:
    check_output_folder(tmp_path, overwrite=False)
    check_output_folder(tmp_path / "absent", overwrite=False)
    (tmp_path / "file").write_text("x")
    with pytest.raises(VlaftError, match="is not empty"):
        check_output_folder(tmp_path, overwrite=False)
    check_output_folder(tmp_path, overwrite=True)
    check_output_folder(tmp_path, overwrite=False, resume=True)
    with pytest.raises(UsageError, match="contradict"):
        check_output_folder(tmp_path, overwrite=True, resume=True)
    with pytest.raises(VlaftError, match="is a file"):
        check_output_folder(tmp_path / "file", overwrite=True)


VERBS = {
    "convert": ["convert", "nowhere", "--overwrite"],
    "train": ["train", "--overwrite"],
    "merge": ["merge", "nowhere", "--overwrite"],
    "export": ["export", "nowhere", "--overwrite"],
    "demo": ["demo", "--overwrite"],
}


@pytest.mark.parametrize("words", VERBS.values(), ids=VERBS.keys())
@pytest.mark.parametrize(
    ("out", "told"),
    [
        (".", "is the folder that this command runs in, which cannot be replaced"),
        ("file", "is a file"),
        ("file/x", "file is a file"),
        ("loop", "leads through links in a circle"),
        ("x" * 300, "File name too long"),
    ],
)
def test_outputs_that_cannot_be(
    words: list[str],
    out: str,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    assert main([*words, "--out", out]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and told in err and err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def test_an_instruction_that_is_longer_than_any_path() -> None:
    from vlaft.cli.convert import _sources

    [source] = _sources(["none.hdf5", f"instruction={'push ' * 100}it"], [], [], [])
    assert (source.path, source.layout) == (Path("none.hdf5"), {"instruction": f"{'push ' * 100}it"})


def test_a_word_that_is_no_utf8_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "model", "--image", "x.png", "--instruction", "push \udcff"]) == 1
    told = capsys.readouterr().err
    assert "error: 'push \\udcff' is no text in UTF-8" in told and "Traceback" not in told


@pytest.mark.parametrize("device", ["meta", "mps", "nothing", "cuda:99"])
def test_a_device_that_computes_nothing(device: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    words = ["predict", str(tmp_path), "--image", str(tmp_path / "x.png"), "--instruction", "push", "--device", device]
    assert main(words) == 2
    assert f"--device {device}: " in capsys.readouterr().err


def test_a_base_whose_path_has_an_apostrophe(tmp_path: Path) -> None:
    from vlaft.cli.train import resolve_recipe

    for name in ("anna's base", 'a "b" \\c', "x: [y", "#z"):
        recipe = resolve_recipe("lora8", None, None, [tmp_path / name], str(tmp_path / name))
        assert (recipe.base, recipe.data.paths) == (str(tmp_path / name), [str(tmp_path / name)])


def test_a_file_that_the_system_refuses_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(5, "Input/output error", "/data/x.yaml")

    monkeypatch.setattr("vlaft.recipe.resolve.find_recipe", refuse)
    assert main(["recipes", "show", "lora8"]) == 1
    assert capsys.readouterr().err == "error: /data/x.yaml: cannot be read or written (Input/output error)\n"


def test_texts_of_data_do_not_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    from vlaft.cli.console import fail, print_json, say, show, stderr_console, warn

    stderr_console.cache_clear()  # bound to the stream of an earlier test
    text = "a\x1b[2Jb\x9b31mc\u202ed\ud800e\x07"
    written = "a\\x1b[2Jb\\x9b31mc\\u202ed\\ud800e"
    table = Table(box=None)
    table.add_column(text)
    table.add_row(text)
    for tell in (say, warn, fail):
        tell(text)
    show(text)
    show(table)
    print_json({text: text})
    streams = capsys.readouterr()
    assert streams.err.count(written) == 3 and streams.out.count(written) == 1
    assert json.loads(streams.out[streams.out.index("{") :]) == {text: text}
    for sign in "\x1b\x9b\u202e\x07":
        assert sign not in streams.out + streams.err
    warn("one\nerror: two")
    fail("x" * 5000)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "warning: one\\nerror: two"
    assert len(second) < 2100 and second.endswith("xxx ...")
