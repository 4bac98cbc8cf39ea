"""What studies of several trainings have in common: a folder that they go on in, and sentences about intervals."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from vlaft.cli.console import fail
from vlaft.demo.results import overlapping
from vlaft.demo.steps import StepFailed
from vlaft.errors import ConfigError, VlaftError
from vlaft.files import output_file


def begin(out: Path, asked: Mapping[str, float | list[float]], kind: str) -> None:
    """Write down what was asked for; a study goes on only with the same.

    Args:
        out: folder of the study.
        asked: option to number, or to several.
        kind: what the folder is to hold, for the sentence.

    Raises:
        ConfigError: the folder holds something else, or a study of other numbers.
    """
    file = out / "asked.json"
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        if before != asked:
            words = " ".join(
                f"--{key} {' '.join(map(str, value)) if isinstance(value, list) else value}"
                for key, value in before.items()
            )
            raise ConfigError(f"{out} was begun with {words}: go on with these, or give another --out")
        return
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out} holds something else than a {kind}; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    with output_file(file) as partial:
        partial.write_text(json.dumps(asked) + "\n", encoding="utf-8")


def run(study: Callable[[], str]) -> int:
    """Print what a study found; return the exit code: 0 done, 1 user error, 130 interrupted, or a failed command's."""
    try:
        print(study())
    except StepFailed as failed:
        return failed.exit_code
    except VlaftError as error:
        fail(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def told_apart(
    one: str, first: tuple[float, float], other: str, second: tuple[float, float], *, first_is_better: bool
) -> str:
    """Say whether two intervals tell two policies apart.

    Args:
        one: name of a policy.
        first: its interval.
        other: name of another.
        second: its interval.
        first_is_better: whether the first one's mean is higher.
    """
    if overlapping(first, second):
        return f"{one} and {other}: their intervals overlap, so that nothing is decided."
    better, worse = (one, other) if first_is_better else (other, one)
    return f"{better} succeeds more often than {worse}: their intervals do not overlap."
