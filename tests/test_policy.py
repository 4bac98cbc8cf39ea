"""Loading whatever can predict, and predicting as the checkpoint says."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_models import MINI, NAMES, base_tensors
from PIL import Image
from safetensors.torch import save_file
from small_base import write_small_base

import vlaft
from vlaft.action.statistics import STATISTICS_FILE
from vlaft.action.tokens import unnormalize
from vlaft.adapt.methods import attach_lora
from vlaft.cli.main import main
from vlaft.errors import Assumed, CheckpointError, DataError, UsageError
from vlaft.model.load import load_model
from vlaft.model.packed_linear import PackedLinear, can_pack
from vlaft.policy import Policy, Prediction, load
from vlaft.recipe.settings import LoraConfig
from vlaft.release.merge import merge
from vlaft.release.quantized import export_quantized
from vlaft.weights.layout import INDEX_FILE, SINGLE_FILE, fingerprint
from vlaft.weights.trained import RUN_FILE, TRAINED_FILE, find_trained

TEXTS = ["push the red cube", "take the cube", "push cube to the red robot", "out"]  # of different lengths


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_base(tmp_path_factory.mktemp("base") / "fused", "fused")


@pytest.fixture(scope="module")
def policy(base: Path) -> Policy:
    return load(base, device="cpu")


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (height, 64, 3), dtype=np.uint8) for height in (64, 48, 64, 56)]


def in_bfloat16(folder: Path, name: str) -> Path:
    """Write a small base whose tensors are stored in bfloat16, as releases are."""
    write_small_base(folder, name)
    tensors = {key: tensor.to(torch.bfloat16) for key, tensor in base_tensors(folder).items()}
    for path in [*folder.glob("*.safetensors"), folder / INDEX_FILE]:
        path.unlink()
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    return folder


def ids_of(predictions: list[Prediction]) -> list[tuple[int, ...]]:
    return [prediction.action_token_ids for prediction in predictions]


def edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_import_needs_no_torch() -> None:
    code = "import sys, vlaft; assert 'torch' not in sys.modules and 'load' in vlaft.__all__"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert vlaft.load is load


def test_a_prediction_is_in_the_units_of_the_statistics(policy: Policy, frames: list[np.ndarray]) -> None:
    found = policy.predict(frames[0], TEXTS[0], action_ids_only=True)
    assert isinstance(found, Prediction)
    assert found.unnorm_key == "mini"
    assert found.non_action_tokens == 0
    assert len(found.action_token_ids) == 7 and all(256 <= token < 512 for token in found.action_token_ids)
    assert found.action.dtype == np.float64
    np.testing.assert_array_equal(
        found.action, unnormalize(found.normalized_action, policy.statistics["mini"]["action"])
    )


def test_rows_of_a_batch_are_what_they_are_alone(policy: Policy, frames: list[np.ndarray]) -> None:
    together = policy.predict(frames, TEXTS)
    alone = [policy.predict(frame, text) for frame, text in zip(frames, TEXTS, strict=True)]
    assert ids_of(together) == ids_of(alone)
    assert len(set(ids_of(together))) > 1
    assert ids_of(policy.predict(frames, TEXTS[0]))[0] == alone[0].action_token_ids
    assert policy.predict([], TEXTS[0]) == []


@pytest.mark.parametrize(
    ("images", "text", "words"),
    [
        (np.zeros((8, 8), np.uint8), "push", "uint8 [height, width, 3]"),
        (np.zeros((8, 8, 3), np.float32), "push", "uint8 [height, width, 3]"),
        ([np.zeros((8, 8, 3), np.uint8)], ["push", "take"], "1 images and 2 instructions"),
        (["frame.png"], "push", "image 0"),
    ],
)
def test_wrong_input_is_refused(policy: Policy, images: Any, text: Any, words: str) -> None:
    with pytest.raises(DataError) as caught:
        policy.predict(images, text)
    assert words in str(caught.value)


def test_of_several_statistics_one_is_asked_for(base: Path, frames: list[np.ndarray], tmp_path: Path) -> None:
    folder = write_small_base(tmp_path / "base", "single")
    ours = json.loads((folder / "config.json").read_text())["norm_stats"]["mini"]
    other = {"action": ours["action"] | {"q01": [0.0] * 7, "q99": [10.0] * 7, "mask": [True] * 7}}
    edit_config(folder, lambda config: config["norm_stats"].update(other=other))
    policy = load(folder, device="cpu")
    with pytest.raises(DataError, match="2 datasets; choose one by its key: mini, other"):
        policy.predict(frames[0], TEXTS[0])
    with pytest.raises(DataError, match="did you mean 'other'"):
        policy.predict(frames[0], TEXTS[0], unnorm_key="othr")
    first, second = (policy.predict(frames[0], TEXTS[0], unnorm_key=key) for key in ("mini", "other"))
    assert first.action_token_ids == second.action_token_ids
    assert second.unnorm_key == "other"
    np.testing.assert_allclose(second.action, (second.normalized_action + 1) * 5)
    # statistics beside the weights win over those in the config
    (folder / STATISTICS_FILE).write_text(json.dumps({"mine": other}))
    assert load(folder, device="cpu").predict(frames[0], TEXTS[0]).unnorm_key == "mine"


def test_frames_go_through_the_pipeline_that_the_checkpoint_records(
    tmp_path: Path, frames: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []

    def keep(model: Any, ids: torch.Tensor, pixels: torch.Tensor, mask: Any, **_: Any) -> torch.Tensor:
        seen.append(pixels)
        return torch.full((len(ids), 7), 300)

    monkeypatch.setattr("vlaft.model.heads.tokens.generate_action_ids", keep)
    folder = write_small_base(tmp_path / "base", "single")
    pipeline = load(folder, device="cpu").pipeline.to_json()
    for crop in (False, True):
        recorded = pipeline | {"center_crop": crop}
        edit_config(folder, lambda config, recorded=recorded: config.update(image_pipeline=recorded))  # type: ignore[misc]
        policy = load(folder, device="cpu")
        assert policy.pipeline.center_crop is crop
        policy.predict(frames[0], TEXTS[0])
    assert seen[0].shape == seen[1].shape == (1, 3, 56, 56)
    assert not torch.equal(seen[0], seen[1])


def upstreams_finetune(folder: Path) -> Path:
    """A release's folder with a fine-tune's statistics beside it, as upstream's script leaves it."""
    write_small_base(folder, "single")
    mini = json.loads((folder / "config.json").read_text())["norm_stats"]["mini"]
    (folder / STATISTICS_FILE).write_text(json.dumps({"libero_object_no_noops": mini}))
    return folder


