from __future__ import annotations

import json
from collections import Counter
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlaft.action.statistics import compute_statistics
from vlaft.action.tokens import ActionTokenizer, normalize
from vlaft.data.codec import encode_image
from vlaft.data.loader import Batch, ExampleLoader, batches_in_order
from vlaft.data.store import ConvertedDataset, example_schema, shard_entry, write_shard
from vlaft.errors import DataError
from vlaft.files import write_json
from vlaft.observation.images import ImagePipeline

PIPELINE = ImagePipeline(8, "lanczos", "resize-naive", (0, 0, 0), False, ((0.5, 0.5, 0.5),), ((0.5, 0.5, 0.5),))
TOKENIZER = {"base": "b", "eos_id": 2, "pad_id": 3, "fingerprint": "f", "action_vocab_size": 600, "n_action_bins": 256}


def write_dataset(
    folder: Path, sizes: dict[str, int], weights: dict[str, float] | None = None, val: int = 7, **info: Any
) -> ConvertedDataset:
    """A dataset whose rows are told apart by their frame's grey level; prompts have 3 or 4 tokens."""
    folder.mkdir()
    statistics: dict[str, Any] = {}
    episodes: list[list[dict[str, Any]]] = []
    level = 0
    for name, size in sizes.items():
        actions = np.linspace(-1, 1, 2 * size, dtype=np.float32).reshape(size, 2)
        statistics[name] = compute_statistics([actions])
        normalized = normalize(actions, statistics[name]["action"])
        rows = []
        for frame in range(size):
            image = encode_image(np.full((8, 8, 3), level, np.uint8), "png")
            rows.append(
                {
                    "episode_index": len(episodes),
                    "frame_index": frame,
                    "dataset": name,
                    "source": "demo_0",
                    "instruction": "x",
                    "image": {"bytes": image, "path": None},
                    "state": None,
                    "action": actions[frame],
                    "normalized_action": normalized[frame],
                    "prompt_token_ids": [1, 5, 6] if frame % 2 else [1, 5, 6, 7],
                    "action_token_ids": ActionTokenizer(600).encode(normalized[frame]),
                }
            )
            level += 1
        episodes.append(rows)
    schema = example_schema(("image",))
    shards = [
        write_shard(folder / "train-00000-of-00001.parquet", "train", schema, episodes),
        write_shard(folder / "val-00000-of-00001.parquet", "val", schema, [episodes[0][:val]]),
    ]
    write_json(folder / "dataset_statistics.json", statistics)
    write_json(
        folder / "dataset.json",
        {
            "format_version": 1,
            "sources": [{"name": name, "weight": (weights or {}).get(name, 1.0)} for name in sizes],
            "image": {"cameras": ["image"], "pipeline": PIPELINE.to_json()},
            "prompt_style": "openvla",
            "tokenizer": TOKENIZER,
            "counts": {"episodes": {}, "rows": {}},
            "shards": [shard_entry(shard) for shard in shards],
        }
        | info,
    )
    return ConvertedDataset(folder)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ConvertedDataset:
    return write_dataset(tmp_path_factory.mktemp("loader") / "data", {"toy": 50})


def rows_of(batch: Batch) -> list[int]:
    return batch.images[:, 0, 0, 0, 0].tolist()


def take(loader: Any, count: int) -> list[list[int]]:
    return [rows_of(batch) for batch in islice(loader, count)]


def test_a_batch_is_padded_and_labelled(dataset: ConvertedDataset) -> None:
    batch = next(batches_in_order(dataset, 2))
    first, second = dataset.row("val", 0), dataset.row("val", 1)
    tokens = [first["action_token_ids"], second["action_token_ids"]]
    assert batch.input_ids.tolist() == [[1, 5, 6, 7, *tokens[0], 2], [1, 5, 6, *tokens[1], 2, 3]]
    assert batch.labels.tolist() == [[-100] * 4 + [*tokens[0], 2], [-100] * 3 + [*tokens[1], 2, -100]]
    assert batch.attention_mask.tolist() == [[True] * 7, [True] * 6 + [False]]
    assert batch.images.shape == (2, 1, 8, 8, 3) and batch.images.dtype == torch.uint8
    assert batch.action.dtype == torch.float32 and batch.state is None
    assert batch.action.tolist() == [[first["normalized_action"]], [second["normalized_action"]]]
    assert batch.datasets == ("toy", "toy") and len(batch.to("cpu")) == 2


