"""Batches of examples from converted datasets, in an order that seed and position alone decide.

An epoch is one permutation of all examples, which (seed, epoch) choose (`vlaft/data/order.py`), so that a position
`(epoch, offset)` is the whole state: resuming continues at the exact example, with any number of threads.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vlaft.action.statistics import STATISTICS_FILE, choose_key, tells_of_state
from vlaft.action.tokens import IGNORED, ActionTokenizer, normalize
from vlaft.data.codec import decode_image
from vlaft.data.columns import SplitColumns
from vlaft.data.order import Order, Runs
from vlaft.data.store import MAIN_CAMERA, ConvertedDataset, camera_columns
from vlaft.data.windows import Windows
from vlaft.errors import DataError
from vlaft.recipe.settings import PolicyConfig

if TYPE_CHECKING:
    import torch

_COMPUTED = "/order=computed"  # behind the fingerprint of the data in a saved position; a listed order says nothing
_PREFETCHED = 2  # batches decoded ahead, or one per thread where there are more
RELEASED = PolicyConfig()  # what the released OpenVLA reads and writes


@dataclass(frozen=True)
class Batch:
    """Examples, collated; sequences are padded on the right.

    Attributes:
        input_ids: int64 `[B, T]`: prompt, action tokens, end of sequence, padding.
        attention_mask: bool `[B, T]`, False on padding.
        labels: int64 `[B, T]`: the K * A action tokens, step by step, and the end of sequence; -100 elsewhere.
        images: uint8 `[B, N, H, W, 3]`, the policy's cameras in its order.
        action: float32 `[B, K, A]`, normalized.
        rows: int64 `[B]`, the number of each example in its split, over all datasets.
        datasets: the name of each example's dataset, `[B]`, which is its key in the statistics.
        state: float32 `[B, S]`, normalized; None where the policy does not read it.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    images: torch.Tensor
    action: torch.Tensor
    rows: torch.Tensor
    datasets: tuple[str, ...]
    state: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.datasets)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on another device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(
            **{
                name: value.to(device, non_blocking=True) if hasattr(value, "to") else value
                for name, value in values.items()
            }
        )


class ExampleLoader:
    """Endless shuffled batches; an iterator whose position can be saved and restored.

    A source of weight w gives w times its examples to every epoch, as OpenVLA's mixtures weigh (times the number of
    steps): 2.0 means each one twice, 0.5 a different half of them in turn.

    Attributes:
        epoch_length: examples in one epoch, over all ranks.
        windows: of each dataset.
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
        policy: PolicyConfig = RELEASED,
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
            limit: only the first so many examples, over and over; None takes all.
            policy: what is read and written at once.

        Raises:
            DataError: the datasets do not fit together, the split is empty, every episode of it is shorter than the
                chunk, or a camera or the state is asked for and not there.
        """
        if batch_size < 1 or not 0 <= rank < world_size or workers < 0:
            raise ValueError(f"batch_size {batch_size}, rank {rank} of {world_size}, workers {workers}")
        self._reader = _Reader(_as_list(dataset), split, policy)
        self.windows: Sequence[Windows] = [examples.windows for examples in self._reader.examples_of]
        self._seed, self._batch_size = seed, batch_size
        self._rank, self._world_size = rank, world_size
        groups = self._reader.groups_by_weight()
        if limit is not None:
            kept = [(weight, examples.below(limit)) for weight, examples in groups]
            groups = [(weight, examples) for weight, examples in kept if len(examples)]
        self._order = Order(groups, seed)
        self.epoch_length = self._order.length
        self._consumed = 0  # examples that all ranks together have been given
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
        data = self._reader.fingerprint + ("" if self._order.listed else _COMPUTED)
        return {"seed": self._seed, "epoch": epoch, "offset": offset, "data": data}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a saved position.

        Raises:
            DataError: the position belongs to another seed or to other data.
        """
        data = str(state.get("data"))
        if state.get("seed") != self._seed or data.removesuffix(_COMPUTED) != self._reader.fingerprint:
            raise DataError(
                "the saved position belongs to other data or another seed; resume with the data and seed of the run"
            )
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()
        self._order.listed = not data.endswith(_COMPUTED)
        self._consumed = int(state["epoch"]) * self.epoch_length + int(state["offset"])

    def close(self) -> None:
        """Stop the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._ahead.clear()

    def _rows_of_batch(self, start: int) -> list[int]:
        """Return this rank's rows of the batch that begins at `start` of the endless order."""
        return self._order.examples(start + self._rank * self._batch_size, self._batch_size).tolist()


