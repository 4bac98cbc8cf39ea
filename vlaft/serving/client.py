"""Ask a `vlaft serve` (or upstream's `deploy.py`) for actions. Needs numpy and httpx, no torch.

from vlaft.serving.client import Client

with Client("http://127.0.0.1:8000") as policy:
    action = policy.act(image, "pick up the red block")
"""

from __future__ import annotations

import json
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlaft.errors import DataError, MissingExtra, VlaftError
from vlaft.serving import json_numpy

_MAX_REPLY = 2**20  # bytes; an action has less than a thousand
_NON_ACTION_HEADER = "vlaft-non-action-tokens"


class ServerError(VlaftError):
    """The server did not give an action.

    Attributes:
        status: of the HTTP response; None when there was none (no connection, or it took too long).
    """

    def __init__(self, sentence: str, status: int | None = None) -> None:
        self.status = status
        super().__init__(sentence)


class Client:
    """A connection that is kept open between actions. One per thread, or one shared by all: both work."""

    def __init__(self, url: str = "http://127.0.0.1:8000", *, token: str | None = None, timeout: float = 30.0) -> None:
        """Name a server; nothing is sent yet.

        Args:
            url: of the server, without a path.
            token: the server's bearer token, where it asks for one.
            timeout: seconds that the server may be silent.

        Raises:
            MissingExtra: httpx is not installed.
            ServerError: the address is no URL.
        """
        try:
            import httpx
        except ImportError:
            raise MissingExtra("vlaft.serving.client", "httpx", "serve") from None
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {token}"} if token else {})
        self._failed = (httpx.HTTPError, httpx.InvalidURL)
        self.url = url.rstrip("/")
        try:
            # The environment's proxies are not for a robot on the local network, and would be shown the token.
            self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout, trust_env=False)
        except httpx.InvalidURL as error:
            raise ServerError(f"{url} is no address of a server ({error})") from None

    def act(self, image: NDArray[np.uint8], instruction: str, unnorm_key: str | None = None) -> NDArray[np.float64]:
        """Return the action for what the robot sees now.

        Args:
            image: uint8 `[H, W, 3]` RGB.
            instruction: what the robot shall do.
            unnorm_key: name of the statistics; needed only where the checkpoint has several.

        Returns:
            float64 `[A]`, in the robot's units.

        Raises:
            ServerError: no connection, no action, or one that holds tokens which stand for no action; such a one
                would be a full move.
        """
        body: dict[str, Any] = {"image": json_numpy.encode(np.asarray(image)), "instruction": instruction}
        if unnorm_key is not None:
            body["unnorm_key"] = unnorm_key
        value, headers = self._exchange("POST", "/act", json.dumps(body).encode())
        if not isinstance(value, dict):  # upstream's server answers "error" with status 200
            raise ServerError(f"{self.url} gave {str(value)[:100]!r} instead of an action", 200)
        try:
            action = json_numpy.decode(value, "the action").astype(np.float64)
        except DataError as error:
            raise ServerError(f"{self.url}: {error}", 200) from None
        if action.ndim != 1 or not np.isfinite(action).all():
            raise ServerError(
                f"{self.url} gave an action of shape {list(action.shape)} or with numbers not finite", 200
            )
        if headers.get(_NON_ACTION_HEADER, "0") != "0":
            raise ServerError(
                f"the model chose {headers[_NON_ACTION_HEADER]} tokens that stand for no action;"
                " start the server with --action-ids-only, or train the model further",
                200,
            )
        return action

    def info(self) -> dict[str, Any]:
        """Return what the server says of itself: its model, the keys of its statistics, its limits."""
        value, _ = self._exchange("GET", "/info")
        return dict(value)

    def health(self) -> bool:
        """Return whether the server is there and ready."""
        try:
            self._exchange("GET", "/health")
        except ServerError:
            return False
        return True

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _exchange(self, method: str, path: str, body: bytes | None = None) -> tuple[Any, Any]:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        data = bytearray()
        try:
            with self._http.stream(method, path, content=body, headers=headers) as response:
                for chunk in response.iter_raw():
                    data += chunk
                    if len(data) > _MAX_REPLY:
                        raise ServerError(f"{self.url}{path} gave more than {_MAX_REPLY} bytes", response.status_code)
        except self._failed as error:
            reason = str(error) or type(error).__name__
            raise ServerError(f"no answer from {self.url}{path} ({reason}); is the server running?") from None
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            value = data[:100].decode("utf-8", "replace")
        if response.status_code != 200:
            sentence = value.get("error") if isinstance(value, dict) else value
            raise ServerError(f"{self.url}{path}: {sentence} (status {response.status_code})", response.status_code)
        return value, response.headers
