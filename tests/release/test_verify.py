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
from golden_models import ADAPTER, MINI, base_tensors, golden, write_single_file
from safetensors.torch import save_file
from small_base import write_small_base

from vlaft.adapt.merging import ModuleAdapter
from vlaft.cli.main import main
from vlaft.files import read_json
from vlaft.model.load import load_model
from vlaft.observation.batch import Observation
from vlaft.release import verify
from vlaft.release.merge import MERGE_FILE
from vlaft.release.record import data_paths, training_record
from vlaft.release.verify import Comparison, Probe, choose_dtype, compare, example_probe
from vlaft.weights.trained import ADAPTER_WEIGHTS, find_trained

BASE = MINI / "single"


def test_identical_models_compare_as_identical() -> None:
    load = partial(load_model, BASE, dtype=torch.float32)
    found = compare(load, load, example_probe(None, BASE), torch.float32)
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

    found = compare(partial(load_model, BASE, dtype=torch.float32), other, example_probe(None, BASE), torch.bfloat16)
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
    observation = Observation(prompts[:, :longest] * mask, mask, case.tensors["pixel_values"])
    inputs = Probe(observation, 7, "golden")
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
    inputs = example_probe(None, BASE, 1)

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
    inputs = example_probe(trained, Path(str(trained.base)), 3)
    assert inputs.origin == "training data"
    assert inputs.action_size == 7
    assert inputs.observation.pixel_values.shape == (3, 3, 56, 56)
    assert (inputs.observation.prompt_ids[:, 0] == 1).all()
    again = example_probe(trained, Path(str(trained.base)), 3)
    assert torch.equal(inputs.observation.pixel_values, again.observation.pixel_values)


def test_where_the_data_are_gone_inputs_are_made(run: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(run, tmp_path / "run"))
    (moved / "recipe.yaml").write_text(json.dumps({"data": {"path": str(tmp_path / "gone")}}))
    trained = find_trained(moved)
    assert data_paths(trained) == []
    inputs = example_probe(trained, Path(str(trained.base)))
    assert inputs.origin == "synthetic"
    assert len(inputs.observation) == 4
    assert inputs.observation.pixel_values.std() > 0.1
    damaged = tmp_path / "data"
    damaged.mkdir()
    (damaged / "dataset.json").write_text("{}")
    (moved / "recipe.yaml").write_text(json.dumps({"data": {"path": [str(damaged)]}}))
    assert example_probe(find_trained(moved), Path(str(trained.base))).origin == "synthetic"


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
    sight = record["verified"]["sight"]
    assert sight["examples"] == 8 and sight["looks"] is True and sight["together"]["swapped"] == 1
    assert "it looks: with the frames of other moments its actions move by 100% of what they differ by" in said
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
    # biases of adapted layers are rounded like the rest, so next to nothing is left
    assert found["largest_logit_difference"] < 1e-4 < found["unrounded_logit_difference"]
    assert found["unrounded_logit_difference"] < verify._ROUNDING[torch.bfloat16] * found["logit_range"]


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


