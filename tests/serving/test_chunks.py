"""Several cameras, a state and chunks over HTTP: in vlaft's own form, and as OpenVLA-OFT's clients ask."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_fixtures import FakePolicy, expected_chunk, running

from vlaft.cli.main import main
from vlaft.data.codec import decode_image
from vlaft.errors import ConfigError
from vlaft.model.configuration import Policy as ModelPolicy
from vlaft.model.load import fill_policy, load_model, read_policy_files
from vlaft.observation.images import ImagePipeline
from vlaft.observation.prompts import load_base_files
from vlaft.policy import Policy
from vlaft.serving import json_numpy
from vlaft.serving.client import Client, Controller, ServerError
from vlaft.serving.observation import read_question
from vlaft.serving.settings import Refused, ServeSettings

IMAGE = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3)
OTHER = 255 - IMAGE[:6]
STATE = [0.5, -1.25, 3.0]
HTTP = httpx.Client(trust_env=False, timeout=20)
CHUNK = 4


@pytest.fixture(scope="module")
def served() -> Iterator[SimpleNamespace]:
    with running(FakePolicy(cameras=("main", "wrist"), state_size=3, chunk=CHUNK)) as server:
        yield server


@pytest.fixture(scope="module")
def left() -> Iterator[SimpleNamespace]:
    """A policy of one camera, which is not the main one."""
    with running(FakePolicy(cameras=("left",), chunk=CHUNK)) as server:
        yield server


def ours(**changes: Any) -> dict[str, Any]:
    images = {"image": json_numpy.encode(IMAGE), "image_wrist": json_numpy.encode(OTHER)}
    return {**images, "state": json_numpy.encode(np.array(STATE)), "instruction": "go on"} | changes


def oft(**changes: Any) -> dict[str, Any]:
    """A request as OpenVLA-OFT's clients make it."""
    images = {"full_image": json_numpy.encode(IMAGE), "left_wrist_image": json_numpy.encode(OTHER)}
    return {**images, "state": json_numpy.encode(np.array(STATE)), "instruction": "go on"} | changes


def without(body: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name not in names}


def post(server: SimpleNamespace, body: dict[str, Any]) -> httpx.Response:
    return HTTP.post(f"{server.url}/act", content=json.dumps(body).encode())


WRITTEN = expected_chunk([IMAGE, OTHER], "go on", chunk=CHUNK, state=np.array(STATE))


def test_a_chunk_comes_back_as_one_array(served: SimpleNamespace) -> None:
    for state in (json_numpy.encode(np.array(STATE, np.float32)), STATE, json_numpy.encode(np.array(STATE, ">f8"))):
        response = post(served, ours(state=state, time=0))
        assert response.status_code == 200, response.text
        assert response.headers["vlaft-non-action-tokens"] == "0"
        chunk = json_numpy.decode(response.json(), "it")
        assert chunk.dtype == np.float64
        np.testing.assert_array_equal(chunk, WRITTEN)


def test_openvla_ofts_clients_get_a_list_of_actions(served: SimpleNamespace) -> None:
    response = post(served, oft())
    assert response.status_code == 200, response.text
    expected = [json_numpy.encode(action) for action in WRITTEN]
    assert response.content == json.dumps(expected, separators=(",", ":")).encode()
    assert post(served, oft()).content == response.content  # upstream normalises the state of its caller in place
    doubly = post(served, {"encoded": json.dumps(oft())})
    assert doubly.json() == json.dumps(expected)


def test_wrists_with_the_names_of_cameras_are_these_in_any_order() -> None:
    cameras = ("main", "left_wrist", "right_wrist")
    frames = {"full_image": IMAGE, "right_wrist_image": 255 - OTHER, "left_wrist_image": OTHER}
    with running(FakePolicy(cameras=cameras, state_size=3, chunk=CHUNK)) as server:
        body = {name: json_numpy.encode(frame) for name, frame in frames.items()}
        answer = post(server, body | {"state": STATE, "instruction": "go on"}).json()
    expected = expected_chunk([IMAGE, OTHER, 255 - OTHER], "go on", chunk=CHUNK, state=np.array(STATE))
    np.testing.assert_array_equal([json_numpy.decode(action, "it") for action in answer], expected)


def test_a_main_image_is_no_wrist() -> None:
    with running(FakePolicy(cameras=("wrist",), chunk=CHUNK)) as server:
        response = post(server, without(oft(), "left_wrist_image"))
    assert response.status_code == 422
    assert "'full_image' is a main camera, and the policy's first is 'wrist': send 'image_wrist'" in response.text


