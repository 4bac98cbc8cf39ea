"""The check of a merge: what it accepts, what it refuses, and what it says."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_models import MINI, base_tensors, golden, write_single_file
from small_base import convert_small, write_small_base

from vlaft import verify
from vlaft.adapt.adapter_files import WEIGHTS_FILE
from vlaft.adapt.merging import ModuleAdapter
from vlaft.cli.main import main
from vlaft.merge import MERGE_FILE
from vlaft.model.checkpoint import fingerprint, load_model, read_json
from vlaft.trained import find_trained
from vlaft.training_record import data_paths, training_record
from vlaft.verify import Comparison, choose_dtype, compare, example_inputs

ADAPTER = MINI / "single" / "adapter_trained"
BASE = MINI / "single"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder around the golden adapter, with converted data."""
    root = tmp_path_factory.mktemp("run")
    base = write_small_base(root / "base")
    data = convert_small(base, root / "data")
    folder = root / "run"
    shutil.copytree(ADAPTER, folder / "checkpoints" / "step-000020")
    status = {"base": str(base), "base_fingerprint": fingerprint(base), "recipe": "lora32", "last": "step-000020"}
    pipeline = json.loads((data / "dataset.json").read_text())["image"]["pipeline"]
    status |= {"inference": {"prompt_style": "openvla", "image_pipeline": pipeline}}
    (folder / "run.json").write_text(json.dumps(status))
    shutil.copyfile(data / "dataset_statistics.json", folder / "dataset_statistics.json")
    recipe = {"adapt": {"method": "lora", "lora": {"rank": 4}, "quantize": "nf4"}, "data": {"path": [str(data)]}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    lines = [
        {"step": 10, "val_loss": 3.0},
        {"step": 20, "val_loss": 2.0, "val_action_l1": 0.25},
        {"step": 30, "val_loss": 1},
    ]
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + "{broken")
    return folder


def test_identical_models_compare_as_identical() -> None:
    load = partial(load_model, BASE, dtype=torch.float32)
    found = compare(load, load, example_inputs(None, BASE), torch.float32)
    assert (found.examples, found.tokens, found.identical_tokens, found.ties) == (4, 28, 28, 0)
    assert found.largest_logit_difference == 0
    assert found.logit_range > 1
    assert found.inputs == "synthetic"
    assert found.holds


def test_another_model_does_not_hold() -> None:
    def other() -> Any:
        model = load_model(BASE, dtype=torch.float32)
        model.language_model.lm_head.weight.data.neg_()
        return model

    found = compare(partial(load_model, BASE, dtype=torch.float32), other, example_inputs(None, BASE), torch.bfloat16)
    assert found.identical_tokens + found.ties < found.tokens
    assert not found.holds
    assert found.largest_logit_difference > 1


def test_the_first_models_tokens_are_those_it_generates() -> None:
    seen = []

    def reference() -> Any:
        model = load_model(BASE, dtype=torch.float32)
        model.register_forward_hook(lambda *arguments: seen.append(arguments[2].logits.argmax(dim=-1)))
        return model

    case = golden("single")
    prompts, lengths = case.tensors["input_ids"], case.expected["prompt_lengths"]
    longest = max(lengths)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    inputs = verify.Inputs(prompts[:, :longest] * mask, mask, case.tensors["pixel_values"], 7, "golden")
    found = compare(reference, partial(load_model, BASE, dtype=torch.float32), inputs, torch.float32)
    assert found.holds
    assert seen[0].view(-1, 7).tolist() == case.expected["generated"]


@pytest.mark.parametrize(
    ("tokens", "same", "ties", "holds"), [(28, 28, 0, True), (28, 27, 1, True), (28, 27, 0, False)]
)
def test_only_ties_may_differ(tokens: int, same: int, ties: int, holds: bool) -> None:
    assert Comparison(4, "synthetic", tokens, same, ties, 0.1, 9.0, "float32").holds is holds


