"""The routes: `POST /act` of upstream's servers, and `GET /health` and `/info`."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from vlaft.action.statistics import choose_key
from vlaft.errors import VlaftError
from vlaft.serving.batching import Batcher
from vlaft.serving.observation import Question, read_question
from vlaft.serving.protocol import NON_ACTION_HEADER, encode_actions
from vlaft.serving.settings import Refused, ServeSettings, busy
from vlaft.version import __version__

logger = logging.getLogger(__name__)

_GONE = Response(status_code=499)  # reaches nobody


def create_app(policy: Any, name: str, settings: ServeSettings) -> FastAPI:
    """Return the application that serves `policy` (see `vlaft.policy.Policy`).

    While it runs, `state.drop()` refuses what is queued; any thread may call it.

    Args:
        policy: has `statistics`, `pipeline`, `predict`, and what it reads and writes as `model.policy`.
        name: what `/info` calls the model.
        settings: the limits.

    Raises:
        DataError: there are no statistics of the name that the settings give.
    """
    if settings.unnorm_key is not None:
        choose_key(policy.statistics, settings.unnorm_key)
    batcher = Batcher(_predictor(policy, settings), max_batch=settings.max_batch, max_wait=settings.max_wait)
    gate = _Gate(settings.queue_length)
    received = _Received(settings.queue_length * settings.max_body)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.drop = partial(asyncio.get_running_loop().call_soon_threadsafe, batcher.drop)
        batcher.start()
        yield
        await batcher.close()

    # Upstream's server has no generated documentation either, and its page would load scripts from elsewhere.
    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return JSONResponse({"error": str(error)}, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        sentence = f"there is no {request.method} {request.url.path[:100]}; there are POST /act, GET /health, GET /info"
        return JSONResponse({"error": sentence}, error.status_code, error.headers)

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/info")
    async def info(request: Request) -> Response:
        _check_token(request, settings.token)
        return JSONResponse(_info(policy, name, settings))

    @app.post("/act")
    async def act(request: Request) -> Response:
        _check_token(request, settings.token)
        gate.check()
        try:
            with received.lent() as lend:
                body = await _read_body(request, settings, lend)
                # a place only from here on: bodies that never end must not keep out those that do
                with gate.admit():
                    question = read_question(body, policy.model.policy, policy.statistics, settings)
                    body.clear()
                    lend(0)
                    prediction = await _unless_gone(request, batcher.submit(question))
        except ClientDisconnect:
            return _GONE
        return _reply(prediction, question)

    return app


class _Gate:
    """Counts the requests that are inside, from when their body is here until they are answered."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._inside = 0

    def check(self) -> None:
        """Refuse a request for which there is no place, before its body is read."""
        if self._inside >= self._places:
            raise busy(f"{self._inside} requests are waiting already; ask again in a second")

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Take a place until the request is answered, or refuse it."""
        self.check()
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1


class _Received:
    """Counts the bytes of all bodies that are being received: what may be held of them is bounded, not their number."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = 0

    @contextmanager
    def lent(self) -> Iterator[Callable[[int], None]]:
        """Yield a function that says how many bytes of one body are held now, and refuses it where that is too much."""
        mine = 0

        def lend(size: int) -> None:
            nonlocal mine
            self._held += size - mine
            mine = size
            if self._held > self._most:
                raise busy("too much is being received already; ask again in a second")

        try:
            yield lend
        finally:
            self._held -= mine


def _predictor(policy: Any, settings: ServeSettings) -> Any:
    def predict(questions: Sequence[Question]) -> Sequence[Any]:
        states = [question.state for question in questions if question.state is not None]
        return policy.predict(
            [question.images for question in questions],
            [question.instruction for question in questions],
            state=np.stack(states) if states else None,  # a policy reads it of all, or of none
            unnorm_key=questions[0].unnorm_key,
            action_ids_only=settings.action_ids_only,
        )

    return predict


def _check_token(request: Request, token: str | None) -> None:
    if token is None:
        return
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    # compare_digest takes the same time wherever the first difference is
    if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.encode()):
        sentence = "this server asks for a token: send the header 'Authorization: Bearer <token>'"
        raise Refused(401, sentence, {"WWW-Authenticate": "Bearer"})


async def _read_body(request: Request, settings: ServeSettings, lend: Callable[[int], None]) -> bytearray:
    """Return the body, never holding more than `max_body` bytes of it.

    Args:
        request: the request.
        settings: the limits.
        lend: told how many bytes are held, after each part.

    Raises:
        Refused: it is compressed, too large, or did not arrive in time.
        ClientDisconnect: the client is gone.
    """
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise Refused(415, f"a body in the encoding '{encoding[:20]}' is not taken; send it uncompressed")
    too_large = f"the body is larger than {settings.max_body} bytes; send a smaller image"
    fits = int(request.headers.get("content-length", 0)) <= settings.max_body
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_timeout):
            async for chunk in request.stream():
                fits = fits and len(body) + len(chunk) <= settings.max_body
                if fits:
                    body += chunk
                else:  # what still comes is dropped, so that the client gets to read the answer
                    body.clear()
                lend(len(body))
    except TimeoutError:
        late = f"the request did not arrive within {settings.body_timeout:g} seconds"
        raise Refused(408 if fits else 413, late if fits else too_large, {"Connection": "close"}) from None
    if not fits:
        raise Refused(413, too_large)
    return body


async def _unless_gone(request: Request, future: asyncio.Future[Any]) -> Any:
    """Wait for the future, and cancel it when the client goes away.

    Raises:
        ClientDisconnect: the client is gone.
        Refused: 422 where the model refuses the input, 500 where it failed, 503 where the server drops what is queued.
    """
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({future, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            raise ClientDisconnect
        return future.result()
    except (ClientDisconnect, Refused):
        raise
    except VlaftError as error:
        raise Refused(422, str(error)) from None
    except Exception:
        logger.exception("the model failed")
        raise Refused(500, "the model failed on this request; the server's log says why") from None
    finally:
        gone.cancel()
        future.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _reply(prediction: Any, question: Question) -> Response:
    actions = encode_actions(prediction.actions, separately=question.separately)
    content = json.dumps(actions) if question.double_encoded else actions
    return JSONResponse(content, headers={NON_ACTION_HEADER: str(prediction.non_action_tokens)})


def _info(policy: Any, name: str, settings: ServeSettings) -> dict[str, Any]:
    reads = policy.model.policy
    return {
        "model": name,
        "server": f"vlaft {__version__}",
        "unnorm_keys": {key: {"action_size": len(entry["action"]["q01"])} for key, entry in policy.statistics.items()},
        "cameras": list(reads.cameras),
        "state_size": reads.state_size if reads.state else None,
        "chunk": reads.chunk,
        "image": {"size": policy.pipeline.size, "center_crop": policy.pipeline.center_crop},
        "action_ids_only": settings.action_ids_only,
        "limits": {
            "max_batch": settings.max_batch,
            "queue_length": settings.queue_length,
            "max_body_bytes": settings.max_body,
            "max_image_side": settings.max_image_side,
        },
    }
