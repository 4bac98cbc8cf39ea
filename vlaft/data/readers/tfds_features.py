"""Read TFDS' features.json: the tree of features, flattened to the keys of the Example.

Each node carries exactly one of `featuresDict`, `sequence`, `tensor`, `image`, `text`, `classLabel` (and kinds that
demonstrations do not use, which are skipped and named). The key of a leaf is its path joined with "/"; sequences add
nothing to the path and one level of nesting. `steps` is such a sequence, of all features of a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from vlaft.errors import DataError

_MAX_DEPTH = 32
_MAX_ELEMENTS = 1 << 31  # of one element of a feature: more is a lie, and would overflow what numpy can shape
_FLOATS = ("float16", "float32", "float64", "bfloat16")
_INTEGERS = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_TEXTS = ("string", "object", "bytes", "str")

Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class Field:
    """One leaf of the tree.

    Attributes:
        path: its key in the Example: `"steps/observation/image"`.
        kind: how its values are to be understood.
        dtype: numpy's name of the decoded type (`"str"` for texts).
        shape: of one element, None where unknown; `(height, width, channels)` for images.
        encoding: "bytes" and "zlib" store one byte string per element, little endian.
        levels: length of every sequence around it, outermost first, None where it varies.
    """

    path: str
    kind: Literal["tensor", "image", "text"]
    dtype: str
    shape: Shape = ()
    encoding: Literal["none", "bytes", "zlib"] = "none"
    levels: Shape = ()

    @property
    def per_step(self) -> bool:
        """Whether every step holds one element, and no list of them that varies."""
        return self.path.startswith("steps/") and None not in self.levels[1:]

    @property
    def is_array(self) -> bool:
        """Whether the steps' values stack to one array of numbers `[T, ...]`."""
        return self.per_step and self.kind == "tensor" and None not in self.shape and 0 not in self.shape

    @property
    def is_camera(self) -> bool:
        """Whether every step holds one colour image of 8 bits."""
        return (
            self.path.startswith("steps/")
            and self.kind == "image"
            and len(self.levels) == 1
            and self.dtype == "uint8"
            and self.shape[2] in (3, None)
        )


def parse_features(tree: object, where: str) -> tuple[list[Field], list[str]]:
    """Flatten the tree of features.json.

    Args:
        tree: the parsed JSON.
        where: names the file in messages.

    Returns:
        The fields, and one sentence for each feature that was left out because its kind is not understood.

    Raises:
        DataError: the tree is malformed.
    """
    skipped: list[str] = []
    fields = list(_walk(tree, "", (), where, skipped))
    if not fields:
        raise DataError(f"{where} describes no features (is it the features.json of TFDS 4.3 or newer?)")
    return fields, skipped


def _walk(node: object, path: str, levels: Shape, where: str, skipped: list[str]) -> Iterator[Field]:
    if not isinstance(node, dict):
        raise DataError(f"{where}: feature '{path}' is no object")
    if path.count("/") + len(levels) > _MAX_DEPTH:
        raise DataError(f"{where}: features are nested deeper than {_MAX_DEPTH} levels at '{path[:60]}'")
    if "featuresDict" in node:
        children = _object(node, "featuresDict", path, where).get("features", {})
        if not isinstance(children, dict):
            raise DataError(f"{where}: the features under '{path}' are no object")
        for name, child in children.items():
            yield from _walk(child, f"{path}/{name}" if path else name, levels, where, skipped)
    elif "sequence" in node:
        sequence = _object(node, "sequence", path, where)
        length = _dimension(sequence.get("length", -1), path, where)
        yield from _walk(sequence.get("feature"), path, (*levels, length), where, skipped)
    elif (leaf := _leaf(node, path, levels, where)) is not None:
        yield leaf
    else:
        kind = node.get("pythonClassName", "unknown")
        skipped.append(f"{where}: feature '{path}' is left out, its kind ({kind}) is not understood")


def _leaf(node: dict[str, object], path: str, levels: Shape, where: str) -> Field | None:
    if "text" in node:
        return Field(path, "text", "str", levels=levels)
    if "classLabel" in node:
        return Field(path, "tensor", "int64", levels=levels)
    if "tensor" in node:
        content = _object(node, "tensor", path, where)
        dtype, encoding = content.get("dtype"), content.get("encoding", "none")
        shape = _shape(content.get("shape"), path, where)
        if dtype in _TEXTS and encoding == "none":
            return Field(path, "text", "str", shape, levels=levels)
        if dtype not in (*_FLOATS, *_INTEGERS) or encoding not in ("none", "bytes", "zlib"):
            return None
        if dtype == "bfloat16" and encoding != "none":
            return None
        # numpy has no bfloat16; float32, in which it is stored, holds all its values
        dtype = "float32" if dtype == "bfloat16" else dtype
        return Field(path, "tensor", str(dtype), shape, encoding, levels)  # type: ignore[arg-type]
    if "image" in node:
        content = _object(node, "image", path, where)
        dtype = content.get("dtype") or "uint8"
        shape = _shape(content.get("shape"), path, where) or (None, None, 3)
        if dtype not in ("uint8", "uint16", "float32") or len(shape) != 3:
            return None
        return Field(path, "image", str(dtype), shape, levels=levels)
    return None


def _object(node: dict[str, object], key: str, path: str, where: str) -> dict[str, object]:
    content = node[key]
    if not isinstance(content, dict):
        raise DataError(f"{where}: '{key}' of feature '{path}' is no object")
    return content


def _shape(content: object, path: str, where: str) -> Shape:
    if content is None:
        return ()
    if not isinstance(content, dict):
        raise DataError(f"{where}: the shape of feature '{path}' is no object")
    dimensions = content.get("dimensions", [])
    if not isinstance(dimensions, list) or len(dimensions) > _MAX_DEPTH:
        raise DataError(f"{where}: the shape of feature '{path}' is no list of at most {_MAX_DEPTH} dimensions")
    shape = tuple(_dimension(value, path, where) for value in dimensions)
    if math.prod(size for size in shape if size) > _MAX_ELEMENTS:
        raise DataError(f"{where}: feature '{path}' claims more than {_MAX_ELEMENTS} elements per step")
    return shape


def _dimension(value: object, path: str, where: str) -> int | None:
    """TFDS writes whole numbers as strings and an unknown length as "-1"."""
    try:
        size = -1 if value is None else int(value)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError):
        size = -2
    if not -1 <= size <= _MAX_ELEMENTS:
        raise DataError(f"{where}: feature '{path}' has the impossible length {str(value)[:40]!r}")
    return None if size == -1 else size
