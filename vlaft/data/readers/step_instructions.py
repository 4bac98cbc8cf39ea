"""The instructions of an episode's steps, which are several where it was recorded as one task after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple


class StepInstructions(NamedTuple):
    """What an `Episode` holds as `instruction` and `instructions`, and a warning, which may be empty."""

    most: str
    own: tuple[str, ...]
    told: str


def gather(texts: Sequence[str], where: str) -> StepInstructions:
    """Return the most frequent of the steps' texts (the earliest of equals), and each step's own where they differ.

    A step without one gets the only one that there is, else the most frequent, with a warning.

    Args:
        texts: T of them, blank where the step has none.
        where: names the episode in the warning.
    """
    counts = Counter(text for text in texts if text.strip())
    if not counts:
        return StepInstructions("", (), "")
    most = counts.most_common(1)[0][0]
    if len(counts) == 1:
        return StepInstructions(most, (), "")
    blank = len(texts) - counts.total()
    told = (
        f"{where}: the rows name {len(counts)} instructions, and {blank} of {len(texts)} none; those get the most"
        f" frequent: '{most[:80]}'"
    )
    own = tuple(text if text.strip() else most for text in texts)
    return StepInstructions(most, own, told if blank else "")
