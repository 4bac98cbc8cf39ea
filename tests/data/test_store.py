from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from vlaft.action.statistics import compute_statistics
from vlaft.data.store import ROW_GROUP, ConvertedDataset, example_schema, shard_entry, write_shard
from vlaft.errors import DataError
from vlaft.files import write_json
from vlaft.observation.images import ImagePipeline

PIPELINE = ImagePipeline(8, "lanczos", "resize-naive", (0, 0, 0), False, ((0.5, 0.5, 0.5),), ((0.5, 0.5, 0.5),))


def example(episode: int, frame: int) -> dict[str, Any]:
    return {
        "episode_index": episode,
        "frame_index": frame,
        "dataset": "toy",
        "source": f"demo_{episode}",
        "instruction": "pick up the cup",
        "image": {"bytes": bytes([episode, frame]), "path": None},
        "image_wrist": None,
        "state": None,
        "action": [0.5, float(frame)],
        "normalized_action": [0.25, 1.0],
        "prompt_token_ids": [1, 5, 6],
        "action_token_ids": [300, 301],
    }


def write_dataset(folder: Path) -> Path:
    """Two training shards of 45 and 20 rows, one validation shard of 5."""
    folder.mkdir()
    cameras = ("image", "image_wrist")
    plan = {
        "train-00000-of-00002.parquet": [(0, 25), (1, 20)],
        "train-00001-of-00002.parquet": [(2, 20)],
        "val-00000-of-00001.parquet": [(3, 5)],
    }
    shards = []
    for name, episodes in plan.items():
        rows = [[example(episode, frame) for frame in range(length)] for episode, length in episodes]
        shards.append(write_shard(folder / name, name.split("-")[0], example_schema(cameras), rows))
    actions = [np.array([[0.5, float(frame)] for frame in range(25)], dtype=np.float32)]
    write_json(folder / "dataset_statistics.json", {"toy": compute_statistics(actions)})
    write_json(
        folder / "dataset.json",
        {
            "format_version": 1,
            "sources": [{"name": "toy", "weight": 1.0}],
            "prompt_style": "openvla",
            "tokenizer": {
                "fingerprint": "0" * 64,
                "action_vocab_size": 512,
                "n_action_bins": 256,
                "eos_id": 2,
                "pad_id": 0,
            },
            "counts": {"episodes": {"train": 3, "val": 1}, "rows": {"train": 65, "val": 5}},
            "image": {"cameras": cameras, "pipeline": PIPELINE.to_json()},
            "shards": [shard_entry(shard) for shard in shards],
        },
    )
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data")


def test_every_row_comes_back_in_any_order(folder: Path) -> None:
    dataset = ConvertedDataset(folder)
    expected = [example(episode, frame) for episode, length in [(0, 25), (1, 20), (2, 20)] for frame in range(length)]
    assert dataset.rows("train") == 65 and dataset.rows("val") == 5
    for index in np.random.default_rng(0).permutation(65):
        assert dataset.row("train", int(index)) == expected[index]
    assert dataset.row("val", 4) == example(3, 4)
    with pytest.raises(IndexError):
        dataset.row("val", 5)


def test_small_columns_load_without_the_images(folder: Path) -> None:
    table = ConvertedDataset(folder).table("train")
    assert "image" not in table.column_names and table.num_rows == 65
    assert table["episode_index"].to_pylist() == [0] * 25 + [1] * 20 + [2] * 20


def test_row_groups_are_small_and_images_are_declared_to_the_hub(folder: Path) -> None:
    file = pq.ParquetFile(folder / "train-00000-of-00002.parquet")
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    assert sizes == [ROW_GROUP] * (45 // ROW_GROUP) + [45 % ROW_GROUP]
    features = json.loads(file.schema_arrow.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == features["image_wrist"] == {"_type": "Image"}
    assert features["action"] == {"feature": {"dtype": "float32", "_type": "Value"}, "_type": "Sequence"}
    assert list(features) == file.schema_arrow.names


def test_the_same_rows_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = write_dataset(tmp_path / "again")
    for path in sorted(folder.iterdir()):
        assert path.read_bytes() == (again / path.name).read_bytes()
    assert not list(folder.glob(".*"))


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def rows() -> Any:
        yield [example(0, 0)] * 40
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError):
        write_shard(tmp_path / "train.parquet", "train", example_schema(("image", "image_wrist")), rows())
    assert list(tmp_path.iterdir()) == []


def test_a_changed_byte_is_found_by_its_checksum(folder: Path) -> None:
    path = folder / "train-00001-of-00002.parquet"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"train-00001-of-00002\.parquet does not match its checksum"):
        ConvertedDataset(folder).verify()


def edit(folder: Path, **changes: Any) -> None:
    info = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(info | changes))


def test_faults_are_sentences_that_name_the_file(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no converted dataset"):
        ConvertedDataset(tmp_path)
    shard = folder / "train-00000-of-00002.parquet"
    data = shard.read_bytes()
    shard.write_bytes(data[:-9])
    with pytest.raises(DataError, match="bytes instead of"):
        ConvertedDataset(folder)
    shard.write_bytes(bytes(len(data)))
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        ConvertedDataset(folder)
    shard.unlink()
    with pytest.raises(DataError, match=r"train-00000-of-00002\.parquet is missing"):
        ConvertedDataset(folder)
    edit(folder, shards=[{"file": "../x.parquet", "split": "train", "rows": 1, "bytes": 1, "crc32c": ""}])
    with pytest.raises(DataError, match="outside of its folder"):
        ConvertedDataset(folder)
    edit(folder, shards=[{"file": "x"}])
    with pytest.raises(DataError, match=r"shards\[0\].split' is missing"):
        ConvertedDataset(folder)
    edit(folder, format_version=7)
    with pytest.raises(DataError, match="format version 7"):
        ConvertedDataset(folder)
    (folder / "dataset.json").write_text("[]")
    with pytest.raises(DataError, match="must hold a JSON object"):
        ConvertedDataset(folder)
