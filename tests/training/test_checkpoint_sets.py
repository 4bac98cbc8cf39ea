"""Whole weights in shards: each process reads and writes its own, and any number of processes goes on with them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_models import base_tensors
from ranks import together
from small_run import Recorder, Small, log_lines, run
from torch.distributed.tensor import DTensor

from vlaft.adapt.adapter import base_parameters
from vlaft.errors import ConfigError, VlaftError
from vlaft.recipe.settings import resolve_precision
from vlaft.release.merge import merge
from vlaft.training import sharded_start
from vlaft.training.checkpoints import newest_good, read_checkpoint
from vlaft.training.model import load_trainable
from vlaft.training.sharded_start import load_sharded
from vlaft.training.sharding import join_processes, local_part, mesh_of, own_rows
from vlaft.training.trainer import train
from vlaft.weights.layout import tensor_table
from vlaft.weights.pieces import StoredTensors
from vlaft.weights.trained import find_trained

WORDS = ("data.augment=false", "train.save_every=2", "train.evaluate_every=0", "train.max_grad_norm=1.0")
WHOLE = {"trained-00001-of-00002.safetensors", "trained-00002-of-00002.safetensors", "state.json"} | {
    "optimizer-00001-of-00002.safetensors",
    "optimizer-00002-of-00002.safetensors",
}


def in_processes(
    small: Small, out: Path, count: int, steps: int, *words: str, name: str = "full", resume: bool = False
) -> None:
    """Train in so many processes, four examples a step in all."""
    recipe = small.recipe(name, *WORDS, f"train.steps={steps}", f"train.batch_size={4 // count}", *words)
    together(count, lambda rank: train(recipe, out, Recorder(), resume=resume) and None, out.parent / "said")


def assert_same_losses(out: Path, expected: Path) -> None:
    ours, theirs = ([line["loss"] for line in log_lines(folder)] for folder in (out, expected))
    assert ours == pytest.approx(theirs, rel=1e-5) and len(ours) > 2


def test_a_set_is_read_by_any_number_of_processes(small: Small, tmp_path: Path) -> None:
    run(small.recipe("full", *WORDS, "train.steps=4"), tmp_path / "one")
    in_processes(small, tmp_path / "two", 2, 2)
    checkpoint = tmp_path / "two" / "checkpoints" / "step-000002"
    assert {path.name for path in checkpoint.iterdir()} == WHOLE
    parts = [sum(path.stat().st_size for path in checkpoint.glob(f"*-0000{number}-*")) for number in (1, 2)]
    assert max(parts) < 0.6 * sum(parts)  # odd numbers of rows, and headers
    shutil.copytree(tmp_path / "two", tmp_path / "alone")
    told = run(small.recipe("full", *WORDS, "train.steps=4"), tmp_path / "alone", resume=True)
    assert told.warnings == [] and [line.step for line in told.lines] == [3, 4]
    assert_same_losses(tmp_path / "alone", tmp_path / "one")
    for out in ("one", "two"):
        merge(find_trained(tmp_path / out, "step-000002"), small.base, tmp_path / f"merged-{out}")
    ours, theirs = (base_tensors(tmp_path / f"merged-{out}") for out in ("two", "one"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-4)
    part = checkpoint / "optimizer-00002-of-00002.safetensors"
    content = bytearray(part.read_bytes())
    content[-5] ^= 16
    part.write_bytes(content)
    found, warnings = newest_good(checkpoint.parent)
    assert found is None and len(warnings) == 1 and part.name in warnings[0]


@pytest.mark.slow
def test_copies_go_on_with_a_set_and_shards_with_a_file(small: Small, tmp_path: Path) -> None:
    run(small.recipe("full", *WORDS, "train.steps=4"), tmp_path / "one")
    in_processes(small, tmp_path / "set", 2, 2)
    shutil.copytree(tmp_path / "set", tmp_path / "more")
    in_processes(small, tmp_path / "set", 2, 4, "train.parallel=ddp", resume=True)
    assert_same_losses(tmp_path / "set", tmp_path / "one")
    in_processes(small, tmp_path / "more", 4, 4, resume=True)
    assert_same_losses(tmp_path / "more", tmp_path / "one")
    run(small.recipe("full", *WORDS, "train.steps=2"), tmp_path / "file")
    in_processes(small, tmp_path / "file", 4, 4, resume=True)
    assert_same_losses(tmp_path / "file", tmp_path / "one")


@pytest.mark.slow
def test_adapters_in_shards_stay_one_file(small: Small, tmp_path: Path) -> None:
    run(small.recipe("oft", *WORDS, "policy.chunk=3", "train.steps=4"), tmp_path / "one")
    words = ("policy.chunk=3", "train.parallel=fsdp")
    in_processes(small, tmp_path / "two", 2, 2, *words, name="oft")
    names = {path.name for path in (tmp_path / "two" / "checkpoints" / "step-000002").iterdir()}
    assert {"adapter_model.safetensors", "trained.safetensors", "optimizer.safetensors"} < names
    in_processes(small, tmp_path / "two", 2, 4, *words, name="oft", resume=True)
    assert_same_losses(tmp_path / "two", tmp_path / "one")


def test_each_process_reads_its_rows_and_no_others(small: Small, tmp_path: Path) -> None:
    """The kernel's count of what was read, and every number against a model that was loaded whole."""
    recipe = small.recipe("lora8")
    precision = resolve_precision(recipe.precision, on_gpu=False)
    whole = load_trainable(recipe, precision, small.base, torch.device("cpu"))[0]  # seeds no generator
    device = torch.device("cpu")

    def read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    def work(rank: int) -> None:
        join_processes()
        mesh = mesh_of("fsdp", device)
        table, fill = tensor_table(small.base), sharded_start.fill
        taken = []

        def counted(*arguments: Any) -> int:
            before = read()
            told = fill(*arguments)
            taken.append(read() - before)
            return told

        sharded_start.fill = counted
        model, (trained, total) = load_sharded(recipe, precision, small.base, device, mesh)
        held = {name: p for name, p in base_parameters(model).items() if name in table}
        for name, parameter in base_parameters(whole).items():
            if name in held:
                rows = own_rows(held[name])
                assert isinstance(held[name], DTensor)
                assert local_part(held[name].detach()).equal(parameter[rows.start : rows.stop])
        own = sum(local_part(parameter.detach()).nbytes for parameter in held.values())
        (tmp_path / f"{rank}.json").write_text(json.dumps([own, *taken, trained, total]))

    together(4, work, tmp_path / "said")
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    stored = sum(entry.end - entry.begin for entry in tensor_table(small.base).values())
    assert sum(own for own, *_ in told) == stored
    for own, taken, trained, total in told:
        assert own <= taken < own + 1000  # which reads the count itself
        assert own < stored / 4 * 1.1  # odd numbers of rows
        assert 0 < trained < total == sum(parameter.numel() for parameter in whole.parameters())


