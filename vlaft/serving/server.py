"""The socket, the process's signals, and what HTTP/1.1 needs against clients that never finish a request."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from vlaft.errors import VlaftError
from vlaft.serving.app import create_app
from vlaft.serving.settings import ServeSettings

_IDLE_CONNECTIONS = 256  # besides those of the queue; keeps the number of open files far below the usual 1024
_KEEP_ALIVE = 30  # seconds between two requests of one connection: robots think slowly
_GRACE = 2.0  # seconds for the application to answer a slow client before its connection is cut


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to the address; port 0 takes a free one. Nobody can connect before it is served.

    Raises:
        VlaftError: the address is unknown, in use, or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except BaseException:
            bound.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise VlaftError(f"cannot serve on {host} port {port}: {reason}; name another with --host or --port") from None
    return bound


class _Protocol(H11Protocol):
    """HTTP/1.1 in which a request that has begun, or a new connection, has a deadline to have come in whole.

    uvicorn limits the idle time between requests only. The application answers 408 to a slow body before this cuts
    the connection; what is cut are slow heads, and bodies that go on after they have been refused.
    """

    def __init__(self, *arguments: Any, deadline: float, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._seconds = deadline
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._stop()  # the request is here
        elif self._timer is None:
            self._timer = self.loop.call_later(self._seconds, self.transport.abort)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready
        self.received: int | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn would leave the tasks and the lifespan to be torn down with tracebacks
            tasks = list(self.server_state.tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.lifespan.shutdown()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
        """Unlike uvicorn, do not raise the signal again at the end: a server that was told to stop did well."""
        if threading.current_thread() is not threading.main_thread():  # elsewhere Python refuses handlers
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit  # the second signal does not wait for what is queued
        self.should_exit = True
        self.received = self.received or sig


def make_server(
    policy: Any, name: str, settings: ServeSettings, on_ready: Callable[[], None] = lambda: None
) -> _Server:
    """Return a server for `policy`; `run(sockets=[bind(...)])` serves until a signal or `should_exit = True`.

    On SIGTERM or SIGINT (kept in `received`) it takes no more connections, answers what is queued and returns; a
    second signal drops what is queued.
    """
    config = uvicorn.Config(
        create_app(policy, name, settings),
        http=partial(_Protocol, deadline=settings.body_timeout + _GRACE),  # type: ignore[arg-type]
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE,
        server_header=False,
        limit_concurrency=settings.queue_length + _IDLE_CONNECTIONS,
    )
    return _Server(config, on_ready)
