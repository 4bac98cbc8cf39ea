"""How to write a setting so that a shell and YAML read back what was meant: proposals are typed as they stand."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable
from typing import Any

# Read back as the same text wherever it stands in YAML; whatever else a name may hold goes into quotes.
_PLAIN = re.compile(r"[A-Za-z_][\w.+/-]*(\*[\w.+/-]*)*( [\w.+/-]+)*", re.ASCII)
_NO_TEXT = {"true", "false", "yes", "no", "on", "off", "null", "y", "n", "none"}


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


_FEW = 2  # told one by one


def folded(sentences: Iterable[str]) -> list[str]:
    """Return the sentences in their order, of more than two that differ only in numbers the first with their count.

    >>> folded(["episode 1 is short", "no rate", "episode 2 is short", "episode 3 is short"])
    ['episode 1 is short (and 2 more such warnings, in which only the numbers differ)', 'no rate']
    """
    alike: dict[str, list[str]] = {}
    for sentence in dict.fromkeys(sentences):
        alike.setdefault(re.sub(r"\d+(\.\d+)?", "#", sentence), []).append(sentence)
    told: list[str] = []
    for same in alike.values():
        if len(same) > _FEW:
            same = [f"{same[0]} (and {len(same) - 1:,} more such warnings, in which only the numbers differ)"]
        told += same
    return told
