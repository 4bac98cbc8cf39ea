"""Exports: the release's layout, quantised checkpoints, adapters for upstream's peft, model cards."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from golden_models import ADAPTER, base_tensors, copy_checkpoint, golden
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from small_base import write_small_base

from vlaft.adapt.methods import SKIPPED, quantization_config
from vlaft.checksums import sealed
from vlaft.cli.main import main
from vlaft.data.codec import encode_image
from vlaft.errors import CheckpointError
from vlaft.files import read_json
from vlaft.model.configuration import Policy
from vlaft.model.load import load_model
from vlaft.model.openvla import OpenVLAForActionPrediction
from vlaft.policy import load
from vlaft.recipe.settings import AdaptConfig
from vlaft.release import export as export_module
from vlaft.release import quantized as export_quantized_module
from vlaft.release.adapter import _KEYS
from vlaft.release.card import write_model_card
from vlaft.release.layout import preprocessor_config
from vlaft.release.merge import MERGE_FILE
from vlaft.release.quantized import linear_weights
from vlaft.release.record import base_licence
from vlaft.weights.layout import plain_shapes, tensor_table

KINDS = ("nf4", "int8")
CONFIG_FIELDS = {  # docs/upstream.md, Configuration
    *("model_type", "architectures", "auto_map", "vision_backbone_id", "llm_backbone_id", "arch_specifier"),
    *("use_fused_vision_backbone", "image_resize_strategy", "text_config", "llm_max_length", "pad_token_id"),
    *("pad_to_multiple_of", "output_projector_states", "image_sizes", "timm_model_ids", "timm_override_act_layers"),
    *("hf_llm_id", "n_action_bins", "norm_stats", "torch_dtype", "transformers_version"),
}
PREPROCESSOR_FIELDS = {  # docs/upstream.md, Files
    *("use_fused_vision_backbone", "image_resize_strategy", "input_sizes", "interpolations", "means", "stds"),
    *("tvf_resize_params", "tvf_crop_params", "tvf_normalize_params", "tvf_do_letterbox", "tvf_letterbox_fill"),
    *("image_processor_type", "processor_class", "auto_map"),
}


@pytest.fixture(scope="module")
def merged(run: Path) -> Path:
    out = run.parent / "merged"
    assert main(["merge", str(run), "--out", str(out), "--dtype", "bfloat16"]) == 0
    return out


@pytest.fixture(scope="module", params=KINDS)
def quantized(request: pytest.FixtureRequest, merged: Path) -> tuple[str, Path]:
    out = merged.parent / str(request.param)
    assert main(["export", str(merged), "--out", str(out), "--to", request.param]) == 0
    return request.param, out


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "frame.png"
    pixels = torch.randint(0, 256, (64, 80, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    path.write_bytes(encode_image(pixels.numpy(), "png"))
    return path


def export(source: Path, out: Path, *words: str) -> int:
    return main(["export", str(source), "--out", str(out), *words])


def actions(model: Path, image: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["predict", str(model), "--image", str(image), "--instruction", "push the red cube", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_release_has_every_field_and_file(merged: Path, tmp_path: Path) -> None:
    assert export(merged, tmp_path / "out") == 0
    out = tmp_path / "out"
    config = read_json(out / "config.json")
    assert set(config) >= CONFIG_FIELDS
    assert config["torch_dtype"] == config["text_config"]["torch_dtype"] == "bfloat16"
    assert "dtype" not in config
    assert config["text_config"]["model_type"] == "llama"
    assert config["architectures"] == ["OpenVLAForActionPrediction"]
    assert config["norm_stats"] == read_json(out / "dataset_statistics.json")
    preprocessor = read_json(out / "preprocessor_config.json")
    assert set(preprocessor) == PREPROCESSOR_FIELDS
    assert preprocessor["input_sizes"] == [[3, 56, 56]]
    # upstream's Python files are not shipped, so every reference names the repository that has them
    tokenizer = read_json(out / "tokenizer_config.json")
    maps = [config["auto_map"], preprocessor["auto_map"], tokenizer["auto_map"]]
    assert all(value.startswith("openvla/openvla-7b--") for references in maps for value in references.values())
    assert config["auto_map"]["AutoConfig"] == "openvla/openvla-7b--configuration_prismatic.OpenVLAConfig"
    assert not list(out.glob("*.py"))
    names = {path.name for path in out.iterdir()}
    assert names >= {"generation_config.json", "tokenizer.json", "model.safetensors.index.json", "README.md"}
    before, after = base_tensors(merged), base_tensors(out)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert {name: (e.file, e.shape) for name, e in tensor_table(out).items()} == {
        name: (e.file, e.shape) for name, e in tensor_table(merged).items()
    }


def test_a_release_keeps_its_own_fields(tiny: Path, tmp_path: Path) -> None:
    source = tiny / "checkpoint"
    assert export(source, tmp_path / "out") == 0
    before, after = read_json(source / "config.json"), read_json(tmp_path / "out" / "config.json")
    assert {key: after[key] for key in before if key != "auto_map"} == {
        key: value for key, value in before.items() if key != "auto_map"
    }
    assert set(after) == set(before)
    assert {path.name for path in source.iterdir()} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert not (tmp_path / "out" / "README.md").exists()  # it comes from no run


def exported(run: Path, tmp_path: Path, strategy: str, crop: bool, base_says: str) -> Path:
    """A run that was trained on frames of `strategy`, merged and exported; its base's processor says something else."""
    trained = Path(shutil.copytree(run, tmp_path / "run"))
    status = read_json(trained / "run.json")
    base = copy_checkpoint(Path(status["base"]), tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(Path(status["base"]) / name, base / name)
    said = preprocessor_config(read_json(base / "config.json") | {"image_resize_strategy": base_says})
    (base / "preprocessor_config.json").write_text(json.dumps(said))
    # a base that was itself trained by a run: what was true of that must not stay
    (base / "config.json").write_text(json.dumps(read_json(base / "config.json") | {"center_crop": not crop}))
    status["base"] = str(base)
    status["inference"]["image_pipeline"] |= {"strategy": strategy, "center_crop": crop}
    (trained / "run.json").write_text(json.dumps(status))
    assert main(["merge", str(trained), "--out", str(tmp_path / "model"), "--no-verify"]) == 0
    assert export(tmp_path / "model", tmp_path / "out") == 0
    return tmp_path / "out"


@pytest.mark.parametrize(("strategy", "base_says"), [("resize-naive", "letterbox"), ("letterbox", "resize-naive")])
def test_the_processor_resizes_as_training_did(run: Path, tmp_path: Path, strategy: str, base_says: str) -> None:
    out = exported(run, tmp_path, strategy, True, base_says)
    found, config = read_json(out / "preprocessor_config.json"), read_json(out / "config.json")
    assert found["image_resize_strategy"] == config["image_resize_strategy"] == strategy
    assert found["tvf_do_letterbox"] is (strategy == "letterbox")
    assert (found["tvf_letterbox_fill"] is None) is (strategy == "resize-naive")
    assert found["tvf_resize_params"][0]["size"] == ([56, 56] if strategy == "resize-naive" else 56)
    assert found["means"] == read_json(tmp_path / "base/preprocessor_config.json")["means"]
    assert set(found) == PREPROCESSOR_FIELDS


@pytest.mark.parametrize("crop", [True, False])
def test_an_augmented_run_says_that_it_is_used_on_the_centre(run: Path, tmp_path: Path, crop: bool) -> None:
    out = exported(run, tmp_path, "resize-naive", crop, "letterbox")
    for folder in (tmp_path / "model", out):
        assert read_json(folder / "config.json")["center_crop"] is crop
    card = (out / "README.md").read_text()
    assert ("--center_crop True" in card) is crop
    assert ("random crops of 90 % of the area" in card) is crop
    assert "resized to 56 x 56 pixels by lanczos, whatever their aspect ratio (`resize-naive`)" in card
    assert load(out, dtype="float32", device="cpu").pipeline.center_crop is crop
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "adapter"), "--to", "adapter"]) == 0
    assert ("--center_crop True" in (tmp_path / "adapter/README.md").read_text()) is crop


