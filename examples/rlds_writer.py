"""Write a small RLDS dataset without TensorFlow: float tensors, texts, and JPEG or PNG images per step.

For demos and tests; what it writes is what TFDS writes: `<name>/<version>/` with dataset_info.json, features.json and
TFRecord shards. Usage:

    write_rlds(folder, "my_robot", {"train": [{"action": actions, "observation/image": frames,
                                               "language_instruction": ["pick up the cup"] * len(actions)}]})
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vlaft.data.codec import encode_image
from vlaft.data.readers.rlds.records import example_message, masked_crc32c

StepValues = NDArray[Any] | Sequence[str]
_FEATURES = "tensorflow_datasets.core.features."


def write_rlds(
    folder: Path,
    name: str,
    splits: Mapping[str, Sequence[Mapping[str, StepValues]]],
    *,
    version: str = "1.0.0",
    shards: int = 1,
    image_format: Literal["jpeg", "png"] = "jpeg",
) -> Path:
    """Write episodes as an RLDS dataset.

    Args:
        folder: parent of the dataset's folder.
        name: the dataset's name.
        splits: split name to episodes. An episode maps paths (`"observation/image"`) to values of T steps: float or
            integer arrays `[T, ...]`, uint8 frames `[T, H, W, 3]`, or T strings. All episodes have the same paths.
        version: name of the version folder.
        shards: files per split; episodes are dealt out in order.
        image_format: how frames are stored.

    Returns:
        The version folder.
    """
    target = folder / name / version
    target.mkdir(parents=True)
    infos = []
    for split, episodes in splits.items():
        lengths = []
        for index, part in enumerate(np.array_split(np.arange(len(episodes)), shards)):
            records = [frame_record(serialize_episode(episodes[int(i)], image_format)) for i in part]
            (target / f"{name}-{split}.tfrecord-{index:05d}-of-{shards:05d}").write_bytes(b"".join(records))
            lengths.append(str(len(records)))
        infos.append(
            {
                "name": split,
                "shardLengths": lengths,
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        )
    info = {"name": name, "version": version, "fileFormat": "tfrecord", "splits": infos}
    (target / "dataset_info.json").write_text(json.dumps(info, indent=2))
    first = next(episode for episodes in splits.values() for episode in episodes)
    (target / "features.json").write_text(json.dumps(features_tree(first, image_format), indent=2))
    return target


def frame_record(payload: bytes) -> bytes:
    """Return one TFRecord: length, its checksum, payload, its checksum."""
    length = struct.pack("<Q", len(payload))
    checksums = struct.pack("<I", masked_crc32c(length)), struct.pack("<I", masked_crc32c(payload))
    return length + checksums[0] + payload + checksums[1]


def serialize_episode(episode: Mapping[str, StepValues], image_format: Literal["jpeg", "png"]) -> bytes:
    """Return one episode as a serialized tf.train.Example, the values of all steps joined."""
    example = example_message()()
    for path, values in episode.items():
        feature = example.features.feature[f"steps/{path}"]
        if not isinstance(values, np.ndarray):
            feature.bytes_list.value.extend(text.encode() for text in values)
        elif _is_image(values):
            feature.bytes_list.value.extend(encode_image(frame, image_format) for frame in values)
        elif values.dtype.kind == "f":
            feature.float_list.value.extend(values.astype(np.float32).ravel().tolist())
        else:
            feature.int64_list.value.extend(values.astype(np.int64).ravel().tolist())
    return bytes(example.SerializeToString(deterministic=True))


def features_tree(episode: Mapping[str, StepValues], image_format: str) -> dict[str, Any]:
    """Return the features.json that describes episodes like this one."""
    root: dict[str, Any] = {}
    for path, values in episode.items():
        *parents, leaf = path.split("/")
        node = root
        for parent in parents:
            node = node.setdefault(parent, _features_dict({}))["featuresDict"]["features"]
        node[leaf] = _leaf(values, image_format)
    steps = {
        "pythonClassName": _FEATURES + "dataset_feature.Dataset",
        "sequence": {"feature": _features_dict(root), "length": "-1"},
    }
    return _features_dict({"steps": steps})


def _is_image(values: NDArray[Any]) -> bool:
    return values.dtype == np.uint8 and values.ndim == 4 and values.shape[-1] == 3


def _features_dict(features: dict[str, Any]) -> dict[str, Any]:
    return {"pythonClassName": _FEATURES + "features_dict.FeaturesDict", "featuresDict": {"features": features}}


def _leaf(values: StepValues, image_format: str) -> dict[str, Any]:
    if not isinstance(values, np.ndarray):
        return {"pythonClassName": _FEATURES + "text_feature.Text", "text": {}}
    shape = {"dimensions": [str(size) for size in values.shape[1:]]}
    if _is_image(values):
        content = {"shape": shape, "dtype": "uint8", "encodingFormat": image_format}
        return {"pythonClassName": _FEATURES + "image_feature.Image", "image": content}
    content = {"shape": shape, "dtype": str(values.dtype), "encoding": "none"}
    return {"pythonClassName": _FEATURES + "tensor_feature.Tensor", "tensor": content}
