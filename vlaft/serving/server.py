"""The socket and the process's signals around uvicorn, which bounds connections, heads and idle times.

What uvicorn does not bound is a connection that sends nothing, or its head byte by byte: it holds one of a few hundred
places, until a reverse proxy in front has a deadline for heads (docs/serving.md).
"""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from types import FrameType
from typing import Any

import uvicorn

from vlaft.errors import VlaftError
from vlaft.serving.app import create_app
from vlaft.serving.settings import ServeSettings

_IDLE_CONNECTIONS = 256  # besides those of the queue; keeps the number of open files far below the usual 1024
_KEEP_ALIVE = 30  # seconds between two requests of one connection: robots think slowly
_HEAD = 16 * 2**10  # bytes of a request's head; the longest token has a quarter of that
_TICK = 0.05  # seconds after which a signal is seen that the system gave to another thread


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


class Server:
    """`policy` behind HTTP, by uvicorn in a thread of its own: there it leaves the process's signals alone."""

    def __init__(self, policy: Any, name: str, settings: ServeSettings) -> None:
        """Take a policy, what `/info` calls it, and the limits."""
        self.received: int | None = None
        self._app = create_app(policy, name, settings)
        self._uvicorn = uvicorn.Server(
            uvicorn.Config(
                self._app,
                http="h11",
                loop="asyncio",
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE,
                limit_concurrency=settings.queue_length + _IDLE_CONNECTIONS,
                h11_max_incomplete_event_size=_HEAD,
            )
        )

    def run(self, bound: socket.socket, on_ready: Callable[[], None] = lambda: None) -> None:
        """Serve until `stop`, or SIGTERM or SIGINT, which is kept in `received`.

        Args:
            bound: from `bind`; closed at the end.
            on_ready: called when clients can connect.
        """
        before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python refuses handlers
            before = {number: signal.signal(number, self._signalled) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with ThreadPoolExecutor(1, thread_name_prefix="vlaft-serve") as pool:
                serving = pool.submit(self._uvicorn.run, [bound])
                while not serving.done() and not self._uvicorn.started:
                    wait([serving], _TICK)
                if self._uvicorn.started:
                    on_ready()
                while not serving.done():
                    wait([serving], _TICK)
                serving.result()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop(self) -> None:
        """Take no more connections, answer what is queued, and end; called again, refuse what is queued."""
        if self._uvicorn.should_exit and self._uvicorn.started:
            with suppress(RuntimeError):  # it has ended meanwhile, and its loop with it
                self._app.state.drop()
        self._uvicorn.should_exit = True

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        self.stop()
