"""What lies at a URL: fetched into the user's cache, file by file, before anything reads it; and folders sent to one.

Readers map files, seek in them and hand them to video decoders, which only a disk does well. So `s3://bucket/folder`
is mirrored: each file appears in the mirror whole, with the size and the time that the store says, and is fetched
again only when one of these is another. What a cut connection leaves is gone on with. `hf://datasets/owner/name` is
left to the Hub's own client, which does the same.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from vlaft.checksums import cache_folder
from vlaft.errors import DataError, Fetching, InUse, VlaftError
from vlaft.files import disk_errors, locked, read_json, write_json

_URL = re.compile(r"(s3|hf):/{1,2}([^/].*?)/*")  # a Path has made one slash of two
_OTHER = re.compile(r"[a-z][a-z0-9+.-]+:/{1,2}[^/].*")
_HUB = re.compile(r"datasets/([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?(?:/(.+))?")
_BLOCK = 8 * 2**20  # bytes asked for at once
_AT_ONCE = 8  # files
_SECONDS = 30  # without an answer
_ATTEMPTS = 3
_SETTLE = 0.2  # s between two looks at whether another process has finished
_SENT = "sent.json"

Progress = Callable[[str, int, int], None]  # phase, done, total


def url_of(path: Path | str) -> str | None:
    """Return the URL that a path was typed as, or None where it is a path.

    Raises:
        DataError: it is a URL of another kind.

    >>> url_of(Path("s3://bucket/demos/")), url_of("demos/")
    ('s3://bucket/demos', None)
    """
    text = str(path)
    if match := _URL.fullmatch(text):
        return f"{match[1]}://{match[2]}"
    if _OTHER.fullmatch(text) and not Path(text.partition("/")[0]).exists():
        raise DataError(f"{text} is no place that vlaft reads from: give a path, s3://BUCKET/... or hf://datasets/...")
    return None


def fetched(path: Path | str) -> Path:
    """Return the path of a local copy of what lies at a URL, made or brought up to date; other paths as they are.

    Raises:
        DataError: nothing is there, it may not be read, the connection broke, or it changed while it was fetched.
        VlaftError: the cache cannot be written, or has too little room.
    """
    url = url_of(path)
    if url is None:
        return Path(path)
    return _from_hub(url) if url.startswith("hf:") else _Mirror(url).updated()


def _from_hub(url: str) -> Path:
    """Return the folder of a dataset of the Hub, or of what lies below it."""
    match = _HUB.fullmatch(url.removeprefix("hf://"))
    if match is None:
        raise DataError(
            f"{url} names no dataset of the Hub: write hf://datasets/OWNER/NAME, and /FOLDER for a part of it"
        )
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, HfHubHTTPError

    name, revision, inside = match.groups()
    try:
        patterns = None if inside is None else [inside, f"{inside}/*"]
        folder = Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=patterns))
        # out of the Hub's reach its client gives what is there; only with a listing it sees whether that is all
        get_cached_repo_tree(name, repo_type="dataset", revision=folder.name)
    except CachedRepoTreeNotFoundError as error:
        raise DataError(
            f"{url}: the Hub cannot be reached, and it is not known whether what is kept here is whole; {_AGAIN}"
        ) from error
    except Exception as error:  # the Hub's client raises those of whatever HTTP library it uses
        foreign = type(error).__module__.startswith("http")
        if not isinstance(error, HfHubHTTPError | OSError | ValueError) and not foreign:
            raise
        raise DataError(f"{url} could not be fetched from the Hub ({_reason(error)}); {_AGAIN}") from error
    place = folder / inside if inside else folder
    if not place.exists():
        raise DataError(f"{url}: the dataset {name} has nothing of that name")
    return place


@dataclass(frozen=True)
class _Remote:
    """A file in a store.

    Attributes:
        key: bucket and key.
        size: bytes.
        changed: when it was written, ns.
    """

    key: str
    size: int
    changed: int


_AGAIN = "check the connection and give the same command again, what has come is kept"


class _Mirror:
    """The local copy of what lies at an `s3://` URL."""

    def __init__(self, url: str) -> None:
        self.url, self.key = url, url.removeprefix("s3://")
        name = self.key.rpartition("/")[2]
        self.folder = cache_folder("mirrors") / hashlib.sha256(url.encode()).hexdigest()[:16]
        self.place = self.folder / name

    def updated(self) -> Path:
        """Fetch what is not there, or is another now, and return the copy."""
        files = _listed(self.url, self.key)
        while True:
            try:
                with locked(self.folder):
                    self._update(files)
                return self.place
            except InUse:
                time.sleep(_SETTLE)  # another process of the same run fetches the same

    def _update(self, files: Mapping[str, _Remote]) -> None:
        places = {self.place / name if name else self.place: file for name, file in files.items()}
        missing = {place: file for place, file in places.items() if not _is(place, file)}
        size = sum(file.size for file in missing.values())
        with disk_errors(self.folder, "; set XDG_CACHE_HOME to another disk"):
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free + sum(_partial_size(place) for place in missing)
            if size > free:
                raise VlaftError(
                    f"{self.url}: {size / 1e9:.1f} GB are to be fetched to {self.folder}, and {free / 1e9:.1f} GB are"
                    " free there; set XDG_CACHE_HOME to another disk"
                )
            wanted = {*places, *(_partial(place, file) for place, file in missing.items())}
            for path in [path for path in self.folder.rglob("*") if not path.is_dir() and path not in wanted]:
                path.unlink()
            for folder in {place.parent for place in missing}:
                folder.mkdir(parents=True, exist_ok=True)
        if not missing:
            return
        warnings.warn(
            f"fetching {self.url} (files: {len(missing)}, {size / 1e9:.2f} GB) to {self.folder}", Fetching, stacklevel=2
        )
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="fetch") as pool:
            waiting = [pool.submit(self._fetch, place, file) for place, file in missing.items()]
            try:
                for each in waiting:
                    each.result()
            except BaseException:
                for each in waiting:
                    each.cancel()
                raise

    def _fetch(self, place: Path, file: _Remote) -> None:
        """Fetch one file, from where an earlier try has ended."""
        partial = _partial(place, file)
        url = f"s3://{file.key}"
        with _told(url):
            source = _store().open_input_file(file.key)
        with disk_errors(place), source, partial.open("ab") as target:
            while (at := target.tell()) < file.size:
                with _told(url):
                    block = source.read_at(min(_BLOCK, file.size - at), at)
                if not block:
                    raise DataError(f"{url} is shorter than the store says; {_AGAIN}")
                target.write(block)
        with _told(url):
            now = _store().get_file_info(file.key)
        if (now.size, _changed(now)) != (file.size, file.changed):
            raise DataError(f"{url} changed while it was fetched; give the same command again")
        with disk_errors(place):
            os.utime(partial, ns=(file.changed, file.changed))
            partial.replace(place)


def _is(place: Path, file: _Remote) -> bool:
    try:
        status = place.stat()
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (file.size, file.changed)


def _partial(place: Path, file: _Remote) -> Path:
    return place.with_name(f".{place.name}.{file.size}.{file.changed}.part")


def _partial_size(place: Path) -> int:
    return sum(path.stat().st_size for path in place.parent.glob(f".{place.name}.*.part"))


def _listed(url: str, key: str) -> dict[str, _Remote]:
    """Return the files at a URL by their paths below it; of a file, itself under an empty path."""
    from pyarrow.fs import FileSelector, FileType

    with _told(url):
        store = _store()
        info = store.get_file_info(key)
        if info.type == FileType.File:
            return {"": _Remote(key, info.size, _changed(info))}
        found = [] if info.type == FileType.NotFound else store.get_file_info(FileSelector(key, recursive=True))
    files = {}
    for info in found:
        if info.type != FileType.File:
            continue
        name = info.path.removeprefix(f"{key}/")
        parts = PurePosixPath(name).parts
        plain = bool(parts) and str(PurePosixPath(name)) == name  # else two keys may be one place
        if not plain or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
            raise DataError(f"s3://{info.path}: a key that is no place below its folder on a disk; rename it")
        files[name] = _Remote(info.path, info.size, _changed(info))
    if not files:
        raise DataError(f"{url}: there is nothing there, or nothing that these credentials may list")
    return files


def _changed(info: Any) -> int:
    """Return when a file was written, ns, in whole seconds: some stores list milliseconds and tell none of one file."""
    return int(info.mtime_ns) // 10**9 * 10**9


def check_vacant(url: str, sent: Path) -> set[str]:
    """Refuse a URL at which something lies that was not sent from the folder `sent`; return what lies there.

    Raises:
        DataError: something is there; nothing that lies in a store is ever replaced.
    """
    from pyarrow.fs import FileSelector

    key, known = url.removeprefix("s3://"), _sent(sent)
    with _told(url):
        found = _store().get_file_info(FileSelector(key, recursive=True, allow_not_found=True))
    there = {info.path.removeprefix(f"{key}/"): info for info in found if info.is_file}
    for name, info in there.items():
        if known.get(name) != [info.size, _changed(info)]:
            raise DataError(
                f"{url} holds something already ({name}); name another place, nothing is replaced in a store"
            )
    return set(there)


def send(folder: Path, url: str, last: str, progress: Progress) -> None:
    """Send the files of a folder to an `s3://` URL; those that an earlier try has sent are not sent again.

    Args:
        folder: flat; beside its files it keeps a note of what was sent.
        url: where to.
        last: the file without which nobody takes the others for anything; it is sent when all others are there.
        progress: called with the phase, bytes done and bytes in all.

    Raises:
        DataError: as `check_vacant`, or the connection broke.
    """
    there = check_vacant(url, folder)
    sent = {name: told for name, told in _sent(folder).items() if name in there}  # somebody may have tidied up
    key = url.removeprefix("s3://")
    names = [*sorted(path.name for path in folder.iterdir() if path.name not in (last, _SENT)), last]
    sizes = {name: (folder / name).stat().st_size for name in names}
    done = 0
    for name in names:
        progress("sending", done, sum(sizes.values()))
        if name not in sent:
            with _told(f"{url}/{name}", "sent"):
                copy_one(folder / name, f"{key}/{name}")
                info = _store().get_file_info(f"{key}/{name}")
            if info.size != sizes[name]:
                raise DataError(f"{url}/{name} has {info.size} bytes in the store instead of {sizes[name]}; {_AGAIN}")
            sent[name] = [info.size, _changed(info)]
            write_json(folder / _SENT, sent)
        done += sizes[name]
    progress("sending", done, done)


def copy_one(local: Path, key: str) -> None:
    """Send a file; a store shows it when all of it has come, or not at all."""
    from pyarrow.fs import LocalFileSystem, copy_files

    copy_files(str(local), key, LocalFileSystem(), _store(), chunk_size=_BLOCK, use_threads=False)


def _sent(folder: Path) -> dict[str, Any]:
    return read_json(folder / _SENT) if (folder / _SENT).is_file() else {}


def _store() -> Any:
    """Return pyarrow's S3 file system; key, secret and region as for AWS's own tools, and where else than AWS."""
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return S3FileSystem(
        endpoint_override=endpoint,
        region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
        connect_timeout=_SECONDS,
        request_timeout=_SECONDS,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
        background_writes=False,
    )


@contextmanager
def _told(url: str, done: str = "fetched") -> Iterator[None]:
    """Turn what a store answers into a sentence."""
    try:
        yield
    except (OSError, ValueError) as error:
        text = str(error)
        if "NO_SUCH_BUCKET" in text:
            raise DataError(f"{url}: there is no such bucket") from error
        if "ACCESS_DENIED" in text or "HTTP status 403" in text or "credentials" in text.lower():
            raise DataError(
                f"{url}: these credentials may not do that; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or"
                " AWS_PROFILE"
            ) from error
        raise DataError(f"{url} could not be {done} ({_reason(error)}); {_AGAIN}") from error


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (text.partition("Details: ")[2] or text)[:160]