def test_what_cannot_be_sharded(small: Small, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for word in ("adapt.quantize=nf4", "adapt.lora.dora=true", "adapt.lora.init=pissa"):
        with pytest.raises(ConfigError, match=r"train\.parallel=ddp"):
            small.recipe("lora8", "train.parallel=fsdp", word)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(ConfigError, match="at least two; here are 1 of 2"):
        train(small.recipe("full", "train.parallel=hsdp"), tmp_path / "run", Recorder())
    with pytest.raises(ConfigError, match=r"take train\.optimizer=adamw"):
        train(small.recipe("full", "train.optimizer=paged-adamw-8bit"), tmp_path / "run", Recorder())


def test_a_process_that_cannot_write_stops_all(small: Small, tmp_path: Path) -> None:
    recipe = small.recipe("full", *WORDS, "train.steps=2", "train.batch_size=2")

    def work(rank: int) -> None:
        import vlaft.training.checkpoint_sets as sets

        def full(*arguments: object) -> None:
            raise OSError(28, os.strerror(28))

        if rank == 1:
            sets.write_rows = full
        with pytest.raises(VlaftError) as raised:
            train(recipe, tmp_path / "run", Recorder())
        print(raised.value)

    said = together(2, work, tmp_path / "said")
    assert "process 1 could not write its part" in said[0] and "No space left on device" in said[1]
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_reading_a_checkpoint_gives_moments_by_name(small: Small, tmp_path: Path) -> None:
    run(small.recipe("full", *WORDS, "train.steps=2"), tmp_path / "one")
    state, tensors, random = read_checkpoint(tmp_path / "one" / "checkpoints" / "step-000002")
    assert isinstance(tensors, StoredTensors) and state["step"] == 2 and set(random) == {"random.cpu"}
    assert tensors["0.exp_avg"].shape == tensors["0.exp_avg_sq"].shape