def test_openvla_ofts_form_of_one_action_is_a_list_too() -> None:
    with running(FakePolicy({"bridge": 7, "aloha": 14}), unnorm_key="aloha") as server:  # it has no key in a request
        (action,) = post(server, oft()).json()  # one camera looks at no wrist, and reads no state
        expected = expected_chunk([IMAGE], "go on", 14)[0]
        np.testing.assert_array_equal(json_numpy.decode(action, "it"), expected)
        both = without(ours(unnorm_key="bridge", full_image=3), "image_wrist")  # OpenVLA's form ignores other members
        assert json_numpy.decode(post(server, both).json(), "it").shape == (7,)


def test_a_default_of_no_dataset_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vlaft.policy.load", lambda *_, **__: FakePolicy())
    assert main(["serve", "model", "--port", "0", "--unnorm-key", "brigde"]) == 1
    assert "did you mean 'bridge'" in capsys.readouterr().err


def test_nobody_need_know_the_name_of_an_only_camera(left: SimpleNamespace) -> None:
    expected = expected_chunk([IMAGE], "go", chunk=CHUNK)
    for name in ("image", "image_left"):
        response = post(left, {name: json_numpy.encode(IMAGE), "instruction": "go"})
        np.testing.assert_array_equal(json_numpy.decode(response.json(), "it"), expected)
    both = {"image": json_numpy.encode(OTHER), "image_left": json_numpy.encode(IMAGE), "instruction": "go"}
    np.testing.assert_array_equal(json_numpy.decode(post(left, both).json(), "it"), expected)


READS = " (the policy reads the cameras main, wrist and a state of 3 numbers)"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (without(ours(), "image_wrist"), f"no 'image_wrist'{READS}"),
        (without(ours(), "image", "state"), f"no 'image' and no 'state'{READS}"),
        ({}, "no 'image' and no 'image_wrist' and no 'state' and no 'instruction'"),
        (ours(image_wirst=1), f"'image_wirst' is no camera of this policy; did you mean 'image_wrist'?{READS}"),
        (ours(**{"image_\ud800" + "x" * 500: 1}), "'image_\\ud800xxx"),
        (ours(image_wrist=json_numpy.encode(OTHER[..., 0])), "'image_wrist' has to be uint8"),
        (ours(image_wrist=json_numpy.encode(np.zeros((3000, 1, 3), np.uint8))), "'image_wrist' is 1 x 3000"),
        (ours(state=[1.0, 2.0]), "'state' has shape [2]; the policy reads a state of 3 numbers"),
        (ours(state=json_numpy.encode(np.zeros((1, 3)))), "'state' has shape [1, 3]"),
        (ours(state=json_numpy.encode(np.array([0, np.nan, 0]))), "not finite"),
        (ours(state=json_numpy.encode(np.array([0, np.inf, 0]))), "not finite"),
        (ours(state=[1e300, 0, 0]), "too large for a float32"),
        (ours(state=[10**400, 0, 0]), "too large for a float32"),
        (ours(state=[True, 0, 0]), "list of numbers"),
        (ours(state=["1", 0, 0]), "list of numbers"),
        (ours(state=[[1], 0, 0]), "list of numbers"),
        (ours(state=None), "json_numpy"),
        (ours(state=3.0), "json_numpy"),
        (ours(state=json_numpy.encode(np.array(STATE)) | {"dtype": "|O"}), "plain numbers"),
        (without(oft(), "left_wrist_image"), "has 1 images; the policy reads 2: 'full_image' and 1 with 'wrist'"),
        (oft(right_wrist_image=json_numpy.encode(OTHER)), "has 3 images; the policy reads 2"),
        (without(oft(), "state"), f"no 'state'{READS}"),
        (oft(left_wrist_image="x"), "'left_wrist_image' has to be an array"),
        (oft(full_image=json_numpy.encode(IMAGE[0])), "'full_image' has to be uint8"),
        (oft(state=[1.0]), "'state' has shape [1]"),
        (without(oft(), "left_wrist_image") | {"wrist\ud800" * 50: 1}, "'wrist\\ud800wrist"),
        (oft(instruction=4), "'instruction' has to be a text"),
    ],
)
def test_what_is_wrong_is_one_sentence(served: SimpleNamespace, body: dict[str, Any], says: str) -> None:
    response = post(served, body)
    assert response.status_code == 422, response.text
    assert set(response.json()) == {"error"}
    assert says in response.json()["error"]
    assert len(response.json()["error"]) < 400 and "\n" not in response.json()["error"]


