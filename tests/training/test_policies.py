"""Policies that write chunks: trained, continued, merged and asked through the commands' own code."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_policies
import torch
from oft_folders import upstream_folder
from safetensors import safe_open
from small_base import INSTRUCTION
from small_policies import CHUNK, RECIPES, write_rich
from small_run import Small, checkpoint_content, log_lines, run
from transformers import AutoModelForImageTextToText

from vlaft.accounting.step import trainable_without_data
from vlaft.adapt.policies import policy_on_base
from vlaft.cli.main import main
from vlaft.data.held_out import HeldOut
from vlaft.errors import CheckpointError, ConfigError, DataError
from vlaft.evaluation.offline import check_models, evaluate
from vlaft.model.configuration import Policy
from vlaft.model.load import base_config, read_policy_files
from vlaft.pages.curves import draw_curves, read_curves
from vlaft.policy import load
from vlaft.recipe.resolve import resolve
from vlaft.recipe.settings import resolve_precision
from vlaft.training.model import base_model, load_trainable
from vlaft.weights.trained import find_trained


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return write_rich(tmp_path_factory.mktemp("rich"))


@pytest.fixture(scope="module", params=RECIPES)
def trained(request: pytest.FixtureRequest, rich: Small, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp(request.param) / "run"
    recorder = run(rich.recipe(request.param, *RECIPES[request.param], "train.save_every=2"), out)
    assert len(recorder.losses) == 3 and all(np.isfinite(recorder.losses))
    return request.param, out


def frames(cameras: list[str]) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(3)
    return {camera: generator.integers(0, 256, (64, 64, 3), dtype=np.uint8) for camera in cameras}


def ask(folder: Path) -> np.ndarray:
    actions = small_policies.ask(load(folder, device="cpu"))
    assert actions.shape == (3, 7)
    return actions


def ask_of(model: Any, folder: Path) -> np.ndarray:
    """Ask a model that is being trained as the policy in `folder` is asked."""
    return small_policies.ask(replace(load(folder, device="cpu"), model=model))


def test_a_checkpoint_holds_adapter_and_head(trained: tuple[str, Path]) -> None:
    name, out = trained
    found = find_trained(out)
    assert found.has_adapter and found.has_tensors
    with safe_open(found.tensors().files[0], framework="pt") as file:
        parts = {key.partition(".")[0] for key in file.keys()}  # noqa: SIM118
    expected = {"oft": {"action_head"}, "oft-state": {"action_head", "proprio_projector"}}
    assert parts == expected.get(name, {"action_head", "proprio_projector", "vision_backbone"})
    assert found.inference["policy"]["chunk"] == 3 and found.inference["policy"]["action_size"] == 7


def test_the_first_action_and_the_later_ones_are_logged(rich: Small, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(rich.recipe("oft", CHUNK, "data.augment=false"), out)
    lines = log_lines(out)
    for prefix in ("", "val_"):
        found = [line for line in lines if f"{prefix}action_l1" in line]
        assert found
        for line in found:
            first, later = line[f"{prefix}first_action_l1"], line[f"{prefix}later_actions_l1"]
            assert (first + 2 * later) / 3 == pytest.approx(line[f"{prefix}action_l1"], rel=1e-6)
            assert first != later
    evaluation = evaluate(str(out), HeldOut.open([rich.data], chunk=3))
    *_, last = (line for line in lines if "val_first_action_l1" in line)
    steps = [abs(evaluation.error[:, step]).mean() for step in range(3)]
    assert last["val_first_action_l1"] == pytest.approx(steps[0], rel=1e-4)
    assert last["val_later_actions_l1"] == pytest.approx(np.mean(steps[1:]), rel=1e-4)
    titles = [axis.get_title() for axis in draw_curves([read_curves(out)]).axes]
    assert titles[0] == "loss (L1)" and "action token accuracy" not in titles
    assert {"L1 of the chunk's first action", "L1 of the chunk's later actions"} <= set(titles)


def test_one_action_at_a_time_logs_what_it_always_did(rich: Small, tmp_path: Path) -> None:
    run(rich.recipe("lora8", "train.steps=1"), tmp_path / "run")
    step, held_out = (set(line) for line in log_lines(tmp_path / "run"))
    assert step == {
        *("step", "loss", "action_accuracy", "action_l1", "learning_rate", "grad_norm", "memory_bytes"),
    }
    assert held_out == {"step", "val_loss", "val_action_accuracy", "val_action_l1", "best"}


def test_a_merged_policy_answers_as_its_run(
    trained: tuple[str, Path], rich: Small, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = trained
    merged = out.parent / "merged"
    assert main(["merge", str(out), "--out", str(merged), "--overwrite"]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(merged), "--data", str(rich.data), "--limit", "2", "--json"]) == 0
    steps = json.loads(capsys.readouterr().out)["models"][0]["free_running"]["steps"]
    assert len(steps) == 3 and all(len(step["dimensions"]) == 7 for step in steps)
    assert ask(merged) == pytest.approx(ask(out), abs=1e-4)
    held_out = HeldOut.open([rich.data], chunk=check_models([str(out), str(merged)]))
    first, second = (evaluate(str(folder), held_out) for folder in (out, merged))
    assert first.teacher_forced is None and first.predicted.shape[1:] == (3, 7)
    assert first.predicted == pytest.approx(second.predicted, abs=1e-4)
    assert first.free_running.overall.token_accuracy is None


def test_what_a_policy_lacks_is_named(trained: tuple[str, Path], tmp_path: Path) -> None:
    _, out = trained
    policy = load(out, device="cpu")
    reads = policy.model.policy
    if reads.state:
        with pytest.raises(DataError, match="reads the robot's state: give its 3 numbers"):
            policy.predict(frames(list(reads.cameras)), INSTRUCTION)
        with pytest.raises(DataError, match="states of 3 numbers, not"):
            policy.predict(frames(list(reads.cameras)), INSTRUCTION, state=[1.0])
        with pytest.raises(DataError, match="lacks the camera 'wrist'"):
            policy.predict(frames(["main"]), INSTRUCTION, state=[0.0, 0.0, 0.0])
        with pytest.raises(DataError, match="looks through main, wrist"):
            policy.predict(frames(["main"])["main"], INSTRUCTION, state=[0.0, 0.0, 0.0])


def test_a_merged_policy_is_loaded_by_nothing_that_would_read_it_otherwise(
    trained: tuple[str, Path], tmp_path: Path
) -> None:
    _, out = trained
    merged = tmp_path / "merged"
    assert main(["merge", str(out), "--out", str(merged), "--no-verify"]) == 0
    with pytest.raises(CheckpointError, match=r"load it with vlaft\.load"):  # it would write other actions, silently
        AutoModelForImageTextToText.from_pretrained(merged)
    model = load(merged, device="cpu").model
    ids = torch.tensor([[1, 5, 6, 4]])
    with pytest.raises(ValueError, match=r"ask model\.head\.predict, or give labels"):
        model(ids, torch.zeros(1, 6 * len(model.policy.cameras), 56, 56), state=torch.zeros(1, 3))


def test_continued_as_undisturbed(rich: Small, tmp_path: Path) -> None:
    """Head, state's projector, FiLM and their optimizer state included."""
    words = (*RECIPES["oft-film"], "train.save_every=1", "train.evaluate_every=1", "train.keep_checkpoints=9")
    whole = rich.recipe("oft-film", *words, "train.steps=4")
    run(whole, tmp_path / "whole")
    run(rich.recipe("oft-film", *words, "train.steps=2"), tmp_path / "parts")
    run(whole, tmp_path / "parts", resume=True)
    names = ["step-000002", "step-000004"]
    assert [checkpoint_content(tmp_path / "parts", name) for name in names] == [
        checkpoint_content(tmp_path / "whole", name) for name in names
    ]
    assert log_lines(tmp_path / "parts") == log_lines(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "sizes", "trainable"),
    [
        ("oft", (7, None), 261_946_119),
        ("oft-state", (7, 8), 278_764_295),
        ("qoft", (7, 8), 278_764_295),
        ("oft-film", (14, 14), 852_557_326),
    ],
)
def test_parameters_are_those_of_upstream(name: str, sizes: tuple[int, int | None], trainable: int) -> None:
    recipe = resolve(name)
    policy = Policy(**asdict(recipe.policy), action_size=sizes[0], state_size=sizes[1])
    precision = resolve_precision(recipe.precision, on_gpu=True)
    _, counted = trainable_without_data(recipe, base_config("openvla/openvla-7b"), precision, policy)
    assert counted.trainable == trainable