def test_an_epoch_is_every_row_once_and_epochs_differ(dataset: ConvertedDataset) -> None:
    batches = take(ExampleLoader(dataset, 10, seed=3), 10)
    first, second = [*chain(*batches[:5])], [*chain(*batches[5:])]
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second and first != sorted(first)
    assert take(ExampleLoader(dataset, 10, seed=3), 10) == batches
    assert take(ExampleLoader(dataset, 10, seed=4), 10) != batches


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 17), before=st.integers(0, 9), workers=st.sampled_from([0, 2]), seed=st.integers(0, 2**40))
def test_resuming_continues_at_the_exact_example(
    dataset: ConvertedDataset, batch: int, before: int, workers: int, seed: int
) -> None:
    whole = take(ExampleLoader(dataset, batch, seed), before + 4)
    interrupted = ExampleLoader(dataset, batch, seed, workers=workers)
    assert take(interrupted, before) == whole[:before]
    state = json.loads(json.dumps(interrupted.state_dict()))
    interrupted.close()
    resumed = ExampleLoader(dataset, batch, seed, workers=workers)
    next(resumed)  # a loader that has run already forgets it
    resumed.load_state_dict(state)
    assert take(resumed, 4) == whole[before:]
    resumed.close()


def test_ranks_share_an_epoch(dataset: ConvertedDataset) -> None:
    ranks = [ExampleLoader(dataset, 5, seed=1, rank=rank, world_size=2) for rank in range(2)]
    seen = [[*chain(*take(loader, 5))] for loader in ranks]
    assert sorted(seen[0] + seen[1]) == list(range(50))
    assert ranks[0].state_dict() == ranks[1].state_dict() and ranks[0].epoch == 1.0
    together = take(ExampleLoader(dataset, 10, seed=1), 5)
    assert sorted(seen[0] + seen[1]) == sorted(chain(*together))


def test_weights_multiply_rows(tmp_path: Path) -> None:
    mixed = write_dataset(tmp_path / "mixed", {"a": 20, "b": 10, "c": 8}, {"a": 0.5, "b": 2.0})
    loader = ExampleLoader(mixed, 38, seed=5)
    assert loader.epoch_length == 10 + 20 + 8
    epochs = [next(loader) for _ in range(2)]
    counts = [Counter(batch.datasets) for batch in epochs]
    assert counts == [{"a": 10, "b": 20, "c": 8}] * 2
    rows = [Counter(rows_of(batch)) for batch in epochs]
    assert all(rows[0][row] == 2 for row in range(20, 30))
    assert {row for row in rows[0] + rows[1] if row < 20} == set(range(20))  # half in each epoch, not the same half


def test_two_datasets_are_one(dataset: ConvertedDataset, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other", {"other": 30})
    batch = next(ExampleLoader([dataset, other], 80))
    assert Counter(batch.datasets) == {"toy": 50, "other": 30}


def test_in_order_once_and_spread_when_limited(dataset: ConvertedDataset) -> None:
    assert [rows_of(batch) for batch in batches_in_order(dataset, 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [rows_of(batch) for batch in batches_in_order(dataset, 9, rank=1, world_size=2)] == [[1, 3, 5]]
    assert [rows_of(batch) for batch in batches_in_order(dataset, 9, limit=3)] == [[0, 3, 6]]


def test_what_does_not_fit_is_told(dataset: ConvertedDataset, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other", {"o": 5}, tokenizer=TOKENIZER | {"fingerprint": "g"}, val=0)
    with pytest.raises(DataError, match="differ in their tokenizer"):
        ExampleLoader([dataset, other], 2)
    with pytest.raises(DataError, match=r"split 'val' of .* is empty"):
        next(batches_in_order(other, 2))
    with pytest.raises(DataError, match="other data or another seed"):
        ExampleLoader(dataset, 2, seed=1).load_state_dict(ExampleLoader(dataset, 2, seed=2).state_dict())
