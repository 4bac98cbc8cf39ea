"""A server in a thread of the test process, and a policy that needs no model."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np

from vlaft.errors import DataError
from vlaft.serving.server import Server, bind
from vlaft.serving.settings import ServeSettings


class FakePolicy:
    """Answers with what it was asked; `hold` stops it until it is set, as a slow model would."""

    def __init__(
        self,
        sizes: dict[str, int] | None = None,
        *,
        cameras: tuple[str, ...] = ("main",),
        state_size: int | None = None,
        chunk: int = 1,
    ) -> None:
        reads = SimpleNamespace(cameras=list(cameras), state=state_size is not None, state_size=state_size, chunk=chunk)
        self.model = SimpleNamespace(policy=reads)
        self.statistics = {key: {"action": {"q01": [0.0] * size}} for key, size in (sizes or {"bridge": 7}).items()}
        self.pipeline = SimpleNamespace(size=224, center_crop=False)
        self.batches: list[int] = []
        self.hold = threading.Event()
        self.hold.set()

    def predict(
        self, images: Any, instructions: Any, *, state: Any, unnorm_key: str, action_ids_only: bool
    ) -> list[Any]:
        reads = self.model.policy
        assert all(list(moment) == reads.cameras for moment in images)
        assert (state is None) == (not reads.state)
        self.batches.append(len(images))
        assert self.hold.wait(20)
        if "crash" in instructions:
            raise RuntimeError("a defect")
        if "refuse" in instructions:
            raise DataError("this is refused")
        size = len(self.statistics[unnorm_key]["action"]["q01"])
        states = [None] * len(images) if state is None else list(state)
        return [
            SimpleNamespace(
                actions=expected_chunk(list(moment.values()), text, size, reads.chunk, of),
                non_action_tokens=int("odd" in text),
            )
            for moment, text, of in zip(images, instructions, states, strict=True)
        ]


def expected_chunk(
    images: list[np.ndarray], instruction: str, size: int = 7, chunk: int = 1, state: np.ndarray | None = None
) -> np.ndarray:
    """A chunk that tells every image, their order, the instruction, the state and its own steps apart."""
    said = sum(number * expected_action(image, instruction, size) for number, image in enumerate(images, 1))
    of_state = 0.0 if state is None else float(np.asarray(state, np.float64) @ np.arange(1, len(state) + 1))
    return np.stack([said + of_state + 100 * step for step in range(chunk)])


def expected_action(image: np.ndarray, instruction: str, size: int = 7) -> np.ndarray:
    """An action that tells every image and instruction apart."""
    seed = float(image.astype(np.float64).mean()) + len(instruction) / 1000
    return np.arange(size) + seed


@contextmanager
def running(policy: Any, **settings: Any) -> Iterator[SimpleNamespace]:
    """Serve `policy` on a free port of the loopback interface."""
    ready = threading.Event()
    server = Server(policy, "test-model", ServeSettings(**settings))
    bound = bind("127.0.0.1", 0)
    port = bound.getsockname()[1]
    thread = threading.Thread(target=server.run, args=(bound, ready.set), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}", port=port, policy=policy, server=server, thread=thread)
    finally:
        server.stop()
        thread.join(20)
    assert not thread.is_alive(), "the server did not stop"


def raw_exchange(port: int, data: bytes, seconds: float = 10.0) -> bytes:
    """Send bytes as they are and return what comes back until the server closes, or falls silent."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        connection.sendall(data)
        received = b""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                part = connection.recv(65536)
            except (TimeoutError, ConnectionResetError):
                break
            if not part:
                break
            received += part
        return received