def test_an_export_holds_no_path_of_this_machine(tiny: Path, tmp_path: Path) -> None:
    source = tiny / "checkpoint"
    assert export(source, tmp_path / "out") == 0
    for path in (tmp_path / "out").iterdir():
        if path.suffix in (".json", ".yaml", ".md"):
            assert str(tmp_path) not in path.read_text(), path.name


def test_another_type(merged: Path, tmp_path: Path) -> None:
    assert export(merged, tmp_path / "out", "--dtype", "float16") == 0
    assert {entry.dtype for entry in tensor_table(tmp_path / "out").values()} == {"F16"}
    assert read_json(tmp_path / "out" / "config.json")["torch_dtype"] == "float16"


def test_a_wrong_export_is_not_published(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = export_module.copy_tensors

    def wrong(source: Path, target: Path, dtypes: Any, **options: Any) -> None:
        right(source, target, dtypes, **options)
        entry = tensor_table(target)["language_model.lm_head.weight"]
        with (target / entry.file).open("r+b") as file:
            file.seek(entry.begin)
            file.write(torch.randn((entry.end - entry.begin) // 2).bfloat16().view(torch.uint8).numpy().tobytes())

    monkeypatch.setattr(export_module, "copy_tensors", wrong)
    assert export(merged, tmp_path / "out") == 3
    assert "does not answer as" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_quantised_tensors_are_those_that_transformers_saves(
    quantized: tuple[str, Path], merged: Path, tmp_path: Path
) -> None:
    kind, out = quantized
    settings = AdaptConfig(quantize=kind, double_quant=kind == "nf4")  # type: ignore[arg-type]
    model = load_model(merged, dtype=torch.bfloat16, quantization=quantization_config(settings, torch.bfloat16))
    model.save_pretrained(tmp_path / "reference")
    reference = {}
    for file in (tmp_path / "reference").glob("*.safetensors"):
        reference |= load_file(file)
    ours = {}
    for file in out.glob("*.safetensors"):
        ours |= load_file(file)
    assert set(ours) == set(reference)
    for name, tensor in reference.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
    theirs = read_json(tmp_path / "reference" / "config.json")["quantization_config"]
    stored = read_json(out / "config.json")["quantization_config"]
    assert stored == {key: value for key, value in theirs.items() if not key.startswith("_")}


def test_what_stays_unquantised(quantized: tuple[str, Path]) -> None:
    kind, out = quantized
    table = tensor_table(out)
    chosen = linear_weights(out)
    assert not any(name.removesuffix(".weight").endswith(SKIPPED) for name in chosen)
    assert "vision_backbone.featurizer.blocks.0.attn.qkv.weight" in chosen
    for name in plain_shapes(table, {}):
        expected = {"nf4": "U8", "int8": "I8"}[kind] if name in chosen else "BF16"
        assert table[name].dtype == expected, name


def test_quantised_checkpoints_load_without_flags(
    quantized: tuple[str, Path], image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, out = quantized
    name = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[kind]
    ours = load_model(out)
    theirs = OpenVLAForActionPrediction.from_pretrained(out)
    for model in (ours, theirs):
        found = {n for n, module in model.named_modules() if type(module).__name__ == name}
        assert {f"{n}.weight" for n in found} == linear_weights(out)
    case = golden("single")
    inputs = {key: value for key, value in case.batch.items() if key != "labels"}
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with torch.no_grad():
        assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)
    found = actions(out, image, capsys)
    assert len(found["action_token_ids"]) == 7
    assert found["unnorm_key"] == "small"
    for kind_of in (torch.float32, torch.bfloat16):
        model = load_model(out, dtype=kind_of)
        assert model.dtype == kind_of
        assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {kind_of}


def test_logits_are_those_of_the_model_quantised_on_loading(quantized: tuple[str, Path], merged: Path) -> None:
    kind, out = quantized
    settings = quantization_config(AdaptConfig(quantize=kind, double_quant=kind == "nf4"), torch.bfloat16)  # type: ignore[arg-type]
    case = golden("single")
    inputs = {key: value for key, value in case.batch.items() if key != "labels"}
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with torch.no_grad():
        exact = load_model(merged)(**inputs).logits
        expected = load_model(merged, dtype=torch.bfloat16, quantization=settings)(**inputs).logits
        found = load_model(out)(**inputs).logits
    assert torch.equal(found, expected)
    assert not torch.equal(found, exact)


def test_a_quantised_export_is_said_to_be_smaller(
    merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(merged, tmp_path / "out", "--to", "nf4") == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "of the source written to" in said
    assert "of 28 tokens on 4 examples" in said
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Quantised, " in card


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_checkpoint_is_no_source(
    merged: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = merged.parent / kind
    if not out.exists():
        assert export(merged, out, "--to", kind) == 0
    for to in ("huggingface", "nf4"):
        assert export(out, tmp_path / "again", "--to", to) == 1
        assert "is quantised already" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="quantised already"):
        load_model(out, quantization=quantization_config(AdaptConfig(quantize="nf4"), torch.float32))


def test_damaged_quantised_checkpoints(merged: Path, tmp_path: Path) -> None:
    source = merged.parent / "nf4"
    if not source.exists():
        assert export(merged, source, "--to", "nf4") == 0
    name = "projector.fc1.weight"

    def damaged(number: int, change: Any) -> Path:
        folder = copy_checkpoint(source, tmp_path / str(number))
        file = next(folder.glob("*.safetensors"))
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        (folder / "model.safetensors.index.json").unlink()
        file.unlink()
        return folder

    changes = [
        lambda tensors: tensors.pop(f"{name}.absmax"),
        lambda tensors: tensors.pop(f"{name}.quant_state.bitsandbytes__nf4"),
        lambda tensors: tensors.pop(name),
        lambda tensors: tensors.update({name: tensors[name][:-1].clone()}),
        lambda tensors: tensors.update({"projector.fc9.weight.absmax": torch.zeros(1)}),
    ]
    for number, change in enumerate(changes):
        with pytest.raises(CheckpointError, match="do not fit together"):
            load_model(damaged(number, change))
    other = copy_checkpoint(source, tmp_path / "other")
    config = read_json(other / "config.json") | {"quantization_config": {"quant_method": "gptq"}}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="gptq"):
        load_model(other)


def test_an_adapter_has_the_keys_of_peft_0_11(run: Path, tmp_path: Path) -> None:
    assert export(run, tmp_path / "out", "--to", "adapter") == 0
    written = read_json(tmp_path / "out" / "adapter_config.json")
    # the golden adapter was written by peft 0.11.1 itself
    golden_config = read_json(ADAPTER / "adapter_config.json")
    assert set(written) == set(golden_config) == set(_KEYS)
    assert {key: written[key] for key in ("r", "lora_alpha", "use_dora", "use_rslora")} == {
        key: golden_config[key] for key in ("r", "lora_alpha", "use_dora", "use_rslora")
    }
    assert sorted(written["target_modules"]) == sorted(golden_config["target_modules"])
    assert written["base_model_name_or_path"] == "base"
    before, after = (
        load_file(ADAPTER / "adapter_model.safetensors"),
        load_file(tmp_path / "out/adapter_model.safetensors"),
    )
    assert set(before) - set(after) == {"base_model.model.language_model.lm_head.base_layer.weight"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"README.md", "dataset_statistics.json"}
    base = str(run.parent / "base")
    assert main(["merge", str(tmp_path / "out"), "--base", base, "--out", str(tmp_path / "merged")]) == 0


def test_an_adapter_of_a_newer_peft_loses_what_the_old_lacks(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ADAPTER, tmp_path / "adapter"))
    config = read_json(folder / "adapter_config.json")
    config |= {"lora_bias": False, "eva_config": None, "init_lora_weights": "eva", "lora_alpha": 4.0, "qalora_group": 3}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert export(folder, tmp_path / "out", "--to", "adapter") == 0
    written = read_json(tmp_path / "out" / "adapter_config.json")
    assert set(written) == set(_KEYS)
    assert written["init_lora_weights"] is True
    assert written["lora_alpha"] == 4
    assert isinstance(written["lora_alpha"], int)
    assert not (tmp_path / "out" / "README.md").exists()


def test_trained_tensors_are_no_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "run/checkpoints/step-000001"
    weights.mkdir(parents=True)
    save_file({"x": torch.zeros(1)}, weights / "trained.safetensors")
    (tmp_path / "run" / "run.json").write_text('{"last": "step-000001"}')
    assert export(tmp_path / "run", tmp_path / "out", "--to", "adapter") == 1
    assert "no adapter" in capsys.readouterr().err


def test_an_adapter_of_another_policy_is_not_exported_to_act_as_the_released_one(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(run, tmp_path / "run"))
    record = json.loads((other / "run.json").read_text())
    record["inference"]["policy"] = asdict(Policy(normalization="minmax"))
    (other / "run.json").write_text(json.dumps(sealed(record)))
    assert export(other, tmp_path / "out", "--to", "adapter") == 1
    assert "an adapter's folder cannot say what this policy reads and writes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_away_from_its_run_is_not_taken_for_an_adapter(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    away = shutil.copytree(run / "checkpoints/step-000020", tmp_path / "step-000020")
    (away / "state.json").write_text("{}")
    assert export(away, tmp_path / "out", "--to", "adapter") == 1
    assert "a checkpoint without its run, which says what was trained; give the run's folder" in capsys.readouterr().err


def test_an_adapter_with_whole_tensors_beside_it_is_not_exported_alone(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = Path(shutil.copytree(run, tmp_path / "run"))
    save_file({"x": torch.zeros(1)}, both / "checkpoints/step-000020/trained.safetensors")
    assert export(both, tmp_path / "out", "--to", "adapter") == 1
    assert "besides its adapter, which would be lost" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_card_tells_recipe_data_statistics_figures_and_licence(
    run: Path,
    tmp_path: Path,
    merged: Path,
) -> None:
    assert export(merged, tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["pipeline_tag"] == "robotics"
    assert head["license"] == "other"
    assert "base_model" not in head  # a local folder is no name on the Hub
    for words in (
        "LoRA of rank 4, alpha 4",
        "quantised to nf4",
        "| small | robomimic | 6 | 48 |",
        "Statistics `small` (6 demonstrations, 48 steps)",
        "| action L1, normalised to [-1, 1] | 0.2500 |",
        "28 of 28 action tokens",
        "is not recorded; look it up",
        "Llama 2 Community License",
        "Nothing here was measured on a robot.",
    ):
        assert words in card, words
    everything = card + (tmp_path / "out" / MERGE_FILE).read_text()
    assert str(run.parent) not in everything  # no paths of this machine


def test_the_licence_of_the_base(tmp_path: Path) -> None:
    assert base_licence("openvla/openvla-7b", tmp_path) == "mit"
    assert base_licence("someone/else", tmp_path) is None
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    assert base_licence("someone/else", tmp_path) == "apache-2.0"
    for text in ("# no metadata", "---\n: : [\n---\n", "---\n- 1\n---\n", "---\nlicense: [mit]\n---\n"):
        (tmp_path / "README.md").write_text(text)
        assert base_licence("someone/else", tmp_path) is None


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--to", "nf5"], 2),
        (["--dtype", "int3"], 2),
        (["--to", "nf4", "--dtype", "float16"], 2),
        (["--checkpoint", "best"], 2),
    ],
)
def test_words_that_contradict(merged: Path, tmp_path: Path, words: list[str], code: int) -> None:
    assert export(merged, tmp_path / "out", *words) == code
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_said(merged: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(run, tmp_path / "out") == 1
    assert "vlaft merge" in capsys.readouterr().err
    without = copy_checkpoint(merged, tmp_path / "a")
    (without / "tokenizer.json").unlink()
    assert export(without, tmp_path / "out") == 1
    assert "tokenizer.json is missing" in capsys.readouterr().err
    base = write_small_base(tmp_path / "b")
    config = read_json(base / "config.json")
    config.pop("norm_stats", None)
    (base / "config.json").write_text(json.dumps(config))
    assert export(base, tmp_path / "out", "--to", "nf4") == 1
    assert "its actions have no units" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_exported_checkpoint_acts_as_the_merged(
    merged: Path, tmp_path: Path, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(merged, tmp_path / "out") == 0
    assert actions(tmp_path / "out", image, capsys) == actions(merged, image, capsys)
    policy = load(tmp_path / "out", dtype="float32", device="cpu")
    assert policy.pipeline == load(merged, dtype="float32", device="cpu").pipeline


def test_the_card_of_a_base_on_the_hub(tmp_path: Path) -> None:
    action = {key: [0.5] for key in ("q01", "q99", "mean", "std")}
    record = {
        "base": "openvla/openvla-7b",
        "base_licence": "mit",
        "training": {"method": "sandwich", "recipe": "sandwich"},
    }
    write_model_card(
        tmp_path, "huggingface", {"mine": {"action": action}}, record, {"llm_backbone_id": "llama2-7b-pure"}
    )
    card = (tmp_path / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["base_model"] == "openvla/openvla-7b"
    assert head["license"] == "mit"
    assert "[openvla/openvla-7b](https://huggingface.co/openvla/openvla-7b)" in card
    assert "the vision backbone, the projector" in card
    assert "| 0 | 0.5 | 0.5 | 0.5 | 0.5 | yes |" in card
    (tmp_path / "README.md").unlink()
    write_model_card(tmp_path, "huggingface", {"mine": {"action": action}}, {"training": None}, {})
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize(
    "error", [SafetensorError("I/O error: No space left on device (os error 28)"), OSError(5, "x")]
)
def test_a_disk_that_fills_up_is_a_sentence(
    merged: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(export_quantized_module, "save_file", fail)
    assert export(merged, tmp_path / "out", "--to", "nf4") == 1
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "out: cannot be written (" in told[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["huggingface", "nf4"])
def test_told_to_stop_it_leaves_nothing(merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    for module in (export_module, export_quantized_module):
        monkeypatch.setattr(module, "finish", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert export(merged, tmp_path / "out", "--to", to) == 130
    assert list(tmp_path.iterdir()) == []


def test_what_is_exported_is_not_replaced(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(merged, merged, "--overwrite") == 1
    assert "which --overwrite would delete" in capsys.readouterr().err
    assert (merged / MERGE_FILE).is_file()
