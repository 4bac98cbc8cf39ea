"""Write a policy as OpenVLA-OFT's own code expects it: its folder, file for file, with the names that it loads.

What upstream has in flags stays in flags: it takes chunk length, action size and normalisation from constants of a
platform, and the rest from options (docs/export.md). `config.json` says it here besides, for vlaft to read.

The files of head, state's projector and backbone are pickled, because upstream reads nothing else: a dict of tensors,
which `torch.load` with `weights_only` takes back.
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlaft.adapt.policies import import_oft, weights_of
from vlaft.errors import CheckFailed, CheckpointError
from vlaft.files import check_apart, output_folder, read_json, write_json
from vlaft.model.load import read_policy_files
from vlaft.recipe.settings import LORA_TARGETS
from vlaft.release.export import (
    ExportResult,
    check_policy_files,
    check_weights,
    compare_with_source,
    finish,
    policy_bytes,
    stored_bytes,
)
from vlaft.release.layout import CONFIG_MAP, Source, copy_licence, open_source, policy_files, write_release_files
from vlaft.release.merge import checkpoint_dtype, copy_tensors, tensor_bytes
from vlaft.release.verify import Comparison
from vlaft.weights.layout import TensorEntry, tensor_table
from vlaft.weights.oft import OftFolder, file_name, wrapped_vision
from vlaft.weights.stream import read_tensor
from vlaft.weights.trained import policy_part

RANK = 32  # of the empty adapters beside a backbone with FiLM: upstream's default, which its loader has to be given
_VISION = "vision_backbone."


def export_oft(
    folder: Path, out: Path, *, overwrite: bool = False, advance: Callable[[int], None] = lambda count: None
) -> ExportResult:
    """Write the policy in `folder` to `out` as OpenVLA-OFT's code reads it.

    Args:
        folder: a merged policy that writes all its actions at once.
        out: written beside its place and renamed into it at the end.
        overwrite: replace what is in `out`.
        advance: called with the number of bytes that were written.

    Raises:
        CheckpointError: `folder` is no such policy, or lacks statistics or a tokenizer.
        CheckFailed: read back, the exported folder is not what it should be.
        VlaftError: `out` is in use, or holds something without `overwrite`, or there is too little room on the disk.
    """
    check_apart(out, [folder])
    source = open_source(folder)
    policy = source.policy
    if not policy.parallel:
        raise CheckpointError(
            f"{folder} writes token after token, as the released OpenVLA does, and OpenVLA-OFT's code only knows"
            " policies that write all at once: export it --to huggingface"
        )
    lacking = [name for name, entry in source.statistics.items() if policy.state and "proprio" not in entry]
    if lacking:
        raise CheckpointError(f"{folder}: the statistics of '{lacking[0]}' say nothing of the state, which it reads")
    table, step = tensor_table(folder), _step(source)
    dtypes = {name: entry.dtype for name, entry in table.items()}
    modules, vision = policy_bytes(folder), {name: entry for name, entry in table.items() if name.startswith(_VISION)}
    weights = tensor_bytes(table, dtypes)
    size = weights + modules + (stored_bytes(vision.values()) if policy.film else 0)
    shards = {entry.file for entry in vision.values()} if policy.film else set()  # written again to be read back
    needed = size + modules + sum((folder / file).stat().st_size for file in shards)
    with output_folder(out, needed, overwrite=overwrite) as partial:
        copy_tensors(folder, partial, dtypes, advance=advance)
        write_release_files(source, partial, checkpoint_dtype(dtypes))
        for path in policy_files(partial):
            path.unlink()
        _name_code(partial)
        own = read_policy_files(folder)
        for part in ("action_head", "proprio_projector"):
            tensors = {f"module.{key.removeprefix(f'{part}.')}": own[key] for key in own if policy_part(key) == part}
            if tensors:
                _save(partial / file_name(part, step), tensors)
        if policy.film:
            film = {name: tensor for name, tensor in own.items() if policy_part(name) == "film"}
            _save(partial / file_name("vision_backbone", step), _backbone(folder, vision, film))
        check_weights(partial, dtypes, own=False)
        comparison = _compare(source, partial, table, size)
        finish(source, partial, "oft", comparison)
        size = weights + sum(path.stat().st_size for path in OftFolder.open(partial).files.values())
    return ExportResult(out, size, stored_bytes(table.values()) + modules, comparison)


def merged_oft_bytes(folder: Path, base: str | None = None) -> int:
    """Return about how many bytes of weights `merge_oft` writes."""
    return stored_bytes(tensor_table(weights_of(OftFolder.open(folder), base)).values())


def merge_oft(
    folder: Path,
    out: Path,
    given: Mapping[str, Any],
    *,
    base: str | None = None,
    overwrite: bool = False,
    advance: Callable[[int], None] = lambda count: None,
) -> ExportResult:
    """Write a folder of OpenVLA-OFT's to `out` as a plain policy, which says itself what it reads and writes.

    Args:
        folder: OpenVLA-OFT's.
        out: written beside its place and renamed into it at the end.
        given: what the folder does not tell, by the names of `PolicyConfig`'s fields.
        base: of a folder without merged weights: folder or Hub id of the base, where its adapter names another.
        overwrite: replace what is in `out`.
        advance: called with the number of bytes that were written.

    Raises:
        CheckpointError, ConfigError: as `vlaft.adapt.policies.policy_folder`.
        CheckFailed: names or shapes are not those of the policy.
        VlaftError: `out` is in use, or holds something without `overwrite`, or there is too little room on the disk.
    """
    check_apart(out, [folder])
    size = merged_oft_bytes(folder, base)
    with output_folder(out, size, overwrite=overwrite) as partial:
        import_oft(str(folder), partial, given, base=base, advance=advance)
        table = tensor_table(partial)
        check_weights(partial, {name: entry.dtype for name, entry in table.items()})
        copy_licence(folder, partial)
        written = stored_bytes(table.values()) + policy_bytes(partial)
    return ExportResult(out, written, size)


def _step(source: Source) -> str:
    """Return the number that upstream's names have: the step of the run's checkpoint, or `latest`."""
    training = (source.merge_record or {}).get("training")
    checkpoint = str(training.get("checkpoint")) if isinstance(training, Mapping) else ""
    number = checkpoint.rpartition("-")[2]
    return str(int(number)) if number.isdecimal() else "latest"


def _name_code(folder: Path) -> None:
    """Name OpenVLA-OFT's own classes, whose files its loader copies into the folder."""
    config = read_json(folder / "config.json", CheckpointError)
    write_json(folder / "config.json", config | {"auto_map": CONFIG_MAP})


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Pickle a dict of tensors, as `torch.save` of a state dict does."""
    torch.save(OrderedDict((name, tensor.contiguous()) for name, tensor in tensors.items()), path)


def _backbone(folder: Path, vision: Mapping[str, TensorEntry], film: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a backbone with FiLM by upstream's names, each linear layer with the adapter that its loader puts there.

    The adapters are zero: what was learned is in the weights.
    """
    found: dict[str, Any] = {}
    for name, entry in vision.items():
        tensor = read_tensor(folder, entry)
        module, _, kind = wrapped_vision(name).rpartition(".")
        if module.rpartition(".")[2] not in LORA_TARGETS:
            found[f"{module}.{kind}"] = tensor
            continue
        found[f"{module}.base_layer.{kind}"] = tensor
        if kind == "weight":
            narrow = (1,) * (tensor.ndim - 2)  # of a convolution's B
            found[f"{module}.lora_A.default.weight"] = tensor.new_zeros(RANK, *tensor.shape[1:])
            found[f"{module}.lora_B.default.weight"] = tensor.new_zeros(tensor.shape[0], RANK, *narrow)
    return found | dict(film)


def _compare(source: Source, folder: Path, table: Mapping[str, TensorEntry], size: int) -> Comparison | None:
    """Read the folder back as one of OpenVLA-OFT's, with only what upstream's folders have, and let both act.

    Raises:
        CheckFailed: it is not the policy that it was made from.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".read-") as place:
        back = Path(place)
        try:
            import_oft(str(folder), back, link=True)
        except CheckpointError as error:
            raise CheckFailed(f"the exported folder is not right: {error}") from None
        check_policy_files(source, back)
        comparison = compare_with_source(source, back, table, size)
    if comparison is not None and not comparison.holds:
        raise CheckFailed(
            f"the exported folder does not answer as {source.folder} does: {comparison.identical_tokens} of"
            f" {comparison.tokens} values are the same; nothing was written"
        )
    return comparison