def with_tensors(run: Path, out: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Copy a run with an adapter, and add whole tensors to it."""
    folder = Path(shutil.copytree(run, out))
    base = base_tensors(Path(json.loads((run / "run.json").read_text())["base"]))
    tensors = {name: -base[name] for name in ("language_model.model.norm.weight", "projector.fc1.bias")}
    save_file(tensors, folder / "checkpoints" / "step-000020" / "trained.safetensors")
    return folder, tensors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_and_whole_tensors_are_merged_and_verified(run: Path, tmp_path: Path, dtype: str) -> None:
    both, tensors = with_tensors(run, tmp_path / "both")
    assert merge(both, tmp_path / "out", "--dtype", dtype) == 0
    record = read_json(tmp_path / "out" / MERGE_FILE)
    assert record["verified"]["identical_tokens"] + record["verified"]["ties"] == 28
    assert merge(run, tmp_path / "alone", "--dtype", dtype, "--no-verify") == 0
    assert record["trained_fingerprint"] != read_json(tmp_path / "alone" / MERGE_FILE)["trained_fingerprint"]
    merged, alone = base_tensors(tmp_path / "out"), base_tensors(tmp_path / "alone")
    for name, tensor in merged.items():
        assert torch.equal(tensor, tensors[name].to(tensor.dtype) if name in tensors else alone[name]), name


def test_what_is_in_the_adapter_and_a_whole_tensor_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both, _ = with_tensors(run, tmp_path / "both")
    name = "language_model.lm_head.weight"
    base = base_tensors(Path(read_json(run / "run.json")["base"]))
    save_file({name: base[name]}, both / "checkpoints" / "step-000020" / "trained.safetensors")
    assert merge(both, tmp_path / "out") == 1
    assert f"'{name}' is in the adapter and among the whole tensors too" in capsys.readouterr().err


def test_a_run_whose_trained_tensors_are_gone_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    for path in (folder / "checkpoints" / "step-000020").iterdir():
        path.unlink()
    assert merge(folder, tmp_path / "out") == 1
    assert "neither an adapter nor trained.safetensors here" in capsys.readouterr().err


def test_trained_tensors_are_verified_too(tmp_path: Path) -> None:
    base = write_small_base(tmp_path / "base")
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


def small_update(tmp_path: Path, size: float) -> Path:
    """A run that trained whole tensors of a bfloat16 base by steps of `size`, most of them below its resolution."""
    base = write_small_base(tmp_path / "base", "fused")
    half = {name: tensor.bfloat16() for name, tensor in base_tensors(base).items()}
    base = write_single_file(base, tmp_path / "half", half)
    generator = torch.Generator().manual_seed(0)
    weights = tmp_path / "run" / "checkpoints" / "step-000001"
    weights.mkdir(parents=True)
    # all one way, as gradients push what they agree on: rounding to nearest loses it in every number alike
    learned = {
        name: tensor.float() + size * tensor.float().abs() * torch.rand(tensor.shape, generator=generator)
        for name, tensor in half.items()
        if name.startswith(("vision_backbone", "projector", "language_model.lm_head"))
    }
    save_file(learned, weights / "trained.safetensors")
    status = {"base": str(base), "last": "step-000001", "recipe": "sandwich"}
    (tmp_path / "run" / "run.json").write_text(json.dumps(status))
    return tmp_path / "run"


def test_an_update_that_rounding_swallows_is_merged_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_update(tmp_path, 0.0025)
    assert merge(run, tmp_path / "out", "--verify") == 0
    said = " ".join(capsys.readouterr().err.split())
    record = read_json(tmp_path / "out" / MERGE_FILE)
    rounding, verified = record["rounding"], record["verified"]
    assert 0 < rounding["kept"] < 0.5 * rounding["changed"]
    assert 0 < rounding["survives"] < 0.8
    assert f"{rounding['survives']:.1%} of the learned change survives" in said
    assert "--rounding stochastic" in said
    assert "--dtype float32" in said
    assert verified["identical_tokens"] == verified["tokens"]
    assert verified["largest_logit_difference"] < 1e-4  # the same rounding leaves the order of sums
    assert verified["unrounded_logit_difference"] > 100 * verified["largest_logit_difference"]
    assert f"{verified['unrounded_tokens']} of 28 tokens are the same" in said

    assert merge(run, tmp_path / "stochastic", "--verify", "--rounding", "stochastic") == 0
    said = " ".join(capsys.readouterr().err.split())
    found = read_json(tmp_path / "stochastic" / MERGE_FILE)
    assert found["rounding"]["survives"] == pytest.approx(1, abs=0.05)
    assert found["verified"]["largest_logit_difference"] < 1e-4
    assert found["verified"]["unrounded_logit_difference"] < 0.8 * verified["unrounded_logit_difference"]
    assert "of what was learned: merge again" not in said
    assert merge(run, tmp_path / "again", "--no-verify", "--rounding", "stochastic") == 0
    first, second = base_tensors(tmp_path / "stochastic"), base_tensors(tmp_path / "again")
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())

    capsys.readouterr()
    assert merge(run, tmp_path / "wide", "--dtype", "float32") == 0
    assert read_json(tmp_path / "wide" / MERGE_FILE)["rounding"] is None
    assert "survives" not in capsys.readouterr().err


def test_what_rounding_changes_is_told_apart_from_what_is_wrong() -> None:
    """Rounding to 4 significant bits makes another model; a right one that is rounded so is still right."""
    load = partial(load_model, BASE, dtype=torch.float32)
    kinds = dict.fromkeys(base_tensors(BASE), torch.float8_e4m3fn)

    def coarse() -> Any:
        model = load()
        with torch.no_grad():
            verify.round_parameters(model, kinds)
        return model

    inputs = example_probe(None, BASE)
    assert not compare(load, coarse, inputs, torch.bfloat16).holds
    found = compare(load, coarse, inputs, torch.bfloat16, partial(verify.round_parameters, kinds=kinds))
    assert found.identical_tokens == found.tokens
    assert found.largest_logit_difference == 0
    assert found.unrounded_tokens is not None
    assert found.unrounded_tokens < found.tokens
    assert found.unrounded_logit_difference is not None
    assert found.unrounded_logit_difference > 0.02 * found.logit_range


@pytest.mark.parametrize("mode", ["nearest", "stochastic"])
def test_adapters_on_a_bfloat16_base_are_held_against_the_same_rounding(tmp_path: Path, mode: str) -> None:
    half = {name: tensor.bfloat16() for name, tensor in base_tensors(BASE).items()}
    base = write_single_file(BASE, tmp_path / "base", half)
    words = ["merge", str(ADAPTER), "--base", str(base), "--out", str(tmp_path / "out"), "--verify"]
    assert main([*words, "--rounding", mode]) == 0
    found = read_json(tmp_path / "out" / MERGE_FILE)
    assert found["rounding"]["mode"] == mode
    assert found["verified"]["unrounded_logit_difference"] > 10 * found["verified"]["largest_logit_difference"]


def test_a_wrong_rounding_is_not_published(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vlaft.adapt.rounding.round_to", lambda exact, out, generator=None: out.copy_(-exact))
    assert merge(run, tmp_path / "out", "--dtype", "bfloat16") == 3
    assert "does not answer as" in capsys.readouterr().err


def test_a_rounding_that_is_none(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert merge(run, tmp_path / "out", "--rounding", "up") == 2
    assert "nearest or stochastic" in capsys.readouterr().err


def test_a_base_of_another_fingerprint_is_refused_before_writing(run: Path, tmp_path: Path) -> None:
    tensors = base_tensors(BASE)
    tensors["projector.fc1.bias"] += 1
    other = write_single_file(BASE, tmp_path / "other", tensors)
    assert merge(run, tmp_path / "out", "--base", str(other)) == 1
    assert not (tmp_path / "out").exists()
    assert (run / "checkpoints" / "step-000020" / ADAPTER_WEIGHTS).is_file()
