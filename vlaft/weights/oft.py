"""OpenVLA-OFT's own checkpoint folders: which files they have, what the tensors are called there, what they tell.

Beside merged weights in the release's layout, or an adapter in `lora_adapter/`, lie pickled files, which are read as
tensors and nothing else (`torch.load` with `weights_only`):
* `action_head--N_checkpoint.pt`: the L1 head;
* `proprio_projector--N_checkpoint.pt`: where the policy reads the state;
* `vision_backbone--N_checkpoint.pt`: where it has FiLM; the whole backbone, its adapters beside the base's weights.

N is a step, or `latest`. Nothing there says how long chunks are, which cameras are looked through, or how actions are
normalised: upstream keeps these in flags and in the run's name.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlaft.errors import CheckpointError
from vlaft.weights.layout import INDEX_FILE, SINGLE_FILE
from vlaft.weights.trained import ADAPTER_CONFIG, policy_part

LORA_ADAPTER = "lora_adapter"
_FILE = re.compile(r"(action_head|proprio_projector|vision_backbone|noisy_action_projector)--(\w+)_checkpoint\.pt")
_WRAPPED = re.compile(r"(\.blocks\.\d+)\.block\.")  # of each block with FiLM
_BLOCK = re.compile(r"(\.blocks\.\d+)\.(?!scale\.|shift\.)")
_PART_OF_LORA = re.compile(r"\.lora_([AB])\.(?:default\.)?weight$")
# The policies that OpenVLA-OFT's authors have put on the Hub; what their folders do not tell is known of these.
_LIBERO = {"chunk": 8, "cameras": ["main", "wrist"], "normalization": "q99"}
RELEASED: dict[str, dict[str, Any]] = {
    f"moojink/openvla-7b-oft-finetuned-libero-{suite}": _LIBERO
    for suite in ("spatial", "object", "goal", "10", "spatial-object-goal-10")
}


def file_name(part: str, step: str) -> str:
    """Return the name of a part's file: `action_head--150000_checkpoint.pt`."""
    return f"{part}--{step}_checkpoint.pt"


def is_oft(folder: Path) -> bool:
    """Say whether a folder has the files of OpenVLA-OFT."""
    return folder.is_dir() and any(_FILE.fullmatch(path.name) for path in folder.iterdir())


@dataclass(frozen=True)
class Vision:
    """What `vision_backbone--N_checkpoint.pt` holds, by the plain names of our model.

    Attributes:
        weights: the backbone's, as they were before the adapters.
        adapters: `A` and `B` by the weight that they change; empty where they are folded in already.
        film: scales and shifts of the blocks.
    """

    weights: Mapping[str, Tensor]
    adapters: Mapping[str, tuple[Tensor, Tensor]]
    film: Mapping[str, Tensor]


