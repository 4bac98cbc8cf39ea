"""What the first pass takes from every episode: its actions, and what else decides how it is converted; no frames.

Episodes are read here for a moment, and from then on by processes, in the order of the sources in any case: what is
found, and the first error, do not depend on their number. What was read is kept in a Parquet file, so that a
conversion that learns later of damaged frames need not read the sources again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vlaft.data.convert.processes import in_processes
from vlaft.data.readers.reader import EpisodeRef
from vlaft.data.sentences import FIRST_SUCH_EPISODE
from vlaft.data.source import MissingInstruction, OpenedSource, SourceRequest, open_request
from vlaft.data.standardize.evidence import Opening, finger_opening
from vlaft.documents import is_text, shown
from vlaft.errors import DataError

PATIENCE = 1.0  # seconds of reading before processes are started, which takes them about as long
_LARGEST_TASK = 32  # episodes that one process reads at a time
_TASKS = 8  # tasks per process, where there are few episodes
_KEPT = 64  # episodes in a row group of the file

Sums = tuple[float, float]  # of magnitudes, and of values by their position


@dataclass(frozen=True)
class Reading:
    """What the first pass takes from one episode of T steps.

    Attributes:
        action: standardized, `[T, A]` float32; None where the episode is damaged.
        state: `[T, S]` float32, or None where there is none.
        opening: `[T]`, see `finger_opening`.
        cameras: names, the main one first.
        texts: its instructions, each once.
        action_names: one per dimension of `action`, or empty.
        fps: control rate in Hz, where it is known.
        damage: why it cannot be used; empty where it can.
        silent: what is wrong is that it does not say what the robot does.
        told: what the reader said of the source while it read the episode.
    """

    action: NDArray[np.float32] | None = None
    state: NDArray[np.float32] | None = None
    opening: Opening | None = None
    cameras: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    action_names: tuple[str, ...] = ()
    fps: float | None = None
    damage: str = ""
    silent: bool = False
    told: tuple[str, ...] = ()

    @property
    def sums(self) -> Sums:
        """By what another reading of the same episode is told from one of changed numbers, on any machine.

        No checksum: processors differ in the last bit of a sine, and actions may be made of rotations.
        """
        parts = [part.reshape(-1) for part in (self.action, self.state) if part is not None]
        values = np.concatenate(parts, dtype=np.float64) if parts else np.zeros(0)
        return float(np.abs(values).sum()), float(values @ np.linspace(1, 2, len(values)))

    def agrees(self, sums: Sums) -> bool:
        """Say whether its numbers are those of the reading that these sums are of."""
        allowed = 1e-6 * (1.0 + sums[0])
        return all(abs(now - then) <= allowed for now, then in zip(self.sums, sums, strict=True))


Readings = Iterator[tuple[int, EpisodeRef, Reading]]  # number of the source, where the episode lies, what was read


def read_actions(
    opened: Sequence[OpenedSource], listed: Sequence[Sequence[EpisodeRef]], requests: Sequence[SourceRequest], *,
    out: Path, workers: int,
) -> Readings:  # fmt: skip
    """Read the actions of all episodes.

    Args:
        opened: the sources.
        listed: the episodes to read of each.
        requests: what opens the sources in another process.
        out: the output, whose lock is held.
        workers: processes, at most.

    Yields:
        The number of the source, where the episode lies, and what was read, in order.
    """
    left = iter([(number, ref) for number, refs in enumerate(listed) for ref in refs])
    total = sum(map(len, listed))
    begun = time.monotonic()
    for done, (number, ref) in enumerate(left, start=1):
        yield number, ref, read_episode(opened[number], ref)
        if workers > 1 and total - done > workers and time.monotonic() - begun > PATIENCE:
            break
    else:
        return
    size = min(_LARGEST_TASK, max(1, (total - done) // (workers * _TASKS)))
    job = _ReadingJob(tuple(requests), out)
    tasks = iter(lambda: list(islice(left, size)), [])
    for found in chain.from_iterable(in_processes(_read_task, tasks, job, workers, ordered=True)):
        number, ref, reading = found
        # not what a damaged episode raises, so it is raised here, as if there had been no other process
        yield number, ref, read_episode(opened[number], ref) if reading is None else reading


@dataclass(frozen=True)
class _ReadingJob:
    requests: tuple[SourceRequest, ...]
    out: Path

    def begin(self) -> Callable[[int], OpenedSource]:
        opened: dict[int, OpenedSource] = {}

        def source(number: int) -> OpenedSource:
            if number not in opened:
                opened[number] = open_request(self.requests[number])
            return opened[number]

        return source


def _read_task(
    source: Callable[[int], OpenedSource], task: Sequence[tuple[int, EpisodeRef]]
) -> list[tuple[int, EpisodeRef, Reading | None]]:
    found: list[tuple[int, EpisodeRef, Reading | None]] = []
    for number, ref in task:
        try:
            found.append((number, ref, read_episode(source(number), ref)))
        except Exception:
            found.append((number, ref, None))
    return found


def read_episode(source: OpenedSource, ref: EpisodeRef) -> Reading:
    """Read all of an episode but its frames; what is wrong with its data is in `damage`."""
    before = len(source.reader.warnings)
    try:
        episode = source.read(ref)
        opening = finger_opening(episode)
    except DataError as error:
        told = tuple(source.reader.warnings[before:])
        return Reading(damage=str(error), silent=isinstance(error, MissingInstruction), told=told)
    return Reading(
        action=episode.action,
        state=episode.state,
        opening=opening,
        cameras=tuple(episode.cameras),
        texts=tuple(dict.fromkeys(episode.step_instructions)),
        action_names=episode.action_names,
        fps=episode.fps,
        told=tuple(source.reader.warnings[before:]),
    )


def merge_told(told: list[str], more: Iterable[str]) -> None:
    """Add what a reader said to what it said before, as one reader would that had read all episodes in order."""
    for sentence in more:
        first_only = sentence.endswith(FIRST_SUCH_EPISODE)
        known = [known.rpartition(", but episode")[0] for known in told] if first_only else told
        if (sentence.rpartition(", but episode")[0] if first_only else sentence) not in known:
            told.append(sentence)


_SCHEMA = pa.schema(
    [
        ("dataset", pa.int32()),
        ("ref", pa.string()),
        ("action", pa.list_(pa.float32())),
        ("action_size", pa.int32()),
        ("state", pa.list_(pa.float32())),
        ("state_size", pa.int32()),
        ("opening", pa.list_(pa.float64())),
        ("cameras", pa.list_(pa.string())),
        ("texts", pa.list_(pa.string())),
        ("action_names", pa.list_(pa.string())),
        ("fps", pa.float64()),
        ("damage", pa.string()),
        ("silent", pa.bool_()),
    ]
)
_ARRAYS = ("action", "state", "opening")


@contextmanager
def keeping(path: Path) -> Iterator[Callable[[int, EpisodeRef, Reading], None]]:
    """Give a function that adds a reading of a source, by its number, to the file `path`."""
    waiting: list[dict[str, Any]] = []
    with pq.ParquetWriter(path, _SCHEMA, compression="zstd") as writer:

        def write() -> None:
            if waiting:
                writer.write_table(pa.Table.from_pylist(waiting, schema=_SCHEMA))
                waiting.clear()

        def keep(number: int, ref: EpisodeRef, reading: Reading) -> None:
            waiting.append(_row(number, ref, reading))
            if len(waiting) == _KEPT:
                write()

        yield keep
        write()


def _row(number: int, ref: EpisodeRef, reading: Reading) -> dict[str, Any]:
    odd = [text for text in reading.texts if not is_text(text)]
    if odd:  # which cannot be kept, nor converted
        reading = Reading(damage=f"the instruction {shown(odd[0])} is no text in UTF-8; write it anew")
    return {
        "dataset": number,
        "ref": written_ref(ref),
        "action": None if reading.action is None else reading.action.reshape(-1),
        "action_size": 0 if reading.action is None else reading.action.shape[1],
        "state": None if reading.state is None else reading.state.reshape(-1),
        "state_size": 0 if reading.state is None else reading.state.shape[1],
        "opening": reading.opening,
        "cameras": reading.cameras,
        "texts": reading.texts,
        "action_names": reading.action_names,
        "fps": reading.fps,
        "damage": reading.damage.encode("utf-8", "backslashreplace").decode(),
        "silent": reading.silent,
    }


def written_ref(ref: EpisodeRef) -> str:
    """Return where an episode lies as text, of which `read_ref` makes it again; a name may hold what is no UTF-8."""
    return json.dumps([ref.index, ref.name, ref.split, *ref.location])


def read_ref(text: str) -> EpisodeRef:
    """Return where an episode lies.

    Raises:
        ValueError: the text is not from `written_ref`.
    """
    index, name, split, *location = json.loads(text)
    return EpisodeRef(index, name, split, tuple(location))


def kept_readings(path: Path) -> Readings:
    """Yield what `keeping` wrote, a row group at a time.

    Raises:
        DataError: the file is damaged.
    """
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_KEPT):
                for number, row in enumerate(batch.drop_columns(list(_ARRAYS)).to_pylist()):
                    yield row["dataset"], read_ref(row["ref"]), _reading(batch, number, row)
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({' '.join(str(error).split())[:100]}); make the plan again") from error


def _reading(batch: pa.RecordBatch, number: int, row: dict[str, Any]) -> Reading:
    def values(name: str) -> NDArray[Any] | None:
        found = batch.column(name)[number]
        return found.values.to_numpy() if found.is_valid else None

    action, state = values("action"), values("state")
    return Reading(
        action=None if action is None else action.reshape(-1, row["action_size"]),
        state=None if state is None else state.reshape(-1, row["state_size"]),
        opening=values("opening"),
        cameras=tuple(row["cameras"]),
        texts=tuple(row["texts"]),
        action_names=tuple(row["action_names"]),
        fps=row["fps"],
        damage=row["damage"],
        silent=row["silent"],
    )
