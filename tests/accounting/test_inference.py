"""What acting takes, and what each part of a model takes in training, against real models and traces of steps."""

from __future__ import annotations

import json

import pytest
import torch
from golden_models import MINI

from vlaft.accounting.gpu import DeviceEmulation
from vlaft.accounting.inference import InferenceMemory, predict_inference
from vlaft.accounting.measure import random_base
from vlaft.accounting.memory import LABELS, memory_model, usual_tokens
from vlaft.accounting.meta import policy_of
from vlaft.accounting.parts import part_memory
from vlaft.accounting.step import held
from vlaft.accounting.tracker import WEIGHTS, StorageTracker
from vlaft.cli.main import main
from vlaft.model.load import base_config
from vlaft.observation.batch import Observation
from vlaft.recipe.resolve import resolve

BASE = str(MINI / "fused")
PARALLEL = ["policy.decoding=parallel", "policy.chunk=4"]
WAYS = {"lora8": [], "oft": [], "oft-film": [], "lora16": PARALLEL}


@pytest.mark.parametrize("name", WAYS)
def test_the_peak_of_an_answer_is_that_of_a_real_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, config = resolve(name, [], WAYS[name]), base_config(BASE)
    policy = policy_of(recipe)
    torch.manual_seed(0)
    model = random_base(config, recipe, torch.bfloat16, torch.device("cpu"))
    model.attach(policy)
    model.eval().requires_grad_(False)
    assert config.image_sizes
    side, count = config.image_sizes[0], len(policy.cameras)
    observation = Observation(
        torch.ones(1, usual_tokens(config) - LABELS, dtype=torch.int64),
        None,
        torch.zeros(1, 6 * count, side, side, dtype=torch.bfloat16),
        torch.zeros(1, policy.state_size or 0) if policy.state else None,
    )
    tracker = StorageTracker()
    for _, tensor in held(model):
        tracker.add(tensor, WEIGHTS)
    for given in (observation.prompt_ids, observation.pixel_values, observation.state):
        if given is not None:
            tracker.add(given)
    with tracker:
        written = model.head.predict(model, observation, 7)
    assert written.actions.shape == (1, policy.chunk, 7)
    tracker.close()
    monkeypatch.setattr(  # the kernels of a CPU
        "vlaft.accounting.inference.DeviceEmulation", lambda on_gpu: DeviceEmulation(on_gpu=False)
    )
    predicted = predict_inference(config, policy)
    live = sum(size for term, size in predicted.terms.items() if term in ("weights", "activations", "logits"))
    assert live == pytest.approx(tracker.trace().at_peak()[0], rel=0.02)
    assert sum(predicted.weights.values()) == predicted.terms["weights"] == sum(t.nbytes for _, t in held(model))
    own = sum(parameter.nbytes for parameter in model.policy_parameters().values())
    assert own == sum(predicted.weights.get(part, 0) for part in ("action_head", "proprio_projector", "film"))


def test_in_four_bits_only_the_released_layers_shrink() -> None:
    config = base_config(BASE)
    policy = policy_of(resolve("oft-state"))
    whole, packed = (predict_inference(config, policy, quantized=quantized).weights for quantized in (False, True))
    for part in ("action_head", "proprio_projector", "head"):
        assert packed[part] == whole[part]
    for part in ("vision", "language model"):
        assert packed[part] < whole[part]


@pytest.mark.parametrize("name", ["lora8", "oft-film", "full", "qoft"])
def test_parts_add_up_to_the_terms_of_a_step(name: str) -> None:
    recipe, config = resolve(name), base_config(BASE)
    parts = part_memory(recipe, config)
    model = memory_model(recipe, config)
    terms = model.predict(2).terms
    assert list(parts) == list(model.counted.parts)
    assert sum(part.weights for part in parts.values()) == terms["weights"] + terms["adapters"]
    assert sum(part.moments for part in parts.values()) == terms["optimizer state"]
    reached = sum(part.gradients for part in parts.values())
    assert reached == model.counted.reached_by_gradient * 4  # in float32


def test_a_report_tells_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--base", BASE, "--recipe", "oft-state", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["recipes"]
    acting = row["inference"]["bfloat16"]
    assert acting["peak_memory"] == sum(acting["memory"].values()) and acting["weights"]["proprio_projector"] > 0
    assert row["parts"]["action_head"]["gradients_bytes"] == 4 * row["parts"]["action_head"]["trainable"]
    assert main(["report", "--base", BASE, "--explain", "oft-state"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][-2:] == ["inference", "GB"]
    assert ["memory", "at", "inference", "bfloat16", "GB", "nf4", "GB"] in lines
    assert any(line[:2] == ["action", "head"] and len(line) == 8 for line in lines)


@pytest.mark.slow
def test_acting_at_7b_is_near_what_upstream_publishes() -> None:
    """LIBERO with one image, with two and a state: 15.9 and 16.2 GB; ALOHA with three and FiLM: 18.0 GB."""
    config = base_config("openvla/openvla-7b")
    found: dict[str, InferenceMemory] = {
        name: predict_inference(config, policy_of(resolve(name), *sizes))
        for name, sizes in {"oft": (7, 8), "oft-state": (7, 8), "oft-film": (14, 14)}.items()
    }
    for name, published in {"oft": 15.9, "oft-state": 16.2}.items():
        assert found[name].peak / 1e9 == pytest.approx(published, rel=0.05)
    assert 18.0 < found["oft-film"].peak / 1e9 < 21.0  # its head and FiLM in float32, 2.9 GB; upstream's in bfloat16
    assert found["oft-film"].weights["film"] == 4 * 456_241_920