def batches_in_order(
    dataset: ConvertedDataset | Sequence[ConvertedDataset],
    batch_size: int,
    split: str = "val",
    rank: int = 0,
    world_size: int = 1,
    limit: int | None = None,
    policy: PolicyConfig = RELEASED,
) -> Iterator[Batch]:
    """Yield the examples of a split once, in a fixed order; the last batch may be smaller.

    Args:
        dataset: one or more, converted for the same base.
        batch_size: examples per batch.
        split: `"train"` or `"val"`.
        rank: of this process, which takes every `world_size`-th example.
        world_size: number of processes.
        limit: at most so many examples over all ranks, spread evenly over the split.
        policy: what is read and written at once.

    Raises:
        DataError: as `ExampleLoader` does.
    """
    reader = _Reader(_as_list(dataset), split, policy)
    rows: Sequence[int] = range(reader.examples)
    if limit is not None and limit < len(rows):
        rows = np.linspace(0, len(rows) - 1, limit).round().astype(np.int64).tolist()
    rows = rows[rank::world_size]
    for start in range(0, len(rows), batch_size):
        yield collate([reader.read(row) for row in rows[start : start + batch_size]], reader.pad_id)


@dataclass(frozen=True)
class _Example:
    """One decoded example."""

    prompt: NDArray[np.int32]
    tokens: NDArray[np.integer]  # action tokens and end of sequence
    images: NDArray[np.uint8]
    action: NDArray[np.float32]
    row: int
    dataset: str
    state: NDArray[np.float32] | None


def collate(examples: Sequence[_Example], pad_id: int) -> Batch:
    """Return a batch of examples: sequences padded on the right, all else stacked."""
    import torch

    states = [example.state for example in examples if example.state is not None]
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
        images=torch.from_numpy(np.stack([example.images for example in examples])),
        action=torch.from_numpy(np.stack([example.action for example in examples])),
        rows=torch.tensor([example.row for example in examples], dtype=torch.int64),
        datasets=tuple(example.dataset for example in examples),
        state=torch.from_numpy(np.stack(states)) if states else None,
    )


class _Examples:
    """The examples of one split of a dataset, as a policy reads them."""

    def __init__(self, dataset: ConvertedDataset, split: str, policy: PolicyConfig) -> None:
        """Open them.

        Raises:
            DataError: a shard cannot be read, or the policy reads the state and there is none.
        """
        self.columns = columns = SplitColumns.of(dataset, split)
        self.windows = Windows.of(dataset, split, policy)
        self._kind = policy.normalization
        if columns.missing["dataset"]:
            raise DataError(f"{dataset.path}: rows of split '{split}' lack their dataset; convert the source again")
        self._statistics = [dataset.statistics[choose_key(dataset.statistics, name)] for name in columns.names]
        self._states = None
        if policy.state:
            _check_states(dataset, columns)
            self._states = columns.lists("state")
        self._tokens = self._tokenizer = None
        if policy.normalization == "q99":  # so are the normalized actions of every conversion
            self._actions, self._tokens = columns.lists("normalized_action"), columns.lists("action_token_ids")
        else:
            self._actions = columns.lists("action")
            described = dataset.info["tokenizer"]
            self._tokenizer = ActionTokenizer(int(described["action_vocab_size"]), int(described["n_action_bins"]))

    @property
    def state_width(self) -> int | None:
        """S, where the policy reads the state and there are rows."""
        return None if self._states is None or not len(self._states) else self._states.shape[1]

    def name(self, row: int) -> str:
        """Return the name of a row's dataset."""
        return self.columns.names[self.columns.arrays["dataset"][row]]

    def actions(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.integer]]:
        """Return the actions of rows of one dataset, normalized `[K, A]`, and their tokens, `[K, A]`."""
        if self._tokens is not None:
            return self._actions[rows], self._tokens[rows]
        assert self._tokenizer is not None
        values = self._normalized(self._actions[rows], int(rows[0]), "action")
        return values, self._tokenizer.encode(values)

    def state(self, row: int) -> NDArray[np.float32] | None:
        """Return the state of a row, normalized `[S]`; None where the policy does not read it."""
        return None if self._states is None else self._normalized(self._states[row], row, "proprio")

    def _normalized(self, values: NDArray[np.float32], row: int, part: str) -> NDArray[np.float32]:
        return normalize(values, self._statistics[self.columns.arrays["dataset"][row]][part], self._kind)


def _check_states(dataset: ConvertedDataset, columns: SplitColumns) -> None:
    """See that there are states, and statistics of them.

    Raises:
        DataError: not; the sentence says how to get them.
    """
    if missing := columns.missing["state"]:
        raise DataError(
            f"{dataset.path}: {missing:,} of its {dataset.rows(columns.split):,} rows have no state, which"
            " policy.state=true reads; convert the source again with the arrays of its state as state='[...]'"
        )
    for name in columns.names:
        if not tells_of_state(dataset.statistics[choose_key(dataset.statistics, name)]):
            raise DataError(
                f"{dataset.path / STATISTICS_FILE} has zeros for the state of '{name}', as earlier versions wrote, and"
                " policy.state=true needs its range; convert the source again"
            )


