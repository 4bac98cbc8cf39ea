"""Chunks of actions against what OpenVLA-OFT's own code computes on a small model (tests/golden/oft-tiny)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from vlaft.action.metrics import MetricSums
from vlaft.action.tokens import IGNORED
from vlaft.model.configuration import Policy
from vlaft.model.load import fill_policy, load_model, read_policy_files
from vlaft.model.openvla import OpenVLAForActionPrediction
from vlaft.observation.batch import Observation
from vlaft.observation.images import ImagePipeline

CASES: dict[str, dict[str, Any]] = {
    "a": {"head": "l1", "chunk": 8, "action_size": 7},
    "b": {"head": "l1", "chunk": 8, "action_size": 7, "cameras": ["main", "wrist"], "state": True, "state_size": 8},
    "c": {
        "head": "l1",
        "chunk": 25,
        "action_size": 14,
        "cameras": ["high", "left", "right"],
        "state": True,
        "state_size": 14,
        "film": True,
        "film_mean": "padded",  # upstream's
    },
    "d": {"head": "tokens", "decoding": "parallel", "chunk": 8},
}
BLANK = 29871  # upstream appends it to the golden prompts


@dataclass
class Case:
    """One golden folder and the model that it was computed with."""

    model: OpenVLAForActionPrediction
    expected: dict[str, Any]
    tensors: dict[str, Tensor]
    golden: Path
    tiny: Path
    pipeline: ImagePipeline

    def frames(self, rows: list[dict[str, Any]]) -> np.ndarray:
        """Return uint8 `[B, N, 224, 224, 3]`."""
        folders = {"openvla-tiny": self.tiny, "bridge": self.golden / "bridge"}
        places = [[folders[name.partition("/")[0]] / name.partition("/")[2] for name in row["frames"]] for row in rows]
        return np.stack([[np.asarray(Image.open(place).convert("RGB")) for place in row] for row in places])

    def batch(self, number: int, *rows: int) -> dict[str, Tensor | None]:
        """Return the model's inputs for a golden batch, or for some of its rows without their padding."""
        chosen = list(rows) or list(range(len(self.expected["batches"][number])))
        taken = {key: self.tensors.get(f"batch{number}.{key}") for key in ("input_ids", "labels", "actions", "proprio")}
        ids, labels, actions, state = (None if tensor is None else tensor[chosen] for tensor in taken.values())
        assert ids is not None and labels is not None
        longest = int((ids != 32000).sum(dim=1).max())
        prepared = self.frames([self.expected["batches"][number][row] for row in chosen])
        observation = Observation.of([[1]] * len(chosen), prepared, self.pipeline, pad_id=32000)
        return {
            "input_ids": ids[:, :longest],
            "labels": labels[:, :longest],
            "label_positions": torch.stack([torch.nonzero(row != IGNORED).flatten() for row in labels]),
            "pixel_values": observation.pixel_values,
            "state": state if self.model.policy.state else None,
            "actions": actions,
        }


def open_case(name: str, tiny: Path, golden: Path) -> Case:
    model = load_model(tiny / "checkpoint", dtype=torch.float32)
    model.attach(Policy(**CASES[name]))
    folder = golden / "oft-tiny" / name
    fill_policy(model, read_policy_files(folder), str(folder))
    read = (json.loads((tiny / f"checkpoint/{part}.json").read_text()) for part in ("config", "preprocessor_config"))
    pipeline = ImagePipeline.from_checkpoint(*read)
    expected = json.loads((folder / "expected.json").read_text())
    return Case(model, expected, load_file(folder / "tensors.safetensors"), golden, tiny, pipeline)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tiny: Path, golden_folder: Path) -> Case:
    return open_case(request.param, tiny, golden_folder)


@pytest.fixture(scope="module")
def two_cameras(tiny: Path, golden_folder: Path) -> Case:
    return open_case("b", tiny, golden_folder)


def test_losses_states_and_predictions(case: Case) -> None:
    assert case.model.context_size == case.expected["tokens_before_text"]
    for number, forward in enumerate(case.expected["forward"]):
        batch = case.batch(number)
        with torch.no_grad():
            output = case.model(**batch)
            states = case.model.label_states(
                *(batch[key] for key in ("input_ids", "label_positions", "pixel_values")), state=batch["state"]
            )
        assert float(output.loss) == pytest.approx(forward["loss"], rel=1e-5)
        compared = case.model.head.compared(output, len(states))
        sums = MetricSums(torch.device("cpu"))
        sums.add(output.loss, compared)
        logged = sums.read()
        assert logged.first_action_l1 == pytest.approx(forward["metrics"]["curr_action_l1_loss"], rel=1e-5)
        assert logged.later_actions_l1 == pytest.approx(forward["metrics"]["next_actions_l1_loss"], rel=1e-5)
        if case.model.policy.head == "l1":
            golden_states = case.tensors[f"batch{number}.action_hidden_states"]
            torch.testing.assert_close(states[:, :-1], golden_states, atol=2e-5, rtol=0)
            torch.testing.assert_close(output.actions, case.tensors[f"batch{number}.prediction"], atol=2e-5, rtol=0)
        else:
            logits = output.logits.view(len(states), -1, output.logits.shape[-1])
            golden_logits = case.tensors[f"batch{number}.action_logits"].view(*logits.shape[:2], -1)
            torch.testing.assert_close(logits[..., 31744:32000], golden_logits, atol=1e-4, rtol=0)
            assert logits.argmax(-1).flatten().equal(case.tensors[f"batch{number}.argmax"].flatten())


