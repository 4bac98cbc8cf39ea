"""A mini base with a tokenizer, and demonstrations converted for it: what tests of training start from.

The golden mini models have no tokenizer; they get one of words, whose ids stay below the action ids 256..511, so that
`convert` and `train` work on them as on a release.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from golden_models import MINI, copy_checkpoint
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from vlaft.data.codec import encode_image
from vlaft.data.convert.run import ConvertRequest, SourceRequest, convert
from vlaft.data.store import ConvertedDataset, example_schema, shard_entry, write_shard
from vlaft.files import write_json
from vlaft.observation.prompts import BLANK

_SPECIAL = ("<PAD>", "<s>", "</s>", "<unk>", BLANK)  # the golden batch pads with 0, begins with 1 and ends with 2
_WORDS = ("in", ":", "out", "what", "action", "should", "the", "robot", "take", "to", "?", "push", "red", "cube")
INSTRUCTION = "push the red cube"


def write_small_base(folder: Path, name: str = "single") -> Path:
    """Write a golden mini model (`fused` or `single`) with a word-level tokenizer to `folder`."""
    copy_checkpoint(MINI / name, folder)
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys([*_SPECIAL, *_WORDS]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<PAD>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def write_demonstrations(file: Path, episodes: int = 6, steps: int = 8, seed: int = 0, rich: bool = False) -> Path:
    """Write robomimic demonstrations of 64-pixel frames whose colour tells the action.

    Rich ones have a wrist camera, and a state of three numbers, of which the last never changes.
    """
    generator = np.random.default_rng(seed)
    with h5py.File(file, "w") as root:
        data = root.create_group("data")
        data.attrs["total"] = episodes * steps
        for number in range(episodes):
            demo = data.create_group(f"demo_{number}")
            demo.attrs["num_samples"] = steps
            actions = generator.uniform(-1, 1, size=(steps, 7))
            actions[:, 6] = np.where(np.arange(steps) < steps // 2, -1, 1)
            demo["actions"] = actions
            frames = np.zeros((steps, 64, 64, 3), np.uint8)
            frames[:] = np.clip((actions[:, None, None, :3] + 1) * 127, 0, 255)
            frames[:, : 8 * (number % 8), :32] = 255
            demo["obs/agentview_image"] = frames
            if rich:
                demo["obs/wrist_image"] = 255 - frames
                demo["obs/joints"] = np.stack([np.cos(np.arange(steps)), actions[:, 0], np.full(steps, 0.5)], axis=1)
    return file


def convert_small(base: Path, out: Path, **changes: Any) -> Path:
    """Convert small demonstrations for `base` into `out`: 40 training and 8 held-out examples.

    `changes` are those of `write_demonstrations`; of rich ones the wrist camera and the state are kept.
    """
    file = write_demonstrations(out.with_suffix(".hdf5"), **changes)
    layout: dict[str, Any] = {
        "action": ["actions"],
        "cameras": {"primary": "obs/agentview_image"},
        "steps": [{"scale_gripper": {"from_range": [1, -1], "to_range": [0, 1]}}],
        "action_mask": [True] * 6 + [False],
        "instruction": INSTRUCTION,
    }
    if changes.get("rich"):
        layout |= {"cameras": {**layout["cameras"], "wrist": "obs/wrist_image"}, "state": ["obs/joints"], "fps": 5}
    source = SourceRequest(path=file, layout=layout, name="small")
    convert(ConvertRequest(sources=[source], base=str(base), out=out, workers=1, val_fraction=0.17))
    return out


def write_examples(
    folder: Path,
    like: Path,
    images: Sequence[np.ndarray],
    prompts: Sequence[Sequence[int]],
    tokens: Sequence[Sequence[int]],
) -> ConvertedDataset:
    """Write chosen examples as a converted dataset (training and held-out split alike), losslessly.

    Args:
        folder: a new folder.
        like: a dataset converted for the same base, which lends its description and statistics.
        images: uint8 `[H, W, 3]` each, of the base's size.
        prompts: prompt ids of each example.
        tokens: action ids of each example.
    """
    source = ConvertedDataset(like)
    name = next(iter(source.statistics))
    rows = [
        {
            "episode_index": 0,
            "frame_index": number,
            "dataset": name,
            "source": "chosen",
            "instruction": "chosen",
            "image": {"bytes": encode_image(image, "png"), "path": None},
            "state": None,
            "action": np.zeros(7, np.float32),
            "normalized_action": np.zeros(7, np.float32),
            "prompt_token_ids": list(prompt),
            "action_token_ids": list(ids),
        }
        for number, (image, prompt, ids) in enumerate(zip(images, prompts, tokens, strict=True))
    ]
    folder.mkdir(parents=True)
    schema = example_schema(("image",))
    shards = [
        write_shard(folder / f"{split}-00000-of-00001.parquet", split, schema, [rows]) for split in ("train", "val")
    ]
    info = dict(source.info) | {"shards": [shard_entry(shard) for shard in shards]}
    info["image"] = info["image"] | {"cameras": ["image"]}
    write_json(folder / "dataset_statistics.json", source.statistics)
    write_json(folder / "dataset.json", info)
    return ConvertedDataset(folder)
