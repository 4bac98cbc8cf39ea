"""Converted datasets of a few rows, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlaft.action.statistics import compute_statistics
from vlaft.action.tokens import ActionTokenizer, normalize
from vlaft.data.codec import encode_image
from vlaft.data.store import ConvertedDataset, example_schema, shard_entry, write_shard
from vlaft.files import write_json
from vlaft.observation.images import ImagePipeline

PIPELINE = ImagePipeline(4, "lanczos", "resize-naive", (0, 0, 0), False, ((0.5, 0.5, 0.5),), ((0.5, 0.5, 0.5),))
TOKENIZER = {"base": "b", "eos_id": 2, "pad_id": 3, "fingerprint": "f", "action_vocab_size": 600, "n_action_bins": 256}
CAMERAS = ("image", "image_left", "image_wrist")

Episode = tuple[np.ndarray, np.ndarray | None]  # actions [T, A], states [T, S]


def write_episodes(
    folder: Path,
    episodes: Sequence[Episode],
    mask: Sequence[bool] = (),
    cameras: Sequence[str] = CAMERAS,
    **changes: Any,
) -> ConvertedDataset:
    """A dataset whose frames tell episode, step and camera by their three channels; both splits hold the same."""
    folder.mkdir()
    actions = [action for action, _ in episodes]
    states = [state for _, state in episodes if state is not None]
    statistics = compute_statistics(actions, mask, states) | changes
    rows = []
    for number, (action, state) in enumerate(episodes):
        normalized = normalize(action, statistics["action"])
        rows.append(
            [
                {
                    "episode_index": number,
                    "frame_index": step,
                    "dataset": "toy",
                    "source": f"demo_{number}",
                    "instruction": "x",
                    **{
                        camera: {"bytes": encode_image(np.full((4, 4, 3), (number, step, place), np.uint8), "png")}
                        for place, camera in enumerate(cameras)
                    },
                    "state": None if state is None else state[step],
                    "action": action[step],
                    "normalized_action": normalized[step],
                    "prompt_token_ids": [1, 5, 6],
                    "action_token_ids": ActionTokenizer(600).encode(normalized[step]),
                }
                for step in range(len(action))
            ]
        )
    schema = example_schema(cameras)
    shards = [
        write_shard(folder / f"{split}-00000-of-00001.parquet", split, schema, rows) for split in ("train", "val")
    ]
    write_json(folder / "dataset_statistics.json", {"toy": statistics})
    write_json(
        folder / "dataset.json",
        {
            "format_version": 1,
            "sources": [{"name": "toy", "weight": 1.0}],
            "image": {"cameras": list(cameras), "pipeline": PIPELINE.to_json()},
            "prompt_style": "openvla",
            "tokenizer": TOKENIZER,
            "counts": {"episodes": {}, "rows": {}},
            "shards": [shard_entry(shard) for shard in shards],
        },
    )
    return ConvertedDataset(folder)


def ramp(steps: int, start: float = 0.0) -> np.ndarray:
    """Return actions of which each value says its step."""
    return (start + np.arange(2 * steps, dtype=np.float32) / 50).reshape(steps, 2)
