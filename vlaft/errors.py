"""What can go wrong in a way that we know, each with the exit code that the command line documents.

Every message is one sentence for the user: which file, episode, step or key, and what to do about it.
Anything that is not a `VlaftError` is a defect of vlaft and keeps its traceback. Imports nothing heavy.
"""

from __future__ import annotations


class VlaftError(Exception):
    """A known error; its text is the sentence that the user reads."""

    exit_code = 1


class InUse(VlaftError):
    """Another process writes to an output."""


class UsageError(VlaftError):
    """The command was typed wrongly (options that contradict each other)."""

    exit_code = 2


class CheckFailed(VlaftError):
    """A check that the user asked for, or that guards a result, did not hold."""

    exit_code = 3


class Interrupted(VlaftError):
    """Ctrl-C or SIGTERM, after what there was has been saved."""

    exit_code = 130


class DataError(VlaftError):
    """A dataset is missing, damaged, or lacks what was asked of it."""


class SourceChanged(VlaftError):
    """Data are not those any more that something was decided on: nothing that may be skipped as damaged."""


class ConfigError(VlaftError):
    """A recipe or setting is wrong; all problems of one call are told together."""

    def __init__(self, problems: list[str] | str) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class CheckpointError(VlaftError):
    """A checkpoint or adapter is missing, damaged, or does not fit what it is used with."""


class Unchecked(UserWarning):
    """Something is used without a check, because what wrote it left nothing to check it by; told once."""


class Assumed(UserWarning):
    """What nobody said is taken to be so, for a reason that is given; told once."""


class Fetching(UserWarning):
    """Something is fetched from elsewhere before it is read; told once, with its size and where it comes to lie."""


class MissingExtra(VlaftError):
    """A feature needs a package that is not installed."""

    def __init__(self, feature: str, package: str, extra: str) -> None:
        super().__init__(f"{feature} needs {package}: pip install 'vlaft[{extra}]'")


def did_you_mean(word: str, known: list[str]) -> str:
    """Return `"; did you mean 'x'?"` for the known word nearest to `word`, or an empty string.

    >>> did_you_mean("train.batchsize", ["train.batch_size", "train.steps"])
    "; did you mean 'train.batch_size'?"
    >>> did_you_mean("zzz", ["train.steps"])
    ''
    """
    from difflib import get_close_matches

    near = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""
