"""Every verb that writes, killed, stopped and started twice at many moments: what is there is old, new or goes on.

    pytest -m slow tests/test_known_faults.py                  # 100 kills per verb; VLAFT_KILLS=20 for a first look

The counts of each verb are printed. Kills come at filesystem events (`faults`), evenly spread over the command, and at
moments of the clock where a command has fewer events than kills are wanted.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from faults import tell
from verbs import CASES, VERBS, Case, End, content, forked, import_all, make, spread, together

KILLS = int(os.environ.get("VLAFT_KILLS", "100"))  # per verb
STOPS = max(KILLS // 4, 4)  # by SIGTERM, per verb
RACES = max(KILLS // 10, 2)  # of two processes, per verb

Content = dict[str, Any]


class Tried:
    """A case, what lies in its folder before and after, and what has been counted."""

    def __init__(self, case: Case, made: Path, place: Path, counts: Counter[str]) -> None:
        self.case, self.made, self.place, self.counts = case, made, place, counts
        self._good: set[int] = set()  # what was left, where the same command was seen to go on from
        case.prepare(made, place)
        self.before = self.now()
        import_all(self.run)
        case.prepare(made, place)
        end = forked(self.run, place)
        assert end.code == 0 and "Traceback" not in end.told, end.told
        self.moments, self.seconds, self.after = end.moments, end.seconds, self.now()
        assert not [name for name in self.after if name.startswith(".")]
        case.prepare(made, place)

    def run(self) -> int:
        return self.case.run(self.made, self.place)

    def now(self) -> Content:
        return content(self.place, self.case.ignored)

    def disturb(self, fault: str, at: int = 0, after: float | None = None) -> None:
        """Disturb one run, look at what it leaves, give the command again, and look again."""
        self.case.prepare(self.made, self.place)
        end = forked(self.run, self.place, fault, at, after)
        told = f"{self.case.name}, {fault} at {at or after} of {self.moments}: {end.code}\n{end.told}"
        assert "Traceback" not in end.told, told
        left = self.now()
        if fault == "term":
            self.look_stopped(end, left, told)
        if end.code not in (-9, 130):
            self.counts["ended before"] += 1
            assert end.code == 0, told
            return
        self.counts[fault] += 1
        shown = self.look(left, told)
        self.counts["left old" if shown == self.before else "left new" if shown == self.after else "left between"] += 1
        state = hash(repr(sorted((name, value) for name, value in left.items() if not name.endswith(".lock"))))
        if state in self._good or (shown == self.after and not self.case.overwrites):
            self.counts["goes on (seen)"] += 1
            return
        again = forked(lambda: self.case.run(self.made, self.place, again=True))
        assert again.code == 0 and "Traceback" not in again.told, told + again.told
        differ = _differ(self.now(), self.after)
        assert not differ, (told, sorted(differ))
        self._good.add(state)
        self.counts["goes on"] += 1

    def look(self, left: Content, told: str) -> Content:
        """See that nothing half-written looks whole and nothing old is lost; return what the user sees."""
        shown = {name: value for name, value in left.items() if not name.startswith((".", *self.case.kept))}
        shown = {name: value for name, value in shown.items() if not any(part[0] == "." for part in Path(name).parts)}
        if self.case.parts:
            for name, value in shown.items():
                if not name.endswith(self.case.growing):
                    assert value in (self.before.get(name), self.after.get(name)), (told, name)
        else:
            assert shown in (self.before, self.after, {}), (told, sorted(shown))
            if not shown and self.before:
                old = {
                    name.removesuffix(".old")[1:]: None for name in left if name.endswith(".old") and "/" not in name
                }
                assert set(old) == {name for name in self.before if "/" not in name}, told
                for name in old:
                    assert content(self.place / f".{name}.old") == _below(self.before, name), told
        return shown

    def look_stopped(self, end: End, left: Content, told: str) -> None:
        hidden = [name for name in left if any(part[0] == "." for part in Path(name).parts)]
        hidden = [name for name in hidden if not name.startswith(self.case.kept or ("\0",))]
        assert not hidden, (told, hidden)
        if end.code:
            assert end.code == 130 and len(end.errors) == 1, told

    def race(self) -> None:
        """Start the command twice at once: one ends well, the other well or in a sentence."""
        self.case.prepare(self.made, self.place)
        ends = together(self.run, self.run)
        told = "\n".join(f"{self.case.name}, one of two: {end.code}\n{end.told}" for end in ends)
        assert {end.code for end in ends} <= {0, 1} and 0 in {end.code for end in ends}, told
        assert "Traceback" not in told, told
        for end in ends:
            assert len(end.errors) == end.code, told
            self.counts["refused" if end.code else "done"] += 1
        assert not _differ(self.now(), self.after), told
        self.counts["race"] += 1


def _differ(one: Content, other: Content) -> set[str]:
    return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}


def _below(whole: Content, name: str) -> Content:
    return {key.removeprefix(f"{name}/"): value for key, value in whole.items() if key.startswith(f"{name}/")}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make(folder)
    return folder


_COLUMNS = ("moments", "kill", "term", "race", "ended before", "left old", "left between", "left new", "refused")


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_killed_stopped_and_started_twice(
    verb: str, made: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    counts = Counter[str]()
    cases = [case for case in CASES if case.verb == verb]
    shares = [KILLS * (n + 1) // len(cases) - KILLS * n // len(cases) for n in range(len(cases))]
    for case, share in zip(cases, shares, strict=True):
        tried = Tried(case, made, tmp_path / "place", counts)
        counts["moments"] += tried.moments
        wanted = counts["kill"] + share
        for at in spread(share, tried.moments):
            tried.disturb("kill", at)
        number = 0
        while counts["kill"] < wanted:  # the clock's moments, denser and denser
            tried.disturb("kill", after=tried.seconds * ((number * 0.618034) % 1.0))
            number += 1
            assert number < 20 * KILLS
        for at in spread(max(STOPS // len(cases), 2), tried.moments):
            tried.disturb("term", at)
        for _ in range(max(RACES // len(cases), 1)):
            tried.race()
    tell(request.config, f"{verb}: " + ", ".join(f"{counts[name]} {name}" for name in _COLUMNS))


def test_the_harness_itself(tmp_path: Path) -> None:
    """One small case at each of its moments; and a command that writes in place is found out."""
    (case,) = [case for case in CASES if case.verb == "recipes copy"]
    counts = Counter[str]()
    tried = Tried(case, tmp_path / "made", tmp_path / "place", counts)
    for at in range(1, tried.moments + 1):
        tried.disturb("kill", at)
    tried.disturb("term", tried.moments // 2)
    tried.race()
    assert counts["kill"] == tried.moments > 5 and counts["term"] == counts["race"] == 1

    class InPlace(Tried):
        def run(self) -> int:
            with (self.place / "mine.yaml").open("w") as file:
                file.write("half")
                file.flush()
                (self.place / "more").mkdir()
                (self.place / "more").rmdir()
                file.write("whole")
            return 0

    shutil.rmtree(tmp_path / "place")
    sloppy = InPlace(case, tmp_path / "made", tmp_path / "place", counts)
    with pytest.raises(AssertionError):
        for at in range(1, sloppy.moments + 1):
            sloppy.disturb("kill", at)
