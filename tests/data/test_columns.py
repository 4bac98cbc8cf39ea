"""A split as arrays: the same values as in Parquet, in memory or mapped from the cache."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from converted_sets import ramp, write_episodes

from vlaft.checksums import cache_folder, checksum
from vlaft.data import columns as module
from vlaft.data.columns import SplitColumns
from vlaft.data.loader import ExampleLoader
from vlaft.data.order import Order
from vlaft.data.store import ConvertedDataset, Shard, shard_entry
from vlaft.errors import DataError
from vlaft.files import locked, read_json, write_json
from vlaft.recipe.settings import PolicyConfig

POLICY = PolicyConfig(head="l1", chunk=3, state=True, cameras=["main", "wrist"])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    episodes = [(ramp(steps), np.ones((steps, 3), np.float32) * steps) for steps in (5, 20, 9, 2)]
    write_episodes(tmp_path / "data", episodes)
    return tmp_path / "data"


def batches(folder: Path) -> list[torch.Tensor | None]:
    loader = ExampleLoader(ConvertedDataset(folder), 7, policy=POLICY)
    return [getattr(next(loader), name) for _ in range(9) for name in ("images", "action", "state", "input_ids")]


def is_kept(folder: Path) -> bool:
    return isinstance(SplitColumns.of(ConvertedDataset(folder), "train").arrays["action"].base, np.memmap)


def test_every_value_is_that_of_parquet(folder: Path) -> None:
    dataset = ConvertedDataset(folder)
    columns = SplitColumns.of(dataset, "train")
    for row in range(dataset.rows("train")):
        stored = dataset.row("train", row)
        for name in ("action", "normalized_action", "action_token_ids", "state"):
            assert columns.lists(name)[row].tolist() == stored[name]
        for name in ("episode_index", "frame_index"):
            assert columns.arrays[name][row] == stored[name]
        assert columns.prompt(row).tolist() == stored["prompt_token_ids"]
        assert columns.names[columns.arrays["dataset"][row]] == stored["dataset"]
        for camera in dataset.cameras:
            assert columns.arrays[f"place.{camera}"][row] > 0
            assert columns.frame(row, camera) == stored[camera]["bytes"]
    assert len(columns.arrays["prompt_starts"]) == 2  # of equal prompts there is one


def test_kept_columns_give_the_same_batches(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = batches(folder)
    assert not is_kept(folder) and not cache_folder("columns").exists()
    monkeypatch.setattr(module, "_KEPT", 0)
    for _ in ("written", "found"):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(batches(folder), expected, strict=True))
        assert is_kept(folder)
    assert len(list(cache_folder("columns").iterdir())) == 1
    [kept] = cache_folder("columns").iterdir()
    written = (kept / "action.npy").stat().st_mtime_ns
    assert is_kept(folder) and (kept / "action.npy").stat().st_mtime_ns == written
    (kept / "action.npy").write_bytes(b"cut off")  # what does not fit what describes it is made anew
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(batches(folder), expected, strict=True))
    assert is_kept(folder) and (kept / "action.npy").stat().st_size > 7


def test_another_process_is_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KEPT", 0)
    monkeypatch.setattr(module, "_WAIT", 0.01)
    assert is_kept(folder)
    [kept] = cache_folder("columns").iterdir()
    shutil.rmtree(kept)
    found: list[bool] = []
    with locked(kept):
        waiting = threading.Thread(target=lambda: found.append(is_kept(folder)))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive() and not found
    waiting.join(20)
    assert found == [True] and kept.is_dir()


def test_without_a_cache_to_write_to_columns_are_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = batches(folder)
    monkeypatch.setattr(module, "_KEPT", 0)
    cache_folder("columns").parent.parent.mkdir()
    cache_folder("columns").parent.write_text("a file where the folder would be")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(batches(folder), expected, strict=True))
    assert not is_kept(folder)


def rewrite(folder: Path, table: pa.Table) -> None:
    """Put a table in the place of the training shard, as something else would write it."""
    path = folder / "train-00000-of-00001.parquet"
    pq.write_table(table, path, compression="zstd", row_group_size=10)
    shard = Shard(path.name, "train", len(table), path.stat().st_size, checksum(path))
    info = read_json(folder / "dataset.json")
    info["shards"] = [shard_entry(shard), *(entry for entry in info["shards"] if entry["split"] != "train")]
    write_json(folder / "dataset.json", info)


def test_shards_that_something_else_has_compressed_are_read_too(folder: Path) -> None:
    expected = batches(folder)
    rewrite(folder, pq.read_table(folder / "train-00000-of-00001.parquet"))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(batches(folder), expected, strict=True))
    places = SplitColumns.of(ConvertedDataset(folder), "train").arrays["place.image"]
    assert module._ENCODED in places.tolist()


def test_a_shard_that_was_replaced_meanwhile_is_told(folder: Path) -> None:
    """Places of frames in one file would be other frames in its successor."""
    loader = ExampleLoader(ConvertedDataset(folder), 7, policy=POLICY)
    next(loader)
    for path in folder.glob("*.parquet"):
        shutil.copyfile(path, folder / "copy")
        (folder / "copy").replace(path)
    with pytest.raises(DataError, match="was replaced while it was read; start again"):
        next(loader)


def test_what_rows_lack_is_told(folder: Path, tmp_path: Path) -> None:
    dataset = write_episodes(tmp_path / "stateless", [(ramp(5), None)], cameras=["image"])
    with pytest.raises(DataError, match="column 'state' is empty in 5 of 5 rows"):
        SplitColumns.of(dataset, "train").lists("state")
    table = pq.read_table(folder / "train-00000-of-00001.parquet")
    for place, (name, values) in enumerate((("action", [0.5] * 3), ("image", None), ("dataset", None))):
        changed = [*table[name].to_pylist()[:-1], values]
        number = table.column_names.index(name)
        field = table.schema.field(name)
        rewrite(folder, table.set_column(number, field, pa.chunked_array([changed], field.type)))
        dataset = ConvertedDataset(folder)
        columns = SplitColumns.of(dataset, "train")
        if place == 0:
            with pytest.raises(DataError, match="column 'action' has from 2 to 3 numbers in a row"):
                columns.lists("action")
        elif place == 1:
            assert columns.frame(35, "image") is None and columns.frame(34, "image") is not None
        else:
            assert columns.missing["dataset"] == 1
            with pytest.raises(DataError, match="rows of split 'train' lack their dataset; convert"):
                ExampleLoader(dataset, 2)


def test_a_run_goes_on_with_the_order_that_it_began_with(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loader() -> ExampleLoader:
        return ExampleLoader(ConvertedDataset(folder), 5)

    began = loader()
    rows = [next(began).rows.tolist() for _ in range(20)]
    halfway = loader()
    for _ in range(10):
        next(halfway)
    listed = halfway.state_dict()
    monkeypatch.setattr("vlaft.data.order._LISTED", 10)
    computed = loader()
    assert [next(computed).rows.tolist() for _ in range(20)] != rows
    position = computed.state_dict()
    resumed = loader()
    resumed.load_state_dict(listed)
    assert [next(resumed).rows.tolist() for _ in range(10)] == rows[10:]
    monkeypatch.undo()
    again = loader()
    again.load_state_dict(position)
    assert next(again).rows.tolist() == next(computed).rows.tolist() and again.state_dict()["data"] != listed["data"]
    assert Order([], 0).length == 1
