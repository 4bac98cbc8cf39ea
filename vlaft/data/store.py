"""The converted dataset on disk: Parquet shards, `dataset.json` and `dataset_statistics.json`.

Every file is written aside, synced and renamed, so that what bears its final name is whole. The images' column is
declared as the `datasets` library's Image feature: pandas and duckdb open the shards as they are, and the Hub shows
the frames.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vlaft.action.statistics import STATISTICS_FILE, read_statistics
from vlaft.checksums import SEAL, UNSEALED, checksum, content_checksum, holds, identity, seal_holds, unsealed
from vlaft.documents import WrongValue, read_as, shown
from vlaft.errors import CheckpointError, DataError
from vlaft.files import read_json, restored
from vlaft.observation.images import ImagePipeline
from vlaft.remote import fetched

FORMAT_VERSION = 1
DATASET_FILE = "dataset.json"
STATISTICS_CHECKSUM = "statistics_crc32c"  # key of the checksum of their content
MAIN_CAMERA = "image"
ROW_GROUP = 8  # rows read together at random access: 0.2 MB of JPEG
SPLITS = ("train", "val")

_LONGEST_NAME = 255  # bytes of a file's name, on every usual file system
_LARGEST_WEIGHT = 1e6
_LARGEST_ID = 2**31
_TEXTS = ["dataset", "source", "instruction"]  # columns that repeat; looking for repeated images takes long
_CACHED_GROUPS = 16
_OPEN_GROUPS = 2048  # row groups of open files: some 9 KB each
_TRIED = 256  # shards that are opened at once, to see whether they are any; of more, each where it is first read


@dataclass(frozen=True)
class Shard:
    """One Parquet file of a dataset.

    Attributes:
        file: its name in the dataset's folder.
        split: `"train"` or `"val"`.
        rows: number of examples.
        bytes: size of the file.
        crc32c: checksum of the whole file, eight hexadecimal digits.
    """

    file: str
    split: str
    rows: int
    bytes: int
    crc32c: str

    def __post_init__(self) -> None:
        """Refuse what no shard can be."""
        if Path(self.file).name != self.file or len(self.file.encode()) > _LONGEST_NAME:
            raise ValueError(f"{shown(self.file)} is a shard outside of its folder")
        if self.split not in SPLITS:
            raise ValueError(f"{shown(self.split)} is no split; there are {' and '.join(SPLITS)}")
        if self.rows < 0 or self.bytes < 0:
            raise ValueError(f"a shard of {self.rows} rows and {self.bytes} bytes cannot be")


@dataclass(frozen=True)
class _Action:
    """What `dataset.json` says of a source's actions."""

    dimensions: int
    names: list[str]
    mask: list[bool]