def test_a_tie_is_told_from_a_difference() -> None:
    head = "language_model.lm_head.weight"
    plain = load_model(BASE, dtype=torch.float32)
    inputs = example_inputs(None, BASE, 1)

    def model(sign: float, size: float) -> Any:
        found = load_model(BASE, dtype=torch.float32)
        # rows 300 and 301 answer alike but for `size`, and before all others
        row = plain.state_dict()[head].mean(dim=0) * 0
        found.language_model.lm_head.weight.data[:] = row
        direction = torch.ones_like(row)
        norm = found.language_model.model.norm.weight.data
        norm[:] = norm.abs()
        found.language_model.lm_head.weight.data[300] = direction * 0
        found.language_model.lm_head.weight.data[301, 0] = sign * size
        return found

    near = compare(partial(model, 1.0, 1e-7), partial(model, -1.0, 1e-7), inputs, torch.float32)
    assert near.tokens == 7
    assert near.holds or near.ties < 7  # nothing here is far apart in float32's sense
    far = compare(partial(model, 1.0, 1.0), partial(model, -1.0, 1.0), inputs, torch.float32)
    assert not far.holds


def test_inputs_are_the_runs_held_out_examples(run: Path) -> None:
    trained = find_trained(run)
    inputs = example_inputs(trained, Path(str(trained.base)), 3)
    assert inputs.origin == "training data"
    assert inputs.num_tokens == 7
    assert inputs.pixel_values.shape == (3, 3, 56, 56)
    assert (inputs.input_ids[:, 0] == 1).all()
    again = example_inputs(trained, Path(str(trained.base)), 3)
    assert torch.equal(inputs.pixel_values, again.pixel_values)


def test_where_the_data_are_gone_inputs_are_made(run: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(run, tmp_path / "run"))
    (moved / "recipe.yaml").write_text(json.dumps({"data": {"path": str(tmp_path / "gone")}}))
    trained = find_trained(moved)
    assert data_paths(trained) == []
    inputs = example_inputs(trained, Path(str(trained.base)))
    assert inputs.origin == "synthetic"
    assert len(inputs.input_ids) == 4
    assert inputs.pixel_values.std() > 0.1
    damaged = tmp_path / "data"
    damaged.mkdir()
    (damaged / "dataset.json").write_text("{}")
    (moved / "recipe.yaml").write_text(json.dumps({"data": {"path": [str(damaged)]}}))
    assert example_inputs(find_trained(moved), Path(str(trained.base))).origin == "synthetic"


def test_the_record_tells_recipe_data_and_figures_without_paths(run: Path) -> None:
    record = training_record(find_trained(run))
    assert record is not None
    assert record["measured"] == {"step": 20, "val_loss": 2.0, "val_action_l1": 0.25}
    assert record["data"][0]["name"] == "small"
    assert record["data"][0]["episodes"] == 6
    assert record["quantize"] == "nf4"
    assert str(run.parent) not in json.dumps(record)
    assert training_record(find_trained(ADAPTER)) is None


@pytest.mark.parametrize("content", ["", "[", "a: [", "- 1", "data: {path: 3}", "data: 3"])
def test_a_damaged_recipe_is_no_obstacle(run: Path, tmp_path: Path, content: str) -> None:
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    (copied / "recipe.yaml").write_text(content)
    (copied / "log.jsonl").write_text("[]\n3\n{")
    trained = find_trained(copied)
    assert training_record(trained) is not None
    assert data_paths(trained) == []


