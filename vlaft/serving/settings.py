"""What a server may take up, and the error that a client is told."""

from __future__ import annotations

from dataclasses import dataclass

from vlaft.errors import UsageError, VlaftError

MAX_INSTRUCTION = 1000  # characters; the longest instruction of the robot datasets has a quarter of that
RETRY_SECONDS = 1


@dataclass(frozen=True)
class ServeSettings:
    """The limits of a server. In the worst case requests take up `queue_length` times twice `max_body` bytes.

    Attributes:
        token: clients must send `Authorization: Bearer <token>`; None lets everybody in.
        action_ids_only: choose among action tokens only.
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