class _Reader:
    """One split of several datasets as one list of examples."""

    def __init__(self, datasets: Sequence[ConvertedDataset], split: str, policy: PolicyConfig) -> None:
        if not datasets:
            raise DataError("there is no dataset to read")
        self.datasets, self.split = datasets, split
        listed = ", ".join(str(dataset.path) for dataset in datasets)
        if not any(dataset.rows(split) for dataset in datasets):
            raise DataError(
                f"split '{split}' of {listed} is empty; convert with a validation fraction or more episodes"
            )
        first = datasets[0]
        for other in datasets[1:]:
            for what, ours, theirs in _must_agree(first, other):
                if ours != theirs:
                    raise DataError(f"{other.path} and {first.path} differ in their {what}; convert them for one base")
        for dataset in datasets:
            _check_cameras(dataset, policy.cameras)
        self.examples_of = [_Examples(dataset, split, policy) for dataset in datasets]
        self.starts = np.concatenate([[0], np.cumsum([len(examples.windows) for examples in self.examples_of])])
        self.examples = int(self.starts[-1])
        if not self.examples:
            longest = max(int(examples.windows.lengths.max(initial=0)) for examples in self.examples_of)
            raise DataError(
                f"no episode in split '{split}' of {listed} has the {policy.chunk} steps of policy.chunk={policy.chunk}"
                f" (the longest has {longest}); take a smaller chunk, or policy.tail=repeat"
            )
        widths = sorted({examples.state_width for examples in self.examples_of if examples.state_width is not None})
        if len(widths) > 1:
            raise DataError(
                f"the states in {listed} have {' and '.join(map(str, widths))} dimensions; train on them separately, or"
                " with policy.state=false"
            )
        self.images = [[dataset.camera_columns[camera] for camera in policy.cameras] for dataset in datasets]
        self.pad_id = int(first.info["tokenizer"]["pad_id"])
        self.eos_id = int(first.info["tokenizer"]["eos_id"])
        self.fingerprint = data_fingerprint(datasets, policy) + f"/{split}"

    def read(self, example: int) -> _Example:
        number = int(np.searchsorted(self.starts, example, side="right")) - 1
        examples = self.examples_of[number]
        rows = examples.windows[example - int(self.starts[number])]
        now = int(rows[0])
        actions, tokens = examples.actions(rows)
        return _Example(
            prompt=examples.columns.prompt(now),
            tokens=np.append(tokens, self.eos_id),
            images=np.stack([self._frame(examples.columns, now, column) for column in self.images[number]]),
            action=actions,
            row=example,
            dataset=examples.name(now),
            state=examples.state(now),
        )

    def _frame(self, columns: SplitColumns, row: int, column: str) -> NDArray[np.uint8]:
        image = columns.frame(row, column)
        try:
            if image is None:
                raise DataError("the row has no image" + (f" in column '{column}'" if column != MAIN_CAMERA else ""))
            # the frames that vlaft stored itself come back closest with the accurate DCT
            return decode_image(image, "the stored frame", accurate_dct=True)
        except DataError as error:
            place = columns.dataset.row(self.split, row)
            where = f"{columns.dataset.path}, {place['source']}, step {place['frame_index']}"
            raise DataError(f"{where}: {error}; convert the source again") from error

    def groups_by_weight(self) -> list[tuple[float, Runs]]:
        """Return the examples of every source with its weight; sources of one weight are one group."""
        groups: dict[float, list[tuple[int, int]]] = {}
        for dataset, examples, start in zip(self.datasets, self.examples_of, self.starts[:-1].tolist(), strict=True):
            weights = {source["name"]: float(source["weight"]) for source in dataset.info["sources"]}
            if len(weights) == 1:
                groups.setdefault(next(iter(weights.values())), []).append((start, len(examples.windows)))
                continue
            runs = list(examples.columns.runs(examples.windows.blocks()))
            firsts = np.cumsum([start, *(count for _, count in runs)]).tolist()
            for name, weight in weights.items():
                own = [
                    (first, count)
                    for first, (number, count) in zip(firsts, runs, strict=False)
                    if examples.columns.names[number] == name
                ]
                groups.setdefault(weight, []).extend(own)
        found = ((weight, Runs.of(*zip(*parts, strict=True))) for weight, parts in sorted(groups.items()) if parts)
        return [(weight, examples) for weight, examples in found if len(examples)]


def data_fingerprint(datasets: Sequence[ConvertedDataset], policy: PolicyConfig) -> str:
    """Return what tells apart the examples that a policy is trained on; for the released one, the datasets alone."""
    read = {"chunk", "cameras", "state", "normalization", "tail"}
    changed = {key: value for key, value in asdict(policy).items() if key in read and value != getattr(RELEASED, key)}
    written = "".join(f"/{key}={json.dumps(value)}" for key, value in sorted(changed.items()))
    return "+".join(dataset.fingerprint for dataset in datasets) + written


def _check_cameras(dataset: ConvertedDataset, cameras: Sequence[str]) -> None:
    """See that every source of the dataset has the cameras.

    Raises:
        DataError: one has not; the sentence names the camera, and those that are there.
    """
    for source in dataset.info["sources"]:
        columns = source.get("cameras") or dataset.cameras  # written since there are further cameras
        there = camera_columns([column for column in dataset.cameras if column in columns])
        if missing := [camera for camera in cameras if camera not in there]:
            raise DataError(
                f"{dataset.path}: '{source['name']}' has no camera '{missing[0]}' (there are: {', '.join(there)});"
                " name others in policy.cameras, or convert the source again with it"
            )


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