@settings(max_examples=100, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            name: st.none() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(), max_size=4)
            for name in ("image", "image_wrist", "image_x", "full_image", "wrist", "state", "instruction", "unnorm_key")
        },
    )
)
def test_any_members_are_read_or_refused(body: dict[str, Any]) -> None:
    policy = FakePolicy(cameras=("main", "wrist"), state_size=3)
    with pytest.raises(Refused):
        read_question(json.dumps(body).encode(), policy.model.policy, policy.statistics, ServeSettings())


def test_info_says_what_is_read_and_written(served: SimpleNamespace, left: SimpleNamespace) -> None:
    info = HTTP.get(f"{served.url}/info").json()
    assert (info["cameras"], info["state_size"], info["chunk"]) == (["main", "wrist"], 3, CHUNK)
    info = HTTP.get(f"{left.url}/info").json()
    assert (info["cameras"], info["state_size"], info["chunk"]) == (["left"], None, CHUNK)


def test_requests_of_either_form_share_forward_passes() -> None:
    policy = FakePolicy(cameras=("main", "wrist"), state_size=3, chunk=CHUNK)
    with running(policy, max_batch=8) as server, ThreadPoolExecutor(12) as pool:
        policy.hold.clear()
        bodies = [(ours, oft)[number % 2](state=[number, 0, 0]) for number in range(12)]
        waiting = [pool.submit(post, server, body) for body in bodies]
        time.sleep(0.3)
        policy.hold.set()
        for number, future in enumerate(waiting):
            value = future.result().json()
            chunk = [json_numpy.decode(each, "it") for each in value] if number % 2 else json_numpy.decode(value, "it")
            expected = expected_chunk([IMAGE, OTHER], "go on", chunk=CHUNK, state=np.array([number, 0, 0]))
            np.testing.assert_array_equal(chunk, expected)
    assert sum(policy.batches) == 12 and max(policy.batches) > 1


# The client


IMAGES = {"wrist": OTHER, "main": IMAGE}  # in any order


def test_the_client_gets_chunks(served: SimpleNamespace, left: SimpleNamespace) -> None:
    with Client(served.url) as client:
        chunk = client.chunk(IMAGES, "go on", state=STATE)
        assert chunk.dtype == np.float64
        np.testing.assert_array_equal(chunk, WRITTEN)
        with pytest.raises(ServerError, match="no 'image_wrist' and no 'state'") as raised:
            client.chunk(IMAGE, "go on")
        assert raised.value.status == 422
        with pytest.raises(ServerError, match="tokens that stand for no action"):
            client.chunk(IMAGES, "an odd one", state=STATE)
    with Client(left.url) as client:
        for images in (IMAGE, {"left": IMAGE}):
            np.testing.assert_array_equal(client.chunk(images, "go"), expected_chunk([IMAGE], "go", chunk=CHUNK))
        with pytest.raises(ServerError, match=r"shape \[4, 7\]: its policy writes chunks"):
            client.act(IMAGE, "go")


def test_a_policy_of_one_action_is_a_chunk_of_one() -> None:
    with running(FakePolicy()) as server, Client(server.url) as client:
        np.testing.assert_array_equal(client.chunk(IMAGE, "go"), expected_chunk([IMAGE], "go"))
        controller = Controller(client)
        for _ in range(2):
            np.testing.assert_array_equal(controller.act(IMAGE, "go"), client.act(IMAGE, "go"))


def frames(step: int) -> dict[str, np.ndarray]:
    return {"main": np.full((4, 4, 3), step, np.uint8), "wrist": np.full((4, 4, 3), 2 * step, np.uint8)}


def said(step: int, instruction: str = "go") -> np.ndarray:
    return expected_chunk(list(frames(step).values()), instruction, chunk=CHUNK, state=np.array(STATE))


