"""A folder with the results of an evaluation, a line for each episode as soon as it has ended.

    results/
      evaluation.json   what was asked for
      episodes.jsonl    a line per finished episode: model, task, seed, how it ended
      results.json      the tables' numbers, once everything is there

Killed and started again with `--resume`, the evaluation goes on where it was.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlaft.checksums import UNSEALED, seal_holds, sealed, unsealed
from vlaft.documents import WrongValue, read_as
from vlaft.environments.episodes import EpisodeOutcome
from vlaft.errors import DataError, VlaftError
from vlaft.files import disk_errors, locked, read_json, replaceable, write_json

_REQUEST, _LINES, _RESULTS = "evaluation.json", "episodes.jsonl", "results.json"
_ASIDE = re.compile(r"\.(evaluation|results)\.json\.\d+\.tmp")  # `write_json`'s


@dataclass(frozen=True)
class Entry:
    """One line: an episode of one model.

    Attributes:
        model: as it was named.
        task: the environment's name.
        seed: of the episode.
        instruction: what was to be done.
        success: whether it was.
        ended: what ended it.
        steps: actions taken.
        tokens: that the model predicted for it.
        non_action_tokens: of these.
        info: what the environment said last.
    """

    model: str
    task: str
    seed: int
    instruction: str
    success: bool
    ended: str
    steps: int
    tokens: int
    non_action_tokens: int
    info: Mapping[str, Any] = field(default_factory=dict)

    def outcome(self) -> EpisodeOutcome:
        """Return how the episode went, as it was found."""
        return EpisodeOutcome(
            self.seed, self.instruction, self.task, self.success, self.ended, self.steps, dict(self.info)  # type: ignore[arg-type]
        )  # fmt: skip


class Journal:
    """Lines that are there, and more of them; `opened_journal` makes one."""

    def __init__(self, folder: Path, entries: list[Entry]) -> None:
        self.entries = entries
        self._folder = folder

    def of(self, model: str) -> list[Entry]:
        """Return a model's lines."""
        return [entry for entry in self.entries if entry.model == model]

    def add(self, entry: Entry) -> None:
        """Write a line, and wait until it is on the disk.

        Raises:
            VlaftError: the disk is full or not writable.
        """
        self.entries.append(entry)
        with disk_errors(self._folder), (self._folder / _LINES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(entry), ensure_ascii=False, allow_nan=False, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def finish(self, results: Mapping[str, Any]) -> None:
        """Write the numbers of the whole.

        Raises:
            VlaftError: the disk is full or not writable.
        """
        with disk_errors(self._folder):
            write_json(self._folder / _RESULTS, results)


@contextmanager
def opened_journal(folder: Path, request: Mapping[str, Any], *, resume: bool, overwrite: bool) -> Iterator[Journal]:
    """Lock a folder of results and go on in it, or begin anew.

    Args:
        folder: made where there is none.
        request: JSON-able; what is continued has to have been asked for in the same words.
        resume: keep the episodes that are there.
        overwrite: remove them.

    Raises:
        VlaftError: another process writes there, or the folder holds something and neither is given.
        DataError: what is to be continued was another evaluation, or is damaged.
    """
    with locked(folder), disk_errors(folder):
        if not resume:
            replaceable(folder, overwrite=overwrite)
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if _ASIDE.fullmatch(path.name):  # a kill came while it was written
                path.unlink()
        there = (folder / _REQUEST).is_file()
        if resume and not there and (folder / _LINES).is_file():
            raise DataError(
                f"{folder} holds {_LINES} but not {_REQUEST}, which says of what; give --overwrite to begin anew"
            )
        if not there or not resume:
            foreign = sorted({path.name for path in folder.iterdir()} - {_REQUEST, _LINES, _RESULTS})
            if foreign:
                raise VlaftError(f"{folder} holds {foreign[0]}, which is of no evaluation; name another folder")
            for name in (_RESULTS, _LINES):
                (folder / name).unlink(missing_ok=True)
            write_json(folder / _REQUEST, sealed(request))
        else:
            before = read_json(folder / _REQUEST)
            if seal_holds(before) is False:
                raise DataError(f"{folder / _REQUEST} does not match its checksum; {UNSEALED}")
            _check_same(folder, unsealed(before), json.loads(json.dumps(request)))
        yield Journal(folder, _read(folder / _LINES))


def _check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for key in [*before, *now]:
        if before.get(key) == now.get(key):
            continue
        if key == "weights":
            raise DataError(
                f"{folder}: other weights acted in the episodes there (names, sizes or times of files differ);"
                " give another --out, or --overwrite to begin anew"
            )
        raise DataError(
            f"{folder}: the evaluation there has {key} {json.dumps(before.get(key))}, not"
            f" {json.dumps(now.get(key))}; give the same words to go on, or another --out"
        )


def _read(path: Path) -> list[Entry]:
    """Return the lines of a file; a last one that a kill cut off is removed from it."""
    if not path.is_file():
        return []
    whole, _, cut = path.read_bytes().rpartition(b"\n")
    if cut:
        with path.open("r+b") as file:
            file.truncate(len(whole) + bool(whole))
    entries = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            entries.append(read_as(Entry, json.loads(line)))
        except (ValueError, WrongValue, RecursionError) as error:
            raise DataError(f"{path}, line {number} is damaged ({error}); remove that line") from None
    return entries
