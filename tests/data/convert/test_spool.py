from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vlaft.data.convert.spool import spooled


@pytest.mark.parametrize("shape", [(7,), ()], ids=["rows", "numbers"])
def test_arrays_come_back_one_by_one_and_together(tmp_path: Path, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    arrays = [None if steps == 3 else rng.normal(size=(steps, *shape)) for steps in (4, 3, 0, 1, 3, 9)]
    with spooled(tmp_path, np.float64) as [spool]:
        assert list(spool) == [] and spool.width is None and len(spool) == 0
        for array in arrays:
            spool.add(array)
        there = [array for array in arrays if array is not None]
        assert np.array_equal(spool.rows, np.concatenate(there)) and len(spool) == len(there) == 4
        assert spool.lengths == [4, 0, 0, 1, 0, 9] and spool.width == (7 if shape else None)
        for found, array in zip(spool, arrays, strict=True):
            assert (found is None) == (array is None)
            assert array is None or np.array_equal(found, array)
        assert list(tmp_path.iterdir()) == []  # the file has no name: a kill leaves nothing
