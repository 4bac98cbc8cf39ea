"""Output folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlaft.errors import VlaftError


@contextmanager
def output_folder(out: Path, bytes_needed: int = 0) -> Iterator[Path]:
    """Give a folder beside `out` to write into, and rename it to `out` when the block ends well.

    What was at `out` before is replaced only then; whether it may be is the caller's question. When the block
    fails, the folder beside it is removed and `out` is as it was.

    Args:
        out: the folder to make.
        bytes_needed: how much will be written, where that is known.

    Raises:
        VlaftError: less than `bytes_needed` is free, or the disk is full or not writable.
    """
    partial = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(out.parent).free
        if free < bytes_needed:
            raise VlaftError(f"{out}: {bytes_needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free")
        partial.mkdir()
        yield partial
        for path in partial.rglob("*"):
            sync(path)
        old = out.with_name(f".{out.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            out.rename(old)
        try:
            partial.rename(out)
        except BaseException:
            if old.exists() and not out.exists():
                old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise VlaftError(f"{out}: could not be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def free_bytes(out: Path) -> int:
    """Return the free bytes where a folder, which need not exist yet, would be made."""
    place = next(path for path in (out, *out.absolute().parents) if path.is_dir())
    return shutil.disk_usage(place).free


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
