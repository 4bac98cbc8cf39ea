"""Batches of examples from converted datasets, in an order that seed and position alone decide.

An epoch is one permutation of all rows, drawn by a counter-based generator from (seed, epoch), so that a position
`(epoch, offset)` is the whole state: resuming continues at the exact example, with any number of threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vlaft.action.tokens import IGNORED
from vlaft.data.codec import decode_image
from vlaft.data.store import ConvertedDataset
from vlaft.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

_PREFETCHED = 2  # batches decoded ahead, or one per thread where there are more


@dataclass(frozen=True)
class Batch:
    """Examples, collated; sequences are padded on the right.

    Attributes:
        input_ids: int64 `[B, T]`: prompt, action tokens, end of sequence, padding.
        attention_mask: bool `[B, T]`, False on padding.
        labels: int64 `[B, T]`: the A action tokens and the end of sequence; -100 elsewhere.
        images: uint8 `[B, H, W, 3]`, the main camera.
        action: float32 `[B, A]`, normalized.
        rows: int64 `[B]`, the number of each example in its split, over all datasets.
        datasets: the name of each example's dataset, `[B]`, which is its key in the statistics.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    images: torch.Tensor
    action: torch.Tensor
    rows: torch.Tensor
    datasets: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.datasets)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on another device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(
            **{
                name: value if name == "datasets" else value.to(device, non_blocking=True)
                for name, value in values.items()
            }
        )