def test_an_l1_loss_reaches_all_but_the_head_of_tokens_and_the_dead_blocks(rich: Small) -> None:
    """The count of what is reached, against a backward pass."""
    from vlaft.training.data import TrainingData, to_inputs
    from vlaft.training.step import Normalization, forward

    recipe = rich.recipe("oft-film", *RECIPES["oft-film"])
    data = TrainingData.open(recipe, rich.base)
    precision = resolve_precision(recipe.precision, on_gpu=False)
    model, _ = load_trainable(recipe, precision, rich.base, torch.device("cpu"), data.policy)
    for parameter in model.parameters():  # a fresh adapter's A gets no gradient while B is zero
        parameter.data += 1e-3 * torch.randn_like(parameter)
    normalization = Normalization(data.pipeline.means, data.pipeline.stds)
    output = forward(model, to_inputs(next(data.loader), torch.device("cpu")), normalization, torch.float32)
    output.loss.backward()
    asked = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    reached = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    assert reached == asked
    assert not any("lm_head" in name for name in asked)


def test_training_begins_from_a_merged_policy(trained: tuple[str, Path], rich: Small, tmp_path: Path) -> None:
    """Head, state's projector and FiLM go on from the base's tensors, under any recipe that says nothing else."""
    from vlaft.training.data import TrainingData

    name, out = trained
    merged = tmp_path / "merged"
    assert main(["merge", str(out), "--out", str(merged), "--no-verify"]) == 0
    words = [*rich.words(), f"base='{merged}'", "train.steps=2", "train.save_every=1", "train.keep_checkpoints=9"]
    recipe = resolve("lora32", [], words, None, policy_on_base)
    assert recipe.policy.chunk == 3 and recipe.policy.head == "l1"
    data = TrainingData.open(recipe, merged)
    precision = resolve_precision(recipe.precision, on_gpu=False)
    model, _ = load_trainable(recipe, precision, merged, torch.device("cpu"), data.policy)
    begun = read_policy_files(merged)
    found = base_model(model).policy_parameters()
    assert {name: parameter.shape for name, parameter in found.items()} == {n: t.shape for n, t in begun.items()}
    assert all(torch.equal(found[name], begun[name]) for name in begun)
    assert not any("lora" in parameter for parameter in found)  # adapters are the base's alone
    assert ask_of(base_model(model).eval(), merged) == pytest.approx(ask(merged), abs=1e-5)

    if name == "oft-film":  # a run goes on bit for bit, and is merged, from such a base too
        run(recipe, tmp_path / "whole")
        run(replace(recipe, train=replace(recipe.train, steps=1)), tmp_path / "parts")
        run(recipe, tmp_path / "parts", resume=True)
        contents = [checkpoint_content(tmp_path / where, "step-000002") for where in ("whole", "parts")]
        assert contents[0] == contents[1]
        again = tmp_path / "again"
        assert main(["merge", str(tmp_path / "whole"), "--out", str(again)]) == 0
        assert ask(again) == pytest.approx(ask(tmp_path / "whole"), abs=1e-4)
        assert np.abs(ask(again) - ask(merged)).max() > 1e-3


