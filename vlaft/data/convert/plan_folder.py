"""A plan on disk: all that parts of a conversion and its end have to know, so that neither needs the base.

plan.json         what was asked for and found, sealed; written last, so what has it is whole
episodes.parquet  every episode to convert, and its shard: a part reads the rows of its own
prompts.parquet   the prompt ids of every instruction
readings.parquet  the actions of every episode, for a conversion that meets damaged frames
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlaft.action.statistics import check_statistics
from vlaft.action.tokens import ActionTokenizer
from vlaft.checksums import UNSEALED, checksum, seal_holds, sealed
from vlaft.data.convert.plan import OnError, PlannedEpisode, ShardPlan, Survey, SurveyedSource, SurveyRules
from vlaft.data.convert.reading import read_ref, written_ref
from vlaft.data.source import SourceRequest
from vlaft.data.store import FORMAT_VERSION
from vlaft.documents import WrongValue, read_as, shown
from vlaft.errors import CheckpointError, ConfigError, DataError
from vlaft.files import read_json, write_json
from vlaft.observation.images import ImagePipeline
from vlaft.version import __version__

PLAN_FILE = "plan.json"
READINGS_FILE = "readings.parquet"
_EPISODES_FILE = "episodes.parquet"
_PROMPTS_FILE = "prompts.parquet"
_VERSION = 2
_GROUP = 10_000  # rows that are written, or left out by a part, together

_EPISODES = pa.schema(
    [
        ("shard", pa.int32()),
        ("file", pa.string()),
        ("split", pa.string()),
        ("dataset", pa.int32()),
        ("ref", pa.string()),
        ("index", pa.int64()),
        ("rows", pa.int64()),
        ("sums", pa.list_(pa.float64(), 2)),
    ]
)
_SHARD = re.compile(r"(train|val)-\d+-of-\d+\.parquet")
_PROMPTS = pa.schema([("text", pa.string()), ("ids", pa.list_(pa.int32()))])


@dataclass(frozen=True)
class _Request:
    """What opens a source: see `SourceRequest`."""

    path: str
    preset: str | None
    layout: dict[str, Any]
    name: str | None
    weight: float


@dataclass(frozen=True)
class _Rules:
    """What decides which episodes are taken: see `SurveyRules`."""

    on_error: OnError
    limit: int | None
    val_fraction: float
    seed: int


@dataclass(frozen=True)
class _Source:
    """What the end of a conversion relies on in `dataset.json`'s description of a source."""

    path: str
    preset: str | None
    layout: dict[str, Any]


