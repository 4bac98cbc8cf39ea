"""From what a record stores to values of the types that features.json declares.

How TFDS stores an element: float64 as float32, booleans and all integers as int64 (uint64 by its bits), "bytes" and
"zlib" tensors as one little-endian byte string per element, depth as 16-bit PNG, float32 images as the bytes of a
four-channel PNG. A tensor with several unknown dimensions has two keys, `<path>/shape` and `<path>/value`; lists
inside steps have `<path>/ragged_flat_values` and `<path>/ragged_row_lengths_<k>`.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vlaft.data.codec import MAX_PIXELS, decode_image, largest_unfolded
from vlaft.data.readers.rlds.records import Stored
from vlaft.errors import DataError

Array = NDArray[np.generic]
Elements = Array | list[Array] | list[str]

_MAX_FIELD_BYTES = 1 << 30  # of one unpacked field of one episode
_MAX_DEPTH = 32
_MAX_ELEMENTS = 1 << 31  # of one element of a feature: more is a lie, and would overflow what numpy can shape
_FLOATS = ("float16", "float32", "float64", "bfloat16")
_INTEGERS = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_TEXTS = ("string", "object", "bytes", "str")
Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class Ragged:
    """Lists whose length varies: the values of all of them in order, and the lengths, outermost level first."""

    values: Elements
    row_lengths: tuple[NDArray[np.int64], ...]


Value = Array | list[Array] | list[str] | str | Ragged


def is_stored(field: Field, example: Mapping[str, Stored]) -> bool:
    """Whether the record holds the field, in whichever of the three forms."""
    return any(f"{field.path}{suffix}" in example for suffix in ("", "/value", "/ragged_flat_values"))


def count_rows(field: Field, example: Mapping[str, Stored]) -> int | None:
    """Return how many steps the record holds of a field under `steps`, without decoding.

    None when the field cannot tell (an empty shape), -1 when the stored numbers do not divide into steps.
    """
    if _is_ragged(field, example):
        return len(example.get(f"{field.path}/ragged_row_lengths_0", ()))
    stored = example.get(field.path)
    shape = _element_shape(field)
    if stored is None:
        return len(example.get(f"{field.path}/value", ()))
    each = math.prod(_known(field.levels[1:] if _one_string_each(field) else shape))
    if each == 0:
        return None
    return len(stored) // each if len(stored) % each == 0 else -1


def decode_field(field: Field, example: Mapping[str, Stored], where: str) -> Value:
    """Return the values of one field.

    Returns:
        Under a sequence (as all steps are) one element per row: an array `[T, ...]`; a list of arrays where the
        shape varies; a list of strings; `Ragged` for lists of varying length. Otherwise the single element.

    Raises:
        DataError: what is stored does not fit what features.json says.
    """
    where = f"{where}, '{field.path}'"
    if _is_ragged(field, example):
        return _ragged(field, example, where)
    if None in field.levels[1:]:
        raise DataError(f"{where}: a list of varying length is stored without its row lengths")
    if field.path not in example and f"{field.path}/value" in example:
        elements: Elements = _shaped(field, example, where)
    else:
        elements = _elements(field, _get(example, field.path, where), _element_shape(field), where)
    if field.levels:
        return elements
    if len(elements) != 1:
        raise DataError(f"{where}: {len(elements)} values are stored where one is expected")
    return elements[0]


def _is_ragged(field: Field, example: Mapping[str, Stored]) -> bool:
    return len(field.levels) > 1 and f"{field.path}/ragged_flat_values" in example


def _element_shape(field: Field) -> Shape:
    """The shape of one row: sequences of fixed length inside steps are stored as leading dimensions."""
    return (*field.levels[1:], *field.shape)


def _one_string_each(field: Field) -> bool:
    return field.kind == "image" or field.encoding != "none"


def _get(example: Mapping[str, Stored], key: str, where: str) -> Stored:
    if key not in example:
        raise DataError(f"{where}: the record holds no '{key}'")
    return example[key]


def _integers(example: Mapping[str, Stored], key: str, where: str) -> NDArray[np.int64]:
    values = _get(example, key, where)
    if isinstance(values, list) and not values:
        return np.zeros(0, np.int64)
    if isinstance(values, list) or values.dtype != np.int64:
        raise DataError(f"{where}: '{key}' holds no integers")
    if len(values) and not 0 <= values.min() <= values.max() < 1 << 31:
        raise DataError(f"{where}: '{key}' holds impossible lengths")
    return values  # type: ignore[return-value]


def _ragged(field: Field, example: Mapping[str, Stored], where: str) -> Ragged:
    key = f"{field.path}/ragged"
    values = _elements(field, _get(example, f"{key}_flat_values", where), field.shape, where)
    lengths = [_integers(example, f"{key}_row_lengths_{level}", where) for level in range(len(field.levels) - 1)]
    for level, rows in enumerate(lengths):
        below = len(lengths[level + 1]) if level + 1 < len(lengths) else len(values)
        if int(rows.sum()) != below:
            raise DataError(f"{where}: the row lengths add up to {int(rows.sum())}, but {below} values are stored")
    return Ragged(values, tuple(lengths))


def _shaped(field: Field, example: Mapping[str, Stored], where: str) -> list[Array]:
    """Elements with several unknown dimensions, each stored with its own shape."""
    shapes = _integers(example, f"{field.path}/shape", where).tolist()
    stored = _get(example, f"{field.path}/value", where)
    rank = len(field.shape)
    if rank == 0 or len(shapes) % rank:
        raise DataError(f"{where}: {len(shapes)} dimensions are stored for elements of {rank}")
    result: list[Array] = []
    start, budget = 0, _budget(stored)
    for row in range(len(shapes) // rank):
        shape = shapes[row * rank : (row + 1) * rank]
        if field.encoding == "none":
            part = stored[start : start + math.prod(shape)]
            flat = _cast(part, field, where)
            start += len(part)
        else:
            promised = math.prod(shape) * np.dtype(field.dtype).itemsize
            flat = _unpack(_string(stored, row, where), field, min(budget, promised), where)
            budget -= flat.nbytes
            start = row + 1
        result.append(_reshape(flat, tuple(shape), where))
    if start != len(stored):
        raise DataError(f"{where}: the stored shapes do not account for all stored values")
    return result


def _elements(field: Field, stored: Stored, shape: Shape, where: str) -> Elements:
    if field.kind == "image":
        images = [_decode_pixels(field, _string(stored, i, where), f"{where}[{i}]") for i in range(len(stored))]
        inner = _known(shape[:-3])
        if len({image.shape for image in images}) > 1 or not images or len(images) % math.prod(inner):
            return images
        return np.stack(images).reshape(-1, *inner, *images[0].shape)
    if field.kind == "text":
        if any(not isinstance(text, bytes) for text in stored):
            raise DataError(f"{where}: numbers are stored where texts are expected")
        texts = [_text(text, where) for text in stored]  # type: ignore[arg-type]
        return _rows(np.array(texts, dtype=object), field, shape, where) if shape else texts
    if field.encoding == "none":
        return _rows(_cast(stored, field, where), field, shape, where)
    unpacked: list[Array] = []
    budget = _budget(stored)
    if None in field.shape:
        for row in range(len(stored)):
            flat = _unpack(_string(stored, row, where), field, budget, where)
            budget -= flat.nbytes
            unpacked.append(_reshape(flat, field.shape, where))
        return unpacked
    inner = _known(shape[: len(shape) - len(field.shape)])
    element = _known(field.shape)
    promised = math.prod(element) * np.dtype(field.dtype).itemsize
    if promised * len(stored) > budget:
        raise DataError(f"{where}: {_told(promised * len(stored))}")
    stacked = np.empty((len(stored), *element), field.dtype)  # filled row by row: the same memory is not taken twice
    for row in range(len(stored)):
        stacked[row] = _reshape(_unpack(_string(stored, row, where), field, promised, where), field.shape, where)
    return _reshape(stacked.reshape(-1), (None, *inner, *field.shape), where) if inner else stacked


def _budget(stored: Stored) -> int:
    """Return how many bytes the packed elements of a field may unfold to together."""
    packed = sum(len(part) for part in stored if isinstance(part, bytes))
    return min(_MAX_FIELD_BYTES, largest_unfolded(packed))


def _told(size: int) -> str:
    return f"the compressed tensors unpack to more than they can hold (at least {size} bytes); write the dataset anew"


def _rows(flat: Array, field: Field, shape: Shape, where: str) -> Array:
    if None not in shape:
        return _reshape(flat, (None, *shape), where) if field.levels else _reshape(flat, shape, where)[np.newaxis]
    if field.levels:
        raise DataError(f"{where}: rows of varying length cannot be told apart without an encoding")
    return _reshape(flat, shape, where)[np.newaxis]


def _known(shape: Shape) -> tuple[int, ...]:
    return tuple(size or 0 for size in shape)


def _reshape(flat: Array, shape: Shape, where: str) -> Array:
    """Reshape to `shape`, where at most one dimension is None."""
    each = math.prod(size for size in shape if size is not None)
    unknown = shape.count(None)
    rows = len(flat) // each if each else 0
    if unknown > 1 or len(flat) != (each * rows if unknown else each):
        raise DataError(f"{where}: features.json says the shape {_words(shape)}, but {len(flat)} values are stored")
    return flat.reshape([rows if size is None else size for size in shape])


def _words(shape: Shape) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


def _cast(stored: Stored | Sequence[bytes], field: Field, where: str) -> Array:
    dtype = np.dtype(field.dtype)
    if len(stored) == 0:
        return np.zeros(0, dtype)
    wanted = np.float32 if dtype.kind == "f" else np.int64
    if not isinstance(stored, np.ndarray) or stored.dtype != wanted:
        raise DataError(f"{where}: features.json says {field.dtype}, which is not what the record holds")
    if dtype.kind == "b":
        return stored != 0
    if dtype == np.uint64:
        return stored.view(np.uint64)
    if dtype.kind in "iu" and not np.iinfo(dtype).min <= stored.min() <= stored.max() <= np.iinfo(dtype).max:
        raise DataError(f"{where}: a stored value does not fit {field.dtype}")
    with np.errstate(over="ignore", invalid="ignore"):
        return stored.astype(dtype)


def _string(stored: Stored, index: int, where: str) -> bytes:
    value = stored[index] if index < len(stored) else None
    if not isinstance(value, bytes):
        raise DataError(f"{where}: byte strings are expected, which is not what the record holds")
    return value


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: a text is not UTF-8") from error


def _unpack(data: bytes, field: Field, limit: int, where: str) -> Array:
    if field.encoding == "zlib":
        data = _inflate(data, limit, where)
    dtype = np.dtype(field.dtype).newbyteorder("<")
    if len(data) > limit or len(data) % dtype.itemsize:
        raise DataError(f"{where}: {len(data)} bytes are no whole number of {field.dtype} values")
    if dtype.kind == "b":
        return np.frombuffer(data, np.uint8) != 0
    return np.frombuffer(data, dtype).astype(field.dtype)


def _inflate(data: bytes, limit: int, where: str) -> bytes:
    inflater = zlib.decompressobj()
    try:
        unpacked = inflater.decompress(data, limit + 1)
    except zlib.error as error:
        raise DataError(f"{where}: the compressed tensor is damaged") from error
    if len(unpacked) > limit:
        raise DataError(f"{where}: {_told(len(unpacked))}")
    if not inflater.eof:
        raise DataError(f"{where}: the compressed tensor is cut off")
    return unpacked


def _decode_pixels(field: Field, data: bytes, where: str) -> Array:
    """Return one image `[height, width, channels]` in the declared type."""
    channels = field.shape[2]
    if field.dtype == "uint8" and channels in (3, None):
        return decode_image(data, where)
    if field.dtype == "uint8" and channels == 1:
        return decode_image(data, where)[:, :, :1]
    if field.dtype == "uint8" and channels == 4:
        return _decode_with_pillow(data, "RGBA", where)
    if field.dtype == "uint16" and channels == 1:
        return _decode_with_pillow(data, "I;16", where)[:, :, np.newaxis]
    if field.dtype == "float32" and channels == 1:
        return _decode_with_pillow(data, "RGBA", where).view("<f4").astype(np.float32)
    raise DataError(f"{where}: {field.dtype} images of {channels} channels cannot be read")


def _decode_with_pillow(data: bytes, mode: str, where: str) -> Array:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{where}: the image claims {image.height} x {image.width} pixels, too many to read")
            if image.mode != mode:
                raise DataError(f"{where}: the PNG holds {image.mode} pixels where {mode} is expected")
            return np.array(image)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: the image is damaged or no PNG") from error


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
