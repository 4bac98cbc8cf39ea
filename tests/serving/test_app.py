from __future__ import annotations

import base64
import contextlib
import gzip
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from repository import ROOT
from serving_fixtures import FakePolicy, expected_action, raw_exchange, running

from vlaft.cli.main import main
from vlaft.errors import DataError, UsageError, VlaftError
from vlaft.serving import json_numpy
from vlaft.serving.observation import read_question
from vlaft.serving.server import bind
from vlaft.serving.settings import TOKEN_VARIABLE, Refused, ServeSettings, read_token

IMAGE = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3)
STATISTICS = FakePolicy().statistics
READS = FakePolicy().model.policy
HTTP = httpx.Client(trust_env=False, timeout=20)
TOKEN = "a-token-of-thirty-two-characters"


@pytest.fixture(scope="module")
def served() -> Iterator[SimpleNamespace]:
    with running(FakePolicy()) as server:
        yield server


def payload(**changes: Any) -> dict[str, Any]:
    return {"image": json_numpy.encode(IMAGE), "instruction": "pick up the block"} | changes


def post(server: SimpleNamespace, body: Any, **keywords: Any) -> httpx.Response:
    content = json.dumps(body).encode() if isinstance(body, dict) else body
    return HTTP.post(f"{server.url}/act", content=content, **keywords)


def assert_alive(server: SimpleNamespace) -> None:
    assert HTTP.get(f"{server.url}/health").json() == {"status": "ok"}


# The wire format


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        dtype=st.sampled_from(["u1", "i8", "<f4", ">f8", "b1", "f2", "<u2"]),
        shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    )
)
def test_arrays_survive_the_wire(array: np.ndarray) -> None:
    back = json_numpy.decode(json.loads(json.dumps(json_numpy.encode(array))), "it")
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()


