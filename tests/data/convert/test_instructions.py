"""A conversion gives each row the instruction of its own step, in words and as token ids."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlaft.data.codec import encode_image
from vlaft.data.convert.run import ConvertRequest, SourceRequest, convert
from vlaft.data.store import ConvertedDataset
from vlaft.errors import DataError
from vlaft.inspection.converted import inspect_converted
from vlaft.inspection.facts import inspect_source
from vlaft.inspection.summary import summarize
from vlaft.inspection.warnings import find
from vlaft.observation.prompts import load_base_files

TASKS = [[0, 0, 1, 1], [1, 1, 1, 1]]
TEXTS = ["open", "it"]


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """A LeRobot set of two episodes, one of them with two tasks."""
    root = tmp_path / "recordings"
    (root / "meta").mkdir(parents=True)
    (root / "data/chunk-000").mkdir(parents=True)
    features = {"action": {"dtype": "float32", "shape": [7]}, "observation.image": {"dtype": "image"}}
    info = {"codebase_version": "v2.1", "fps": 10, "features": features, "total_episodes": 2}
    info["data_path"] = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    (root / "meta/info.json").write_text(json.dumps(info))
    lines = [json.dumps({"task_index": number, "task": text}) for number, text in enumerate(TEXTS)]
    (root / "meta/tasks.jsonl").write_text("\n".join(lines))
    lines = [json.dumps({"episode_index": number, "length": 4}) for number in range(2)]
    (root / "meta/episodes.jsonl").write_text("\n".join(lines))
    rng = np.random.default_rng(0)
    picture = {"bytes": encode_image(np.full((16, 16, 3), 90, np.uint8), "png"), "path": None}
    for number, tasks in enumerate(TASKS):
        table = {
            "action": pa.array(rng.normal(size=(4, 7)).tolist(), pa.list_(pa.float32())),
            "observation.image": pa.array([picture] * 4),
            "timestamp": pa.array(np.arange(4) / 10),
            "task_index": pa.array(tasks),
        }
        pq.write_table(pa.table(table), root / f"data/chunk-000/episode_{number:06d}.parquet")
    return root


@pytest.mark.parametrize("workers", [1, 2])
def test_rows_keep_their_own_instruction(recordings: Path, base: str, tmp_path: Path, workers: int) -> None:
    request = ConvertRequest(
        sources=[SourceRequest(path=recordings)],
        base=base,
        out=tmp_path / "out",
        val_fraction=0,
        workers=workers,
        shard_rows=2,
    )
    done = convert(request)
    assert done.sources[0]["instructions"] == TEXTS
    prompts = {text: load_base_files(Path(base)).prompt_token_ids(text) for text in TEXTS}
    assert prompts["open"] != prompts["it"]
    table = ConvertedDataset(tmp_path / "out").table("train")
    wanted = [TEXTS[task] for tasks in TASKS for task in tasks]
    assert table.column("instruction").to_pylist() == wanted
    assert table.column("prompt_token_ids").to_pylist() == [prompts[text] for text in wanted]
    for inspection in (inspect_source(request.sources[0]), inspect_converted(tmp_path / "out")):
        assert inspection.instructions == TEXTS
        assert summarize(inspection, find(inspection))["instructions"] == TEXTS


def test_one_instruction_for_all_wins(recordings: Path, base: str, tmp_path: Path) -> None:
    source = SourceRequest(path=recordings, layout={"instruction": "open it"})
    convert(ConvertRequest(sources=[source], base=base, out=tmp_path / "out", workers=1))
    table = ConvertedDataset(tmp_path / "out").table("train")
    assert set(table.column("instruction").to_pylist()) == {"open it"}
    assert inspect_source(source).instructions == ["open it"]


def test_an_instruction_too_long_is_told_wherever_it_stands(recordings: Path, base: str, tmp_path: Path) -> None:
    lines = [json.dumps({"task_index": number, "task": text}) for number, text in enumerate(["open", "it " * 3000])]
    (recordings / "meta/tasks.jsonl").write_text("\n".join(lines))
    request = ConvertRequest(sources=[SourceRequest(path=recordings)], base=base, out=tmp_path / "out", workers=1)
    with pytest.raises(DataError, match=r"episode '.*0': its instruction has .* tokens"):
        convert(request)
