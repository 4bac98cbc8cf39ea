"""URLs as sources and outputs, against a local server that speaks S3, over connections that are cut."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import CachedRepoTreeNotFoundError
from small_base import write_demonstrations, write_small_base

from vlaft import remote
from vlaft.checksums import cache_folder
from vlaft.cli.main import main
from vlaft.data.loader import ExampleLoader
from vlaft.data.store import ConvertedDataset
from vlaft.errors import DataError, Fetching, VlaftError
from vlaft.files import output_folder
from vlaft.remote import fetched, url_of

moto = pytest.importorskip("moto.server", reason="moto[server] is not installed; it is among vlaft[dev]")


class Cut:
    """A way to a server that closes every connection once so many bytes have gone over all of them together."""

    def __init__(self, port: int) -> None:
        self.target, self.left = port, float("inf")
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                server = socket.create_connection(("127.0.0.1", self.target))
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while (data := source.recv(2**14)) and self.left > 0:
                self.left -= len(data)
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    yield running.get_host_and_port()[1]
    running.stop()


@pytest.fixture
def way(server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cut]:
    """The server, empty but for a bucket, and a cache of its own."""
    way = Cut(server)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{way.port}",
        "AWS_EC2_METADATA_DISABLED": "true",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "_ATTEMPTS", 1)
    monkeypatch.setattr(remote, "_SECONDS", 5)
    from pyarrow.fs import S3FileSystem

    store = S3FileSystem(
        endpoint_override=f"http://127.0.0.1:{server}", allow_bucket_creation=True, allow_bucket_deletion=True
    )
    store.create_dir("lab")
    yield way
    store.delete_dir("lab")
    way.listener.close()


def put(key: str, content: bytes) -> None:
    with remote._store().open_output_stream(key) as file:
        file.write(content)


def mirrored() -> dict[str, bytes]:
    """Return the names and contents of all files of the mirrors."""
    return {path.name: path.read_bytes() for path in cache_folder("mirrors").rglob("*") if path.is_file()}


def test_what_is_a_url() -> None:
    assert url_of(Path("s3://lab/set")) == url_of("s3://lab/set/") == "s3://lab/set"
    assert url_of(Path("hf://datasets/a/b")) == "hf://datasets/a/b"
    assert url_of("demos/") is url_of("/tmp/x") is url_of("lab/set") is None
    with pytest.raises(DataError, match=r"gs:/lab/set is no place that vlaft reads from"):
        url_of(Path("gs://lab/set"))
    with (
        pytest.raises(VlaftError, match="is a URL, and this is written to a folder"),
        output_folder(Path("s3://lab/set")),
    ):
        pass


def test_files_are_fetched_once_and_again_when_they_change(way: Cut, recwarn: pytest.WarningsRecorder) -> None:
    put("lab/set/a.bin", b"a" * 1000)
    put("lab/set/below/b.bin", b"b" * 3)
    folder = fetched("s3://lab/set")
    assert (folder / "a.bin").read_bytes() == b"a" * 1000 and (folder / "below" / "b.bin").read_bytes() == b"bbb"
    assert "fetching s3://lab/set (files: 2," in str(recwarn.pop(Fetching).message)
    assert fetched(Path("s3://lab/set/")) == folder
    assert not [told for told in recwarn.list if issubclass(told.category, Fetching)]
    put("lab/set/a.bin", b"another")
    remote._store().delete_file("lab/set/below/b.bin")
    assert fetched("s3://lab/set") == folder and mirrored() == {"a.bin": b"another"}
    put("lab/set/one.hdf5", b"single")
    assert fetched("s3://lab/set/one.hdf5").read_bytes() == b"single"
    for url, sentence in (
        ("s3://lab/none", "there is nothing there"),
        ("s3://none/set", "there is no such bucket|there is nothing there"),
    ):
        with pytest.raises(DataError, match=sentence):
            fetched(url)


@pytest.mark.parametrize("key", ["../../x", "b//a.bin", "./a.bin"])  # out of the folder, or onto another key's place
def test_a_key_that_is_no_place_of_its_own_is_refused(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyarrow.fs import FileInfo, FileType

    class Store:
        def get_file_info(self, wanted: Any) -> Any:
            none = FileInfo("lab/set", type=FileType.Directory)
            return none if isinstance(wanted, str) else [FileInfo(f"lab/set/{key}", type=FileType.File, size=1)]

    monkeypatch.setattr(remote, "_store", Store)
    with pytest.raises(DataError, match=rf"lab/set/{re.escape(key)}: a key that is no place below its folder"):
        fetched("s3://lab/set")


def test_a_cut_connection_is_a_sentence_and_the_next_try_goes_on(way: Cut, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_BLOCK", 2**16)
    monkeypatch.setattr(remote, "_AT_ONCE", 1)
    content = os.urandom(2**20)
    put("lab/demos.hdf5", content)
    way.left = 500_000
    with pytest.raises(
        DataError, match=r"s3://lab/demos\.hdf5 could not be fetched \(.*\); check the connection and give"
    ):
        fetched("s3://lab/demos.hdf5")
    [(name, begun)] = mirrored().items()
    assert name.endswith(".part") and 0 < len(begun) < 500_000 and content.startswith(begun)  # nothing that looks whole
    way.left = 2**20 - len(begun) + 50_000  # enough for the rest with its headers, not for all of it
    copy = fetched("s3://lab/demos.hdf5")
    assert hashlib.sha256(copy.read_bytes()).digest() == hashlib.sha256(content).digest()
    assert list(mirrored()) == ["demos.hdf5"]


def test_what_changes_while_it_is_fetched_is_not_taken(way: Cut, monkeypatch: pytest.MonkeyPatch) -> None:
    put("lab/set/a.bin", b"1" * 100)
    listed = remote._listed

    def changed(url: str, key: str) -> Any:
        found = listed(url, key)
        put("lab/set/a.bin", b"2" * 101)
        return found

    monkeypatch.setattr(remote, "_listed", changed)
    with pytest.raises(DataError, match="changed while it was fetched"):
        fetched("s3://lab/set")
    monkeypatch.undo()


def test_the_whole_way_over_a_store(
    way: Cut, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_small_base(tmp_path / "base")
    put("lab/cups.hdf5", write_demonstrations(tmp_path / "cups.hdf5").read_bytes())
    source = ["s3://lab/cups.hdf5", "instruction=put the cup on the shelf"]
    assert main(["inspect", *source]) == 0
    told = capsys.readouterr()
    assert "fetching s3://lab/cups.hdf5 (files: 1," in told.err and "cups" in told.out
    convert = ["convert", *source, "--base", str(base), "--workers", "1"]
    assert main([*convert, "--out", str(tmp_path / "here")]) == 0
    remote_convert = [*convert, "--out", "s3://lab/sets/cups"]
    way.left = 30_000  # so that it breaks while shards are sent or before: none of it may look whole
    assert main(remote_convert) == 1
    assert "could not be" in capsys.readouterr().err
    way.left = float("inf")
    store = remote._store()
    assert not store.get_file_info("lab/sets/cups/dataset.json").is_file
    send, sent = remote.copy_one, []

    def some(local: Path, key: str) -> None:
        if len(sent) == 2:
            raise OSError("Details: the line is dead")
        sent.append(key)
        send(local, key)

    monkeypatch.setattr(remote, "copy_one", some)
    assert main(remote_convert) == 1
    assert "could not be sent (the line is dead); check the connection and give the same" in capsys.readouterr().err
    assert not store.get_file_info("lab/sets/cups/dataset.json").is_file
    monkeypatch.setattr(remote, "copy_one", lambda local, key: (sent.append(key), send(local, key)))
    assert main(remote_convert) == 0
    assert "written to s3://lab/sets/cups" in capsys.readouterr().err
    assert len(sent) == len(set(sent)) and sent[-1].endswith("dataset.json")  # none of them twice
    assert not list(cache_folder("outputs").iterdir())
    assert main(remote_convert) == 1
    assert "s3://lab/sets/cups holds something already" in capsys.readouterr().err
    here, there = (ConvertedDataset(place) for place in (tmp_path / "here", Path("s3://lab/sets/cups")))
    assert there.info["sources"][0]["path"] == "s3://lab/cups.hdf5"
    ours, theirs = (next(ExampleLoader(dataset, 4)) for dataset in (here, there))
    assert (ours.images == theirs.images).all() and (ours.input_ids == theirs.input_ids).all()
    capsys.readouterr()
    for words, sentence in (
        ([*convert, "--out", "s3://lab/other", "--overwrite"], "nothing is replaced in a store"),
        ([*convert, "--out", "hf://datasets/a/b"], "cannot be written to; convert to a folder"),
    ):
        assert main(words) == 1
        assert sentence in capsys.readouterr().err
    assert main([*convert, "--out", "s3://lab/other", "--plan", str(tmp_path / "plan")]) == 2


@pytest.mark.slow
def test_a_run_reads_its_data_from_a_store(way: Cut, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, data = write_small_base(tmp_path / "base"), "s3://lab/sets/cups"
    source = [str(write_demonstrations(tmp_path / "cups.hdf5")), "instruction=put the cup on the shelf"]
    assert main(["convert", *source, "--base", str(base), "--workers", "1", "--out", data]) == 0
    words = ["train", "--recipe", "lora8", "--data", data, "--base", str(base), "--out", str(tmp_path / "run")]
    words += ["train.batch_size=2", "train.accumulation=1"]
    assert main([*words, "train.steps=2"]) == 0
    assert main([*words, "train.steps=3", "--resume"]) == 0
    assert main(["evaluate", str(tmp_path / "run"), "--data", data]) == 0
    capsys.readouterr()
    assert main(["merge", str(tmp_path / "run"), "--out", "s3://lab/model"]) == 1
    assert "is a URL, and this is written to a folder" in capsys.readouterr().err
    assert f"- {data}" in (tmp_path / "run" / "recipe.yaml").read_text()


def test_hub_urls_are_left_to_its_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(tmp_path)

    (tmp_path / "train").mkdir()
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.get_cached_repo_tree", lambda name, **options: [])
    assert fetched("hf://datasets/lab/cups@v2/train") == tmp_path / "train"
    assert fetched(Path("hf://datasets/lab/cups")) == tmp_path
    whole = {"repo_type": "dataset", "revision": None, "allow_patterns": None}
    assert asked[1] == ("lab/cups", whole)
    assert asked[0] == ("lab/cups", whole | {"revision": "v2", "allow_patterns": ["train", "train/*"]})
    with pytest.raises(DataError, match="has nothing of that name"):
        fetched("hf://datasets/lab/cups/val")
    with pytest.raises(DataError, match="names no dataset of the Hub"):
        fetched("hf://lab/cups")

    def unknown(name: str, **options: Any) -> None:
        raise CachedRepoTreeNotFoundError("no listing")

    monkeypatch.setattr("huggingface_hub.get_cached_repo_tree", unknown)
    with pytest.raises(DataError, match="cannot be reached, and it is not known whether what is kept here is whole"):
        fetched("hf://datasets/lab/cups")


def test_stores_that_list_milliseconds(way: Cut, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one file they tell whole seconds, as HTTP does."""
    from pyarrow.fs import FileSelector

    put("lab/set/a.bin", b"1")
    store = remote._store

    class Listing:
        def __getattr__(self, name: str) -> Any:
            return getattr(store(), name)

        def get_file_info(self, what: Any) -> Any:
            found = store().get_file_info(what)
            if not isinstance(what, FileSelector):
                return found
            return [
                SimpleNamespace(
                    path=each.path,
                    size=each.size,
                    type=each.type,
                    is_file=each.is_file,
                    mtime_ns=each.mtime_ns + 123_000_000,
                )
                for each in found
            ]

    monkeypatch.setattr(remote, "_store", Listing)
    assert (fetched("s3://lab/set") / "a.bin").read_bytes() == b"1"


def test_what_is_gone_from_the_store_is_sent_again(way: Cut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.bin", "b.bin", "last.json"):
        (tmp_path / name).write_bytes(name.encode())
    send = remote.copy_one

    def cut(local: Path, key: str) -> None:
        if key.endswith("b.bin"):
            raise OSError("Details: the line is dead")
        send(local, key)

    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("a.bin", "b.bin", "last.json"):
        (tmp_path / name).rename(folder / name)
    monkeypatch.setattr(remote, "copy_one", cut)
    with pytest.raises(DataError, match="the line is dead"):
        remote.send(folder, "s3://lab/out", "last.json", lambda *told: None)
    remote._store().delete_file("lab/out/a.bin")
    monkeypatch.setattr(remote, "copy_one", send)
    remote.send(folder, "s3://lab/out", "last.json", lambda *told: None)
    assert fetched("s3://lab/out").joinpath("a.bin").read_bytes() == b"a.bin"