def test_what_a_policy_is_cannot_be_trained_away(
    rich: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = small_policies.merged_policy(rich, "oft-state", tmp_path)
    begin = ["train", "--base", str(merged), "--data", str(rich.data), "--out", str(tmp_path / "x")]
    capsys.readouterr()
    assert main([*begin, "--recipe", "oft-state", CHUNK, "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert main([*begin, "--recipe", "oft-state", CHUNK, "--dry-run", "--base", str(rich.base)]) == 0
    fresh = capsys.readouterr().out
    counts = [next(line for line in text.splitlines() if line.startswith("params")) for text in (planned, fresh)]
    assert counts[0] == counts[1]
    assert main([*begin, "--recipe", "oft-state"]) == 1  # which says chunks of 8
    assert "policy.chunk=8 is not what" in capsys.readouterr().err
    assert main([*begin, "--recipe", "lora32", "policy.state=false"]) == 1
    assert "policy.state=false is not what" in capsys.readouterr().err
    other = rich.recipe("oft-state", CHUNK, "policy.normalization=minmax", f"base='{merged}'")
    with pytest.raises(ConfigError, match=r"policy\.normalization=minmax is not what"):
        run(other, tmp_path / "x")
    config = json.loads((merged / "config.json").read_text())
    config["policy"]["action_size"] = 14
    (merged / "config.json").write_text(json.dumps(config))
    assert main([*begin, "--recipe", "oft-state", CHUNK]) == 1
    assert "its actions have 7 dimensions, and the policy" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_training_begins_from_a_folder_of_upstreams(rich: Small, tmp_path: Path) -> None:
    """Its backbone with FiLM and unmerged adapters, its head: a run, merged again without any word."""
    merged = small_policies.merged_policy(rich, "oft-film", tmp_path)
    source = upstream_folder(merged, tmp_path / "source")
    given = [CHUNK, "policy.cameras=[main,wrist]", "policy.normalization=minmax"]
    words = [*rich.words(), f"base='{source}'", "train.steps=1", *given]
    out = tmp_path / "out"
    run(resolve("lora32", [], words, None, policy_on_base), out)
    assert json.loads((out / "run.json").read_text())["base"] == str(source)
    assert main(["merge", str(out), "--out", str(tmp_path / "again")]) == 0
    assert ask(tmp_path / "again") == pytest.approx(ask(out), abs=1e-4)
