"""Folders in OpenVLA-OFT's layout, made of what tests have: its names, its files, its pickles."""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict
from pathlib import Path

import torch
from golden_models import unpack
from safetensors.torch import load_file
from torch import Tensor

from vlaft.model.load import read_policy_files
from vlaft.recipe.settings import LORA_TARGETS
from vlaft.weights.layout import tensor_table
from vlaft.weights.oft import wrapped_vision
from vlaft.weights.stream import read_tensor

RANK = 4


def save(path: Path, tensors: dict[str, Tensor], prefix: str = "module.") -> None:
    """Write a state dict as upstream does."""
    torch.save(OrderedDict((f"{prefix}{name}", tensor) for name, tensor in tensors.items()), path)


def golden_checkpoint(golden: Path, case: str, target: Path) -> Path:
    """Unpack the folder that upstream's own code saved, its `.pt` files pickled again."""
    unpack(golden / "oft-tiny" / case / "checkpoint", target)
    for path in target.glob("*--*.safetensors"):
        torch.save(OrderedDict(load_file(path)), path.with_suffix(".pt"))
        path.unlink()
    return target


def upstream_folder(merged: Path, target: Path, *, prefix: str = "module.", unmerged: bool = True) -> Path:
    """Write a merged policy of ours as OpenVLA-OFT would have it; nothing in there says chunk, cameras or the rest.

    Args:
        merged: the policy.
        target: a new folder.
        prefix: of keys.
        unmerged: with FiLM, take a share of each weight of the backbone away again and put it into an adapter.
    """
    shutil.copytree(merged, target, ignore=lambda folder, names: [name for name in names if name.startswith("merge")])
    config = json.loads((target / "config.json").read_text())
    for key in ("policy", "image_pipeline", "norm_stats", "prompt_style"):
        config.pop(key, None)
    (target / "config.json").write_text(json.dumps(config))
    own = read_policy_files(merged)
    for part in ("action_head", "proprio_projector", "film"):
        (target / f"{part}.safetensors").unlink(missing_ok=True)
    for part in ("action_head", "proprio_projector"):
        tensors = {name.removeprefix(f"{part}."): own[name] for name in own if name.startswith(f"{part}.")}
        if tensors:
            save(target / f"{part}--20_checkpoint.pt", tensors, prefix)
    if any(name.startswith("vision_backbone.") for name in own):
        film = {name: tensor for name, tensor in own.items() if name.startswith("vision_backbone.")}
        save(target / "vision_backbone--20_checkpoint.pt", _backbone(merged, unmerged) | film, "")
    return target


def _backbone(merged: Path, unmerged: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    for name, entry in tensor_table(merged).items():
        if not name.startswith("vision_backbone."):
            continue
        tensor = read_tensor(merged, entry)
        module, _, kind = wrapped_vision(name).rpartition(".")
        if not unmerged or module.rpartition(".")[2] not in LORA_TARGETS:
            found[f"{module}.{kind}"] = tensor
            continue
        if kind == "weight":
            a = torch.randn(RANK, *tensor.shape[1:], generator=generator) / 10
            b = torch.randn(tensor.shape[0], RANK, generator=generator) / 10
            tensor = tensor.float() - (b @ a.flatten(1)).view(tensor.shape)  # alpha / rank is 1
            found[f"{module}.lora_A.default.weight"] = a
            found[f"{module}.lora_B.default.weight"] = b.view(*b.shape, *(1,) * (tensor.ndim - 2))
        found[f"{module}.base_layer.{kind}"] = tensor
    return found
