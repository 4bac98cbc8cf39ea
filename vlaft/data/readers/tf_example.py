"""Parse `tf.train.Example`: a flat map from keys to lists of bytes, float32 or int64.

The message is described here in code (tensorflow/core/example/{example,feature}.proto), so that the protobuf
library can parse it without TensorFlow and without generated modules. Unpacked and split lists, which the wire
format allows, are joined by the library.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from vlaft.errors import DataError

Stored = NDArray[np.float32] | NDArray[np.int64] | list[bytes]

_PACKAGE = "vlaft.tf_example"


def parse_example(payload: bytes, where: str) -> dict[str, Stored]:
    """Return the features of one serialized Example.

    Args:
        payload: one record.
        where: names the record in messages.

    Returns:
        Key to float32 `[N]`, int64 `[N]` or a list of N byte strings; a feature without a kind is an empty list.

    Raises:
        DataError: the bytes are no Example.
    """
    example = example_message()()
    try:
        example.ParseFromString(payload)
    except DecodeError as error:
        raise DataError(f"{where} is no tf.train.Example") from error
    return {key: _values(feature) for key, feature in example.features.feature.items()}


def _values(feature: Any) -> Stored:
    kind = feature.WhichOneof("kind")
    if kind == "float_list":
        values = feature.float_list.value
        return np.fromiter(values, np.float32, len(values))
    if kind == "int64_list":
        values = feature.int64_list.value
        return np.fromiter(values, np.int64, len(values))
    return list(feature.bytes_list.value)


@cache
def example_message() -> Any:
    """Return the message class `Example`, for whoever writes records too."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name=f"{_PACKAGE}.proto", package=_PACKAGE, syntax="proto3")

    def add(message: Any, name: str, number: int, kind: Any, *, repeated: bool = False, of: str = "") -> Any:
        label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
        added = message.field.add(name=name, number=number, type=kind, label=label)
        if of:
            added.type_name = f".{_PACKAGE}.{of}"
        return added

    lists = {"BytesList": field.TYPE_BYTES, "FloatList": field.TYPE_FLOAT, "Int64List": field.TYPE_INT64}
    for name, kind in lists.items():
        add(file.message_type.add(name=name), "value", 1, kind, repeated=True)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, (name, of) in enumerate(zip(("bytes_list", "float_list", "int64_list"), lists, strict=True), start=1):
        add(feature, name, number, field.TYPE_MESSAGE, of=of).oneof_index = 0
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    add(entry, "key", 1, field.TYPE_STRING)
    add(entry, "value", 2, field.TYPE_MESSAGE, of="Feature")
    add(features, "feature", 1, field.TYPE_MESSAGE, repeated=True, of="Features.FeatureEntry")
    add(file.message_type.add(name="Example"), "features", 1, field.TYPE_MESSAGE, of="Features")
    # A pool of our own: TensorFlow, if it is loaded too, registers its own message in the default pool.
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Example"))