@pytest.mark.parametrize(("execute", "every"), [(None, CHUNK), (3, 3), (1, 1)])
def test_a_controller_acts_so_many_of_each_chunk(served: SimpleNamespace, execute: int | None, every: int) -> None:
    before = sum(served.policy.batches)
    with Client(served.url) as client:
        controller = Controller(client, execute=execute)
        for step in range(9):
            action = controller.act(frames(step), "go", state=STATE)
            np.testing.assert_array_equal(action, said(step - step % every)[step % every])
    assert sum(served.policy.batches) - before == -(-9 // every)


def test_a_controllers_ensemble_is_acts_mean(served: SimpleNamespace) -> None:
    with Client(served.url) as client:
        controller = Controller(client, ensemble=True)
        for step in range(6):
            action = controller.act(frames(step), "go", state=STATE)
            spoken = [said(at)[step - at] for at in range(max(0, step - CHUNK + 1), step + 1)]
            weights = np.exp(-0.01 * np.arange(len(spoken)))
            np.testing.assert_allclose(action, np.average(spoken, axis=0, weights=weights), rtol=1e-12)


def test_a_new_episode_or_instruction_asks_anew(served: SimpleNamespace) -> None:
    with Client(served.url) as client:
        controller = Controller(client)
        np.testing.assert_array_equal(controller.act(frames(0), "go", state=STATE), said(0)[0])
        np.testing.assert_array_equal(controller.act(frames(1), "go", state=STATE), said(0)[1])
        np.testing.assert_array_equal(controller.act(frames(2), "stop", state=STATE), said(2, "stop")[0])
        controller.reset()
        np.testing.assert_array_equal(controller.act(frames(3), "stop", state=STATE), said(3, "stop")[0])
        with pytest.raises(ServerError, match="the policy reads a state of 3 numbers"):
            controller.act(frames(4), "another", state=[1.0])
        np.testing.assert_array_equal(controller.act(frames(5), "another", state=STATE), said(5, "another")[0])


def test_more_actions_than_a_chunk_has_are_refused(served: SimpleNamespace) -> None:
    with Client(served.url) as client:
        with pytest.raises(ConfigError, match="the policy writes chunks of 4; give at most 4"):
            Controller(client, execute=5).act(frames(0), "go", state=STATE)
        with pytest.raises(ConfigError, match="not both"):
            Controller(client, execute=2, ensemble=True)


# What OpenVLA-OFT's own code answers


def deployed(name: str, tiny: Path, golden: Path) -> tuple[Policy, list[dict[str, Any]]]:
    """Return the policy of a golden folder, and the questions that upstream's deployment answered."""
    folder = golden / "oft-tiny" / name
    expected = json.loads((folder / "expected.json").read_text())
    sizes = expected["platform_constants"]
    model = load_model(tiny / "checkpoint", dtype=torch.float32)
    reads = ModelPolicy(
        head="l1",
        chunk=sizes["chunk"],
        cameras=["main", "left_wrist", "right_wrist"][: expected["images"]],
        state=expected["proprio"],
        film=expected["film"],
        film_mean="padded",
        normalization="q99" if sizes["normalization"] == "bounds_q99" else "minmax",
        action_size=sizes["action_dim"],
        state_size=sizes["proprio_dim"] if expected["proprio"] else None,
    )
    model.attach(reads)
    fill_policy(model, read_policy_files(folder), str(folder))
    files = load_base_files(tiny / "checkpoint")
    pipeline = ImagePipeline.from_checkpoint(files.config, files.preprocessor)
    policy = Policy(model.eval(), files, pipeline, expected["norm_stats"], torch.device("cpu"))
    return policy, expected["predict"]


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_deployed_answers_are_upstreams(name: str, tiny: Path, golden_folder: Path) -> None:
    policy, questions = deployed(name, tiny, golden_folder)
    folders = {"openvla-tiny": tiny, "bridge": golden_folder / "bridge"}
    cameras = ["full_image", "left_wrist_image", "right_wrist_image"]
    statistics = next(iter(policy.statistics.values()))["action"]
    low, high = ("q01", "q99") if policy.model.policy.normalization == "q99" else ("min", "max")
    width = np.array(statistics[high]) - np.array(statistics[low])
    bodies = []
    for question in questions:
        places = [folders[path.partition("/")[0]] / path.partition("/")[2] for path in question["frames"]]
        images = [decode_image(place.read_bytes(), place.name) for place in places]
        body: dict[str, Any] = {key: json_numpy.encode(image) for key, image in zip(cameras, images, strict=False)}
        body |= {"state": json_numpy.encode(np.array(question["state"]))} if "state" in question else {}
        bodies.append(body | {"instruction": question["instruction"]})
    with running(policy, max_batch=len(bodies), max_wait=0.2) as server, ThreadPoolExecutor(len(bodies)) as pool:
        answers = list(pool.map(lambda body: post(server, body), bodies))  # together: prompts of different lengths
        again = post(server, bodies[0])
    for answer, question in zip(answers, questions, strict=True):
        chunk = np.stack([json_numpy.decode(action, "it") for action in answer.json()])
        assert np.abs((chunk - question["actions"]) / np.where(width > 0, width, 1)).max() < 2e-5
    first = np.stack([json_numpy.decode(action, "it") for action in again.json()])
    assert np.abs((first - questions[0]["actions"]) / np.where(width > 0, width, 1)).max() < 2e-5
