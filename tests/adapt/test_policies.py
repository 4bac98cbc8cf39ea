"""Folders of OpenVLA-OFT's, read as policies: against upstream's own answers, and against the plain policy."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_models import base_tensors
from oft_folders import golden_checkpoint, save
from PIL import Image
from safetensors.torch import save_file

from vlaft.adapt import policies
from vlaft.adapt.merging import StoredSettings
from vlaft.adapt.policies import base_folder, check_policy, policy_folder, policy_on_base
from vlaft.errors import CheckpointError, ConfigError, VlaftError
from vlaft.model.configuration import Policy
from vlaft.policy import load
from vlaft.recipe.settings import PolicyConfig
from vlaft.weights.layout import INDEX_FILE, SINGLE_FILE
from vlaft.weights.oft import OftFolder, Vision, is_oft, read_pickled

GIVEN: dict[str, dict[str, Any]] = {
    "b": {"chunk": 8, "cameras": ["main", "wrist"], "normalization": "q99"},
    "c": {"chunk": 25, "cameras": ["high", "left", "right"], "normalization": "minmax"},
}


@pytest.fixture(scope="module")
def exact_base(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden base in float32, as upstream computed with it."""
    folder = tmp_path_factory.mktemp("exact") / "base"
    shutil.copytree(tiny / "checkpoint", folder, ignore=shutil.ignore_patterns("model*"))
    save_file(
        {name: tensor.float() for name, tensor in base_tensors(tiny / "checkpoint").items()}, folder / SINGLE_FILE
    )
    config = json.loads((folder / "config.json").read_text())
    # golden frames were made without the crop that training asks for
    (folder / "config.json").write_text(json.dumps(config | {"center_crop": False}))
    return folder


@pytest.fixture(scope="module", params=GIVEN)
def saved(
    request: pytest.FixtureRequest, golden_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param) / "checkpoint"
    return request.param, golden_checkpoint(golden_folder, request.param, folder)


def test_answers_are_those_of_upstreams_loader(
    saved: tuple[str, Path], exact_base: Path, golden_folder: Path, tiny: Path
) -> None:
    """From the folder that upstream saved: adapter, head, state's projector, and the backbone with FiLM."""
    name, folder = saved
    policy = load(folder, base=str(exact_base), device="cpu", policy=GIVEN[name])
    expected = json.loads((golden_folder / f"oft-tiny/{name}/trained.json").read_text())
    low, high = ("q01", "q99") if name == "b" else ("min", "max")
    bounds = policy.statistics[expected["unnorm_key"]]["action"]
    spread = np.maximum(np.array(bounds[high]) - np.array(bounds[low]), 1e-3)
    for question in expected["predict_trained"]:
        places = [
            tiny.parent / frame if frame.startswith("openvla-tiny") else golden_folder / frame
            for frame in question["frames"]
        ]
        frames = [np.asarray(Image.open(place).convert("RGB")) for place in places]
        images = dict(zip(GIVEN[name]["cameras"], frames, strict=True))
        prediction = policy.predict(images, question["instruction"], state=question["state"])
        assert prediction.normalized_actions == pytest.approx(np.array(question["normalized"]), abs=5e-5)
        assert prediction.actions / spread == pytest.approx(np.array(question["actions"]) / spread, abs=5e-5)


def test_what_upstream_pickles_is_read(golden_folder: Path) -> None:
    found = read_pickled(golden_folder / "oft-tiny/b/pickled/action_head--5_checkpoint.pt")
    assert len(found) == 16 and found["model.fc2.weight"].dtype == torch.bfloat16
    assert found["model.fc2.weight"].shape == (7, 64)


def test_what_the_files_tell(saved: tuple[str, Path]) -> None:
    name, folder = saved
    found = OftFolder.open(folder)
    assert is_oft(folder) and not found.merged
    assert (found.action_size, found.state_size) == {"b": (7, 8), "c": (14, 14)}[name]
    assert (found.vision is not None) == (name == "c")


@pytest.mark.parametrize("left_out", ["chunk", "cameras", "normalization"])
def test_what_no_file_tells_is_asked_for(saved: tuple[str, Path], exact_base: Path, left_out: str) -> None:
    name, folder = saved
    given = {key: value for key, value in GIVEN[name].items() if key != left_out}
    with pytest.raises(CheckpointError, match=rf"nothing there says policy\.{left_out}, which.*policy\.{left_out}="):
        policy_folder(str(folder), given, base=str(exact_base))


