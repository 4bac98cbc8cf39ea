"""Merging on disk: upstream's merged model, the release's layout, and everything that must be refused."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import faults
import pytest
import torch
from golden_models import NAMES, Golden, base_tensors, copy_checkpoint, golden, write_single_file
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlaft.action.statistics import STATISTICS_FILE
from vlaft.adapt.adapter import read_adapter_tensors
from vlaft.cli.main import main
from vlaft.errors import CheckpointError, ConfigError, VlaftError
from vlaft.files import read_json
from vlaft.model.load import load_model
from vlaft.release import merge as merge_module
from vlaft.release.merge import MERGE_FILE, merge
from vlaft.weights.layout import INDEX_FILE, SINGLE_FILE, fingerprint, resolve_checkpoint, tensor_table
from vlaft.weights.stream import read_tensor
from vlaft.weights.trained import ADAPTER_WEIGHTS, TRAINED_FILE, Trained, find_trained

STATISTICS = {"mine": {"action": {"q01": [0.0], "q99": [1.0], "mask": [True]}, "num_transitions": 3}}


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest) -> Golden:
    return golden(request.param)


@pytest.fixture
def adapter(case: Golden) -> Trained:
    return find_trained(case.folder / "adapter_trained")


def trained_tensors(folder: Path, tensors: dict[str, Tensor]) -> Trained:
    folder.mkdir()
    save_file(tensors, folder / TRAINED_FILE)
    return Trained(folder, base=None)


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_merged_model_is_upstreams(case: Golden, adapter: Trained, tmp_path: Path) -> None:
    merge(adapter, case.folder, tmp_path / "out")
    model = load_model(tmp_path / "out")
    inputs = {name: tensor for name, tensor in case.batch.items() if name != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, case.tensors["merged_logits"], rtol=0, atol=1e-4)
        loss = model(**case.batch).loss.item()
    assert loss == pytest.approx(case.expected["lora"]["merged_loss"], rel=1e-5)


def test_keys_types_shapes_and_shards_are_the_bases(case: Golden, adapter: Trained, tmp_path: Path) -> None:
    written: list[int] = []
    result = merge(adapter, case.folder, tmp_path / "out", advance=written.append)
    before, after = tensor_table(case.folder), tensor_table(tmp_path / "out")
    assert {name: (e.file, e.dtype, e.shape) for name, e in after.items()} == {
        name: (e.file, e.dtype, e.shape) for name, e in before.items()
    }
    index, base_index = read_json(tmp_path / "out" / INDEX_FILE), read_json(case.folder / INDEX_FILE)
    assert index["weight_map"] == base_index["weight_map"]
    assert index["metadata"]["total_size"] == result.bytes == sum(written)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"config.json", "generation_config.json", MERGE_FILE, INDEX_FILE}
    assert not {"expected.json", "tensors.safetensors"} & names
    assert result.tensors == len(before)
    assert result.changed == len(read_adapter_tensors(adapter.weights)) // 2


def test_tensors_without_an_adapter_keep_every_bit(case: Golden, adapter: Trained, tmp_path: Path) -> None:
    result = merge(adapter, case.folder, tmp_path / "out")
    before, after = base_tensors(case.folder), base_tensors(tmp_path / "out")
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert len(changed) <= result.changed
    assert "language_model.lm_head.weight" in changed
    assert not any(name.endswith((".bias", "norm.weight", "embed_tokens.weight")) for name in changed)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_another_type_is_rounded_once(case: Golden, adapter: Trained, tmp_path: Path, dtype: str) -> None:
    merge(adapter, case.folder, tmp_path / "exact")
    merge(adapter, case.folder, tmp_path / "out", dtype=dtype)
    exact, rounded = base_tensors(tmp_path / "exact"), base_tensors(tmp_path / "out")
    kind = getattr(torch, dtype)
    assert all(torch.equal(rounded[name], tensor.to(kind)) for name, tensor in exact.items())
    assert read_json(tmp_path / "out" / "config.json")["torch_dtype"] == dtype
    assert {parameter.dtype for parameter in load_model(tmp_path / "out").parameters()} == {kind}


def test_bfloat16_base_is_summed_in_float32(case: Golden, adapter: Trained, tmp_path: Path) -> None:
    half = {name: tensor.bfloat16() for name, tensor in base_tensors(case.folder).items()}
    base = write_single_file(case.folder, tmp_path / "base", half)
    merge(adapter, base, tmp_path / "wide", dtype="float32")
    merge(adapter, base, tmp_path / "out")
    wide, out = base_tensors(tmp_path / "wide"), base_tensors(tmp_path / "out")
    assert all(torch.equal(out[name], tensor.bfloat16()) for name, tensor in wide.items())
    name = "language_model.lm_head.weight"
    assert not torch.equal(wide[name], wide[name].bfloat16().float())
    assert not (tmp_path / "out" / INDEX_FILE).exists()
    assert (tmp_path / "out" / SINGLE_FILE).is_file()


def test_statistics_and_inference_keys_go_into_the_config(case: Golden, adapter: Trained, tmp_path: Path) -> None:
    trained = replace(adapter, statistics=STATISTICS, inference={"prompt_style": "vicuna"}, recipe="lora32")
    merge(trained, case.folder, tmp_path / "out", base_name="someone/base")
    config, base = read_json(tmp_path / "out" / "config.json"), read_json(case.folder / "config.json")
    assert config["norm_stats"] == read_json(tmp_path / "out" / STATISTICS_FILE) == STATISTICS
    assert config["prompt_style"] == "vicuna"
    assert {key: config[key] for key in base if key != "norm_stats"} == {
        key: base[key] for key in base if key != "norm_stats"
    }
    record = read_json(tmp_path / "out" / MERGE_FILE)
    assert record["base"] == "someone/base"
    assert record["base_fingerprint"] == fingerprint(case.folder)
    assert record["recipe"] == "lora32"


def test_without_statistics_those_of_the_base_stay(case: Golden, adapter: Trained, tmp_path: Path) -> None:
    merge(adapter, case.folder, tmp_path / "out")
    config, base = read_json(tmp_path / "out" / "config.json"), read_json(case.folder / "config.json")
    assert config["norm_stats"] == base["norm_stats"]


def test_the_stored_frozen_head_is_not_merged(case: Golden, adapter: Trained, tmp_path: Path) -> None:
    extra = "base_model.model.language_model.lm_head.base_layer.weight"
    folder = Path(shutil.copytree(adapter.weights, tmp_path / "without"))
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    del tensors[extra]
    save_file(tensors, folder / ADAPTER_WEIGHTS)
    merge(adapter, case.folder, tmp_path / "a")
    merge(find_trained(folder), case.folder, tmp_path / "b")
    one, other = base_tensors(tmp_path / "a"), base_tensors(tmp_path / "b")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_trained_tensors_replace_those_of_the_base(case: Golden, tmp_path: Path) -> None:
    before = base_tensors(case.folder)
    changed = {name: before[name] + 1 for name in ("projector.fc1.weight", "language_model.lm_head.weight")}
    result = merge(trained_tensors(tmp_path / "trained", changed), case.folder, tmp_path / "out")
    assert result.changed == 2
    for name, tensor in base_tensors(tmp_path / "out").items():
        assert torch.equal(tensor, changed.get(name, before[name])), name


def test_merging_twice_is_refused(case: Golden, adapter: Trained, tmp_path: Path) -> None:
    merge(adapter, case.folder, tmp_path / "once")
    sentence = refused(lambda: merge(adapter, tmp_path / "once", tmp_path / "twice"))
    assert "merged into this checkpoint already" in sentence
    assert not (tmp_path / "twice").exists()
    # another adapter may go on top, and then the first is still known
    other = trained_tensors(
        tmp_path / "trained", {"projector.fc1.bias": base_tensors(case.folder)["projector.fc1.bias"]}
    )
    merge(other, tmp_path / "once", tmp_path / "stacked")
    assert "already" in refused(lambda: merge(adapter, tmp_path / "stacked", tmp_path / "twice"))
    assert "already" in refused(lambda: merge(other, tmp_path / "stacked", tmp_path / "twice"))


def test_adapter_with_the_fingerprint_of_another_base(case: Golden, adapter: Trained, tmp_path: Path) -> None:
    right = replace(adapter, base_fingerprint=fingerprint(case.folder))
    merge(right, case.folder, tmp_path / "out")
    base = copy_checkpoint(case.folder, tmp_path / "base")
    changed = base_tensors(base)
    changed["projector.fc1.bias"][0] += 1
    other = write_single_file(base, tmp_path / "other", changed)
    sentence = refused(lambda: merge(right, other, tmp_path / "wrong"))
    assert "another base" in sentence
    assert fingerprint(case.folder)[:12] in sentence
    assert not (tmp_path / "wrong").exists()


def test_adapter_of_the_other_architecture(tmp_path: Path) -> None:
    for one, other in (NAMES, NAMES[::-1]):
        trained = find_trained(golden(other).folder / "adapter_trained")
        assert "another base" in refused(partial(merge, trained, golden(one).folder, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_trained_tensors_that_do_not_fit(case: Golden, tmp_path: Path) -> None:
    for number, (name, shape) in enumerate([("projector.fc1.bias", (3,)), ("projector.fc9.bias", (4,))]):
        trained = trained_tensors(tmp_path / f"trained{number}", {name: torch.zeros(shape)})
        assert f"'{name}'" in refused(partial(merge, trained, case.folder, tmp_path / "out"))


def test_damaged_trained_weights(case: Golden, adapter: Trained, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter.weights, tmp_path / "adapter"))
    data = (folder / ADAPTER_WEIGHTS).read_bytes()
    for size in (0, 20, len(data) // 2, len(data) - 1):
        (folder / ADAPTER_WEIGHTS).write_bytes(data[:size])
        assert ADAPTER_WEIGHTS in refused(
            lambda: merge(replace(adapter, weights=folder), case.folder, tmp_path / "out")
        )
    (folder / ADAPTER_WEIGHTS).unlink()
    assert ADAPTER_WEIGHTS in refused(lambda: merge(replace(adapter, weights=folder), case.folder, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["", "[]", '{"earlier": "x"}', '{"earlier": [1]}'])
def test_damaged_record_of_earlier_merges(case: Golden, adapter: Trained, tmp_path: Path, content: str) -> None:
    base = copy_checkpoint(case.folder, tmp_path / "base")
    (base / MERGE_FILE).write_text(content)
    if "earlier" in content:
        merge(adapter, base, tmp_path / "out")
    else:
        assert MERGE_FILE in refused(lambda: merge(adapter, base, tmp_path / "out"))


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError, OSError])
def test_an_interrupted_merge_leaves_nothing(
    case: Golden, adapter: Trained, tmp_path: Path, kind: type[BaseException]
) -> None:
    calls = 0

    def interrupt(count: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise kind(28, "No space left on device") if kind is OSError else kind

    with pytest.raises(VlaftError if kind is OSError else kind):
        merge(adapter, case.folder, tmp_path / "out", advance=interrupt)
    assert calls == 20
    assert list(tmp_path.iterdir()) == []


KILL = """
import os, pathlib, signal, sys
from vlaft.release import merge as module
from vlaft.weights.trained import find_trained
weights, base, out, moment = sys.argv[1:]
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
options = {}
if moment == "check":
    options["check"] = die