@dataclass(frozen=True)
class OftFolder:
    """A folder of OpenVLA-OFT's.

    Attributes:
        folder: where it is.
        files: by part.
    """

    folder: Path
    files: Mapping[str, Path]

    @classmethod
    def open(cls, folder: Path) -> OftFolder:
        """Look through a folder.

        Raises:
            CheckpointError: a part is there twice, parts are of several steps, or it is a diffusion policy.
        """
        files: dict[str, Path] = {}
        steps: set[str] = set()
        for path in sorted(folder.iterdir()):
            if match := _FILE.fullmatch(path.name):
                if match[1] in files:
                    raise CheckpointError(
                        f"{folder}: both {files[match[1]].name} and {path.name} are here; keep those of one step"
                    )
                files[match[1]] = path
                steps.add(match[2])
        if len(steps) > 1:
            listed = ", ".join(sorted(steps))
            raise CheckpointError(f"{folder}: parts of the steps {listed} are here; keep those of one step")
        found = cls(folder, files)
        if "noisy_action_projector" in files or any(name.startswith("noise_predictor.") for name in found.head):
            raise CheckpointError(f"{folder}: a policy with a diffusion head, which vlaft does not have")
        return found

    @property
    def merged(self) -> bool:
        """Whether the weights lie here; else an adapter does."""
        return any((self.folder / name).is_file() for name in (INDEX_FILE, SINGLE_FILE))

    @property
    def adapter(self) -> Path | None:
        """The adapter's folder, which counts where the weights are not merged."""
        folder = self.folder / LORA_ADAPTER
        return folder if (folder / ADAPTER_CONFIG).is_file() else None

    @cached_property
    def head(self) -> dict[str, Tensor]:
        """The action head's tensors, empty where there is none."""
        return self._part("action_head")

    @cached_property
    def projector(self) -> dict[str, Tensor]:
        """The state projector's tensors, empty where there is none."""
        return self._part("proprio_projector")

    @cached_property
    def vision(self) -> Vision | None:
        """The backbone with FiLM, or None where there is none.

        Raises:
            CheckpointError: an adapter's matrix is without its partner, or the backbone is without FiLM.
        """
        if not (tensors := self._part("vision_backbone")):
            return None
        where = self.files["vision_backbone"]
        weights: dict[str, Tensor] = {}
        pairs: dict[str, dict[str, Tensor]] = {}
        film: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            name = _WRAPPED.sub(r"\1.", key)
            if part := _PART_OF_LORA.search(name):
                pairs.setdefault(f"{name[: part.start()]}.weight", {})[part[1]] = tensor
            elif policy_part(name) == "film":
                film[name] = tensor
            else:
                weights[name.replace(".base_layer.", ".")] = tensor
        if odd := [name for name, pair in pairs.items() if set(pair) != {"A", "B"} or name not in weights]:
            raise CheckpointError(f"{where}: the adapter of '{odd[0]}' is not whole; copy or download the file again")
        if not film:
            raise CheckpointError(f"{where}: a vision backbone without FiLM; its weights belong into the merged ones")
        return Vision(weights, {name: (pair["A"], pair["B"]) for name, pair in pairs.items()}, film)

    @property
    def action_size(self) -> int | None:
        """A, the dimensions of an action, as the head has it."""
        return self._side("action_head", self.head, "model.fc2.weight", 0) if "action_head" in self.files else None

    @property
    def state_size(self) -> int | None:
        """S, the numbers of a state, as its projector has it."""
        there = "proprio_projector" in self.files
        return self._side("proprio_projector", self.projector, "fc1.weight", 1) if there else None

    def policy_tensors(self) -> dict[str, Tensor]:
        """Return head, state's projector and FiLM by their names in our model."""
        found = {f"action_head.{name}": tensor for name, tensor in self.head.items()}
        found |= {f"proprio_projector.{name}": tensor for name, tensor in self.projector.items()}
        return found | dict(self.vision.film if self.vision else {})

    def _side(self, part: str, tensors: Mapping[str, Tensor], name: str, side: int) -> int:
        if name not in tensors or tensors[name].ndim != 2:
            raise CheckpointError(f"{self.files[part]}: '{name}' is missing, so it is none of OpenVLA-OFT's")
        return int(tensors[name].shape[side])

    def _part(self, part: str) -> dict[str, Tensor]:
        return read_pickled(self.files[part]) if part in self.files else {}


def read_pickled(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file of `torch.save`, by their names without DDP's `module.`.

    Nothing but tensors is unpickled, and no code is run: what needs more is refused.

    Raises:
        CheckpointError: it cannot be read so, is damaged, or holds something else than tensors of numbers by name.
    """
    try:
        mapped = zipfile.is_zipfile(path)  # all but files of torch before 1.6: read where it is asked for
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path}: more than tensors is pickled here, and reading that could run anything; save the plain state dict"
        ) from None
    except (FileNotFoundError, PermissionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception:  # a damaged file ends in whatever the reader meets first
        raise CheckpointError(f"{path}: damaged; copy or download the file again") from None
    plain = isinstance(content, Mapping) and all(
        isinstance(name, str)
        and isinstance(tensor, Tensor)
        and tensor.is_floating_point()
        and tensor.layout is torch.strided
        for name, tensor in content.items()
    )
    if not plain or not content:
        raise CheckpointError(f"{path}: no state dict, which has tensors of numbers by their names")
    return {name.removeprefix("module."): tensor.detach() for name, tensor in content.items()}


def wrapped_vision(name: str) -> str:
    """Return what upstream calls a tensor of a vision backbone whose blocks have FiLM.

    >>> wrapped_vision("vision_backbone.featurizer.blocks.0.attn.qkv.weight")
    'vision_backbone.featurizer.blocks.0.block.attn.qkv.weight'
    >>> wrapped_vision("vision_backbone.featurizer.blocks.0.scale.weight")
    'vision_backbone.featurizer.blocks.0.scale.weight'
    """
    return _BLOCK.sub(r"\1.block.", name)