@pytest.mark.parametrize("wrong", [{"state": False}, {"head": "tokens"}, {"film": None}])
def test_what_the_files_tell_cannot_be_said_otherwise(
    saved: tuple[str, Path], exact_base: Path, wrong: dict[str, Any]
) -> None:
    name, folder = saved
    wrong = {key: name != "c" if value is None else value for key, value in wrong.items()}
    (key,) = wrong
    with pytest.raises(ConfigError, match=rf"policy\.{key}=.* is not what .* was trained with"):
        policy_folder(str(folder), GIVEN[name] | wrong, base=str(exact_base))


def test_made_once_and_again_when_a_file_changes(saved: tuple[str, Path], exact_base: Path, tmp_path: Path) -> None:
    name, source = saved
    folder = shutil.copytree(source, tmp_path / "folder")
    first = policy_folder(str(folder), GIVEN[name], base=str(exact_base))
    assert policy_folder(str(folder), GIVEN[name], base=str(exact_base)) == first
    again = {part: tensor + 1 for part, tensor in read_pickled(folder / "action_head--5_checkpoint.pt").items()}
    save(folder / "action_head--5_checkpoint.pt", again)
    second = policy_folder(str(folder), GIVEN[name], base=str(exact_base))
    assert second != first and (first / "config.json").is_file()
    assert policy_folder(str(folder), GIVEN[name] | {"chunk": 5}, base=str(exact_base)) not in (first, second)


def test_a_base_that_is_missing_or_another_is_told(saved: tuple[str, Path], tmp_path: Path) -> None:
    name, source = saved
    folder = shutil.copytree(source, tmp_path / "folder")
    settings = json.loads((folder / "lora_adapter/adapter_config.json").read_text())
    (folder / "lora_adapter/adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    with pytest.raises(CheckpointError, match="does not say on which base it was trained; give it with --base"):
        policy_folder(str(folder), GIVEN[name])
    shutil.rmtree(folder / "lora_adapter")
    with pytest.raises(CheckpointError, match="a head without its model"):
        policy_folder(str(folder), GIVEN[name])


def test_statistics_of_another_robot_are_told(saved: tuple[str, Path], exact_base: Path, tmp_path: Path) -> None:
    name, source = saved
    folder = shutil.copytree(source, tmp_path / "folder")
    content = json.loads((folder / "dataset_statistics.json").read_text())
    (entry,) = content.values()
    entry["action"] = {key: value[:-1] for key, value in entry["action"].items()}
    (folder / "dataset_statistics.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"the actions of '\w+' have \d+ dimensions, and the policy's"):
        policy_folder(str(folder), GIVEN[name], base=str(exact_base))


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("/tmp/vlaft-was-here", "w"))


def test_a_pickle_that_could_run_anything_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "action_head--1_checkpoint.pt"
    for content in ({"module.model.fc1.weight": _Evil()}, _Evil()):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match="more than tensors is pickled here"):
            read_pickled(path)
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(CheckpointError, match=r"more than tensors is pickled here|damaged"):
            read_pickled(path)
    assert not Path("/tmp/vlaft-was-here").exists()


def test_what_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "action_head--1_checkpoint.pt"
    for content in ([torch.zeros(2)], {"a": 1}, {}, {1: torch.zeros(2)}, {"a": torch.zeros(2, dtype=torch.int64)}):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match="no state dict"):
            read_pickled(path)
    save(path, {"a": torch.zeros(1000)})
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"damaged|more than tensors"):
            read_pickled(path)


