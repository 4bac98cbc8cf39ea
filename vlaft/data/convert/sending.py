"""A conversion whose output is a URL: made in the user's cache, and sent when it is whole."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vlaft.checksums import cache_folder
from vlaft.data.convert.planning import ConvertRequest, check_settings, prepare
from vlaft.data.convert.run import Conversion, Skipped, convert
from vlaft.data.source import Progress, silent
from vlaft.data.store import DATASET_FILE
from vlaft.errors import ConfigError
from vlaft.files import locked, read_json, write_json
from vlaft.remote import check_vacant, send


def convert_to_url(
    request: ConvertRequest, url: str, *, dry_run: bool = False, progress: Progress = silent
) -> Conversion:
    """Convert the request's sources and send what comes of it; `dataset.json` last, without which nobody reads it.

    Args:
        request: what to convert; its `out` does not matter.
        url: an `s3://` URL at which nothing lies but what an earlier try has sent.
        dry_run: as `convert` takes it.
        progress: likewise.

    Raises:
        ConfigError: the URL is of the Hub, or what is there is to be overwritten.
        DataError: something lies at the URL, or the connection broke; the same call goes on.
        VlaftError: as `convert`.
    """
    check_settings(request)
    if not url.startswith("s3://"):
        raise ConfigError(f"{url} cannot be written to; convert to a folder, and send it with `hf upload`")
    if request.overwrite:
        raise ConfigError("nothing is replaced in a store: leave --overwrite out and name another place")
    key = hashlib.sha256(f"{url} {prepare(request).fingerprint}".encode()).hexdigest()[:16]
    folder = cache_folder("outputs") / key
    made, note = folder / "data", folder / "conversion.json"
    check_vacant(url, made)
    if dry_run:
        return replace(convert(replace(request, out=made), dry_run=True, progress=progress), out=Path(url))
    if note.is_file() and (made / DATASET_FILE).is_file():
        conversion = _read(note)
    else:
        if (made / DATASET_FILE).is_file():  # it was killed before it could note what it had made
            shutil.rmtree(made)
        conversion = convert(replace(request, out=made), progress=progress)
        write_json(note, asdict(replace(conversion, out=None)))  # type: ignore[arg-type]
    with locked(made):
        send(made, url, DATASET_FILE, progress)
    shutil.rmtree(folder)
    return replace(conversion, out=Path(url))


def _read(note: Path) -> Conversion:
    content: dict[str, Any] = read_json(note)
    content["skipped"] = tuple(Skipped(**entry) for entry in content["skipped"])
    return Conversion(**content | {"sources": tuple(content["sources"]), "warnings": tuple(content["warnings"])})
