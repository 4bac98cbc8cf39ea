"""Fold trained weights into their base: a plain checkpoint again, in the release's layout.

The base streams through, tensor by tensor, from its shards into equal shards of the output, so that memory is
bounded by the largest tensor, not by the model. Sums are taken in float32 and rounded to the output's type once.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlaft.action.statistics import STATISTICS_FILE
from vlaft.adapt.merging import Change, ModuleAdapter, changes, policy_tensors
from vlaft.adapt.rounding import Mode, Rounding
from vlaft.errors import CheckpointError
from vlaft.files import check_apart, output_folder, read_json, write_json
from vlaft.model.load import write_policy_files
from vlaft.observation.images import recorded
from vlaft.observation.prompts import preprocessor_of
from vlaft.release.record import base_licence, training_record
from vlaft.weights.layout import (
    INDEX_FILE,
    RELEASE_FILES,
    TensorEntry,
    expecting,
    fingerprint,
    tensor_table,
)
from vlaft.weights.stream import DTYPES, Scratch, ShardWriter, read_rows, read_tensor
from vlaft.weights.trained import ADAPTER_WEIGHTS, Trained, check_base, statistics_of

MERGE_FILE = "merge.json"
DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_JSON_DTYPES = {short: name for name, short in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class MergeResult:
    """What a merge did.

    Attributes:
        folder: the merged checkpoint.
        tensors: number of tensors written.
        changed: number of those that training changed.
        bytes: size of the weights.
        rounding: what became of the learned change when it was rounded to the output's type.
    """

    folder: Path
    tensors: int
    changed: int
    bytes: int
    rounding: Rounding


def merge(
    trained: Trained,
    base: Path,
    out: Path,
    *,
    base_name: str | None = None,
    dtype: str | None = None,
    rounding: Mode = "nearest",
    overwrite: bool = False,
    advance: Callable[[int], None] = lambda count: None,
    check: Callable[[Path], Mapping[str, Any]] | None = None,
) -> MergeResult:
    """Write `base` with `trained` folded in to `out`.

    Args:
        trained: an adapter, whole tensors, or both.
        base: the base's local folder.
        out: written beside its place and renamed into it at the end.
        base_name: how the base was called, for the record.
        dtype: `float32`, `bfloat16` or `float16` of floating-point tensors; None keeps each tensor's own.
        rounding: how tensors that training changed are rounded to that type.
        overwrite: replace what is in `out`.
        advance: called with the number of bytes that were written.
        check: called with the finished folder before it is renamed into place; what it returns is kept in
            `merge.json` as `verified`, and when it raises, nothing is published.

    Raises:
        CheckpointError: the trained weights belong to another base, are merged into it already, or are damaged.
        VlaftError: `out` is in use, or holds something without `overwrite`, or there is too little room on the disk.
    """
    check_apart(out, [base, trained.weights])
    base_print = fingerprint(base)
    trained_print = weights_fingerprint(trained)
    _check_unmerged(trained, base, trained_print)
    check_base(trained, base, base_print)
    table = tensor_table(base)
    changed = changes(trained, base)
    dtypes = _output_types(table, dtype)
    total = tensor_bytes(table, dtypes)
    rounded = Rounding(rounding)
    with output_folder(out, total, overwrite=overwrite) as folder:
        copy_tensors(base, folder, dtypes, changed, advance, rounded, trained.base_checksums)
        copy_release_files(base, folder)
        write_policy_files(folder, policy_tensors(trained, base))
        _write_config(base, folder, trained, checkpoint_dtype(dtypes))
        record = {
            "base": base_name or str(base),
            "base_fingerprint": base_print,
            "base_licence": base_licence(base_name or str(base), base),
            "trained": str(trained.weights.name),
            "trained_fingerprint": trained_print,
            "recipe": trained.recipe,
            "training": training_record(trained),
            "rounding": rounded.to_json(),
            "verified": dict(check(folder)) if check else None,
            "earlier": merge_record(base),
        }
        write_json(folder / MERGE_FILE, record)
    return MergeResult(out, len(table), len(changed), total, rounded)


def weights_fingerprint(trained: Trained) -> str:
    """Return a short hash of the trained weights' files."""
    digest = hashlib.sha256()
    adapter = [trained.weights / ADAPTER_WEIGHTS] if trained.has_adapter else []
    for path in [*adapter, *trained.tensors().files]:
        try:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()[:32]


def merge_record(folder: Path) -> dict[str, Any] | None:
    """Return what `merge` recorded of a checkpoint, or None for one that it did not write."""
    return read_json(folder / MERGE_FILE, CheckpointError) if (folder / MERGE_FILE).is_file() else None


def _check_unmerged(trained: Trained, base: Path, trained_print: str) -> None:
    record = merge_record(base)
    while isinstance(record, dict):
        if record.get("trained_fingerprint") == trained_print:
            raise CheckpointError(f"{base}: '{trained.weights.name}' is merged into this checkpoint already")
        record = record.get("earlier")


def merged_bytes(base: Path, dtype: str | None = None) -> int:
    """Return the bytes of weights that merging into `base` writes, as `dtype` or in the types that they have."""
    table = tensor_table(base)
    return tensor_bytes(table, _output_types(table, dtype))