class ExampleLoader:
    """Endless shuffled batches; an iterator whose position can be saved and restored.

    A source of weight w gives w times its rows to every epoch, as OpenVLA's mixtures weigh (times the number of
    steps): 2.0 means each row twice, 0.5 a different half of the rows in turn.

    Attributes:
        epoch_length: examples in one epoch, over all ranks.
    """

    def __init__(
        self,
        dataset: ConvertedDataset | Sequence[ConvertedDataset],
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        split: str = "train",
        limit: int | None = None,
    ) -> None:
        """Prepare to read; nothing is decoded yet.

        Args:
            dataset: one or more, converted for the same base.
            batch_size: examples per batch and rank.
            seed: of the order.
            rank: of this process; ranks read different examples of the same order.
            world_size: number of processes.
            workers: threads that decode ahead, each a whole batch; 0 decodes in the caller's.
            split: `"train"` or `"val"`.
            limit: only the first so many rows, over and over; None takes all.

        Raises:
            DataError: the datasets do not fit together, or the split is empty.
        """
        if batch_size < 1 or not 0 <= rank < world_size or workers < 0:
            raise ValueError(f"batch_size {batch_size}, rank {rank} of {world_size}, workers {workers}")
        self._reader = _Reader(_as_list(dataset), split)
        self._seed, self._batch_size = seed, batch_size
        self._rank, self._world_size = rank, world_size
        self._groups = self._reader.groups_by_weight()
        if limit is not None:
            kept = [(weight, rows[rows < limit]) for weight, rows in self._groups]
            self._groups = [(weight, rows) for weight, rows in kept if len(rows)]
        self.epoch_length = max(1, sum(round(weight * len(rows)) for weight, rows in self._groups))
        self._consumed = 0  # examples that all ranks together have been given
        self._orders: dict[int, NDArray[np.int64]] = {}
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode") if workers else None
        self._ahead: deque[Future[Batch]] = deque()
        self._depth = max(_PREFETCHED, workers)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        step = self._batch_size * self._world_size
        if self._pool is None:
            batch = self._read(self._rows_of_batch(self._consumed))
        else:
            while len(self._ahead) <= self._depth:
                rows = self._rows_of_batch(self._consumed + len(self._ahead) * step)
                self._ahead.append(self._pool.submit(self._read, rows))
            batch = self._ahead[0].result()
            self._ahead.popleft()  # not before: after an error the same batch comes again
        self._consumed += step
        return batch

    def _read(self, rows: Sequence[int]) -> Batch:
        return collate([self._reader.read(row) for row in rows], self._reader.pad_id)

    @property
    def epoch(self) -> float:
        """How many epochs have been given out, as a fraction."""
        return self._consumed / self.epoch_length

    def state_dict(self) -> dict[str, Any]:
        """Return the position, as plain numbers and texts; the same on every rank."""
        epoch, offset = divmod(self._consumed, self.epoch_length)
        return {"seed": self._seed, "epoch": epoch, "offset": offset, "data": self._reader.fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a saved position.

        Raises:
            DataError: the position belongs to another seed or to other data.
        """
        if state.get("seed") != self._seed or state.get("data") != self._reader.fingerprint:
            raise DataError(
                "the saved position belongs to other data or another seed; resume with the data and seed of the run"
            )
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()
        self._consumed = int(state["epoch"]) * self.epoch_length + int(state["offset"])

    def close(self) -> None:
        """Stop the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._ahead.clear()

    def _rows_of_batch(self, start: int) -> list[int]:
        """Return this rank's rows of the batch that begins at `start` of the endless order."""
        first = start + self._rank * self._batch_size
        rows = []
        for position in range(first, first + self._batch_size):
            epoch, offset = divmod(position, self.epoch_length)
            rows.append(int(self._order(epoch)[offset]))
        return rows

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            for old in [known for known in self._orders if known < epoch - 1]:
                del self._orders[old]
            generator = np.random.Generator(np.random.Philox(key=[self._seed % 2**64, epoch]))
            parts = []
            for number, (weight, rows) in enumerate(self._groups):
                count = round(weight * len(rows))
                copies, rest = divmod(count, len(rows))
                parts += [rows] * copies
                if rest:
                    # a fixed order of the source, walked on from epoch to epoch: every row gets its turn
                    fixed = np.random.Generator(np.random.Philox(key=[self._seed % 2**64, 2**63 + number]))
                    parts.append(fixed.permutation(rows)[(epoch * rest + np.arange(rest)) % len(rows)])
            self._orders[epoch] = generator.permutation(np.concatenate(parts))
        return self._orders[epoch]


def batches_in_order(
    dataset: ConvertedDataset | Sequence[ConvertedDataset],
    batch_size: int,
    split: str = "val",
    rank: int = 0,
    world_size: int = 1,
    limit: int | None = None,
) -> Iterator[Batch]:
    """Yield the examples of a split once, in a fixed order; the last batch may be smaller.

    Args:
        dataset: one or more, converted for the same base.
        batch_size: examples per batch.
        split: `"train"` or `"val"`.
        rank: of this process, which takes every `world_size`-th example.
        world_size: number of processes.
        limit: at most so many examples over all ranks, spread evenly over the split.

    Raises:
        DataError: the datasets do not fit together, or the split is empty.
    """
    reader = _Reader(_as_list(dataset), split)
    rows = np.arange(reader.rows)
    if limit is not None and limit < len(rows):
        rows = rows[np.linspace(0, len(rows) - 1, limit).round().astype(np.int64)]
    rows = rows[rank::world_size]
    for start in range(0, len(rows), batch_size):
        yield collate([reader.read(int(row)) for row in rows[start : start + batch_size]], reader.pad_id)


@dataclass(frozen=True)
class _Example:
    """One decoded row."""

    prompt: NDArray[np.int32]
    tokens: list[int]  # action tokens and end of sequence
    image: NDArray[np.uint8]
    action: NDArray[np.float32]
    row: int
    dataset: str


def collate(examples: Sequence[_Example], pad_id: int) -> Batch:
    """Return a batch of examples: sequences padded on the right, all else stacked."""
    import torch

    longest = max(len(example.prompt) + len(example.tokens) for example in examples)
    ids = np.full((len(examples), longest), pad_id, dtype=np.int64)
    labels = np.full_like(ids, IGNORED)
    mask = np.zeros_like(ids, dtype=bool)
    for row, example in enumerate(examples):
        start, end = len(example.prompt), len(example.prompt) + len(example.tokens)
        ids[row, :start], ids[row, start:end] = example.prompt, example.tokens
        labels[row, start:end] = example.tokens
        mask[row, :end] = True
    return Batch(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        labels=torch.from_numpy(labels),
        images=torch.from_numpy(np.stack([example.image for example in examples])),
        action=torch.from_numpy(np.stack([example.action for example in examples])),
        rows=torch.tensor([example.row for example in examples], dtype=torch.int64),
        datasets=tuple(example.dataset for example in examples),
    )


@dataclass(frozen=True)
class _Rows:
    """Lists of varying length, one per row: `values[offsets[i] : offsets[i + 1]]`."""

    values: NDArray[np.generic]
    offsets: NDArray[np.int64]

    def __getitem__(self, index: int) -> NDArray[Any]:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> _Rows:
        """Take the lists of a column."""
        parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
        lengths = [np.diff(chunk.offsets.to_numpy()) for chunk in column.chunks]
        empty: list[NDArray[Any]] = [np.zeros(0, np.int64)]
        return cls(np.concatenate(parts or empty), np.concatenate([empty[0], [0], *lengths]).cumsum().astype(np.int64))


@dataclass(frozen=True)
class _Columns:
    """All of a split but its frames, in memory: some 200 bytes per row, and reading them anew takes longer than frames.

    Attributes:
        prompts: int32 `[T]` per row.
        tokens: int32 `[A]` per row.
        actions: float32 `[A]` per row, normalized.
        datasets: number of each row's dataset, `[N]`.
        names: the datasets' names.
    """

    prompts: _Rows
    tokens: _Rows
    actions: _Rows
    datasets: NDArray[np.int32]
    names: tuple[str, ...]

    @classmethod
    def read(cls, dataset: ConvertedDataset, split: str) -> _Columns:
        """Read them.

        Raises:
            DataError: a shard cannot be read.
        """
        table = dataset.table(split, ["dataset", "prompt_token_ids", "action_token_ids", "normalized_action"])
        names = table["dataset"].combine_chunks().dictionary_encode()
        return cls(
            prompts=_Rows.of(table["prompt_token_ids"]),
            tokens=_Rows.of(table["action_token_ids"]),
            actions=_Rows.of(table["normalized_action"]),
            datasets=names.indices.to_numpy(zero_copy_only=False),
            names=tuple(names.dictionary.to_pylist()),
        )


class _Reader:
    """One split of several datasets as one list of rows."""

    def __init__(self, datasets: Sequence[ConvertedDataset], split: str) -> None:
        if not datasets:
            raise DataError("there is no dataset to read")
        self.datasets, self.split = datasets, split
        self.starts = np.concatenate([[0], np.cumsum([dataset.rows(split) for dataset in datasets])])
        self.rows = int(self.starts[-1])
        if not self.rows:
            listed = ", ".join(str(dataset.path) for dataset in datasets)
            raise DataError(
                f"split '{split}' of {listed} is empty; convert with a validation fraction or more episodes"
            )
        first = datasets[0]
        for other in datasets[1:]:
            for what, ours, theirs in _must_agree(first, other):
                if ours != theirs:
                    raise DataError(f"{other.path} and {first.path} differ in their {what}; convert them for one base")
        self.columns = [_Columns.read(dataset, split) for dataset in datasets]
        self.pad_id = int(first.info["tokenizer"]["pad_id"])
        self.eos_id = int(first.info["tokenizer"]["eos_id"])
        self.fingerprint = "+".join(dataset.fingerprint for dataset in datasets) + f"/{split}"

    def read(self, row: int) -> _Example:
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        dataset, index = self.datasets[number], row - int(self.starts[number])
        image = dataset.image(self.split, index)
        try:
            if image is None:
                raise DataError("the row has no image")
            # the frames that vlaft stored itself come back closest with the accurate DCT
            pixels = decode_image(image, "the stored frame", accurate_dct=True)
        except DataError as error:
            place = dataset.row(self.split, index)
            where = f"{dataset.path}, {place['source']}, step {place['frame_index']}"
            raise DataError(f"{where}: {error}; convert the source again") from error
        columns = self.columns[number]
        return _Example(
            prompt=columns.prompts[index],
            tokens=[*columns.tokens[index], self.eos_id],
            image=pixels,
            action=columns.actions[index],
            row=row,
            dataset=columns.names[columns.datasets[index]],
        )

    def groups_by_weight(self) -> list[tuple[float, NDArray[np.int64]]]:
        """Return the rows of every source with its weight; sources of one weight are one group."""
        groups: dict[float, list[NDArray[np.int64]]] = {}
        for dataset, columns, start in zip(self.datasets, self.columns, self.starts[:-1], strict=True):
            weights = {source["name"]: float(source["weight"]) for source in dataset.info["sources"]}
            if len(weights) == 1:
                rows = np.arange(dataset.rows(self.split), dtype=np.int64)
                groups.setdefault(next(iter(weights.values())), []).append(rows + int(start))
                continue
            for name, weight in weights.items():
                of_name = columns.datasets == (columns.names.index(name) if name in columns.names else -1)
                groups.setdefault(weight, []).append(np.flatnonzero(of_name).astype(np.int64) + int(start))
        return [(weight, rows) for weight, parts in sorted(groups.items()) if len(rows := np.concatenate(parts))]


def _must_agree(first: ConvertedDataset, other: ConvertedDataset) -> Iterator[tuple[str, object, object]]:
    for key, what in (("tokenizer", "tokenizer"), ("prompt_style", "prompt style")):
        ours, theirs = first.info[key], other.info[key]
        if isinstance(ours, Mapping):  # the base may be the same under another path
            ours, theirs = ({**value, "base": None} for value in (ours, theirs))
        yield what, ours, theirs
    yield "image pipeline", first.pipeline, other.pipeline
    yield "number of action dimensions", _action_widths(first), _action_widths(other)


def _action_widths(dataset: ConvertedDataset) -> set[int]:
    return {len(entry["action"]["mean"]) for entry in dataset.statistics.values()}


def _as_list(dataset: ConvertedDataset | Sequence[ConvertedDataset]) -> list[ConvertedDataset]:
    return [dataset] if isinstance(dataset, ConvertedDataset) else list(dataset)