def test_diffusion_and_two_steps_are_refused(saved: tuple[str, Path], tmp_path: Path) -> None:
    _, source = saved
    folder = shutil.copytree(source, tmp_path / "folder")
    save(folder / "noisy_action_projector--5_checkpoint.pt", {"fc1.weight": torch.zeros(2, 1)})
    with pytest.raises(CheckpointError, match="a policy with a diffusion head"):
        OftFolder.open(folder)
    (folder / "noisy_action_projector--5_checkpoint.pt").rename(folder / "action_head--6_checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"both action_head--5_checkpoint\.pt and action_head--6"):
        OftFolder.open(folder)


def test_what_is_no_policy_stays_as_it_is(tiny: Path) -> None:
    base = str(tiny / "checkpoint")
    assert policy_folder(base) == base_folder(base, PolicyConfig(head="l1", chunk=8)) == Path(base)
    assert policy_on_base(base, {"chunk": 8}) is None
    assert policy_on_base("openvla/openvla-7b", {"chunk": 8}) is None
    with pytest.raises(ConfigError, match=r"policy\.head asks for a module that .* does not have"):
        policy_folder(base, {"head": "l1", "chunk": 8})
    with pytest.raises(ConfigError, match=r"policy\.decoding=parallel, with policy\.chunk, makes it one"):
        policy_folder(base, {"chunk": 8})


def test_tokens_all_at_once_are_said(tiny: Path) -> None:
    """A discrete policy of OpenVLA-OFT's has no file of its own."""
    given = {"decoding": "parallel", "chunk": 8, "cameras": ["main"], "normalization": "q99"}
    policy = load(tiny / "checkpoint", device="cpu", policy=given)
    assert policy.model.policy.parallel and policy.model.policy.chunk == 8
    assert (policy_folder(str(tiny / "checkpoint"), given) / INDEX_FILE).is_symlink()


def test_released_policies_are_known_by_their_names() -> None:
    name = "moojink/openvla-7b-oft-finetuned-libero-spatial"
    found = policy_on_base(name, {"chunk": 8})
    assert found == PolicyConfig(head="l1", chunk=8, cameras=["main", "wrist"], state=True)
    with pytest.raises(ConfigError, match=r"policy\.chunk=25 is not what moojink/.* was trained with \(8\)"):
        policy_on_base(name, {"chunk": 25})


def test_parts_of_two_steps_are_not_mixed(tmp_path: Path) -> None:
    for name in ("action_head--150000", "proprio_projector--50000"):
        (tmp_path / f"{name}_checkpoint.pt").touch()
    with pytest.raises(CheckpointError, match="parts of the steps 150000, 50000 are here; keep those of one step"):
        OftFolder.open(tmp_path)


def test_without_its_statistics_it_does_not_act_by_the_bases(
    saved: tuple[str, Path], exact_base: Path, tmp_path: Path
) -> None:
    name, source = saved
    folder = shutil.copytree(source, tmp_path / "folder")
    (folder / "dataset_statistics.json").unlink()
    with pytest.raises(VlaftError, match=r"dataset_statistics.json"):
        policy_folder(str(folder), GIVEN[name], base=str(exact_base))


@pytest.mark.parametrize(
    ("changes", "scaling"),
    [({}, 0.5), ({"use_rslora": True}, 16 / 32**0.5), ({"alpha_pattern": {"qkv": 64}}, 2.0), ({"lora_alpha": 64}, 2.0)],
)
def test_a_backbones_adapters_are_scaled_as_their_configuration_says(changes: dict[str, Any], scaling: float) -> None:
    vision = Vision({"blocks.0.qkv.weight": torch.zeros(4, 3)}, {"blocks.0.qkv.weight": _pair()}, {})
    settings = StoredSettings.from_json({"r": 32, "lora_alpha": 16} | changes, "here")
    found = policies._folded(vision, "blocks.0.qkv.weight", settings)
    a, b = _pair()
    torch.testing.assert_close(found, scaling * (b @ a))


def _pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(32, 3, generator=generator), torch.randn(4, 32, generator=generator)


def test_settings_that_say_the_same_agree() -> None:
    policy = Policy(head="l1", chunk=8, cameras=["main", "wrist"], action_size=7)
    check_policy(policy, {"decoding": "parallel", "cameras": ["front", "hand"], "tail": "repeat"}, "model/")
    check_policy(policy, {"decoding": "serial"}, "model/")
    with pytest.raises(
        ConfigError, match=r"cameras=\[wrist, main\] is not what model/ was trained with \(\[main, wrist"
    ):
        check_policy(policy, {"cameras": ["wrist", "main"]}, "model/")
    with pytest.raises(ConfigError) as told:
        check_policy(policy, {"cameras": ["main"], "chunk": 9, "normalization": "minmax"}, "model/")
    assert told.value.problems == [
        "policy.chunk=9 is not what model/ was trained with (8)",
        "policy.cameras=[main] is not what model/ was trained with ([main, wrist])",
        "policy.normalization=minmax is not what model/ was trained with (q99)",
    ]
