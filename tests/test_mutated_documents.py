"""Whatever a document holds, its reader says a sentence or takes it: never a traceback, never a hang.

`VLAFT_MUTATIONS=100000 pytest tests/test_mutated_documents.py` tries as many of each kind, or what `VLAFT_SECONDS` (for
one kind) allow, and prints how many.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from faults import tell
from mutations import json_mutations, word_mutations, yaml_mutations
from small_base import convert_small, write_small_base
from torch import nn

from vlaft.accounting.plan import describe
from vlaft.action.statistics import BOUNDS, read_statistics
from vlaft.cli.convert import _layout_settings
from vlaft.data.loader import ExampleLoader
from vlaft.data.mixes import load_mix
from vlaft.data.presets import load_preset
from vlaft.data.source import SourceRequest, open_request
from vlaft.data.store import ConvertedDataset
from vlaft.documents import read_as
from vlaft.errors import VlaftError
from vlaft.model.load import empty_model, load_config
from vlaft.observation.prompts import load_base_files
from vlaft.recipe.resolve import leaf_types, recipes_folder, resolve, to_yaml
from vlaft.release.record import training_record
from vlaft.training.checkpoints import RunProgress, read_checkpoint, write_checkpoint, write_trained
from vlaft.training.folder import RunFolder
from vlaft.weights.trained import find_trained

COUNT = int(os.environ.get("VLAFT_MUTATIONS", "150"))
ALLOWED = float(os.environ.get("VLAFT_SECONDS", "inf"))  # for one kind
SECONDS = 60  # for one document; all take milliseconds

Try = Callable[[int], None]  # reads the document damaged with a seed


@dataclass(frozen=True)
class Kind:
    """How documents of one kind are damaged and read."""

    prepare: Callable[[Path, Path], Try]  # takes a base and its data, and an empty folder
    share: float = 1.0  # of the documents that are tried, less where each takes longer


def write_dataset(made: Path, place: Path) -> Try:
    data = place / "data"
    data.mkdir()
    for path in (made / "data").iterdir():
        (data / path.name).symlink_to(path)
    file = data / "dataset.json"
    document = json.loads(file.read_text())
    file.unlink()

    def attempt(seed: int) -> None:
        file.write_bytes(json_mutations(document, seed))
        dataset = ConvertedDataset(data)
        describe(dataset)
        next(ExampleLoader(dataset, 2))

    return attempt


def write_recipe_words(made: Path, place: Path) -> Try:
    keys = [key for key, _ in leaf_types()]

    def attempt(seed: int) -> None:
        config = resolve("lora8", [], [word_mutations(keys, seed)])
        (place / "recipe.yaml").write_text(to_yaml(config), encoding="utf-8")
        assert resolve(place / "recipe.yaml") == config

    return attempt


def write_layout_words(made: Path, place: Path) -> Try:
    keys = ["action", "state", "cameras.primary", "cameras", "instruction", "fps", "steps", "steps+", "action_mask"]
    keys += ["action_names", "options", "episodes", "shift_action"]

    def attempt(seed: int) -> None:
        settings = _layout_settings([word_mutations(keys, seed)])
        opened = open_request(SourceRequest(path=made / "data.hdf5", layout=settings))
        opened.read(opened.reader.episodes()[0])

    return attempt


def of_yaml(folder: str, read: Callable[[Path], object]) -> Callable[[Path, Path], Try]:
    def prepare(made: Path, place: Path) -> Try:
        files = sorted((recipes_folder() / folder).glob("*.yaml"))
        documents = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in files]

        def attempt(seed: int) -> None:
            (place / "file.yaml").write_bytes(yaml_mutations(documents[seed % len(documents)], seed))
            read(place / "file.yaml")

        return attempt

    return prepare


def write_config(made: Path, place: Path) -> Try:
    for path in (made / "base").iterdir():
        (place / path.name).symlink_to(path)
    file = place / "config.json"
    document = json.loads(file.read_text())
    document["norm_stats"] = json.loads((made / "data/dataset_statistics.json").read_text())
    file.unlink()

    def attempt(seed: int) -> None:
        file.write_bytes(json_mutations(document, seed))
        load_base_files(place).prompt_token_ids("push")
        config = load_config(place)
        overrides = config.vision_overrides if isinstance(config.vision_overrides, list) else []
        depths = [each.get("depth") for each in overrides if isinstance(each, dict)]
        depths.append(config.text_config.num_hidden_layers)
        if not any(isinstance(depth, int) and depth > 8 for depth in depths):  # right, and slow
            empty_model(place)

    return attempt


def write_statistics(made: Path, place: Path) -> Try:
    document = json.loads((made / "data/dataset_statistics.json").read_text())

    def attempt(seed: int) -> None:
        (place / "dataset_statistics.json").write_bytes(json_mutations(document, seed))
        for name, entry in read_statistics(place, BOUNDS).items():
            assert isinstance(name, str)
            assert np.isfinite(np.asarray(entry["action"]["q01"], dtype=np.float64)).all()

    return attempt


STATUS = {
    "status": "finished",
    "recipe": "lora8",
    "base": "openvla/openvla-7b",
    "base_fingerprint": "fac8aa05e581f2bf376e70fd5e90a167",
    "inference": {"prompt_style": "openvla", "image_pipeline": {"size": 56}},
    "last": "step-000002",
    "best": "step-000001",
    "step": 2,
    "best_l1": 0.5,
}


def write_status(made: Path, place: Path) -> Try:
    for name in ("step-000001", "step-000002"):
        (place / "checkpoints" / name).mkdir(parents=True)
    (place / "recipe.yaml").write_text("train: {steps: 2}\n")
    line = {"step": 2, "val_loss": 1.0, "val_action_accuracy": 0.5, "val_action_l1": 0.25}
    report = {"trainable_parameters": 3, "total_parameters": 4}

    def attempt(seed: int) -> None:
        (place / "run.json").write_bytes(json_mutations(STATUS, seed))
        (place / "log.jsonl").write_bytes(json_mutations(line, seed))
        (place / "report.json").write_bytes(json_mutations(report, seed))
        RunFolder(place).read_status()
        for which in ("best", "last"):
            assert find_trained(place, which).weights.is_dir()
        record = training_record(find_trained(place))
        assert record is not None
        json.dumps(record, allow_nan=False)

    return attempt


def write_state(made: Path, place: Path) -> Try:
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    folder = write_checkpoint(
        place,
        2,
        write_weights=lambda target: write_trained(dict(layer.state_dict()), target),
        optimizer=optimizer,
        state={
            "progress": {"step": 2, "best": "step-000001", "best_l1": 0.5, "evaluations_since_best": 1},
            "loader": {"seed": 7, "epoch": 0, "offset": 4, "data": "76267fe9/train"},
            "effective_batch": 2,
        },
    )
    document = json.loads((folder / "state.json").read_text())

    def attempt(seed: int) -> None:
        (folder / "state.json").write_bytes(json_mutations(document, seed))
        state, _, _ = read_checkpoint(folder)
        if state.get("progress") is not None:
            assert read_as(RunProgress, state["progress"]).step == state["step"] >= 0

    return attempt


def write_info(made: Path, place: Path) -> Try:
    (place / "meta").mkdir()
    (place / "data/chunk-000").mkdir(parents=True)
    rows = {"action": [[0.5] * 7] * 4, "episode_index": [0] * 4, "frame_index": range(4), "task_index": [0] * 4}
    pq.write_table(pa.table(rows), place / "data/chunk-000/episode_000000.parquet")
    (place / "meta/tasks.jsonl").write_text('{"task_index": 0, "task": "push"}\n')
    feature = {"dtype": "float32", "shape": [7], "names": ["x", "y", "z", "a", "b", "c", "gripper"]}
    document = {
        "codebase_version": "v2.1",
        "fps": 10,
        "total_episodes": 1,
        "chunks_size": 1000,
        "splits": {"train": "0:1"},
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": {"action": feature, "task_index": {"dtype": "int64", "shape": [1], "names": None}},
    }

    def attempt(seed: int) -> None:
        (place / "meta/info.json").write_bytes(json_mutations(document, seed))
        opened = open_request(SourceRequest(path=place))
        opened.reader.read(opened.reader.episodes()[0])

    return attempt


KINDS = {
    "dataset.json": Kind(write_dataset),
    "recipe words": Kind(write_recipe_words, share=0.4),
    "layout words": Kind(write_layout_words),
    "recipe": Kind(of_yaml(".", resolve), share=0.4),
    "preset": Kind(of_yaml("datasets", load_preset), share=0.4),
    "mix": Kind(of_yaml("mixes", load_mix), share=0.4),
    "config.json": Kind(write_config),
    "dataset_statistics.json": Kind(write_statistics),
    "run.json": Kind(write_status, share=0.3),
    "state.json": Kind(write_state),
    "info.json": Kind(write_info),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    convert_small(write_small_base(folder / "base"), folder / "data", episodes=3, steps=4)
    return folder


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Break off what hangs."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_document_is_a_sentence(
    name: str, made: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    attempt = KINDS[name].prepare(made, tmp_path)
    sentences, tried, began = 0, 0, time.monotonic()
    # all of them where many are asked for: the shares keep the suite fast
    for seed in range(COUNT if COUNT >= 1000 else round(COUNT * KINDS[name].share)):
        if seed % 64 == 0 and time.monotonic() - began > ALLOWED:
            break
        tried += 1
        try:
            with limited(SECONDS):
                attempt(seed)
        except VlaftError as error:
            assert str(error).strip(), seed
            sentences += 1
        except (Exception, RecursionError) as error:
            error.add_note(f"{name}, seed {seed}")
            raise
    assert sentences > 5  # the damage is damage
    if COUNT >= 1000:
        seconds = time.monotonic() - began
        tell(request.config, f"{name:24}{tried:10,} tried {sentences:10,} sentences {seconds:8.0f} s")


def test_damage_is_the_same_on_every_machine() -> None:
    assert json_mutations(STATUS, 5) == json_mutations(dict(STATUS), 5)
    assert any(json_mutations(STATUS, seed) != json.dumps(STATUS).encode() for seed in range(5))


def test_numbers_that_mean_nothing_never_pass_as_others(made: Path, tmp_path: Path) -> None:
    """A weight of true, rows of 3.0 and an id as a text are refused, not turned into what they may have meant."""
    data = tmp_path / "data"
    data.mkdir()
    for path in (made / "data").iterdir():
        (data / path.name).symlink_to(path)
    info: Any = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").unlink()
    changes: list[tuple[str, Callable[[Any], None], str]] = [
        ("weight", lambda it: it["sources"][0].update(weight=True), r"sources\[0\]\.weight must be a number, not True"),
        ("rows", lambda it: it["shards"][0].update(rows=3.5), r"shards\[0\]\.rows must be a whole number, not 3\.5"),
        ("id", lambda it: it["tokenizer"].update(eos_id="2"), r"tokenizer\.eos_id must be a whole number, not '2'"),
        ("none", lambda it: it.update(sources=[]), "at least one source"),
        ("twice", lambda it: it["shards"].append(it["shards"][0]), "at least one shard, and each once"),
        ("camera", lambda it: it["image"].update(cameras=[]), "'image' first"),
    ]
    for _, change, says in changes:
        changed = json.loads(json.dumps(info))
        change(changed)
        (data / "dataset.json").write_text(json.dumps(changed))
        with pytest.raises(VlaftError, match=says):
            ConvertedDataset(data)
