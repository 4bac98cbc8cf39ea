"""Whether policies that look, that do not, and that only listen are told apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from golden_models import base_tensors, write_single_file
from small_base import convert_small, write_small_base

from vlaft.action.written import Written
from vlaft.cli.main import main
from vlaft.evaluation.blind import BLIND, FEWEST, Sight, look
from vlaft.observation.batch import Observation
from vlaft.observation.images import ImagePipeline

PIPELINE = ImagePipeline(
    size=8,
    resize="lanczos",
    strategy="resize-naive",
    letterbox_fill=(127, 127, 127),
    center_crop=False,
    means=((0.5, 0.5, 0.5),),
    stds=((0.25, 0.25, 0.25),),
)
CHUNK = 3


def moments(count: int = 12, cameras: int = 1, instructions: int = 1, state: bool = False) -> Observation:
    """Frames of one colour each; every third prompt is shorter, where there are several."""
    random = np.random.default_rng(0)
    frames = np.broadcast_to(
        random.integers(0, 256, (count, cameras, 1, 1, 3), dtype=np.uint8), (count, cameras, 8, 8, 3)
    )
    prompts = [[1, 5 + row % instructions, *([9] if row % instructions else [])] for row in range(count)]
    states = random.uniform(-1, 1, (count, 4)).astype(np.float32) if state else None
    return Observation.of(prompts, np.ascontiguousarray(frames), PIPELINE, pad_id=0, state=states)


def policy(rule: Callable[[Observation], torch.Tensor], cameras: tuple[str, ...] = ("main",)) -> Any:
    """A model that writes chunks of two numbers by a rule from an observation to `[B, 2]`."""

    def predict(model: Any, observation: Observation, size: int, **_: Any) -> Written:
        assert len(observation) <= 5  # as many as were asked for
        values = rule(observation).double().numpy()
        return Written(np.stack([values + step for step in range(CHUNK)], axis=1))

    return SimpleNamespace(head=SimpleNamespace(predict=predict), policy=SimpleNamespace(cameras=cameras))


def colour(observation: Observation, camera: int = 0) -> torch.Tensor:
    return observation.pixel_values.mean(dim=(2, 3))[:, 3 * camera : 3 * camera + 2]


def word(observation: Observation) -> torch.Tensor:
    return observation.prompt_ids[:, 1:2].float().expand(-1, 2)


def seen(rule: Callable[[Observation], torch.Tensor], cameras: tuple[str, ...] = ("main",), **data: Any) -> Sight:
    observation = moments(cameras=len(cameras), **data)
    random = np.random.default_rng(1).uniform(-1, 1, (len(observation), CHUNK, 2))
    found = look(policy(rule, cameras), observation, random, PIPELINE, batch_size=5)
    assert found is not None
    return found


def test_a_policy_that_goes_by_its_frames_alone_has_a_share_of_one() -> None:
    sight = seen(colour)
    assert sight.together == sight.cameras["main"]
    assert sight.cameras["main"].swapped == pytest.approx(1) and sight.cameras["main"].black > BLIND
    assert sight.instruction is None and sight.state is None  # one instruction: nothing can be told of it
    assert sight.looks and sight.warnings() == []


def test_one_that_listens_only() -> None:
    sight = seen(word, instructions=3)
    assert sight.cameras["main"].swapped == sight.cameras["main"].black == sight.cameras["main"].white == 0
    assert sight.instruction == pytest.approx(1)
    assert sight.looks is False
    (sentence,) = sight.warnings()
    assert "does not look: with frames of other moments its actions move by 0.0%" in sentence
    assert "goes by its instruction" in sentence


def test_one_that_does_not_listen() -> None:
    sight = seen(colour, instructions=3)
    assert sight.looks and sight.instruction == 0
    (sentence,) = sight.warnings()
    assert sentence.startswith("does not listen")
    both = seen(lambda each: colour(each) + 0.2 * word(each), instructions=3)
    assert both.looks and both.instruction and both.warnings() == []


def test_one_that_reads_only_its_state() -> None:
    sight = seen(lambda each: each.state[:, :2], state=True)  # type: ignore[index]
    assert sight.looks is False and sight.state == pytest.approx(1)
    assert "goes by its state and instruction" in sight.warnings()[0]
    both = seen(lambda each: each.state[:, :2] + 0.5 * colour(each), state=True)  # type: ignore[index]
    assert both.looks and both.warnings() == [] and both.state and both.state < 1.5


def test_one_that_writes_the_same_always() -> None:
    sight = seen(lambda each: 0.01 * colour(each), instructions=3)
    assert sight.constant and sight.looks is False and sight.cameras == {}
    (sentence,) = sight.warnings()
    assert sentence.startswith("writes nearly the same actions whatever it is shown")


def test_each_camera_is_changed_by_itself() -> None:
    sight = seen(lambda each: colour(each, 1), cameras=("main", "wrist"))
    assert sight.cameras["main"].swapped == 0 and sight.cameras["wrist"].swapped == pytest.approx(1)
    assert sight.together and sight.together.swapped == pytest.approx(1) and sight.looks
    (sentence,) = sight.warnings()
    assert sentence.startswith("does not look through the camera 'main'")
    assert seen(lambda each: colour(each) + colour(each, 1), cameras=("main", "wrist")).warnings() == []


def test_what_cannot_be_told_is_not_told() -> None:
    observation = moments(state=True)
    still = Observation(
        observation.prompt_ids, None, observation.pixel_values[:1].expand(12, -1, -1, -1).clone(), observation.state
    )
    actions = np.random.default_rng(1).uniform(-1, 1, (12, CHUNK, 2))
    by_state = policy(lambda each: each.state[:, :2])  # type: ignore[index]
    sight = look(by_state, still, actions, PIPELINE, batch_size=5)
    assert sight and sight.cameras["main"].swapped is None and sight.looks is None and sight.warnings() == []
    sight = look(by_state, observation, np.zeros((12, CHUNK, 2)), PIPELINE, batch_size=5)  # demonstrations do nothing
    assert sight and sight.looks is None and sight.warnings() == []
    few = moments(FEWEST - 1)
    assert look(policy(colour), few, actions[: FEWEST - 1], PIPELINE, batch_size=5) is None
    json.dumps(sight.to_json())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blind")


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    return write_small_base(folder / "base")


def blinded(base: Path, out: Path) -> Path:
    """The base with a projector that writes zeros whatever it is shown."""
    tensors = base_tensors(base)
    last = sorted({name.rpartition(".")[0] for name in tensors if name.startswith("projector.")})[-1]
    changed = {name: torch.zeros_like(value) if name.startswith(last) else value for name, value in tensors.items()}
    write_single_file(base, out, changed)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((base / name).read_bytes())
    return out


def test_evaluate_says_whether_models_look(folder: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = convert_small(base, folder / "data", episodes=6)
    blind = blinded(base, folder / "blind")
    words = ["evaluate", str(base), str(blind), "--data", str(data), "--device", "cpu"]
    assert main([*words, "--json"]) == 0
    out, told = capsys.readouterr()
    first, second = (each["sight"] for each in json.loads(out)["models"])
    assert first["looks"] is True and first["examples"] == 8 and first["warnings"] == []
    assert first["together"]["swapped"] == 1 and first["instruction"] is None  # one instruction, no state
    assert second["looks"] is False and second["spread"] == 0
    assert main(words) == 0
    out, told = capsys.readouterr()
    assert "camera main  base" in out and "100%" in out and "not tellable" in out
    assert f"warning: {blind} writes nearly the same actions whatever it is shown" in told
