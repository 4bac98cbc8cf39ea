"""Patch features of frozen ViTs, computed once per example and kept on disk.

Where no parameter of the vision backbone is trained and frames are not augmented, its output for an example never
changes; for `last-layer`, `frozen-vision` and adapters on the language model alone it need be computed in the first
epoch only. Features are stored as the backbone gives them, so that a step that reads them computes what a step
without the cache does.

The file's name is a hash of everything that the features depend on (base, data, image pipeline, number format), so
runs on the same base and data share it. A row's mark is set after its features are written; a killed run leaves
rows that are computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_NUMPY = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.float16: np.float16}
_VERSION = 1  # of what is stored; part of the name


def cacheable(model: nn.Module, *, augment: bool) -> bool:
    """Say whether the vision backbone's output depends on the example alone."""
    trained = any(p.requires_grad for name, p in model.named_parameters() if "vision_backbone." in name)
    return not augment and not trained


def pays(rows: int, examples: int, bytes_per_row: int, folder: Path) -> bool:
    """Say whether keeping features is worth it: rows come again, and take less than half of the free disk.

    Args:
        rows: examples of the training split.
        examples: examples that the run will look at.
        bytes_per_row: size of one example's features.
        folder: where they would be kept.
    """
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return examples > rows and rows * bytes_per_row < shutil.disk_usage(place).free // 2


class FeatureCache:
    """Features `[rows, P, V]` in one memory-mapped file, filled as rows are met."""

    def __init__(self, folder: Path, key: dict[str, Any], shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        """Open or make the cache of `key`.

        Args:
            folder: of all caches.
            key: JSON-able description of what the features depend on.
            shape: rows, patches, width.
            dtype: of the features.
        """
        described = json.dumps(key | {"shape": shape, "dtype": str(dtype), "version": _VERSION}, sort_keys=True)
        name = hashlib.sha256(described.encode()).hexdigest()[:32]
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}.features"
        self.dtype = dtype
        self.hits = self.misses = 0
        self._features = _open(self.path, shape, _NUMPY[dtype])
        self._marks = _open(folder / f"{name}.marks", (shape[0],), np.uint8)

    def features(self, rows: Tensor, compute: Callable[[], Tensor], device: torch.device) -> Tensor:
        """Return the features of `rows`, from the file where all of them are there.

        Args:
            rows: `[B]` int64 on the CPU.
            compute: gives the features `[B, P, V]` of the batch; called where a row is missing.
            device: where to put them.

        Returns:
            `[B, P, V]` on `device`.
        """
        index = rows.numpy()
        if self._marks[index].all():
            self.hits += len(index)
            stored = torch.from_numpy(self._features[index])
            return (stored.view(torch.bfloat16) if self.dtype == torch.bfloat16 else stored).to(device)
        self.misses += len(index)
        with torch.no_grad():
            computed = compute()
        plain = computed.to("cpu")
        self._features[index] = (plain.view(torch.uint16) if self.dtype == torch.bfloat16 else plain).numpy()
        self._marks[index] = 1
        return computed


def _open(path: Path, shape: tuple[int, ...], dtype: Any) -> np.memmap:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if not path.exists() or path.stat().st_size != size:
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        with partial.open("wb") as file:
            file.truncate(size)  # sparse: takes room as rows are written
        partial.replace(path)
    return np.memmap(path, dtype=dtype, mode="r+", shape=shape)