def test_gradients_of_every_group(case: Case) -> None:
    model = case.model.requires_grad_(True)
    model.zero_grad(set_to_none=True)
    model(**case.batch(0)).loss.backward()
    squares: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            group = _group(name)
            squares[group] = squares.get(group, 0.0) + float(parameter.grad.double().square().sum())
    golden = {
        name: norm for name, norm in case.expected["forward"][0]["grad_norm_by_group"].items() if norm is not None
    }
    assert {name: value**0.5 for name, value in squares.items()} == pytest.approx(golden, rel=1e-4)
    model.zero_grad(set_to_none=True)


def _group(name: str) -> str:
    if name.startswith("vision_backbone"):
        return "film" if ".scale." in name or ".shift." in name else f"vision.{name.split('.')[1]}"
    if name.startswith("language_model.model"):
        return "language_model.embed_tokens" if "embed_tokens" in name else "language_model.layers_and_norm"
    return "language_model.lm_head" if "lm_head" in name else name.partition(".")[0]


def test_what_a_policy_writes_by_itself(case: Case) -> None:
    size = case.expected["platform_constants"]["action_dim"]
    for question in case.expected["predict"]:
        state = question.get("normalized_state")
        observation = Observation.of(
            [[*question["prompt_token_ids"], BLANK]],
            case.frames([question]),
            case.pipeline,
            pad_id=32000,
            state=None if state is None else np.array([state], np.float32),
        )
        written = case.model.head.predict(case.model, observation, size)
        assert written.actions[0] == pytest.approx(np.array(question["normalized"]), abs=2e-5)
        if "token_ids" in question:
            assert written.token_ids is not None
            assert written.token_ids.ravel().tolist() == np.ravel(question["token_ids"]).tolist()


def test_a_row_alone_is_the_row_in_its_batch(two_cameras: Case) -> None:
    with torch.no_grad():
        both = two_cameras.model(**two_cameras.batch(0)).actions
        alone = torch.cat([two_cameras.model(**two_cameras.batch(0, row)).actions for row in range(2)])
    torch.testing.assert_close(both, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        alone[0:1], two_cameras.tensors["batch0.row0_alone.prediction"].view_as(alone[0:1]), atol=2e-5, rtol=0
    )


def test_a_mean_over_real_tokens_does_not_see_padding(tiny: Path, golden_folder: Path) -> None:
    """Upstream's does: a row's actions then depend on the longest row of its batch."""
    case = open_case("c", tiny, golden_folder)

    def difference() -> float:
        with torch.no_grad():
            both = case.model(**case.batch(0)).actions
            return max(float((case.model(**case.batch(0, row)).actions - both[row]).abs().max()) for row in range(2))

    assert difference() > 0.1
    case.model.policy = Policy(**CASES["c"] | {"film_mean": "tokens"})
    assert difference() < 1e-5


def test_by_itself_a_policy_does_not_see_padding_either_way(tiny: Path, golden_folder: Path) -> None:
    """What a server answers does not depend on who asks at the same time."""
    case = open_case("c", tiny, golden_folder)  # film_mean: padded
    questions = case.expected["predict"]
    prompts = [[*question["prompt_token_ids"], BLANK] for question in questions]
    states = np.array([question["normalized_state"] for question in questions], np.float32)
    assert len({len(prompt) for prompt in prompts}) > 1
    together = Observation.of(prompts, case.frames(questions), case.pipeline, pad_id=32000, state=states)
    written = case.model.head.predict(case.model, together, 14)
    for row, question in enumerate(questions):
        assert written.actions[row] == pytest.approx(np.array(question["normalized"]), abs=2e-5)


def test_a_later_token_moves_an_earlier_state(two_cameras: Case) -> None:
    """So that nobody can ship it causal, as stock transformers silently is."""
    batch = two_cameras.batch(0, 0)
    names = ("input_ids", "label_positions", "pixel_values")

    def first_state() -> Tensor:
        with torch.no_grad():
            return two_cameras.model.label_states(*(batch[name] for name in names), state=batch["state"])[0, 0]

    before, ids = first_state(), batch["input_ids"]
    assert ids is not None
    batch["input_ids"] = ids.clone()
    batch["input_ids"][0, -1] = 450  # the end of the sequence, behind all actions
    assert float((first_state() - before).abs().max()) > 1e-3
    batch["input_ids"] = ids.clone()
    batch["input_ids"][0, -2] = 31800  # another action: its embedding is zero, whatever it says
    assert first_state().equal(before)


def test_cameras_in_another_order_give_other_actions(two_cameras: Case) -> None:
    batch = two_cameras.batch(0)
    pixels = batch["pixel_values"]
    assert pixels is not None
    with torch.no_grad():
        before = two_cameras.model(**batch).actions
        after = two_cameras.model(**batch | {"pixel_values": pixels.roll(pixels.shape[1] // 2, dims=1)}).actions
    assert float((after - before).abs().max()) > 1e-4