@dataclass(frozen=True)
class _Layout:
    """What `dataset.json` says of how a source was read."""

    action: list[str] = field(default_factory=list)
    state: list[str] = field(default_factory=list)
    cameras: dict[str, str] = field(default_factory=dict)
    steps: list[str | dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class _Source:
    """What `dataset.json` says of one source."""

    name: str
    weight: float
    action: _Action | None = None
    fps: float | None = None
    preset: str | None = None
    format: str = ""
    episodes: int = 0
    steps: int = 0
    instructions: list[str] = field(default_factory=list)
    cameras: dict[str, str] = field(default_factory=dict)
    layout: _Layout = field(default_factory=_Layout)

    def __post_init__(self) -> None:
        """Refuse what it cannot be."""
        if not 0 < self.weight <= _LARGEST_WEIGHT:
            raise ValueError(f"the weight {self.weight:g} is not above 0 and at most {_LARGEST_WEIGHT:g}")


@dataclass(frozen=True)
class _Tokenizer:
    """What `dataset.json` says of the tokenizer that the examples were written with."""

    fingerprint: str
    action_vocab_size: int
    n_action_bins: int
    eos_id: int
    pad_id: int
    base: str = ""

    def __post_init__(self) -> None:
        """Refuse what it cannot be."""
        if not (0 <= self.eos_id < _LARGEST_ID and 0 <= self.pad_id < _LARGEST_ID):
            raise ValueError(f"eos_id {self.eos_id} or pad_id {self.pad_id} is no number of a token")


@dataclass(frozen=True)
class _Images:
    """What `dataset.json` says of the frames."""

    cameras: list[str]
    pipeline: dict[str, Any]
    codec: str = ""

    def __post_init__(self) -> None:
        """Refuse what it cannot be."""
        if self.cameras[:1] != [MAIN_CAMERA] or len(set(self.cameras)) != len(self.cameras):
            raise ValueError(f"the cameras are {shown(self.cameras)}; each is named once, '{MAIN_CAMERA}' first")


@dataclass(frozen=True)
class _Counts:
    """What `dataset.json` says of its sizes."""

    episodes: dict[str, int]
    rows: dict[str, int]


@dataclass(frozen=True)
class _DatasetFile:
    """`dataset.json`: what every reader of it may rely on."""

    sources: list[_Source]
    image: _Images
    prompt_style: str
    tokenizer: _Tokenizer
    counts: _Counts
    shards: list[Shard]
    skipped: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Refuse a dataset of nothing, and names that are there twice."""
        for what, names in (
            ("source", [source.name for source in self.sources]),
            ("shard", [shard.file for shard in self.shards]),
        ):
            if not names or len(set(names)) != len(names):
                raise ValueError(f"it has to name at least one {what}, and each once")


def example_schema(cameras: Sequence[str]) -> pa.Schema:
    """Return the columns of a row; `cameras` are the image columns, the main one first."""
    values: dict[str, pa.DataType] = {
        "episode_index": pa.int32(),
        "frame_index": pa.int32(),
        "dataset": pa.string(),
        "source": pa.string(),
        "instruction": pa.string(),
    }
    lists: dict[str, pa.DataType] = {
        "state": pa.float32(),
        "action": pa.float32(),
        "normalized_action": pa.float32(),
        "prompt_token_ids": pa.int32(),
        "action_token_ids": pa.int32(),
    }
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    fields = [
        *(pa.field(name, kind) for name, kind in values.items()),
        *(pa.field(name, image) for name in cameras),
        *(pa.field(name, pa.list_(kind)) for name, kind in lists.items()),
    ]
    features = {
        **{name: _feature(kind) for name, kind in values.items()},
        **{name: {"_type": "Image"} for name in cameras},
        **{name: {"feature": _feature(kind), "_type": "Sequence"} for name, kind in lists.items()},
    }
    return pa.schema(fields, metadata={b"huggingface": json.dumps({"info": {"features": features}}).encode()})


def camera_columns(columns: Sequence[str]) -> dict[str, str]:
    """Return image columns by the names that `policy.cameras` has for them, in their order.

    >>> camera_columns(["image", "image_wrist"])
    {'main': 'image', 'wrist': 'image_wrist'}
    """
    names = {}
    for column in columns:
        name = column.removeprefix(f"{MAIN_CAMERA}_")
        # a further camera that is called `main` itself keeps its column's name
        names["main" if column == MAIN_CAMERA else column if name == "main" else name] = column
    return names


def write_shard(path: Path, split: str, schema: pa.Schema, episodes: Iterable[Sequence[Mapping[str, Any]]]) -> Shard:
    """Write one shard from the rows of its episodes and return its entry in `dataset.json`.

    The same rows always give the same bytes. At most one episode and one row group are held in memory. The file is
    not synced: whoever makes the dataset whole does so for all files (see `vlaft.files.publish`).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    count = 0
    waiting: list[Mapping[str, Any]] = []
    try:
        with pq.ParquetWriter(
            temporary, schema, compression=_compression(schema), use_dictionary=_TEXTS, write_statistics=False
        ) as writer:
            for rows in episodes:
                waiting.extend(rows)
                count += len(rows)
                while len(waiting) >= ROW_GROUP:
                    writer.write_table(pa.Table.from_pylist(waiting[:ROW_GROUP], schema=schema))
                    del waiting[:ROW_GROUP]
            if waiting:
                writer.write_table(pa.Table.from_pylist(waiting, schema=schema))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return Shard(path.name, split, count, path.stat().st_size, checksum(path))


def _compression(schema: pa.Schema) -> dict[str, str]:
    """Encoded images do not get smaller: compressing them costs a twentieth of a conversion, and time to load."""
    lists = {name for name in schema.names if pa.types.is_list(schema.field(name).type)}
    images = {name for name in schema.names if pa.types.is_struct(schema.field(name).type)}
    plain = [f"{name}.list.element" if name in lists else name for name in schema.names if name not in images]
    return {
        **dict.fromkeys(plain, "zstd"),
        **{f"{name}.{part}": "none" for name in images for part in ("bytes", "path")},
    }


@dataclass(frozen=True)
class _OpenFile:
    """A shard that is open, and the first row of each of its row groups; last, how many rows there are."""

    parquet: pq.ParquetFile
    starts: NDArray[np.int64]


class ConvertedDataset:
    """A folder that `vlaft convert` wrote, opened for reading; any number of threads may read.

    Each file is held against its checksum where it is first read: `dataset.json` and the statistics here, a shard with
    the first of its rows.

    Attributes:
        path: the folder.
        info: `dataset.json`, without its checksums; what `_DatasetFile` names is there and of its kind.
        has_checksum: whether `dataset.json` carries its own checksum; those of earlier versions do not.
        statistics: `dataset_statistics.json`: name to statistics.
        cameras: the image columns, the main one first.
        pipeline: how the frames were prepared.
        fingerprint: sha256 of `dataset.json`, which holds a checksum of every shard.
        columns: the splits as arrays, as far as `vlaft.data.columns` has read them.
    """

    def __init__(self, path: Path) -> None:
        """Read the folder's metadata and see whether every shard is there; what lies at a URL is fetched first.

        Raises:
            DataError: this is no converted dataset, it is of another version, a shard is missing or cut off, or a
                document does not match its checksum.
        """
        self.path = restored(fetched(path))
        if not (self.path / DATASET_FILE).is_file():
            raise DataError(f"{path} is no converted dataset (it has no {DATASET_FILE}); make one with `vlaft convert`")
        self.info = read_json(self.path / DATASET_FILE)
        version = self.info.get("format_version")
        if version != FORMAT_VERSION:
            raise DataError(
                f"{self.path / DATASET_FILE} is of format version {version}, this vlaft reads {FORMAT_VERSION};"
                " convert the source again"
            )
        try:
            described = read_as(_DatasetFile, self.info)
            self.pipeline = ImagePipeline.from_json(described.image.pipeline)
        except (WrongValue, CheckpointError) as error:
            raise DataError(f"{self.path / DATASET_FILE}: {error}; convert the source again") from error
        self.cameras: tuple[str, ...] = tuple(described.image.cameras)
        self.fingerprint = hashlib.sha256((self.path / DATASET_FILE).read_bytes()).hexdigest()
        shards = described.shards
        self.statistics = read_statistics(self.path / STATISTICS_FILE)
        self._check_documents()
        self._shards = {split: [shard for shard in shards if shard.split == split] for split in SPLITS}
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()  # those used last
        self._starts: dict[str, NDArray[np.int64]] = {}  # per split: the number of each shard's first row
        self._cache: OrderedDict[tuple[str, int, str | None], pa.Table] = OrderedDict()
        self.columns: dict[str, Any] = {}
        self._lock = threading.RLock()
        self._checked: dict[str, list[int]] = {}  # size, time and inode of the shards that match their checksums
        for split in SPLITS:
            self._index(split)

    @property
    def camera_columns(self) -> dict[str, str]:
        """The image columns by the cameras' names."""
        return camera_columns(self.cameras)

    def rows(self, split: str) -> int:
        """Return the number of examples of a split."""
        return int(self._starts[split][-1])

    def stored_bytes(self, split: str) -> int:
        """Return how many bytes the shards of a split take on disk."""
        return sum(shard.bytes for shard in self._shards[split])

    def row(self, split: str, index: int) -> dict[str, Any]:
        """Return one example: column name to value, images as `{"bytes": ..., "path": ...}` or None.

        Raises:
            IndexError: there is no such row.
            DataError: the shard cannot be read.
        """
        table, offset = self._locate(split, index, None)
        return table.slice(offset, 1).to_pylist()[0]

    def image(self, split: str, index: int, column: str = MAIN_CAMERA) -> bytes | None:
        """Return the encoded frame of one example, or None where it has none; much faster than `row`.

        Raises:
            IndexError: there is no such row.
            DataError: the shard cannot be read.
        """
        table, offset = self._locate(split, index, column)
        value = table.column(0)[offset].as_py()
        return None if value is None else value["bytes"]

    def frame_file(self, split: str, index: int) -> tuple[Path, list[int]]:
        """Return the shard that holds an example, and the `identity` of the file that was held against its checksum.

        Raises:
            DataError: it cannot be read, or does not match.
        """
        shard = self._shards[split][self._shard_number(split, index)]
        if shard.file not in self._checked:
            with self._lock:
                self._check(shard)
        return self.path / shard.file, self._checked[shard.file]

    def _shard_number(self, split: str, index: int) -> int:
        if not 0 <= index < self.rows(split):
            raise IndexError(f"row {index} of {self.rows(split)} in split '{split}' of {self.path}")
        return int(np.searchsorted(self._starts[split], index, side="right")) - 1

    def _locate(self, split: str, index: int, column: str | None) -> tuple[pa.Table, int]:
        """Return the row group that holds an example (one column of it, or all), and the example's place there."""
        number = self._shard_number(split, index)
        return self._read_group(self._shards[split][number], index - int(self._starts[split][number]), column)

    def table(self, split: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Return whole columns of a split in memory; without names, all but the images.

        Raises:
            DataError: a shard cannot be read.
        """
        schema = example_schema(self.cameras)
        wanted = [name for name in schema.names if name not in self.cameras] if columns is None else list(columns)
        parts = []
        for shard in self._shards[split]:
            with self._lock:
                self._check(shard)
                with self._readable(shard.file):
                    parts.append(self._open(shard).parquet.read(columns=wanted))
        return pa.concat_tables(parts) if parts else pa.schema([schema.field(name) for name in wanted]).empty_table()

    def blocks(self, split: str, groups: int) -> Iterator[tuple[Path, pq.FileMetaData, range, pa.Table]]:
        """Yield a split from its first row to its last, some row groups at a time and whole rows.

        Args:
            split: `"train"` or `"val"`.
            groups: row groups at a time, none of them over the end of a shard.

        Yields:
            The shard's file, its metadata, the numbers of the row groups, and their rows.

        Raises:
            DataError: a shard cannot be read.
        """
        for shard in self._shards[split]:
            with self._lock:
                self._check(shard)
                file = self._open(shard)
            for start in range(0, len(file.starts) - 1, groups):
                numbers = range(start, min(start + groups, len(file.starts) - 1))
                with self._lock, self._readable(shard.file):
                    rows = file.parquet.read_row_groups(list(numbers), use_threads=False)
                yield self.path / shard.file, file.parquet.metadata, numbers, rows

    def verify(self) -> None:
        """Compare every shard with its checksum, also those that are unchanged since they were last read.

        Raises:
            DataError: one differs.
        """
        for shard in (shard for split in SPLITS for shard in self._shards[split]):
            self._check(shard, fresh=True)

    def _check(self, shard: Shard, *, fresh: bool = False) -> None:
        if shard.file in self._checked and not fresh:
            return
        path = self.path / shard.file
        try:
            found = identity(path.stat())
            intact = holds(path, shard.crc32c, fresh=fresh)
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror or error}); convert the source again") from error
        if not intact:
            raise DataError(f"{path} does not match its checksum; convert the source again")
        self._checked[shard.file] = found

    def _check_documents(self) -> None:
        """Hold `dataset.json` against its own checksum, and the statistics against the one that it has of them."""
        document = self.path / DATASET_FILE
        intact = seal_holds(self.info)
        if intact is False:
            raise DataError(f"{document} does not match its checksum; convert the source again ({UNSEALED})")
        self.has_checksum = intact is not None
        self.info = unsealed(self.info)
        recorded = self.info.pop(STATISTICS_CHECKSUM, None)
        if recorded not in (None, content_checksum(self.statistics)):
            raise DataError(
                f"{self.path / STATISTICS_FILE} does not match its checksum; convert the source again (if the change is"
                f' meant, delete the lines "{STATISTICS_CHECKSUM}" and "{SEAL}" in {DATASET_FILE})'
            )

    def _index(self, split: str) -> None:
        shards = self._shards[split]
        for number, shard in enumerate(shards):
            path = self.path / shard.file
            if not path.is_file():
                raise DataError(f"{path} is missing; copy the dataset again or convert the source again")
            if path.stat().st_size != shard.bytes:
                raise DataError(
                    f"{path} has {path.stat().st_size} bytes instead of {shard.bytes}; it was cut or changed"
                )
            if number < _TRIED:
                self._open(shard)
        self._starts[split] = np.cumsum([0, *(shard.rows for shard in shards)], dtype=np.int64)

    def _open(self, shard: Shard) -> _OpenFile:
        """Return an open file, and close those that were not used for long where many are open; the lock is held."""
        if (opened := self._files.get(shard.file)) is not None:
            self._files.move_to_end(shard.file)
            return opened
        path = self.path / shard.file
        with self._readable(shard.file):
            # without pre-buffering, which hands every read to another thread: more waiting than reading
            parquet = pq.ParquetFile(path, memory_map=True, pre_buffer=False)
        metadata = parquet.metadata
        lengths = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        counted = {metadata.num_rows, sum(lengths)}
        if counted != {shard.rows} or not set(self.cameras) <= set(parquet.schema_arrow.names):
            raise DataError(f"{path} is not the shard that {DATASET_FILE} describes; convert the source again")
        self._files[shard.file] = opened = _OpenFile(parquet, np.cumsum([0, *lengths], dtype=np.int64))
        groups = sum(len(file.starts) for file in self._files.values())
        while groups > _OPEN_GROUPS and len(self._files) > 1:
            _, old = self._files.popitem(last=False)
            groups -= len(old.starts)
        return opened

    def _read_group(self, shard: Shard, row: int, column: str | None) -> tuple[pa.Table, int]:
        """Return the row group that holds a row of a shard, and the row's place there."""
        with self._lock:  # a ParquetFile is not for several threads at once
            file = self._open(shard)
            group = int(np.searchsorted(file.starts, row, side="right")) - 1
            key = (shard.file, group, column)
            table = self._cache.pop(key, None)
            if table is None:
                self._check(shard)
                columns = None if column is None else [column]
                with self._readable(shard.file):
                    table = file.parquet.read_row_group(group, columns=columns, use_threads=False)
            self._cache[key] = table
            if len(self._cache) > _CACHED_GROUPS:
                self._cache.popitem(last=False)
            return table, row - int(file.starts[group])

    @contextmanager
    def _readable(self, file: str) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            raise self._damaged(file, error) from error

    def _damaged(self, file: str, error: Exception) -> DataError:
        reason = " ".join(str(error).split())[:100]
        return DataError(f"{self.path / file} cannot be read as Parquet ({reason}); convert the source again")


def shard_entry(shard: Shard) -> dict[str, Any]:
    """Return a shard as `dataset.json` lists it."""
    return asdict(shard)


def _feature(kind: pa.DataType) -> dict[str, str]:
    return {"dtype": "float32" if kind == pa.float32() else str(kind), "_type": "Value"}
