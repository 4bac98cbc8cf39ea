"""Scripts for a GPU run from end to end on a CPU with a small base, so that the next GPU only has to run them."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from golden_models import MINI
from repository import ROOT
from small_base import convert_small

from vlaft.accounting.meta import example_inputs, example_normalization, meta_model, policy_of
from vlaft.accounting.step import follow_steps
from vlaft.cli.main import main as cli
from vlaft.model.configuration import OpenVLAConfig
from vlaft.model.load import base_config
from vlaft.recipe.resolve import resolve
from vlaft.recipe.settings import resolve_precision
from vlaft.training.step import Inputs
from vlaft.weights.layout import tensor_table
from vlaft.weights.stream import read_tensor

BENCHMARKS = ROOT / "benchmarks"
BASE = str(MINI / "fused")


@pytest.fixture
def gpu_7b(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("gpu_7b")
    monkeypatch.setattr(module, "matrix_rate", lambda device, dtype: 1e12)  # of a GPU's size takes a CPU seconds
    return module


def options(batch_sizes: list[int]) -> argparse.Namespace:
    return argparse.Namespace(base=BASE, batch_sizes=batch_sizes, steps=1)


@pytest.mark.parametrize("part", range(12))
def test_steps_are_timed_and_their_memory_is_as_predicted(gpu_7b: ModuleType, part: int) -> None:
    kind, name, words = (*gpu_7b.PARTS, *gpu_7b.CHUNKS)[part]
    if name in ("qlora32", "qoft"):
        pytest.importorskip("bitsandbytes")
    small, large = gpu_7b.steps_of(kind, name, words, options([1, 3]))
    for row in (small, large):
        assert row["measured_bytes"] == pytest.approx(row["predicted_bytes"], rel=0.02)
        assert row["samples_per_second"] == pytest.approx(row["batch_size"] / row["seconds"])
        assert 0 < row["share_of_rate"] <= row["share_of_rate_computed"]
    assert large["measured_bytes"] > small["measured_bytes"]


@pytest.mark.parametrize("name", ["oft", "oft-film"])
def test_the_plain_step_of_chunks_computes_the_same_loss(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """It takes more memory for the same number and the same gradients, or it would be no baseline."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    train_step = importlib.import_module("train_step")
    recipe, config = resolve(name, [], ["data.augment=false", "policy.chunk=3"]), base_config(BASE)
    policy, normalization = policy_of(recipe), example_normalization(config)
    more = (policy.chunk - 1) * 7
    inputs = example_inputs(
        config, batch_size=2, tokens=20 + more, labels=8 + more, device=torch.device("cpu"), policy=policy
    )
    inputs.labels.fill_(-100)
    inputs.labels[:, -8 - more :] = 300
    assert inputs.actions is not None
    inputs.actions.uniform_(-1, 1)
    found = {}
    for kind, forward_pass in (("vlaft", train_step.forward), ("plain", train_step.plain_chunk_forward)):
        model, optimizer = train_step.ready(config, recipe, torch.device("cpu"))
        output = forward_pass(model, inputs, normalization, torch.float32)
        output.loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.zero_grad(set_to_none=True)
        words = resolve_precision(recipe.precision, on_gpu=False)
        steps = follow_steps(model, optimizer, inputs, normalization, recipe, words, forward_pass=forward_pass)
        found[kind] = output.loss.item(), float(norm), steps.at_peak()[0]
    assert found["vlaft"][:2] == pytest.approx(found["plain"][:2], rel=1e-5)
    assert found["vlaft"][2] < found["plain"][2]


def test_a_chunk_is_timed_against_serial_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    chunks = importlib.import_module("chunks")
    result = chunks.measure(base_config(BASE), torch.float32, 4, 1, torch.device("cpu"), 1)
    serial, parallel, l1 = (result["flop"][name] for name in chunks.policies(4))
    assert serial < l1 < parallel  # the L1 head is smaller than the vocabulary here
    assert set(result["over_serial"]) == {"parallel tokens", "parallel L1"}
    for name, value in result["over_serial"].items():
        times = result["seconds"]
        assert value == pytest.approx(4 * times["serial tokens"] / times[name])
    assert all(limit > 0 for limit in result["limit_seconds"].values())


