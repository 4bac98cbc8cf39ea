from __future__ import annotations

import http.server
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from repository import ROOT
from serving_fixtures import FakePolicy, expected_action, running

from vlaft.serving.client import Client, ServerError

GUIDE = ROOT / "docs" / "serving.md"
IMAGE = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3)


def test_the_client_imports_nothing_heavy() -> None:
    code = "import sys, vlaft.serving.client; print(*sorted(m for m in sys.modules if m.split('.')[0] in sys.argv[1:]))"
    heavy = ["vlaft", "torch", "transformers", "fastapi", "uvicorn", "pyarrow", "PIL", "h5py"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [
        "vlaft",
        "vlaft.action",
        "vlaft.action.execution",
        "vlaft.errors",
        "vlaft.model",
        "vlaft.model.registration",
        "vlaft.serving",
        "vlaft.serving.client",
        "vlaft.serving.json_numpy",
        "vlaft.serving.protocol",
        "vlaft.version",
    ]


def test_the_client_gets_the_servers_action() -> None:
    with running(FakePolicy({"bridge": 7, "aloha": 14}), token="t" * 20) as server:
        with Client(server.url, token="t" * 20) as client:
            assert client.health()
            assert set(client.info()["unnorm_keys"]) == {"bridge", "aloha"}
            action = client.act(IMAGE, "go", "aloha")
            assert action.dtype == np.float64
            np.testing.assert_array_equal(action, expected_action(IMAGE, "go", 14))
            with pytest.raises(ServerError, match="uint8") as raised:
                client.act(IMAGE.astype(np.float32), "go", "aloha")  # type: ignore[arg-type]
            assert raised.value.status == 422
            with pytest.raises(ServerError, match="choose one by its key: bridge, aloha"):
                client.act(IMAGE, "go")
            with pytest.raises(ServerError, match="--action-ids-only"):
                client.act(IMAGE, "an odd one", "aloha")
        with Client(server.url) as stranger, pytest.raises(ServerError, match="asks for a token") as raised:
            stranger.act(IMAGE, "go", "aloha")
        assert raised.value.status == 401
    assert not Client(server.url).health()
    with pytest.raises(ServerError, match="is the server running") as raised:
        Client(server.url).act(IMAGE, "go")
    assert raised.value.status is None


def test_an_address_that_is_none_is_one_sentence() -> None:
    for url in ("http://[", "http://localhost:port", "no scheme", "ftp://127.0.0.1"):
        with pytest.raises(ServerError):
            Client(url).act(IMAGE, "go")


@contextmanager
def answering(body: bytes, status: int = 200) -> Iterator[str]:
    """A server that gives everybody the same answer."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            with suppress(OSError):  # the client has seen enough
                self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'"error"', "'error' instead of an action"),  # upstream's way to say that something went wrong
        (b"<html>", "instead of an action"),
        (b'{"__numpy__": "AAAAAAAA+H8=", "dtype": "<f8", "shape": [1]}', "not finite"),
        (b'{"__numpy__": "AAAAAAAA8D8=", "dtype": "<f8", "shape": [1, 1]}', r"shape \[1, 1\]"),
        (b'{"__numpy__": "gASVAAAAAA==", "dtype": "|O", "shape": []}', "plain numbers"),
        (b"[" * 100_000, "instead of an action"),
        (b" " * 5_000_000, "more than 1048576 bytes"),
    ],
)
def test_a_server_that_answers_nonsense_moves_no_robot(body: bytes, says: str) -> None:
    with answering(body) as url, Client(url) as client, pytest.raises(ServerError, match=says):
        client.act(IMAGE, "go")


def control_loop() -> Any:
    """The function that the guide shows."""
    code = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(code) == 1
    assert len(code[0].splitlines()) <= 20
    names: dict[str, Any] = {}
    exec(compile(code[0], str(GUIDE), "exec"), names)
    return names["control_loop"]


class Robot:
    def __init__(self, steps: int) -> None:
        self.rows: list[np.ndarray] = []
        self.steps = steps

    def move(self, translation: np.ndarray, rotation: np.ndarray) -> None:
        self.rows.append(np.concatenate([translation, rotation]))

    def gripper(self, opened: bool) -> None:
        self.rows[-1] = np.append(self.rows[-1], opened)

    def done(self) -> bool:
        return len(self.rows) == self.steps


@pytest.fixture(scope="module")
def policy(tiny: Path) -> Any:
    from vlaft.policy import load

    return load(tiny / "checkpoint", device="cpu")


@pytest.fixture(scope="module")
def cases(tiny: Path) -> list[tuple[np.ndarray, str, list[float]]]:
    from vlaft.data.codec import decode_image

    predict = json.loads((tiny / "cases.json").read_text())["predict"]
    return [
        (
            decode_image((tiny / case["frame"]).read_bytes(), case["frame"]),
            case["instruction"],
            case["action"],
        )
        for case in predict
    ]


def test_the_guides_control_loop_drives_a_robot(policy: Any, cases: Any) -> None:
    frames = iter([image for image, _, _ in cases] * 2)
    robot = Robot(5)
    with running(policy, action_ids_only=True) as server:
        assert control_loop()(lambda: next(frames), robot, "pick up the cup", server.url, hz=1000.0)
    frames = iter([image for image, _, _ in cases] * 2)
    for row in robot.rows:
        action = policy.predict(next(frames), "pick up the cup", action_ids_only=True).action
        np.testing.assert_array_equal(row, [*action[:6], action[6] > 0.5])


def ask_many(policy: Any, cases: Any, url: str, requests: int, clients: int) -> None:
    """Ask from `clients` threads, each with its own connection; every answer has to be the one of `predict`."""
    expected = [policy.predict(image, text, action_ids_only=True).action for image, text, _ in cases]

    def ask(client_number: int) -> int:
        with Client(url) as client:
            numbers = range(client_number, requests, clients)
            for number in numbers:
                image, text, _ = cases[number % len(cases)]
                np.testing.assert_array_equal(client.act(image, text), expected[number % len(cases)])
            return len(numbers)

    with ThreadPoolExecutor(clients) as pool:
        assert sum(pool.map(ask, range(clients))) == requests


def test_concurrent_clients_each_get_their_own_action(policy: Any, cases: Any) -> None:
    with running(policy, action_ids_only=True) as server:
        ask_many(policy, cases, server.url, requests=48, clients=16)


@pytest.mark.slow
def test_a_thousand_requests_of_sixteen_clients(policy: Any, cases: Any, tiny: Path) -> None:
    command = [sys.executable, "-m", "vlaft", "serve", str(tiny / "checkpoint")]
    server = subprocess.Popen([*command, "--port", "0", "--action-ids-only"], stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        found = re.search(r"on (http://\S+) ", server.stderr.readline())
        assert found
        import psutil

        process = psutil.Process(server.pid)
        ask_many(policy, cases, found[1], requests=100, clients=16)
        before = process.memory_info().rss
        ask_many(policy, cases, found[1], requests=1000, clients=16)
        assert process.memory_info().rss - before < 30e6
        server.terminate()
        assert server.wait(20) == 0
    finally:
        server.kill()
