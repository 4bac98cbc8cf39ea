"""How to say it: settings as a shell and YAML read them back, for they are typed as they stand; like things once."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator
from typing import Any

# Read back as the same text wherever it stands in YAML; whatever else a name may hold goes into quotes.
_PLAIN = re.compile(r"[A-Za-z_][\w.+/-]*(\*[\w.+/-]*)*( [\w.+/-]+)*", re.ASCII)
_NO_TEXT = {"true", "false", "yes", "no", "on", "off", "null", "y", "n", "none"}
FIRST_SUCH_EPISODE = "(told for the first such episode only)"  # ends a sentence that names one of many episodes
_FEW = 2  # sentences alike that are told one by one


def word(key: str, value: Any) -> str:
    r"""Return the word `key=value`, quoted for a POSIX shell.

    >>> word("action", ["cmd/ee_delta", "pose[0:6]"])
    'action=\'[cmd/ee_delta, "pose[0:6]"]\''
    """
    written = flow(value)
    return f"{key}={shlex.quote(written)}" if "'" in written else f"{key}='{written}'"


def flow(value: Any) -> str:
    """Write a value as YAML in one line.

    >>> flow({"b": [1, True, None], "a": "actions_{i}"})
    '{b: [1, true, null], a: "actions_{i}"}'
    """
    if isinstance(value, dict):
        return "{" + ", ".join(f"{flow(key)}: {flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(flow(inner) for inner in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        plain = _PLAIN.fullmatch(value) and value.lower() not in _NO_TEXT
        return value if plain else json.dumps(value, ensure_ascii=False)
    return "null" if value is None else str(value)


def alike(texts: Iterable[str], numbers: str = r"\d+") -> Iterator[list[str]]:
    """Gather texts that differ only in their numbers, as an expression tells these, in the order of the first of each.

    >>> list(alike(["traj_0", "meta", "traj_1"]))
    [['traj_0', 'traj_1'], ['meta']]
    """
    gathered: dict[str, list[str]] = {}
    for text in texts:
        gathered.setdefault(re.sub(numbers, "#", text), []).append(text)
    yield from gathered.values()


def folded(sentences: Iterable[str]) -> list[str]:
    """Return the sentences in their order, of more than two that differ only in numbers the first with their count.

    >>> folded(["episode 1 is short", "no rate", "episode 2 is short", "episode 3 is short"])
    ['episode 1 is short (and 2 more such warnings, in which only the numbers differ)', 'no rate']
    """
    told: list[str] = []
    for same in alike(dict.fromkeys(sentences), r"\d+(\.\d+)?"):
        if len(same) > _FEW:
            same = [f"{same[0]} (and {len(same) - 1:,} more such warnings, in which only the numbers differ)"]
        told += same
    return told