@dataclass(frozen=True)
class _PlanFile:
    """`plan.json`."""

    fingerprint: str
    out: str
    settings: dict[str, Any]
    requests: list[_Request]
    files: list[str]
    rules: _Rules
    shard_rows: int | None
    longest: int
    dataset: dict[str, Any]
    sources: list[dict[str, Any]]  # each holds what `_Source` names
    surveyed: list[SurveyedSource]
    told: list[str]
    shards: int
    episodes: dict[str, int]
    rows: dict[str, int]
    tables: dict[str, str]

    def __post_init__(self) -> None:
        """Refuse what does not belong together."""
        if not len(self.requests) == len(self.files) == len(self.sources) == len(self.surveyed):
            raise ValueError("it does not name the same sources everywhere")
        if not all(source.cameras for source in self.surveyed):
            raise ValueError("a source has no camera")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A conversion that is decided and not written yet.

    Attributes:
        out: the folder to write.
        fingerprint: a hash of the request and the sources' files.
        settings: the request as the user gave it, as plain values.
        requests: what opens the sources, from any working folder.
        files: per source a hash of its files.
        rules: which episodes are taken.
        shard_rows: as in the request.
        prompts: instruction to prompt ids; of all episodes that can be read.
        longest: see `Prompts`.
        dataset: what `dataset.json` says of version, images, prompts and tokenizer.
        sources: what it says of each source.
        survey: what the first pass found.
        told: what the readers said of the sources, a sentence each.
        shards: the shards; those of a part where it was opened for one.
        shard_count: of all parts.
        episodes: number of episodes per split.
        rows: number of examples per split.
        damaged: episodes with damaged frames that are not in it.
    """

    out: Path
    fingerprint: str
    settings: Mapping[str, Any]
    requests: tuple[SourceRequest, ...]
    files: tuple[str, ...]
    rules: SurveyRules
    shard_rows: int | None
    prompts: dict[str, list[int]]
    longest: int
    dataset: Mapping[str, Any]
    sources: tuple[dict[str, Any], ...]
    survey: Survey
    told: tuple[str, ...]
    shards: tuple[ShardPlan, ...]
    shard_count: int
    episodes: Mapping[str, int]
    rows: Mapping[str, int]
    damaged: int = 0

    def as_typed(self, number: int, sentence: str) -> str:
        """Return a sentence of a source that names its path and preset as the user typed them, wherever it was said."""
        request, source = self.requests[number], self.sources[number]
        for here, typed in ((request.path, source["path"]), (request.preset, source["preset"])):
            if here is not None and str(here) != typed:
                sentence = sentence.replace(str(here), typed)
        return sentence

    @property
    def pipeline(self) -> ImagePipeline:
        """How frames are prepared."""
        return ImagePipeline.from_json(self.dataset["image"]["pipeline"])

    @property
    def actions(self) -> ActionTokenizer:
        """What turns actions into tokens."""
        tokenizer = self.dataset["tokenizer"]
        return ActionTokenizer(tokenizer["action_vocab_size"], tokenizer["n_action_bins"])


def write_plan(folder: Path, plan: Plan) -> None:
    """Write a plan into a folder in which its readings lie already."""
    episodes = (
        {
            "shard": number,
            "file": shard.file,
            "split": shard.split,
            "dataset": episode.source,
            "ref": written_ref(episode.ref),
            "index": episode.index,
            "rows": episode.rows,
            "sums": episode.sums,
        }
        for number, shard in enumerate(plan.shards)
        for episode in shard.episodes
    )
    _write_table(folder / _EPISODES_FILE, episodes, _EPISODES)
    prompts = ({"text": text, "ids": ids} for text, ids in plan.prompts.items())
    _write_table(folder / _PROMPTS_FILE, prompts, _PROMPTS)
    document = {
        "plan_version": _VERSION,
        "vlaft": __version__,
        "format_version": FORMAT_VERSION,
        "fingerprint": plan.fingerprint,
        "out": str(plan.out),
        "settings": plan.settings,
        "requests": [{**asdict(request), "path": str(request.path)} for request in plan.requests],
        "files": plan.files,
        "rules": {key: value for key, value in asdict(plan.rules).items() if key != "without"},
        "shard_rows": plan.shard_rows,
        "longest": plan.longest,
        "dataset": plan.dataset,
        "sources": plan.sources,
        "surveyed": [asdict(source) for source in plan.survey.sources],
        "told": plan.told,
        "shards": plan.shard_count,
        "episodes": plan.episodes,
        "rows": plan.rows,
        "tables": {file: checksum(folder / file) for file in (_EPISODES_FILE, _PROMPTS_FILE, READINGS_FILE)},
    }
    write_json(folder / PLAN_FILE, sealed(json.loads(json.dumps(document, default=str))), indent=1)


def _write_table(path: Path, rows: Iterator[dict[str, Any]], schema: pa.Schema) -> None:
    with pq.ParquetWriter(path, schema) as writer:
        for some in iter(lambda: list(islice(rows, _GROUP)), []):
            writer.write_table(pa.Table.from_pylist(some, schema=schema))


def read_plan(folder: Path, part: tuple[int, int] | None = None) -> Plan:
    """Read a plan.

    Args:
        folder: as `write_plan` left it.
        part: number, from 1, and count: only the shards of this part, every count-th, are in it.

    Raises:
        DataError: there is no plan, it is of another version of vlaft, or a file in it is damaged.
    """
    if not (folder / PLAN_FILE).is_file():
        raise DataError(f"{folder} is no plan (it has no {PLAN_FILE}); make one with vlaft convert ... --plan {folder}")
    content = read_json(folder / PLAN_FILE)
    versions = [content.get(key) for key in ("plan_version", "vlaft", "format_version")]
    if versions != [_VERSION, __version__, FORMAT_VERSION]:
        raise DataError(
            f"{folder} was made by vlaft {str(versions[1])[:40]}, this is vlaft {__version__} with another plan or"
            " format; use that version everywhere, or make the plan again"
        )
    if not seal_holds(content):
        raise DataError(f"{folder / PLAN_FILE} does not match its checksum; make the plan again ({UNSEALED})")
    try:
        file = read_as(_PlanFile, content)
        for number, described in enumerate(file.sources):
            read_as(_Source, described, f"sources[{number}]")
        for number, source in enumerate(file.surveyed):
            check_statistics({source.name: source.statistics}, f"{folder / PLAN_FILE}: surveyed[{number}].statistics")
        prompts = dict(zip(*_columns(folder, file, _PROMPTS_FILE, _PROMPTS, None), strict=True))
        plan = Plan(
            out=Path(file.out),
            fingerprint=file.fingerprint,
            settings=file.settings,
            requests=tuple(SourceRequest(**{**vars(request), "path": Path(request.path)}) for request in file.requests),
            files=tuple(file.files),
            rules=SurveyRules(**vars(file.rules)),
            shard_rows=file.shard_rows,
            prompts=prompts,
            longest=file.longest,
            dataset=file.dataset,
            sources=tuple(file.sources),
            survey=Survey(tuple(file.surveyed), prompts),
            told=tuple(file.told),
            shards=_read_shards(folder, file, part),
            shard_count=file.shards,
            episodes=file.episodes,
            rows=file.rows,
        )
        assert plan.pipeline and plan.actions  # said here rather than amid the work
    except (WrongValue, ConfigError, CheckpointError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{folder}: the plan cannot be read ({error}); make it again") from error
    return plan


def check_readings(folder: Path) -> Path:
    """Return the file of a plan's readings, once it is as it was written.

    Raises:
        DataError: it is not.
    """
    recorded = read_json(folder / PLAN_FILE)["tables"]
    return _checked(folder, recorded, READINGS_FILE)


def _checked(folder: Path, recorded: Mapping[str, str], name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise DataError(f"{path} is missing; make the plan again")
    if checksum(path) != recorded.get(name):
        raise DataError(f"{path} does not match its checksum; make the plan again")
    return path


def _columns(
    folder: Path, file: _PlanFile, name: str, schema: pa.Schema, filters: Sequence[tuple[Any, ...]] | None
) -> list[list[Any]]:
    table = pq.read_table(_checked(folder, file.tables, name), filters=filters)
    if not table.schema.equals(schema):
        raise DataError(f"{folder / name} has other columns than a plan's; make the plan again")
    return [table.column(column).to_pylist() for column in schema.names]


def _read_shards(folder: Path, file: _PlanFile, part: tuple[int, int] | None) -> tuple[ShardPlan, ...]:
    mine = None if part is None else range(part[0] - 1, file.shards, part[1])
    filters = None if mine is None else [("shard", "in", list(mine) or [-1])]
    rows = zip(*_columns(folder, file, _EPISODES_FILE, _EPISODES, filters), strict=True)
    shards = []
    for (_, name, split), group in groupby(rows, key=lambda row: row[:3]):
        if not _SHARD.fullmatch(name):
            raise ValueError(f"{shown(name)} is no name of a shard")
        episodes = tuple(
            PlannedEpisode(source, read_ref(ref), index, split, count, (sums[0], sums[1]))
            for *_, source, ref, index, count, sums in group
        )
        if not all(0 <= episode.source < len(file.requests) and episode.rows > 0 for episode in episodes):
            raise ValueError(f"an episode of {name} belongs to no source or has no rows")
        shards.append(ShardPlan(name, split, episodes))
    return tuple(shards)
