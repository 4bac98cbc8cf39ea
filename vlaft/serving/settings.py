"""What a server may take up, and the error that a client is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vlaft.errors import UsageError, VlaftError

MAX_INSTRUCTION = 1000  # characters; the longest instruction of the robot datasets has a quarter of that
RETRY_SECONDS = 1


@dataclass(frozen=True)
class ServeSettings:
    """The limits of a server. In the worst case requests take up `queue_length` times twice `max_body` bytes.

    Attributes:
        token: clients must send `Authorization: Bearer <token>`; None lets everybody in.
        action_ids_only: choose among action tokens only.
        unnorm_key: name of the statistics where a request names none; None: those of the only dataset.
        max_batch: at most so many requests go through the model together.
        max_wait: seconds that a request waits for others to join it.
        queue_length: requests waiting or computed; a further one is answered 503. Those still being received do not
            count, but they hold at most `queue_length` times `max_body` bytes together.
        max_body: bytes of one request; the default holds the largest image in base64.
        max_image_side: pixels.
        body_timeout: seconds in which a request has to have arrived.
    """

    token: str | None = None
    action_ids_only: bool = False
    unnorm_key: str | None = None
    max_batch: int = 8
    max_wait: float = 0.004
    queue_length: int = 32
    max_body: int = 20 * 2**20
    max_image_side: int = 2048
    body_timeout: float = 10.0

    def __post_init__(self) -> None:
        """Refuse limits under which nothing could be served."""
        for name in ("max_batch", "queue_length", "max_body", "max_image_side"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name.replace('_', ' ')} has to be at least 1")


class Refused(VlaftError):
    """A request that is not served; the text is the sentence that the client reads."""

    def __init__(self, status: int, sentence: str, headers: dict[str, str] | None = None) -> None:
        self.status = status
        self.headers = headers or {}
        super().__init__(sentence)


def busy(sentence: str) -> Refused:
    """Return the refusal of a request that may come again."""
    return Refused(503, sentence, {"Retry-After": str(RETRY_SECONDS)})


TOKEN_VARIABLE = "VLAFT_SERVE_TOKEN"
_SHORTEST = 16
_LONGEST = 4096


def read_token(file: Path | None, environment: Mapping[str, str]) -> str | None:
    """Return the token in `file`, else the one in the variable `VLAFT_SERVE_TOKEN`, else None.

    Raises:
        VlaftError: the file cannot be read, or the token is empty, short, or holds what a header cannot.
    """
    if file is not None:
        try:
            with file.open("rb") as stream:
                text = stream.read(_LONGEST + 1).decode("latin-1")
        except OSError as error:
            raise VlaftError(f"{file}: the token cannot be read ({error.strerror})") from None
    elif TOKEN_VARIABLE in environment:
        text = environment[TOKEN_VARIABLE]
    else:
        return None
    where = str(file) if file is not None else TOKEN_VARIABLE
    token = text.strip()
    if not _SHORTEST <= len(token) <= _LONGEST or not all("!" <= character <= "~" for character in token):
        raise VlaftError(
            f"{where} has to hold a token of at least {_SHORTEST} letters, digits or signs without blanks;"
            " make one with: openssl rand -hex 16"
        )
    return token
