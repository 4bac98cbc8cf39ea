"""Arrays of very many episodes, kept in a file rather than in memory: what lies there is read where it is looked at."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


class Spool:
    """Arrays `[T, N]` with one N, or `[T]`, of one type, one after the other; some may be None.

    Attributes:
        width: N, or None before the first array, or where they are `[T]`.
    """

    def __init__(self, folder: Path | None, dtype: DTypeLike) -> None:
        """Begin a file without a name in `folder`, or where temporary files go."""
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by `spooled`)
        self._dtype = np.dtype(dtype)
        self._ends = [0]  # rows up to each array
        self._there: list[bool] = []
        self.width: int | None = None

    def add(self, rows: NDArray[Any] | None) -> None:
        """Append an array."""
        self._there.append(rows is not None)
        if rows is not None:
            self.width = rows.shape[1] if rows.ndim == 2 else None
            self._file.write(np.ascontiguousarray(rows, self._dtype).tobytes())
        self._ends.append(self._ends[-1] + (0 if rows is None else len(rows)))

    def __len__(self) -> int:
        """Return how many arrays there are that are not None."""
        return sum(self._there)

    @property
    def rows(self) -> NDArray[Any]:
        """All rows, `[sum of T, N]` or `[sum of T]`; read from the file where they are looked at."""
        shape = (self._ends[-1],) if self.width is None else (self._ends[-1], self.width)
        if not self._ends[-1]:  # nothing to be mapped
            return np.zeros(shape, self._dtype)
        self._file.flush()
        return np.memmap(self._file, self._dtype, mode="r", shape=shape)

    def __iter__(self) -> Iterator[NDArray[Any] | None]:
        """Yield the arrays, as they lie in the file."""
        rows = self.rows
        for there, (start, stop) in zip(self._there, pairwise(self._ends), strict=True):
            yield rows[start:stop] if there else None

    @property
    def lengths(self) -> list[int]:
        """T of each array, 0 of None."""
        return [stop - start for start, stop in pairwise(self._ends)]

    def close(self) -> None:
        """Give the file's place back."""
        self._file.close()


@contextmanager
def spooled(folder: Path | None, *dtypes: DTypeLike) -> Iterator[list[Spool]]:
    """Give a spool of each type, which is gone when the block ends."""
    spools = [Spool(folder, dtype) for dtype in dtypes]
    try:
        yield spools
    finally:
        for spool in spools:
            spool.close()