def test_a_finetune_of_upstreams_is_used_as_upstream_evaluates_it(
    tmp_path: Path, frames: list[np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = upstreams_finetune(tmp_path / "tuned")
    with pytest.warns(Assumed, match=r"is a fine-tune \(libero_object_no_noops\) .* through JPEG, by lanczos, cropped"):
        policy = load(folder, device="cpu")
    assert (policy.pipeline.resize, policy.pipeline.center_crop, policy.pipeline.jpeg) == ("lanczos", True, True)
    said = load(folder, device="cpu", center_crop=False, resize="bicubic")  # nothing is assumed, so nothing is told
    assert said.pipeline == load(write_small_base(tmp_path / "base", "single"), device="cpu").pipeline
    with pytest.raises(UsageError, match="--resize cubic: give lanczos or bicubic"):
        load(folder, device="cpu", resize="cubic")
    Image.fromarray(frames[0]).save(tmp_path / "frame.png")
    words = ["predict", str(folder), "--image", str(tmp_path / "frame.png"), "--instruction", TEXTS[0], "--json"]
    printed = []
    for options in ([], ["--no-center-crop", "--resize", "lanczos"]):
        assert main([*words, *options, "--device", "cpu"]) == 0
        out, told = capsys.readouterr()
        assert ("fine-tune" in told) is (not options) and "warning" not in told
        printed.append(json.loads(out)["action_token_ids"])
    assert printed[0] == list(policy.predict(frames[0], TEXTS[0]).action_token_ids or ())


def test_what_is_merged_into_a_base_by_upstreams_adapter_acts_as_the_adapter(
    tmp_path: Path, frames: list[np.ndarray]
) -> None:
    base = in_bfloat16(tmp_path / "base", "single")
    adapter = Path(shutil.copytree(MINI / "single/adapter_trained", tmp_path / "run/adapter"))
    mini = json.loads((base / "config.json").read_text())["norm_stats"]["mini"]
    (tmp_path / "run" / STATISTICS_FILE).write_text(json.dumps({"my_robot": mini}))
    merge(find_trained(adapter), base, tmp_path / "merged")
    with pytest.warns(Assumed, match="my_robot"):
        beside = load(adapter, base=str(base), dtype="float32", device="cpu")
    merged = load(tmp_path / "merged", dtype="float32", device="cpu")
    assert beside.pipeline == merged.pipeline and merged.pipeline.center_crop and merged.pipeline.jpeg
    assert ids_of(beside.predict(frames, TEXTS)) == ids_of(merged.predict(frames, TEXTS))
    assert json.loads((tmp_path / "merged/config.json").read_text())["center_crop"] is True


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_answers_as_what_it_is_merged_into(
    name: str, dtype: str, frames: list[np.ndarray], tmp_path: Path
) -> None:
    base = in_bfloat16(tmp_path / "base", name)
    adapter = MINI / name / "adapter_trained"
    merge(find_trained(adapter), base, tmp_path / "merged")
    ours = load(adapter, base=str(base), dtype=dtype, device="cpu")
    theirs = load(tmp_path / "merged", dtype=dtype, device="cpu")
    assert ids_of(ours.predict(frames, TEXTS)) == ids_of(theirs.predict(frames, TEXTS))
    untouched = load(base, dtype=dtype, device="cpu")
    assert torch.equal(ours.model.language_model.lm_head.weight, theirs.model.language_model.lm_head.weight)
    assert not torch.equal(ours.model.language_model.lm_head.weight, untouched.model.language_model.lm_head.weight)


def test_trained_tensors_answer_as_what_they_are_merged_into(frames: list[np.ndarray], tmp_path: Path) -> None:
    base = in_bfloat16(tmp_path / "base", "single")
    weights = tmp_path / "run/checkpoints/step-000001"
    weights.mkdir(parents=True)
    head = load_model(base, dtype=torch.float32).language_model.lm_head.weight.detach()
    trained = {"language_model.lm_head.weight": torch.randn(head.shape, generator=torch.Generator().manual_seed(0))}
    save_file(trained, weights / TRAINED_FILE)
    run = {"base": str(base), "base_fingerprint": fingerprint(base), "last": "step-000001", "inference": {}}
    (tmp_path / "run" / RUN_FILE).write_text(json.dumps(run))
    merge(find_trained(tmp_path / "run"), base, tmp_path / "merged")
    ours, theirs = (load(tmp_path / folder, dtype="float32", device="cpu") for folder in ("run", "merged"))
    assert torch.equal(ours.model.language_model.lm_head.weight, theirs.model.language_model.lm_head.weight)
    assert ids_of(ours.predict(frames, TEXTS)) == ids_of(theirs.predict(frames, TEXTS))
    other = write_small_base(tmp_path / "other", "single")
    with pytest.raises(CheckpointError, match="another base"):
        load(tmp_path / "run", base=str(other), device="cpu")


def test_an_adapter_and_whole_tensors_answer_as_what_they_are_merged_into(
    frames: list[np.ndarray], tmp_path: Path
) -> None:
    base = in_bfloat16(tmp_path / "base", "single")
    weights = Path(shutil.copytree(MINI / "single/adapter_trained", tmp_path / "run/checkpoints/step-000001"))
    name = "language_model.model.norm.weight"
    norm = torch.linspace(-2, 2, len(base_tensors(base)[name]))
    save_file({name: norm}, weights / TRAINED_FILE)
    run = {"base": str(base), "base_fingerprint": fingerprint(base), "last": "step-000001", "inference": {}}
    (tmp_path / "run" / RUN_FILE).write_text(json.dumps(run))
    merge(find_trained(tmp_path / "run"), base, tmp_path / "merged")
    ours, theirs = (load(tmp_path / folder, dtype="float32", device="cpu") for folder in ("run", "merged"))
    for policy in (ours, theirs):
        assert torch.equal(policy.model.language_model.model.norm.weight, norm.bfloat16().float())
    assert torch.equal(ours.model.language_model.lm_head.weight, theirs.model.language_model.lm_head.weight)
    assert ids_of(ours.predict(frames, TEXTS)) == ids_of(theirs.predict(frames, TEXTS))
    quantised = dict(load(tmp_path / "run", dtype="nf4", device="cpu").model.named_parameters())
    assert any("lora_A" in key for key in quantised)
    assert torch.equal(quantised[f"base_model.model.{name}"], norm.bfloat16().float())


def test_whole_tensors_do_not_go_into_quantised_weights(tmp_path: Path) -> None:
    base = in_bfloat16(tmp_path / "base", "single")
    weights = tmp_path / "run/checkpoints/step-000001"
    weights.mkdir(parents=True)
    (tmp_path / "run" / RUN_FILE).write_text(json.dumps({"base": str(base), "last": "step-000001"}))
    save_file({"projector.fc1.weight": base_tensors(base)["projector.fc1.weight"]}, weights / TRAINED_FILE)
    for kind in ("nf4", "int8"):
        with pytest.raises(CheckpointError, match=r"projector\.fc1\.weight.* merge it first"):
            load(tmp_path / "run", dtype=kind, device="cpu")
    head = {"language_model.lm_head.weight": -base_tensors(base)["language_model.lm_head.weight"]}
    save_file(head, weights / TRAINED_FILE)  # is not quantised
    loaded = load(tmp_path / "run", dtype="nf4", device="cpu").model.language_model.lm_head.weight
    assert torch.equal(loaded, head["language_model.lm_head.weight"].float())


def test_an_adapter_of_another_base_is_refused(base: Path) -> None:
    with pytest.raises(CheckpointError, match="adapter_trained belongs to another base"):
        load(MINI / "single/adapter_trained", base=str(base), device="cpu")
    with pytest.raises(CheckpointError, match="give it with --base"):
        load(MINI / "single/adapter_trained", device="cpu")


def complete_statistics(config: dict[str, Any]) -> None:
    """Add what an export asks for."""
    entry = config["norm_stats"]["mini"]
    entry["action"] |= {name: [float(number) for number in range(7)] for name in ("mean", "std", "min", "max")}
    entry |= {"num_transitions": 10, "num_trajectories": 2}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_while_loading_and_as_saved(kind: str, frames: list[np.ndarray], tmp_path: Path) -> None:
    base = edit_config(write_small_base(tmp_path / "base", "fused"), complete_statistics)
    export_quantized(base, tmp_path / "out", kind)
    loaded = load(base, dtype=kind, device="cpu")
    saved = load(tmp_path / "out", device="cpu")
    for quantised in (loaded, saved):
        assert type(quantised.model.language_model.model.layers[0].mlp.up_proj).__name__.startswith("Linear")
        assert "bitsandbytes" in type(quantised.model.language_model.model.layers[0].mlp.up_proj).__module__
        predictions = quantised.predict(frames, TEXTS, action_ids_only=True)
        assert all(prediction.non_action_tokens == 0 for prediction in predictions)
        assert (
            ids_of(predictions)
            == ids_of(
                [
                    quantised.predict(frame, text, action_ids_only=True)
                    for frame, text in zip(frames, TEXTS, strict=True)
                ]
            )
            or kind == "int8"
        )  # int8 scales activations over the rows of a batch's matrix, one by one up to rounding
    with pytest.raises(CheckpointError, match="quantised already"):
        load(tmp_path / "out", dtype=kind, device="cpu")


def test_an_adapter_stays_beside_quantised_weights(base: Path, frames: list[np.ndarray]) -> None:
    policy = load(MINI / "fused/adapter_trained", base=str(base), dtype="nf4", device="cpu")
    assert any("lora_A" in name for name, _ in policy.model.named_parameters())
    assert len(policy.predict(frames[0], TEXTS[0]).action_token_ids) == 7


@pytest.mark.skipif(not can_pack(torch.float32), reason="needs oneDNN")
def test_linear_layers_are_packed_on_a_cpu(policy: Policy) -> None:
    layers = [module for module in policy.model.modules() if isinstance(module, PackedLinear)]
    assert len(layers) > 20
    assert type(policy.model.language_model.lm_head) is torch.nn.Linear


def test_an_unknown_dtype_is_refused(base: Path) -> None:
    with pytest.raises(CheckpointError, match="'half' is not known: give float32, bfloat16, float16, int8 or nf4"):
        load(base, dtype="half")


def test_a_head_with_an_adapter_chooses_among_action_tokens_too(base: Path, frames: list[np.ndarray]) -> None:
    policy = load(base, device="cpu")
    adapted = Policy(
        attach_lora(load_model(base, dtype=torch.float32), LoraConfig(rank=2)).eval(),
        policy.files,
        policy.pipeline,
        policy.statistics,
        policy.device,
    )
    expected = policy.predict(frames, TEXTS, action_ids_only=True)
    assert ids_of(adapted.predict(frames, TEXTS, action_ids_only=True)) == ids_of(expected)


@pytest.mark.parametrize("device", ["banana", "cuda:99"])
def test_a_device_that_is_not_there(device: str, tmp_path: Path) -> None:
    base = write_small_base(tmp_path / "base")
    with pytest.raises(UsageError, match=f"--device {device}"):
        load(base, device=device)