elif moment == "record":
    right = module.write_json
    module.write_json = lambda path, content: die() if path.name == "merge.json" else right(path, content)
elif moment == "rename":
    pathlib.Path.rename = die
else:
    left = [int(moment)]
    def options_advance(count):
        left[0] -= 1
        if left[0] == 0:
            die()
    options["advance"] = options_advance
module.merge(find_trained(pathlib.Path(weights)), pathlib.Path(base), pathlib.Path(out), **options)
"""


@pytest.mark.parametrize("moment", ["1", "40", "check", "record", "rename"])
def test_killed_at_any_moment(tmp_path: Path, moment: str) -> None:
    case = golden("single")
    weights, out = case.folder / "adapter_trained", tmp_path / "out"
    words = [sys.executable, "-c", KILL, str(weights), str(case.folder), str(out), moment]
    killed = subprocess.run(words, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    assert all(path.name.startswith(".") for path in tmp_path.iterdir())  # nothing that looks like a result
    assert main(["merge", str(weights), "--base", str(case.folder), "--out", str(out), "--no-verify"]) == 0
    assert list(tmp_path.iterdir()) == [out]
    assert len(tensor_table(out)) == len(tensor_table(case.folder))


def test_what_was_there_stays_until_the_end(case: Golden, adapter: Trained, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")

    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(adapter, case.folder, out, overwrite=True, advance=interrupt)
    assert [path.name for path in out.iterdir()] == ["precious"]
    with pytest.raises(VlaftError, match="is not empty"):
        merge(adapter, case.folder, out)
    merge(adapter, case.folder, out, overwrite=True)
    assert not (out / "precious").exists()
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_exits_with_130_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    case = golden("single")
    monkeypatch.setattr(merge_module, "_write_config", lambda *_: os.kill(os.getpid(), number))
    words = ["merge", str(case.folder / "adapter_trained"), "--base", str(case.folder), "--no-verify"]
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        assert main([*words, "--out", str(tmp_path / "out")]) == 130
    finally:
        signal.signal(signal.SIGINT, previous)
    assert capsys.readouterr().err.endswith("error: interrupted\n")
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("fault", ["kill", "term"])
def test_a_replaced_model_is_there_whenever_it_is_stopped(tmp_path: Path, fault: str) -> None:
    """At every event from the first rename on; what reads next finds the old model or the new one."""
    case = golden("single")
    adapter, base, out = find_trained(case.folder / "adapter_trained"), case.folder, tmp_path / "out"
    copy_checkpoint(base, out)
    unchanged = fingerprint(out)

    def work() -> None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with suppress(KeyboardInterrupt):
            merge(adapter, base, out, overwrite=True)

    def look(at: int, code: int) -> None:
        assert fault == "kill" or not list(tmp_path.glob(".*")), at
        again = fingerprint(resolve_checkpoint(str(out)))
        assert not (tmp_path / ".out.old").exists(), at
        assert (again != unchanged) == (out / MERGE_FILE).is_file(), at
        shutil.rmtree(out)
        copy_checkpoint(base, out)

    assert faults.at_each_moment(tmp_path, fault, work, look) > 20


def test_of_two_merges_at_once_one_is_refused(tmp_path: Path) -> None:
    case = golden("single")
    adapter, out = find_trained(case.folder / "adapter_trained"), tmp_path / "out"

    def other(count: int) -> None:
        with pytest.raises(VlaftError, match=rf"process {os.getpid()} on .* is writing there"):
            merge(adapter, case.folder, out)

    merge(adapter, case.folder, out, advance=other)
    assert list(tmp_path.iterdir()) == [out]
    with pytest.raises(ConfigError, match="which --overwrite would delete"):
        merge(adapter, out, out, overwrite=True)


def test_full_disk_is_foreseen(case: Golden, adapter: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(VlaftError, match="GB are free"):
        merge(adapter, case.folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def _peak(call: Callable[[], Any]) -> int:
    """Return by how many bytes the process grew at most during `call`."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before would otherwise be used again, unseen
        reset.write_text("5")  # forget the peak so far
    except (OSError, AttributeError):
        pytest.skip("this system does not tell a process's peak memory")

    def read(key: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024

    start = read("VmRSS")
    call()
    return read("VmHWM") - start


@pytest.mark.parametrize("kind", ["adapter", "tensors"])
def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path, kind: str) -> None:
    side, count = 1448, 48  # 48 tensors of 4.2 MB, 201 MB in all
    base, weights = tmp_path / "base", tmp_path / "weights"
    base.mkdir()
    weights.mkdir()
    (base / "config.json").write_text('{"model_type": "openvla"}')
    names = [f"layers.{index}.weight" for index in range(count)]
    tensors = {name: torch.full((side, side), 0.5, dtype=torch.bfloat16) for name in names}
    assert sum(tensor.numel() * 2 for tensor in tensors.values()) > 200e6
    save_file(tensors, base / SINGLE_FILE)
    if kind == "tensors":
        save_file(tensors, weights / TRAINED_FILE)
    else:
        factors = {}
        for index in range(count):
            factors[f"base_model.model.layers.{index}.lora_A.weight"] = torch.ones(2, side)
            factors[f"base_model.model.layers.{index}.lora_B.weight"] = torch.ones(side, 2)
        save_file(factors, weights / ADAPTER_WEIGHTS)
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["0"]}
        (weights / "adapter_config.json").write_text(json.dumps(config))
    del tensors
    peak = _peak(lambda: merge(Trained(weights, base=None), base, tmp_path / "out"))
    # a few copies of one tensor in float32 (8.4 MB each), the adapter, and chunks; 400 MB take no more
    assert peak < 100e6
    with torch.no_grad():
        expected = 0.5 if kind == "tensors" else 2.5
        table = tensor_table(tmp_path / "out")
        last = read_tensor(tmp_path / "out", table[names[-1]])
        assert (last == expected).all()