def test_memory_decides_the_number_format(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = sum(tensor.numel() for tensor in base_tensors(BASE).values())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for free, expected in [(10 * numbers, torch.float32), (3 * numbers, torch.bfloat16), (numbers, None)]:
        monkeypatch.setattr(verify, "free_memory", lambda free=free: free)
        found = choose_dtype(BASE)
        assert (found and found[0]) == expected


def test_free_memory_is_told() -> None:
    assert 1e6 < verify.free_memory() <= 2**62


def merge(run: Path, out: Path, *words: str) -> int:
    return main(["merge", str(run), "--out", str(out), *words])


def test_merging_is_verified_by_default(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert merge(run, tmp_path / "out") == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "GB are free" in said
    assert "28 of 28 tokens are the same" in said
    record = read_json(tmp_path / "out" / MERGE_FILE)
    assert record["verified"]["identical_tokens"] == record["verified"]["tokens"] == 28
    assert record["verified"]["inputs"] == "training data"
    assert record["verified"]["largest_logit_difference"] < 1e-4
    # trained on a base in nf4, merged into the base in full precision
    assert {entry.dtype for entry in base_tensors(tmp_path / "out").values()} == {torch.float32}


def test_a_wrong_merge_is_not_published(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = ModuleAdapter.add_to
    monkeypatch.setattr(ModuleAdapter, "add_to", lambda self, weight: right(replace(self, scaling=-3.0), weight))
    assert merge(run, tmp_path / "out") == 3
    said = capsys.readouterr().err
    assert "does not answer as base and trained weights do" in said
    assert "logits differ by up to" in said
    assert list(tmp_path.iterdir()) == []
    assert merge(run, tmp_path / "unchecked", "--no-verify") == 0
    assert read_json(tmp_path / "unchecked" / MERGE_FILE)["verified"] is None


def test_a_failed_check_keeps_what_was_there(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    right = ModuleAdapter.add_to
    monkeypatch.setattr(ModuleAdapter, "add_to", lambda self, weight: right(replace(self, scaling=-3.0), weight))
    assert merge(run, tmp_path / "out", "--overwrite") == 3
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_too_little_memory(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify, "free_memory", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert merge(run, tmp_path / "out", "--verify") == 1
    assert "--no-verify" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert merge(run, tmp_path / "out") == 0
    assert "not verified" in capsys.readouterr().err


def test_rounding_to_bfloat16_holds(run: Path, tmp_path: Path) -> None:
    assert merge(run, tmp_path / "out", "--dtype", "bfloat16", "--verify") == 0
    found = read_json(tmp_path / "out" / MERGE_FILE)["verified"]
    assert 0 < found["largest_logit_difference"] < verify._ROUNDING[torch.bfloat16] * found["logit_range"]


def test_golden_adapters_through_the_command(tmp_path: Path) -> None:
    for name in ("fused", "single"):
        case = golden(name)
        words = ["merge", str(case.folder / "adapter_trained"), "--base", str(case.folder), "--verify"]
        assert main([*words, "--out", str(tmp_path / name)]) == 0
        model = load_model(tmp_path / name)
        inputs = {key: value for key, value in case.batch.items() if key != "labels"}
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits, case.tensors["merged_logits"], rtol=0, atol=1e-4)


def test_the_tiny_release_through_the_command(tiny: Path, tmp_path: Path) -> None:
    base = tiny / "checkpoint"
    words = ["merge", str(tiny / "adapter_step20"), "--base", str(base), "--dtype", "float32", "--verify"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    golden_run = json.loads((tiny / "lora.json").read_text())
    merged = base_tensors(tmp_path / "out")
    embeddings = "language_model.model.embed_tokens.weight"  # a merge leaves them as they are
    assert set(merged) == {*golden_run["merged_norms"], embeddings}
    assert torch.equal(merged[embeddings], base_tensors(base)[embeddings].float())
    for name, norm in golden_run["merged_norms"].items():
        if name != "language_model.lm_head.weight":  # there it is the norm before merging; see the model's golden test
            assert merged[name].norm().item() == pytest.approx(norm, rel=1e-5), name


def test_trained_tensors_are_verified_too(tmp_path: Path) -> None:
    base = write_small_base(tmp_path / "base")
    from safetensors.torch import save_file

    weights = tmp_path / "run" / "checkpoints" / "step-000001"
    weights.mkdir(parents=True)
    tensors = base_tensors(base)
    save_file(
        {"language_model.lm_head.weight": tensors["language_model.lm_head.weight"] * -1},
        weights / "trained.safetensors",
    )
    (tmp_path / "run" / "run.json").write_text(
        json.dumps({"base": str(base), "last": "step-000001", "recipe": "last-layer"})
    )
    assert merge(tmp_path / "run", tmp_path / "out") == 0
    assert read_json(tmp_path / "out" / MERGE_FILE)["verified"]["identical_tokens"] == 28


def test_a_base_of_another_fingerprint_is_refused_before_writing(run: Path, tmp_path: Path) -> None:
    tensors = base_tensors(BASE)
    tensors["projector.fc1.bias"] += 1
    other = write_single_file(BASE, tmp_path / "other", tensors)
    assert merge(run, tmp_path / "out", "--base", str(other)) == 1
    assert not (tmp_path / "out").exists()
    assert (run / "checkpoints" / "step-000020" / WEIGHTS_FILE).is_file()
