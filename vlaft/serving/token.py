"""The bearer token, read from where other users of the machine cannot see it (a command line they can)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vlaft.errors import VlaftError

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
