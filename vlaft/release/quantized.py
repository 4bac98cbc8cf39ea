"""Write a checkpoint with its linear weights in 4 or 8 bits, as bitsandbytes stores them.

Each tensor is quantised by itself and written with what is needed to read it back, exactly as transformers would
after loading the model quantised and saving it; but only one output shard is in memory.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vlaft.adapt.methods import SKIPPED, quantization_config
from vlaft.errors import CheckFailed, CheckpointError, MissingExtra
from vlaft.files import check_apart, output_folder, write_json
from vlaft.model.load import load_config
from vlaft.recipe.settings import AdaptConfig
from vlaft.release.export import (
    ExportResult,
    check_policy_files,
    compare_with_source,
    finish,
    model_shapes,
    policy_bytes,
    stored_bytes,
)
from vlaft.release.layout import open_source, write_release_files
from vlaft.weights.layout import INDEX_FILE, check_tensors, plain_shapes, tensor_table
from vlaft.weights.stream import read_tensor

BITS = {"nf4": 4.25, "int8": 8.1}  # per weight, scales included, rounded up
_SHARD = 1_000_000_000  # bytes; one shard is in memory
_REST = torch.bfloat16  # type of all that is not quantised, and of the products


def export_quantized(
    folder: Path,
    out: Path,
    kind: str,
    *,
    overwrite: bool = False,
    advance: Callable[[int], None] = lambda count: None,
) -> ExportResult:
    """Write the checkpoint `folder` to `out` with linear weights in nf4 (scales quantised as well) or int8.

    The vocabulary's head, embeddings, convolutions, norms and biases stay in bfloat16, a policy's own modules (action
    head, state's projector, FiLM) in float32.

    Args:
        folder: a merged checkpoint or a base.
        out: written beside its place and renamed into it at the end.
        kind: `nf4` or `int8`.
        overwrite: replace what is in `out`.
        advance: called with the number of bytes that were read.

    Raises:
        CheckpointError: `folder` is no plain checkpoint, or lacks statistics or a tokenizer.
        CheckFailed: the exported folder is not what it should be.
        MissingExtra: bitsandbytes is not installed.
        VlaftError: `out` is in use, or holds something without `overwrite`, or there is too little room on the disk.
    """
    check_apart(out, [folder])
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtra(f"--to {kind}", "bitsandbytes", "qlora")
    source = open_source(folder)
    table = tensor_table(folder)
    check_tensors({name: entry.shape for name, entry in table.items()}, model_shapes(folder), str(folder))
    chosen = linear_weights(folder)
    numbers = {name: math.prod(entry.shape) for name, entry in table.items()}
    needed = sum(count * BITS[kind] / 8 if name in chosen else 2 * count for name, count in numbers.items())
    settings = quantization_config(AdaptConfig(quantize=kind, double_quant=kind == "nf4"), _REST)  # type: ignore[arg-type]
    modules = policy_bytes(folder)
    with output_folder(out, int(needed) + modules, overwrite=overwrite) as partial:
        shards = _Shards(partial)
        for name, entry in table.items():
            tensor = read_tensor(folder, entry)
            shards.add(quantize(name, tensor, kind) if name in chosen else {name: _rest(tensor)})
            advance(entry.end - entry.begin)
        shards.close()
        described = {key: value for key, value in settings.to_dict().items() if not key.startswith("_")}
        write_release_files(source, partial, "bfloat16", {"quantization_config": described})
        written = tensor_table(partial)
        _check(partial, chosen)
        check_policy_files(source, partial)
        size = stored_bytes(written.values()) + modules
        comparison = compare_with_source(source, partial, table, size)
        finish(source, partial, kind, comparison)
    return ExportResult(out, size, stored_bytes(table.values()) + modules, comparison)


def linear_weights(folder: Path) -> set[str]:
    """Return the names of the weights that are quantised: those of linear layers, but for the head's."""
    from vlaft.model.openvla import OpenVLAForActionPrediction

    with torch.device("meta"):
        model = OpenVLAForActionPrediction(load_config(folder))
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name.rpartition(".")[2] not in SKIPPED
    }


@torch.no_grad()
def quantize(name: str, weight: Tensor, kind: str) -> dict[str, Tensor]:
    """Return the tensors, by name, that stand for one quantised weight.

    Args:
        name: of the weight.
        weight: `[out, in]`, of any floating-point type.
        kind: `nf4` or `int8`.
    """
    import bitsandbytes.functional as bnb

    if kind == "int8":
        codes, scales, _ = bnb.int8_vectorwise_quant(weight.to(_REST).to(torch.float16))
        module = name.removesuffix(".weight")
        # The format's number says that rows lie one behind the other.
        return {name: codes, f"{module}.SCB": scales, f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8)}
    codes, state = bnb.quantize_4bit(weight.to(_REST), compress_statistics=True, quant_type="nf4")
    return {name: codes} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}


def _rest(tensor: Tensor) -> Tensor:
    return tensor.to(_REST) if tensor.is_floating_point() else tensor


class _Shards:
    """Collects tensors into files of about `_SHARD` bytes, with an index."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._waiting: dict[str, Tensor] = {}
        self._files: list[list[str]] = []
        self._size = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        self._waiting |= {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        self._size += sum(tensor.nbytes for tensor in tensors.values())
        if sum(tensor.nbytes for tensor in self._waiting.values()) >= _SHARD:
            self._write()

    def _write(self) -> None:
        save_file(self._waiting, self._folder / f"shard-{len(self._files)}", metadata={"format": "pt"})
        self._files.append(list(self._waiting))
        self._waiting = {}

    def close(self) -> None:
        if self._waiting:
            self._write()
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._files):
            file = f"model-{number + 1:05d}-of-{len(self._files):05d}.safetensors"
            (self._folder / f"shard-{number}").rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        index: dict[str, Any] = {"metadata": {"total_size": self._size}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self._folder / INDEX_FILE, index)


def _check(folder: Path, chosen: set[str]) -> None:
    """Hold the exported folder against the model that its config describes."""
    table, expected = tensor_table(folder), model_shapes(folder)
    try:
        check_tensors(plain_shapes(table, expected), expected, str(folder))
    except CheckpointError as error:
        raise CheckFailed(f"the exported folder is not right: {error}") from None
    for name in expected:
        if (table[name].dtype in ("U8", "I8")) != (name in chosen):
            raise CheckFailed(f"the exported folder is not right: '{name}' is of type {table[name].dtype}")
