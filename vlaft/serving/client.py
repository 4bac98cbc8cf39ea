"""Ask a `vlaft serve` (or upstream's `deploy.py`) for actions. Needs numpy and httpx, no torch.

from vlaft.serving.client import Client, Controller

with Client("http://127.0.0.1:8000") as policy:
    action = policy.act(image, "pick up the red block")  # of a policy that writes one action
    controller = Controller(policy)  # of one that writes chunks, of one that has several cameras or reads the state
    action = controller.act({"main": image, "wrist": other}, "pick up the red block", state=joints)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlaft.action.execution import Execution, Executor
from vlaft.errors import DataError, MissingExtra, VlaftError
from vlaft.serving import json_numpy
from vlaft.serving.protocol import NON_ACTION_HEADER, decode_actions, image_member

_MAX_REPLY = 2**20  # bytes; an action has less than a thousand, a chunk of 50 less than ten thousand


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
        """Return the action for what the robot sees now, of a policy that reads one camera and writes one action.

        Args:
            image: uint8 `[H, W, 3]` RGB.
            instruction: what the robot shall do.
            unnorm_key: name of the statistics; needed only where the checkpoint has several.

        Returns:
            float64 `[A]`, in the robot's units.

        Raises:
            ServerError: no connection, no action, a chunk of them, or one that holds tokens which stand for no action;
                such a one would be a full move.
        """
        actions = self._ask({"image": json_numpy.encode(np.asarray(image)), "instruction": instruction}, unnorm_key)
        if actions.ndim != 1:
            raise ServerError(
                f"{self.url} gave an action of shape {list(actions.shape)}: its policy writes chunks, which"
                " `Client.chunk` returns and a `Controller` acts",
                200,
            )
        return actions

    def chunk(
        self,
        images: NDArray[np.uint8] | Mapping[str, NDArray[np.uint8]],
        instruction: str,
        *,
        state: ArrayLike | None = None,
        unnorm_key: str | None = None,
    ) -> NDArray[np.float64]:
        """Return the actions for what the robot sees now and the moments after it.

        Args:
            images: uint8 `[H, W, 3]` RGB; of a policy with several cameras a mapping from their names to such frames.
            instruction: what the robot shall do.
            state: of a policy that reads it, the robot's state as recorded, `[S]`.
            unnorm_key: name of the statistics; needed only where the checkpoint has several.

        Returns:
            float64 `[K, A]`, in the robot's units; K is 1 of a policy that writes one action.

        Raises:
            ServerError: as `act` raises it.
        """
        frames = images if isinstance(images, Mapping) else {"main": images}
        body = {image_member(camera): json_numpy.encode(np.asarray(frame)) for camera, frame in frames.items()}
        body |= {} if state is None else {"state": json_numpy.encode(np.asarray(state, np.float64))}
        return np.atleast_2d(self._ask({**body, "instruction": instruction}, unnorm_key))

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

    def _ask(self, body: dict[str, Any], unnorm_key: str | None) -> NDArray[np.float64]:
        """Return what the policy answers: `[A]`, or `[K, A]` of one that writes chunks."""
        if unnorm_key is not None:
            body["unnorm_key"] = unnorm_key
        value, headers = self._exchange("POST", "/act", json.dumps(body).encode())
        if not isinstance(value, dict):  # upstream's server answers "error" with status 200
            raise ServerError(f"{self.url} gave {str(value)[:100]!r} instead of an action", 200)
        try:
            actions = decode_actions(value)
        except DataError as error:
            raise ServerError(f"{self.url}: {error}", 200) from None
        if headers.get(NON_ACTION_HEADER, "0") != "0":
            raise ServerError(
                f"the model chose {headers[NON_ACTION_HEADER]} tokens that stand for no action;"
                " start the server with --action-ids-only, or train the model further",
                200,
            )
        return actions

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


class Controller:
    """An action for each step of a robot's loop: asks for a chunk when one is due, and hands out what it says.

    By default a chunk is acted whole before the next is asked for (open loop), as OpenVLA-OFT does.
    """

    def __init__(
        self, client: Client, *, execute: int | None = None, ensemble: bool = False, unnorm_key: str | None = None
    ) -> None:
        """Take a connection; nothing is asked yet.

        Args:
            client: of the policy's server.
            execute: so many of a chunk's actions are acted before the next is asked for; None: all.
            ensemble: ask at each step, and act the weighted mean of what all chunks so far say of it (ACT's).
            unnorm_key: as `Client.chunk` takes it.

        Raises:
            ConfigError: `execute` is not positive, or both are asked for.
        """
        self._client = client
        self._execution = Execution(execute, ensemble)
        self._unnorm_key = unnorm_key
        self._instruction: str | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the chunks so far: a new episode begins, or the robot was moved by somebody else."""
        self._executor = Executor(self._execution)

    def act(
        self,
        images: NDArray[np.uint8] | Mapping[str, NDArray[np.uint8]],
        instruction: str,
        *,
        state: ArrayLike | None = None,
    ) -> NDArray[np.float64]:
        """Return the action of this step, `[A]`, in the robot's units; another instruction than before asks anew.

        Args:
            images: as `Client.chunk` takes them; nothing is sent at steps that a chunk has an action for.
            instruction: likewise.
            state: likewise.

        Raises:
            ServerError: as `Client.chunk` raises it; the next call asks again.
            ConfigError: `execute` is more than the policy's chunks have.
        """
        if instruction != self._instruction:
            self.reset()
            self._instruction = instruction
        if self._executor.wants_chunk:
            chunk = self._client.chunk(images, instruction, state=state, unnorm_key=self._unnorm_key)
            self._execution.check(len(chunk))
            self._executor.add(chunk)
        return self._executor.next_action()