def test_the_wire_format_is_json_numpys() -> None:
    assert json_numpy.encode(np.array([[1.0, -2.0]], dtype="<f8")) == {
        "__numpy__": base64.b64encode(b"\0\0\0\0\0\0\xf0?\0\0\0\0\0\0\0\xc0").decode(),
        "dtype": "<f8",
        "shape": [1, 2],
    }
    assert json_numpy.encode(IMAGE[::2, ::-1])["__numpy__"] == base64.b64encode(IMAGE[::2, ::-1].tobytes()).decode()
    with pytest.raises(DataError, match="plain numbers"):
        json_numpy.encode(np.array([None]))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dtype": "|O"}, "only plain numbers"),
        ({"dtype": "<U1000000000"}, "only plain numbers"),
        ({"dtype": "V8"}, "only plain numbers"),
        ({"dtype": "u1,u1"}, "only plain numbers"),
        ({"dtype": [["a", "|O"]]}, "only plain numbers"),
        ({"dtype": "|u1\n"}, "only plain numbers"),
        ({"dtype": None}, "only plain numbers"),
        ({"shape": [10**6, 10**6, 3]}, "holds another number"),
        ({"shape": [2**31, 1]}, "whole numbers"),
        ({"shape": [-1, 6, 3]}, "whole numbers"),
        ({"shape": [True, 6, 24]}, "whole numbers"),
        ({"shape": [8.0, 6, 3]}, "whole numbers"),
        ({"shape": [1] * 64}, "at most 8"),
        ({"shape": 144}, "at most 8"),
        ({"shape": None}, "at most 8"),
        ({"__numpy__": 5}, "string of base64"),
        ({"__numpy__": "é" * 192}, "no base64"),
        ({"__numpy__": "!" * 192}, "no base64"),
        ({"__numpy__": "AA==" * 48}, "no base64"),
        ({"__numpy__": ""}, "holds another number"),
        ({"more": 1}, "json_numpy"),
    ],
)
def test_a_wrong_array_is_refused_with_a_sentence(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        json_numpy.decode(json_numpy.encode(IMAGE) | changes, "'image'")


# What a request may be


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"", 400, "no JSON"),
        (b"{", 400, "no JSON"),
        (b"\xff\xfe", 400, "no JSON"),
        (b'{"image": NaN}', 400, "NaN"),
        (b'{"image": -Infinity}', 400, "Infinity"),
        (b"[" * 9_000, 400, "nests too deep"),
        (b"[" * 2_000_000, 400, "members"),
        (b"[" + b"{}," * 100_000 + b"{}]", 400, "members"),
        (b'{"image": ' + b"9" * 10_000 + b"}", 400, "no JSON"),
        (b"[]", 422, "JSON object"),
        (b"null", 422, "JSON object"),
        ({}, 422, "no 'image' and no 'instruction'"),
        ({"instruction": "go"}, 422, "no 'image'"),
        ({"encoded": 3}, 422, "only member"),
        ({"encoded": "{}", "instruction": "go"}, 422, "only member"),
        ({"encoded": "{"}, 400, "no JSON"),
        ({"encoded": "\ud800"}, 400, "no JSON"),
        (payload(image=IMAGE.tolist()), 422, "json_numpy"),
        (payload(image="gASVAAAAAA=="), 422, "json_numpy"),
        (payload(image=json_numpy.encode(IMAGE.astype(np.float32))), 422, "uint8"),
        (payload(image=json_numpy.encode(IMAGE[..., 0])), 422, "uint8"),
        (payload(image=json_numpy.encode(IMAGE[None])), 422, "uint8"),
        (payload(image=json_numpy.encode(np.zeros((8, 6, 4), np.uint8))), 422, "uint8"),
        (payload(image=json_numpy.encode(np.zeros((0, 6, 3), np.uint8))), 422, "no pixels"),
        (payload(image=json_numpy.encode(np.zeros((1, 2049, 3), np.uint8))), 422, "2049 x 1"),
        (payload(instruction=None), 422, "'instruction' has to be a text"),
        (payload(instruction=" "), 422, "'instruction' has to be a text"),
        (payload(instruction=["go"]), 422, "'instruction' has to be a text"),
        (payload(instruction="go" * 501), 422, "1002 characters"),
        (payload(instruction="go \ud800"), 422, "no Unicode text"),
        (payload(unnorm_key="brigde"), 422, "did you mean 'bridge'"),
        (payload(unnorm_key=4), 422, "'unnorm_key' has to be a text"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(served: SimpleNamespace, body: Any, status: int, says: str) -> None:
    response = post(served, body)
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    assert says in response.json()["error"]
    assert_alive(served)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
def test_any_body_is_read_or_refused(body: bytes | str) -> None:
    data = body if isinstance(body, bytes) else body.encode("utf-8", "surrogatepass")
    with pytest.raises(Refused):
        read_question(data, READS, STATISTICS, ServeSettings())


@pytest.mark.parametrize("name", ["max_batch", "queue_length", "max_body", "max_image_side"])
def test_a_limit_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        ServeSettings(**{name: 0})


# What comes back


def test_an_action_comes_back_as_upstreams_client_expects_it(served: SimpleNamespace) -> None:
    response = post(served, payload(unnorm_key="bridge", proprio=[1, 2]))
    assert response.status_code == 200
    assert response.headers["vlaft-non-action-tokens"] == "0"
    action = json_numpy.decode(response.json(), "it")
    assert action.dtype == np.float64
    np.testing.assert_array_equal(action, expected_action(IMAGE, "pick up the block"))


def test_the_double_encoded_form_is_answered_double_encoded(served: SimpleNamespace) -> None:
    response = post(served, {"encoded": json.dumps(payload(unnorm_key=None))})
    assert response.status_code == 200
    assert isinstance(response.json(), str)
    action = json_numpy.decode(json.loads(response.json()), "it")
    np.testing.assert_array_equal(action, expected_action(IMAGE, "pick up the block"))


def test_the_largest_image_goes_through(served: SimpleNamespace) -> None:
    image = np.zeros((2048, 2048, 3), np.uint8)
    body = payload(image=json_numpy.encode(image))
    for form in (body, {"encoded": json.dumps(body)}):
        response = post(served, form)
        assert response.status_code == 200, response.text


def test_several_statistics_need_a_key() -> None:
    with running(FakePolicy({"bridge": 7, "aloha": 14})) as server:
        refused = post(server, payload())
        assert refused.status_code == 422
        assert "bridge, aloha" in refused.json()["error"]
        with ThreadPoolExecutor(8) as pool:  # both keys at the same time
            keys = ["bridge", "aloha"] * 8
            replies = list(pool.map(lambda key: post(server, payload(unnorm_key=key)).json()["shape"], keys))
        assert replies == [[7], [14]] * 8


def test_health_info_and_unknown_routes(served: SimpleNamespace) -> None:
    info = HTTP.get(f"{served.url}/info").json()
    assert info["model"] == "test-model"
    assert info["unnorm_keys"] == {"bridge": {"action_size": 7}}
    assert info["limits"]["queue_length"] == 32
    for method, path, status in [("GET", "/act", 405), ("GET", "/docs", 404), ("POST", "/health", 405)]:
        response = HTTP.request(method, served.url + path)
        assert response.status_code == status
        assert "POST /act" in response.json()["error"]


def test_a_model_that_refuses_or_fails_does_not_take_its_neighbours_along(served: SimpleNamespace) -> None:
    texts = ["go", "crash", "refuse"] * 4
    with ThreadPoolExecutor(len(texts)) as pool:
        replies = list(pool.map(lambda text: post(served, payload(instruction=text)), texts))
    assert [reply.status_code for reply in replies] == [200, 500, 422] * 4
    assert replies[1].json() == {"error": "the model failed on this request; the server's log says why"}
    assert replies[2].json() == {"error": "this is refused"}


# Limits


@pytest.fixture
def memory() -> Iterator[Callable[[], float]]:
    """How many MB the process grew by at most, sampled while the test runs."""
    process = psutil.Process()
    start = process.memory_info().rss
    peak, stop = [start], threading.Event()

    def sample() -> None:
        while not stop.wait(0.005):
            peak[0] = max(peak[0], process.memory_info().rss)

    thread = threading.Thread(target=sample)
    thread.start()
    yield lambda: (peak[0] - start) / 1e6
    stop.set()
    thread.join()


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_100_mb_is_refused_without_being_held(
    served: SimpleNamespace, memory: Callable[[], float], chunked: bool
) -> None:
    def body() -> Iterator[bytes]:
        for _ in range(1600):
            yield b" " * 65536

    headers = {} if chunked else {"content-length": str(1600 * 65536)}
    response = post(served, body(), headers=headers)
    assert response.status_code == 413
    assert "larger than 20971520 bytes" in response.json()["error"]
    assert_alive(served)
    assert memory() < 70


def test_bombs_are_refused_without_being_unpacked(served: SimpleNamespace, memory: Callable[[], float]) -> None:
    bomb = gzip.compress(b" " * 200_000_000, compresslevel=1)
    for encoding in ("gzip", "br", "deflate", "gzip, identity"):
        response = post(served, bomb, headers={"content-encoding": encoding})
        assert response.status_code == 415
        assert "uncompressed" in response.json()["error"]
    nested = b'{"image": ' + b"[[]," * 4_000_000 + b"0]"
    assert post(served, nested).status_code == 400
    claim = payload(image=json_numpy.encode(IMAGE) | {"shape": [2_000_000, 2_000_000, 3]})
    assert post(served, claim).status_code == 422
    assert_alive(served)
    assert memory() < 300  # the bomb itself is made here


@pytest.mark.parametrize("path", ["/act", "/info"])
@pytest.mark.parametrize("given", [None, "", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", TOKEN])
def test_without_the_token_nothing_is_told(guarded: SimpleNamespace, path: str, given: str | None) -> None:
    method = "POST" if path == "/act" else "GET"
    headers = {"authorization": given} if given is not None else {}
    body = json.dumps(payload()) if path == "/act" else None
    response = HTTP.request(method, guarded.url + path, content=body, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert set(response.json()) == {"error"}


@pytest.fixture(scope="module")
def guarded() -> Iterator[SimpleNamespace]:
    with running(FakePolicy(), token=TOKEN) as server:
        yield server


def test_with_the_token_an_action_is_given(guarded: SimpleNamespace) -> None:
    assert post(guarded, payload(), headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
    assert_alive(guarded)  # a probe needs no token


def test_the_token_comes_from_a_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    assert read_token(None, {}) is None
    assert read_token(None, {TOKEN_VARIABLE: TOKEN}) == TOKEN
    assert read_token(file, {TOKEN_VARIABLE: "x" * 20}) == TOKEN
    for wrong in ("", "short", "with a blank in the middle", "é" * 20, "x" * 5000):
        with pytest.raises(VlaftError, match="at least 16"):
            read_token(None, {TOKEN_VARIABLE: wrong})
    with pytest.raises(VlaftError, match="No such file"):
        read_token(tmp_path / "none", {})


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.01)


def test_a_full_queue_is_told_when_to_come_again() -> None:
    policy = FakePolicy()
    with running(policy, queue_length=4, max_batch=2) as server, ThreadPoolExecutor(7) as pool:
        policy.hold.clear()
        replies = [pool.submit(post, server, payload()) for _ in range(7)]
        wait_until(lambda: sum(reply.done() for reply in replies) == 3)
        for refused in (reply.result() for reply in replies if reply.done()):
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "1"
            assert "ask again" in refused.json()["error"]
        policy.hold.set()
        assert sorted(reply.result().status_code for reply in replies) == [200] * 4 + [503] * 3
        assert post(server, payload()).status_code == 200


def test_requests_share_forward_passes() -> None:
    policy = FakePolicy()
    with running(policy, max_batch=4) as server, ThreadPoolExecutor(12) as pool:
        policy.hold.clear()
        waiting = [pool.submit(post, server, payload()) for _ in range(12)]
        time.sleep(0.3)
        policy.hold.set()
        assert all(future.result().status_code == 200 for future in waiting)
    assert sum(policy.batches) == 12
    assert max(policy.batches) == 4
    assert len(policy.batches) <= 5


def test_a_slow_client_is_cut_and_does_not_hold_others_up() -> None:
    with running(FakePolicy(), body_timeout=0.4) as server:
        head = b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n"

        def drip(beginning: bytes, drop: bytes) -> bytes:
            with socket.create_connection(("127.0.0.1", server.port), timeout=8) as connection:
                connection.sendall(beginning)
                received = b""
                try:
                    for _ in range(60):
                        connection.sendall(drop)
                        connection.settimeout(0.1)
                        try:
                            part = connection.recv(4096)
                        except TimeoutError:
                            continue
                        received += part
                        if not part:
                            return received
                except (ConnectionResetError, BrokenPipeError):
                    return received
                raise AssertionError("the connection was never cut")

        with ThreadPoolExecutor(2) as pool:
            body = pool.submit(drip, head + b"\r\n", b" ")
            after = pool.submit(drip, head.replace(b"1000", b"99999999") + b"\r\n", b" ")
            for _ in range(5):
                assert post(server, payload()).status_code == 200
            assert body.result().startswith(b"HTTP/1.1 408")
            assert b"did not arrive within 0.4 seconds" in body.result()
            assert after.result().startswith(b"HTTP/1.1 413")
        assert_alive(server)


def test_a_client_that_leaves_is_not_computed() -> None:
    policy = FakePolicy()
    with running(policy, max_batch=1, queue_length=40) as server:
        policy.hold.clear()
        body = json.dumps(payload()).encode()
        head = b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
        for count in range(30):
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                connection.sendall(head + (body[:50] if count % 2 else body))
                time.sleep(0.02)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(post, server, payload())
            time.sleep(0.3)
            policy.hold.set()
            assert waiting.result().status_code == 200
    assert len(policy.batches) <= 3  # at most one was being computed when its client left


@pytest.mark.parametrize(
    "data", [b"\x16\x03\x01\x02\x00" * 20 + b"\r\n\r\n", b"GET /\x00 HTTP/1.1\r\n\r\n", b"A" * 300_000]
)
def test_what_is_no_http_is_answered_and_forgotten(served: SimpleNamespace, data: bytes) -> None:
    assert raw_exchange(served.port, data, 5).startswith(b"HTTP/1.1 400")
    assert_alive(served)


def test_many_requests_leave_memory_as_it_was(served: SimpleNamespace) -> None:
    body = json.dumps(payload(image=json_numpy.encode(np.zeros((480, 640, 3), np.uint8)))).encode()
    wrong = json.dumps(payload(image=json_numpy.encode(np.zeros((480, 640, 4), np.uint8)))).encode()

    def rounds(count: int) -> int:
        for _ in range(count):
            assert post(served, body).status_code == 200
            assert post(served, wrong).status_code == 422
        return psutil.Process().memory_info().rss

    before = rounds(20)
    assert rounds(60) - before < 25e6


# The process


def test_a_taken_port_is_one_sentence() -> None:
    with bind("127.0.0.1", 0) as first:
        first.listen()
        with pytest.raises(VlaftError, match="Address already in use"):
            bind("127.0.0.1", first.getsockname()[1])
    with pytest.raises(VlaftError, match="cannot serve on nowhere-invalid port 8000"):
        bind("nowhere-invalid", 8000)


COMMAND = """
import sys, time, types
sys.path.insert(0, sys.argv.pop(1))
from serving_fixtures import FakePolicy
class Slow(FakePolicy):
    def predict(self, *arguments, **keywords):
        time.sleep(0.05)
        return super().predict(*arguments, **keywords)
sys.modules["vlaft.policy"] = types.SimpleNamespace(load=lambda *_, **__: Slow())
from vlaft.cli.main import main
code = main(sys.argv[1:])
assert "torch" not in sys.modules
sys.exit(code)
"""


def test_a_second_signal_does_not_wait(served: SimpleNamespace) -> None:
    policy = FakePolicy()
    with running(policy, max_batch=1) as server, ThreadPoolExecutor(3) as pool:
        policy.hold.clear()
        replies = [pool.submit(post, server, payload()) for _ in range(3)]
        wait_until(lambda: policy.batches == [1])
        time.sleep(0.2)
        server.server.stop()
        time.sleep(0.3)
        assert not any(reply.done() for reply in replies)
        server.server.stop()
        assert [reply.result().status_code for reply in replies] == [503] * 3
        assert "stopped before the model answered" in replies[0].result().json()["error"]
        policy.hold.set()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_lets_what_is_queued_finish(number: int, code: int) -> None:
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            COMMAND,
            str(ROOT / "tests"),
            *["serve", "some/model", "--port", "0", "--max-batch", "1"],
        ],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {TOKEN_VARIABLE: TOKEN},
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"serving some/model on http://127.0.0.1:(\d+) ", line)
        assert found, line + process.stderr.read()
        address = ("127.0.0.1", int(found[1]))
        body = json.dumps(payload()).encode()
        head = f"POST /act HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {len(body)}\r\n\r\n"
        waiting = [socket.create_connection(address, timeout=20) for _ in range(16)]
        for connection in waiting:
            connection.sendall(head.encode() + body)
        assert waiting[0].recv(12) == b"HTTP/1.1 200"  # the others have arrived too
        process.send_signal(number)
        assert [connection.recv(12) for connection in waiting[1:]] == [b"HTTP/1.1 200"] * 15
        assert process.wait(15) == code
        assert process.stderr.read() == ("" if code == 0 else "error: interrupted\n")
        with pytest.raises(OSError):
            socket.create_connection(address, timeout=2)
    finally:
        process.kill()


def test_a_wrong_command_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code, says in [
        (["no-such-model", "--port", "0"], 1, "no-such-model"),
        (["model", "--port", "99999"], 2, "65535"),
        (["model", "--max-body", "many"], 2, "no memory size"),
        (["model", "--queue-length", "0"], 2, "at least 1"),
        (["model", "--token-file", "/nonexistent"], 1, "cannot be read"),
    ]:
        assert main(["serve", *arguments]) == code
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1


def test_fifty_unfinished_bodies_keep_nobody_out() -> None:
    head = b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n"
    granted = f"Authorization: Bearer {TOKEN}\r\n".encode()
    with running(FakePolicy(), token=TOKEN, queue_length=4) as server, contextlib.ExitStack() as stack:
        for number in range(50):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=10))
            connection.sendall(head + (granted if number % 2 else b"") + b"\r\n{")
            if not number % 2:  # refused by its token, before its body
                assert connection.recv(4096).startswith(b"HTTP/1.1 401")
        for _ in range(3):
            assert post(server, payload(), headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200


def test_what_is_received_at_once_is_bounded() -> None:
    body = json.dumps(payload()).encode()
    head = b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    with running(FakePolicy(), queue_length=2, max_body=len(body)) as server, contextlib.ExitStack() as stack:
        waiting = []
        for _ in range(2):
            waiting.append(stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=10)))
            waiting[-1].sendall(head + body[:-1])
        wait_until(lambda: post(server, payload()).status_code == 503)
        for connection in waiting:
            connection.sendall(body[-1:])
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        assert post(server, payload()).status_code == 200
