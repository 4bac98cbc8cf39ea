"""Arrays inside JSON, as the `json_numpy` package writes them.

An array is `{"__numpy__": base64 of its bytes in C order, "dtype": "<f8", "shape": [7]}` (docs/upstream.md,
Arrays in JSON). Only plain numbers are taken: no objects, records or strings, so nothing is ever unpickled. What an
array claims is held against what it brings before anything is allocated.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlaft.errors import DataError

_KEYS = {"__numpy__", "dtype", "shape"}
_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")  # of numpy.lib.format.dtype_to_descr, the plain numbers
_MAX_DIMENSIONS = 8


def encode(array: NDArray[Any]) -> dict[str, Any]:
    """Return the array of plain numbers as a dict for `json.dumps`.

    >>> encode(np.array([1, 2], dtype=np.uint8))
    {'__numpy__': 'AQI=', 'dtype': '|u1', 'shape': [2]}
    """
    if _DTYPE.fullmatch(array.dtype.str) is None:
        raise DataError(f"an array of type {array.dtype} cannot be sent; send plain numbers")
    return {
        "__numpy__": base64.b64encode(np.ascontiguousarray(array).data).decode("ascii"),
        "dtype": array.dtype.str,
        "shape": list(array.shape),
    }


def decode(value: object, what: str) -> NDArray[Any]:
    """Return the array that `encode` (or `json_numpy`) wrote; it may be read-only.

    Args:
        value: parsed JSON.
        what: names the array in errors.

    Raises:
        DataError: it is no such dict, its type is none of plain numbers, or its shape does not fit its bytes.
    """
    if not isinstance(value, dict) or set(value) != _KEYS:
        raise DataError(f"{what} has to be an array as json_numpy writes it: an object of __numpy__, dtype and shape")
    data, name, shape = value["__numpy__"], value["dtype"], value["shape"]
    if not isinstance(name, str) or _DTYPE.fullmatch(name) is None:
        shown = name[:20] if isinstance(name, str) else type(name).__name__
        raise DataError(f"{what} has dtype {shown!r}; only plain numbers are taken, such as '|u1' or '<f8'")
    if not isinstance(data, str):
        raise DataError(f"{what}.__numpy__ has to be a string of base64")
    dtype = np.dtype(name)
    length = _length(shape, dtype.itemsize, what)
    if 4 * -(-length // 3) != len(data):
        raise DataError(f"{what} has shape {shape}, which is {length} bytes of {name}; its base64 holds another number")
    try:
        raw = binascii.a2b_base64(data, strict_mode=True)
    except ValueError:  # not ASCII, or not base64
        raise DataError(f"{what}.__numpy__ is no base64") from None
    if len(raw) != length:
        raise DataError(f"{what} has shape {shape}, which is {length} bytes of {name}, but brings {len(raw)}")
    return np.frombuffer(raw, dtype=dtype).reshape(shape)


def _length(shape: object, itemsize: int, what: str) -> int:
    """Return how many bytes an array of this shape has."""
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS:
        raise DataError(f"{what}.shape has to be a list of at most {_MAX_DIMENSIONS} whole numbers")
    for size in shape:
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size < 2**31:
            raise DataError(f"{what}.shape has to be a list of whole numbers from 0 to 2147483647")
    return itemsize * math.prod(shape)
