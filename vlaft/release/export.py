"""Rewrite a merged checkpoint in the release's layout, and look at the result.

The folder has the names, keys and config fields of `openvla/openvla-7b`, for upstream's code, vLLM and vlaft
to load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vlaft.adapt.policies import check_policy
from vlaft.errors import CheckFailed, CheckpointError, ConfigError
from vlaft.files import check_apart, output_folder, read_json
from vlaft.model.configuration import Policy
from vlaft.model.load import load_config, load_model, read_policy_files
from vlaft.release.card import write_model_card
from vlaft.release.layout import Source, copy_licence, open_source, policy_files, write_release_files
from vlaft.release.merge import DTYPE_NAMES, checkpoint_dtype, copy_tensors, tensor_bytes
from vlaft.release.verify import Comparison, compare, example_probe, round_parameters
from vlaft.weights.layout import TensorEntry, check_tensors, tensor_table
from vlaft.weights.stream import DTYPES

SMALL = 2_000_000_000  # bytes; up to this an export is also loaded and asked for actions
_FLOATS = frozenset(DTYPE_NAMES.values())


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote.

    Attributes:
        folder: the exported checkpoint.
        bytes: size of its weights.
        source_bytes: size of the weights that it was made from.
        comparison: how its answers compare with the source's, or None where it is too large to load for that.
    """

    folder: Path
    bytes: int
    source_bytes: int
    comparison: Comparison | None = None


def export_huggingface(
    folder: Path,
    out: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    advance: Callable[[int], None] = lambda count: None,
) -> ExportResult:
    """Write the checkpoint `folder` to `out` in the release's layout, tensor by tensor.

    Args:
        folder: a merged checkpoint or a base.
        out: written beside its place and renamed into it at the end.
        dtype: `float32`, `bfloat16` or `float16`; None keeps each tensor's own.
        overwrite: replace what is in `out`.
        advance: called with the number of bytes that were written.

    Raises:
        CheckpointError: `folder` is no plain checkpoint, or lacks statistics or a tokenizer.
        CheckFailed: the exported folder is not what it should be.
        VlaftError: `out` is in use, or holds something without `overwrite`, or there is too little room on the disk.
    """
    check_apart(out, [folder])
    source = open_source(folder)
    table = tensor_table(folder)
    dtypes = {
        name: DTYPE_NAMES[dtype] if dtype and entry.dtype in _FLOATS else entry.dtype for name, entry in table.items()
    }
    modules = policy_bytes(folder)
    size = tensor_bytes(table, dtypes) + modules
    with output_folder(out, size, overwrite=overwrite) as partial:
        copy_tensors(folder, partial, dtypes, advance=advance)
        write_release_files(source, partial, checkpoint_dtype(dtypes))
        check_weights(partial, dtypes)
        check_policy_files(source, partial)
        comparison = compare_with_source(source, partial, table, size)
        if comparison is not None and not comparison.holds:
            raise CheckFailed(
                f"the exported folder does not answer as {folder} does: {comparison.identical_tokens} of"
                f" {comparison.tokens} {comparison.compared} are the same; nothing was written"
            )
        finish(source, partial, "huggingface", comparison)
    return ExportResult(out, size, stored_bytes(table.values()) + modules, comparison)


def policy_bytes(folder: Path) -> int:
    """Return the bytes of a policy's own modules, which every export carries in full precision."""
    return sum(path.stat().st_size for path in policy_files(folder))


def check_policy_files(source: Source, folder: Path) -> None:
    """Hold what an exported policy reads and writes, and its modules number for number, against its source.

    Raises:
        CheckFailed: they are others.
    """
    before, after = read_policy_files(source.folder), read_policy_files(folder)
    if set(before) != set(after) or not all(torch.equal(before[name], after[name]) for name in before):
        raise CheckFailed("the exported folder is not right: the policy's own modules are not those of the source")
    written = Policy.of(read_json(folder / "config.json", CheckpointError), str(folder))
    try:
        check_policy(written, asdict(source.policy), str(folder))
    except ConfigError as error:
        raise CheckFailed(f"the exported folder is not right: {error.problems[0]}") from None


def stored_bytes(entries: Iterable[TensorEntry]) -> int:
    """Return the bytes that tensors take on disk."""
    return sum(entry.end - entry.begin for entry in entries)


def check_weights(folder: Path, dtypes: Mapping[str, str], *, own: bool = True) -> None:
    """Open an exported folder as a stranger would and hold it against the model that its config describes.

    Args:
        folder: in the release's layout, not quantised.
        dtypes: type of each tensor, by safetensors' names.
        own: hold a policy's own modules against it as well; False where they are not in our own layout.

    Raises:
        CheckFailed: names, shapes or types are not what they should be.
    """
    table = tensor_table(folder)
    try:
        check_tensors({name: entry.shape for name, entry in table.items()}, model_shapes(folder), str(folder))
        modules = {name: tuple(tensor.shape) for name, tensor in read_policy_files(folder).items()}
        if own:
            check_tensors(modules, policy_shapes(folder), str(folder))
    except CheckpointError as error:
        raise CheckFailed(f"the exported folder is not right: {error}") from None
    if wrong := [name for name, entry in table.items() if entry.dtype != dtypes[name]]:
        raise CheckFailed(f"the exported folder is not right: '{wrong[0]}' is of type {table[wrong[0]].dtype}")


def model_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors of the model that `config.json` describes."""
    from vlaft.model.openvla import OpenVLAForActionPrediction

    with torch.device("meta"):
        model = OpenVLAForActionPrediction(load_config(folder))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def policy_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the modules of its own that the policy in `config.json` has."""
    from vlaft.model.openvla import OpenVLAForActionPrediction

    config = load_config(folder)
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(config)
        if config.policy:
            model.attach(Policy.of({"policy": config.policy}, str(folder / "config.json")))
    return {name: tuple(parameter.shape) for name, parameter in model.policy_parameters().items()}


def compare_with_source(source: Source, folder: Path, table: Mapping[str, TensorEntry], size: int) -> Comparison | None:
    """Let source and export act on the same inputs, where both are small.

    Args:
        source: the checkpoint that was exported.
        folder: the export, which says itself how it is to be loaded.
        table: the source's tensors.
        size: bytes of the export's weights.
    """
    if max(size, stored_bytes(table.values())) > SMALL:
        return None
    written = tensor_table(folder)
    kinds = {entry.dtype for entry in written.values()}
    rounding = next((kind for kind in ("BF16", "F16") if kind in kinds), "F32")
    named = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    return compare(
        lambda: load_model(source.folder, dtype=torch.float32),
        lambda: load_model(folder, dtype=torch.float32),
        example_probe(None, source.folder),
        named[rounding],
        _rounding_of(table, written),
    )


def _rounding_of(table: Mapping[str, TensorEntry], written: Mapping[str, TensorEntry]) -> Callable[[Any], None] | None:
    """Return what rounds the source's parameters to the export's types; None where they are the same or quantised."""
    if set(table) != set(written) or all(table[name].dtype == entry.dtype for name, entry in written.items()):
        return None
    return partial(round_parameters, kinds={name: DTYPES[entry.dtype] for name, entry in written.items()})


def finish(source: Source, folder: Path, kind: str, comparison: Comparison | None) -> None:
    """Add the model card and the licence texts."""
    copy_licence(source.folder, folder)
    write_model_card(folder, kind, source.statistics, source.merge_record, source.config, comparison)
