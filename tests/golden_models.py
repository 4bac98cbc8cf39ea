"""The small golden models, and what upstream's code computes with them (see `golden/README.md`)."""

from __future__ import annotations

import json
import lzma
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlaft.model.load import load_model
from vlaft.model.openvla import OpenVLAForActionPrediction
from vlaft.weights.layout import INDEX_FILE, SINGLE_FILE, tensor_table
from vlaft.weights.stream import read_tensor

MINI = Path(__file__).parent / "golden" / "mini"
ADAPTER = MINI / "single" / "adapter_trained"
NAMES = ("fused", "single")  # DINOv2 and SigLIP; SigLIP alone


@dataclass(frozen=True)
class Golden:
    """One of the two mini models."""

    folder: Path
    expected: dict[str, Any]
    tensors: dict[str, Tensor]

    def load(self) -> OpenVLAForActionPrediction:
        return load_model(self.folder, dtype=torch.float32)

    @property
    def batch(self) -> dict[str, Tensor]:
        """Inputs of a forward pass with labels."""
        return {name: self.tensors[name] for name in ("input_ids", "attention_mask", "pixel_values", "labels")}


def golden(name: str) -> Golden:
    folder = MINI / name
    expected = json.loads((folder / "expected.json").read_text())
    return Golden(folder, expected, load_file(folder / "tensors.safetensors"))


def unpack(source: Path, target: Path) -> Path:
    """Copy a folder, with the `.xz` files in it unpacked as `unxz` would."""
    for path in source.rglob("*"):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".xz":
                copy.with_suffix("").write_bytes(lzma.decompress(path.read_bytes()))
            else:
                shutil.copyfile(path, copy)
    return target


def base_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, as stored."""
    return {name: read_tensor(folder, entry) for name, entry in tensor_table(folder).items()}


def copy_checkpoint(source: Path, target: Path) -> Path:
    """Copy a checkpoint's own files, writable, without the golden outputs and adapters beside them."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file() and path.name not in ("expected.json", "tensors.safetensors"):
            shutil.copyfile(path, target / path.name)
    return target


def write_single_file(source: Path, target: Path, tensors: dict[str, Tensor]) -> Path:
    """Write `tensors` as a checkpoint of one file with the configuration of `source`."""
    target.mkdir(parents=True)
    shutil.copyfile(source / "config.json", target / "config.json")
    save_file(tensors, target / SINGLE_FILE, metadata={"format": "pt"})
    assert not (target / INDEX_FILE).exists()
    return target
