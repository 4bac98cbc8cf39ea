"""Put trained weights into a model that is in memory, with the arithmetic of `vlaft merge`.

A robot should get the same actions from a run as from the checkpoint that the run is merged into, and as fast. So
adapters are folded in when they are loaded, summed in float32 and rounded to the base's stored type as merging does,
instead of being computed beside every linear layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from vlaft.adapt.adapter_files import CONFIG_FILE, adapter_table, read_settings
from vlaft.adapt.merging import StoredSettings, sort_parts
from vlaft.errors import CheckpointError
from vlaft.model.checkpoint import TensorEntry, read_header, tensor_table
from vlaft.model.tensor_stream import DTYPES, read_tensor


@torch.no_grad()
def fold_adapter(model: nn.Module, base: Path, adapter: Path) -> None:
    """Fold the adapter in `adapter` into `model`, in place.

    Args:
        model: loaded from `base`, not quantised, on any device and of any floating-point type.
        base: the base's folder, whose stored weights the sums start from.
        adapter: folder in peft's layout.

    Raises:
        CheckpointError: the adapter is damaged, of a kind that cannot be merged, or made for another base.
    """
    settings = StoredSettings.from_json(read_settings(adapter), str(adapter / CONFIG_FILE))
    stored, table = adapter_table(adapter), tensor_table(base)

    def read(name: str) -> Tensor:
        return read_tensor(adapter, stored[name])

    found = sort_parts(settings, {name: entry.shape for name, entry in stored.items()})
    weights = _weights(model, table, {name: parts.shape for name, parts in found.items()}, adapter)
    for name, weight in weights.items():
        weight.copy_(found[name].load(read).merged(read_tensor(base, table[name])))


@torch.no_grad()
def lay_over(model: nn.Module, base: Path, file: Path) -> None:
    """Replace tensors of `model` by those in `file`, rounded to the type that the base stores them in.

    Raises:
        CheckpointError: the file is damaged or belongs to another base.
    """
    trained, table = read_header(file), tensor_table(base)
    weights = _weights(model, table, {name: entry.shape for name, entry in trained.items()}, file)
    for name, weight in weights.items():
        weight.copy_(read_tensor(file.parent, trained[name]).to(DTYPES[table[name].dtype]))


def _weights(
    model: nn.Module, table: Mapping[str, TensorEntry], shapes: Mapping[str, tuple[int, ...]], source: Path
) -> dict[str, Tensor]:
    """Return the model's weights of the names in `shapes`, checked against the base's."""
    parameters = dict(model.named_parameters())
    for name, shape in shapes.items():
        if name not in table or name not in parameters:
            raise CheckpointError(f"{source} belongs to another base: this one has no tensor '{name}'")
        if table[name].shape != shape:
            raise CheckpointError(
                f"{source} belongs to another base: '{name}' is {shape} there and {table[name].shape} in this base"
            )
    return {name: parameters[name] for name in shapes}
