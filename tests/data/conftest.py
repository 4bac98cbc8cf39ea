from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from vlaft.data.codec import encode_image

STEPS = 6


@pytest.fixture
def base(tmp_path: Path) -> str:
    """A base of 32-pixel images with a word-level tokenizer, no weights."""
    folder = tmp_path / "base"
    folder.mkdir()
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "open": 3, "it": 4}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": "<s>"}))
    config = {"text_config": {"vocab_size": 400}, "vision_backbone_id": "siglip-vit-so400m", "image_sizes": [32]}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture
def demos(tmp_path: Path) -> Path:
    """Ten ALOHA episodes of six steps with JPEG frames from two cameras."""
    folder = tmp_path / "demos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(10):
        with h5py.File(folder / f"episode_{number}.hdf5", "w") as file:
            file.attrs.update(sim=True, compress=True)
            file["action"] = rng.normal(size=(STEPS, 14)).astype(np.float32)
            file["observations/qpos"] = rng.normal(size=(STEPS, 14)).astype(np.float32)
            for camera in ("cam_high", "cam_left_wrist"):
                frames = np.zeros((STEPS, 4000), np.uint8)
                for step in range(STEPS):
                    frame = np.full((20, 24, 3), 20 * number + step, np.uint8)
                    data = encode_image(frame, "jpeg")
                    frames[step, : len(data)] = np.frombuffer(data, np.uint8)
                file[f"observations/images/{camera}"] = frames
    return folder