def _output_types(table: Mapping[str, TensorEntry], dtype: str | None) -> dict[str, str]:
    return {
        name: DTYPE_NAMES[dtype] if dtype and entry.dtype in _JSON_DTYPES else entry.dtype
        for name, entry in table.items()
    }


def tensor_bytes(table: Mapping[str, TensorEntry], dtypes: Mapping[str, str]) -> int:
    """Return the bytes that tensors of these shapes and types take."""
    return sum(torch.Size(entry.shape).numel() * DTYPES[dtypes[name]].itemsize for name, entry in table.items())


def copy_tensors(
    source: Path,
    target: Path,
    dtypes: Mapping[str, str],
    changed: Mapping[str, Change] | None = None,
    advance: Callable[[int], None] = lambda count: None,
    rounding: Rounding | None = None,
    checksums: str | None = None,
) -> None:
    """Stream a checkpoint's tensors into shards of the same names in `target`, with the index.

    Args:
        source: a checkpoint's folder.
        target: an existing folder.
        dtypes: type of each tensor in the output, by safetensors' names.
        changed: what replaces or changes single tensors.
        advance: called with the number of bytes that were written.
        rounding: rounds the tensors that `changed` names; None does so to the nearest number.
        checksums: what the source's tensors have to be, as `tensor_checksums` returned it; None where nothing says.

    Raises:
        CheckpointError: a tensor cannot be read, or does not match its checksum.
    """
    table = tensor_table(source)
    if checksums is not None:
        table = expecting(table, source, checksums)
    scratch, rounding = Scratch(), rounding or Rounding()
    by_file: dict[str, list[str]] = {}
    for name, entry in table.items():
        by_file.setdefault(entry.file, []).append(name)
    for file, names in by_file.items():
        layout = {name: (dtypes[name], table[name].shape) for name in names}
        # Blocks are small: one thread computes while another writes, and more would only wait for each other.
        with _one_thread(), ShardWriter(target / file, layout) as writer:
            for name in names:
                change = (changed or {}).get(name)
                _write_tensor(writer, name, source, table[name], dtypes[name], change, scratch, rounding)
                advance(torch.Size(table[name].shape).numel() * DTYPES[dtypes[name]].itemsize)
    if (source / INDEX_FILE).is_file():
        weight_map = {name: table[name].file for name in sorted(table)}
        total = tensor_bytes(table, dtypes)
        write_json(target / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _write_tensor(
    writer: ShardWriter,
    name: str,
    source: Path,
    entry: TensorEntry,
    dtype: str,
    change: Change | None,
    scratch: Scratch,
    rounding: Rounding,
) -> None:
    kind = DTYPES[dtype]
    made = change.load() if change is not None else None
    if made is None and dtype == entry.dtype:
        writer.write_rows(name, (block for _, block in read_rows(source, entry, scratch)))
        return
    if isinstance(made, ModuleAdapter) and not made.by_rows:
        made = made.merged(read_tensor(source, entry).float())
    writer.write_rows(name, _blocks(source, entry, kind, made, scratch, rounding, rounding.generator(name)))


def _blocks(
    source: Path,
    entry: TensorEntry,
    kind: torch.dtype,
    change: ModuleAdapter | Tensor | None,
    scratch: Scratch,
    rounding: Rounding,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    """Yield a tensor's blocks of rows in another type, or as training changed them; each in the memory of the last.

    Sums are taken in float32 and rounded once, also where the output is wider than the base.
    """
    for first, block in read_rows(source, entry, scratch):
        shape = tuple(block.shape)
        out = scratch.take("write", kind, shape)
        if change is None:
            out.copy_(block)
        elif isinstance(change, Tensor):
            rounding.round(change.view(entry.shape or (1,))[first : first + len(block)], block, out, scratch, generator)
        else:
            total = scratch.take("sum", torch.float32, shape).copy_(block)
            change.rows(first, first + len(block)).add_to(total)
            rounding.round(total, block, out, scratch, generator)
        yield out


def checkpoint_dtype(dtypes: Mapping[str, str]) -> str | None:
    """Return the one floating-point type of a checkpoint as `config.json` names it, or None where it has several."""
    kinds = {dtype for dtype in dtypes.values() if dtype in _JSON_DTYPES}
    return _JSON_DTYPES[kinds.pop()] if len(kinds) == 1 else None


def copy_release_files(source: Path, target: Path) -> None:
    """Copy tokenizer, processor and generation settings, where `source` has them."""
    for name in RELEASE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _write_config(base: Path, target: Path, trained: Trained, dtype: str | None) -> None:
    config = read_json(base / "config.json", CheckpointError) | dict(trained.inference)
    statistics = statistics_of(trained, base, config)
    config = recorded(config, preprocessor_of(base), statistics)
    if isinstance(pipeline := config.get("image_pipeline"), Mapping):
        config["center_crop"] = bool(pipeline.get("center_crop"))  # in the open, for upstream's code
    if statistics:
        config["norm_stats"] = statistics
        write_json(target / STATISTICS_FILE, statistics)
    if dtype is not None:
        config["torch_dtype"] = dtype
        if isinstance(config.get("text_config"), dict) and "torch_dtype" in config["text_config"]:
            config["text_config"] = config["text_config"] | {"torch_dtype": dtype}
    write_json(target / "config.json", config)
