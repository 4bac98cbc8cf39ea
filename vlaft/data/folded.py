"""Many sentences that say the same of different episodes, told as one with a count."""

from __future__ import annotations

import re
from collections.abc import Iterable

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