def test_the_small_card_is_tried_with_augmentation(gpu_7b: ModuleType) -> None:
    pytest.importorskip("bitsandbytes")
    found = gpu_7b.on_a_small_card(options([1]))
    assert found["survived"] and not found["enforced"]  # there is nothing to enforce on a CPU
    assert len(found["losses"]) == 3
    assert found["limit_bytes"] + found["outside_bytes"] == found["card_bytes"] == 8 * 10**9


def test_a_step_of_chunks_that_does_not_fit_is_tried_with_half_its_examples(
    gpu_7b: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = gpu_7b.our_step

    def small_gpu(model: object, optimizer: object, inputs: Inputs, *others: object) -> None:
        if len(inputs.input_ids) > 2:
            raise torch.cuda.OutOfMemoryError
        step(model, optimizer, inputs, *others)

    monkeypatch.setattr(gpu_7b, "our_step", small_gpu)
    rows = gpu_7b.steps_of("vlaft", "oft", [], options([1, 16]))
    told = [(row["batch_size"], row.get("note")) for row in rows]
    assert told == [(1, None), (8, "does not fit"), (4, "does not fit"), (2, None)]


@pytest.mark.parametrize("name", ["lora32", "oft", "oft-state", "oft-film"])
def test_answers_are_timed_and_their_memory_is_as_predicted(gpu_7b: ModuleType, name: str) -> None:
    found = gpu_7b.answers_of(name, options([1]))
    assert found["measured_bytes"] == pytest.approx(found["predicted_bytes"], rel=0.02)
    assert found["chunk"] == {"lora32": 1, "oft-film": 25}.get(name, 8)
    assert found["actions_per_second"] == pytest.approx(found["chunk"] / found["seconds"]["launched"])
    assert found["limit_actions_per_second"] > found["actions_per_second"]
    assert found["upstream_gb"] == {"oft": 15.9, "oft-state": 16.2, "oft-film": 18.0}.get(name)


@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4"])
def test_prediction_is_timed_in_every_precision(gpu_7b: ModuleType, precision: str) -> None:
    if precision != "bf16":
        pytest.importorskip("bitsandbytes")
    found = gpu_7b.prediction_in(precision, options([1]))
    assert found["prompt_seconds_launched"] > 0 and found["actions_per_second_launched"] > 0
    assert 0 < found["token_floor_seconds"] < 0.01
    plain = gpu_7b.prediction_in("bf16", options([1]))["weight_bytes"]
    assert found["weight_bytes"] == plain if precision == "bf16" else found["weight_bytes"] < 0.7 * plain


def test_the_tables_name_what_failed_and_what_did_not_fit(gpu_7b: ModuleType) -> None:
    row = {"kind": "vlaft", "recipe": "lora32", "settings": [], "batch_size": 1}
    times = {"predicted_bytes": 2e9, "measured_bytes": 1e9, "seconds": 2.0, "share_of_rate": 0.5}
    plain = row | times | {"kind": "plain", "samples_per_second": 0.5, "share_of_rate_computed": 0.5}
    answer = {"actions_per_second": 2.0, "limit_actions_per_second": 4.0, "predicted_bytes": 2e9, "measured_bytes": 1e9}
    found = {
        "device": "a GPU",
        "base": "b",
        "torch": "t",
        "date": "d",
        "seconds": 1,
        "card": {"survived": True},
        "steps": [
            plain | {"kind": "vlaft", "samples_per_second": 0.75},
            plain,
            row | {"note": "does not fit"},
            {"failed": "out of luck"},
        ],
        "prediction": [{"failed": "no kernels"}],
        "chunks": [plain | {"recipe": "oft-state", "batch_size": 8, "samples_per_second": 0.5}],
        "answers": [
            answer | {"recipe": "lora32", "policy": "seven serial tokens", "chunk": 1, "upstream_gb": None},
            answer | {"recipe": "oft", "policy": "oft", "chunk": 8, "actions_per_second": 50.0, "upstream_gb": 15.9},
            {"failed": "no answer"},
        ],
    }
    text = gpu_7b.markdown(found)
    assert "| plain oft-state | 8 | 2.00 GB |" in text and "|  | 62.5 |" not in text and "| 1.00 | 62.5 |" in text
    assert "| oft, chunk of 8 | 50.00 | 25.0 | 4.00 | 1.0 | 2.00 GB | 1.00 GB | 15.9 |" in text and "no answer" in text
    assert (
        "| vlaft lora32 | 1 | 2.00 GB | 1.00 GB | +100.0 % | 2.000 | 0.75 | 50 % (50 % with recomputation) | 1.50 |"
        in text
    )
    assert "| plain lora32 | 1 |" in text
    assert all(word in text for word in ("does not fit", "out of luck", "no kernels", "survived True"))


@pytest.mark.slow
def test_the_whole_gpu_script(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    words = [sys.executable, str(BENCHMARKS / "gpu_7b.py"), "--base", BASE, "--batch-sizes", "1", "2", "--steps", "1"]
    done = subprocess.run([*words, "--out", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu_7b.json").read_text())
    assert len(found["steps"]) == 10 and found["card"]["survived"] and len(found["prediction"]) == 3
    assert len(found["chunks"]) == 14 and len(found["answers"]) == 4
    assert (tmp_path / "gpu_7b.md").read_text().count("\n| ") >= 15


def test_a_base_of_7b_is_refused_without_a_gpu(gpu_7b: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_7b.py"])
    monkeypatch.setattr(gpu_7b.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="there is no GPU here"):
        gpu_7b.main()


def test_scaling_is_measured_predicted_and_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    scaling = importlib.import_module("scaling")
    monkeypatch.setitem(scaling.SIZES, "small", (64, 2, 64, 3))
    row = scaling.measure("small", [1, 3], 1)
    assert row["bytes"] == row["predicted_bytes"]
    assert row["bytes"][0] < row["bytes"][1]
    scaling.plot([row, row | {"parameters": 2 * row["parameters"]}], tmp_path / "scaling.png", "a test")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


SMALL_7B = {  # a release in miniature, with its whole vocabulary
    "dtype": "bfloat16",
    "vision_backbone_id": "siglip-vit-so400m",
    "llm_backbone_id": "llama2-7b-pure",
    "arch_specifier": "no-align+gelu-mlp",
    "image_sizes": [56],
    "vision_overrides": [{"embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}],
    "text_config": {
        "model_type": "llama",
        "pad_token_id": 32000,
        "vocab_size": 32064,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
}


def test_a_random_folder_in_a_releases_sizes_is_a_base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("make_7b_folder")
    monkeypatch.setitem(script.BASES, "openvla/openvla-7b", SMALL_7B)
    monkeypatch.setattr(script, "SHARD_BYTES", 1_100_000)
    base, out = tmp_path / "base", tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["make_7b_folder.py", "--out", str(base)])
    assert script.main() == 0
    assert script.main() == 1  # what is there is never overwritten
    table = tensor_table(base)
    model = meta_model(OpenVLAConfig(**SMALL_7B))
    assert {name: entry.shape for name, entry in table.items()} == {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
    }
    assert {entry.dtype for entry in table.values()} == {"BF16"} and len({entry.file for entry in table.values()}) == 2
    head = read_tensor(base, table["language_model.lm_head.weight"]).float()
    assert abs(float(head.std()) - 0.02) < 0.001 and len(head.unique(dim=0)) == len(head)
    data = convert_small(base, tmp_path / "data")
    words = ["train", "--recipe", "lora8", "--base", str(base), "--data", str(data), "--out", str(out)]
    assert cli([*words, "train.steps=1", "train.batch_size=2", "train.accumulation=1"]) == 0
    assert (out / "checkpoints" / "step-000001").is_dir()


def test_a_random_folder_is_not_begun_where_the_disk_is_too_small(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("make_7b_folder")
    monkeypatch.setattr(script.shutil, "disk_usage", lambda path: argparse.Namespace(free=10**9))
    monkeypatch.setattr(sys, "argv", ["make_7b_folder.py", "--out", str(tmp_path / "base")])
    assert script.main() == 1
    assert "15.1 GB are needed and 1.0 GB are free" in capsys.readouterr().err
    assert not (tmp_path / "base").exists()
