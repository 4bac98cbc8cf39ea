"""Rewrite a merged checkpoint in the release's layout, and look at the result.

The folder has the names, keys and config fields of `openvla/openvla-7b`, so that upstream's code, vLLM and vlaft
load it. Upstream's Python files are not part of it: `auto_map` points at the Hub repository that has them, for
those who load with remote code.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vlaft.data.images import ImagePipeline
from vlaft.data.statistics import check_statistics
from vlaft.errors import CheckFailed, CheckpointError
from vlaft.merge import DTYPE_NAMES, MERGE_FILE, checkpoint_dtype, copy_release_files, copy_tensors
from vlaft.model.checkpoint import check_tensors, load_config, read_json, tensor_table
from vlaft.output_folder import output_folder
from vlaft.trained import STATISTICS_FILE, is_trained, write_json

_CODE_REPOSITORY = "openvla/openvla-7b"
_AUTO_MAP = {
    "AutoConfig": "configuration_prismatic.OpenVLAConfig",
    "AutoModelForVision2Seq": "modeling_prismatic.OpenVLAForActionPrediction",
}


def export_huggingface(
    source: Path, out: Path, *, dtype: str | None = None, advance: Callable[[int], None] = lambda count: None
) -> None:
    """Write the checkpoint `source` to `out` in the release's layout, tensor by tensor.

    Args:
        source: a merged checkpoint or a base.
        out: written beside its place and renamed into it at the end.
        dtype: `float32`, `bfloat16` or `float16`; None keeps each tensor's own.
        advance: called with the number of bytes that were written.

    Raises:
        CheckpointError: `source` is no plain checkpoint, or lacks statistics or a tokenizer.
        CheckFailed: the exported folder is not what it should be.
        VlaftError: too little room on the disk.
    """
    if is_trained(source):
        raise CheckpointError(f"{source} is not merged yet; run: vlaft merge {source} --out {source}-merged")
    config = read_json(source / "config.json")
    statistics = read_json(source / STATISTICS_FILE) if (source / STATISTICS_FILE).is_file() else None
    statistics = statistics or config.get("norm_stats")
    if not statistics:
        raise CheckpointError(
            f"{source}: neither {STATISTICS_FILE} nor norm_stats in config.json, so its actions have no units;"
            f" put the {STATISTICS_FILE} of the training data there"
        )
    check_statistics(statistics, str(source))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (source / name).is_file():
            raise CheckpointError(f"{source}: {name} is missing; copy it from the base")
    table = tensor_table(source)
    dtypes = {name: DTYPE_NAMES[dtype] if dtype else entry.dtype for name, entry in table.items()}
    with output_folder(out, sum(entry.end - entry.begin for entry in table.values())) as partial:
        copy_tensors(source, partial, dtypes, advance=advance)
        copy_release_files(source, partial)
        write_json(partial / "config.json", _release_config(source, config, statistics, checkpoint_dtype(dtypes)))
        write_json(partial / STATISTICS_FILE, statistics)
        _fill_in(partial, config)
        if (source / MERGE_FILE).is_file():
            write_json(partial / MERGE_FILE, read_json(source / MERGE_FILE))
        _check(partial, dtypes)


def _release_config(source: Path, config: dict[str, Any], statistics: Any, dtype: str | None) -> dict[str, Any]:
    auto_map = dict(config.get("auto_map") or _AUTO_MAP)
    for key, reference in auto_map.items():
        if "--" not in reference and not (source / f"{reference.split('.')[0]}.py").is_file():
            auto_map[key] = f"{_CODE_REPOSITORY}--{reference}"
    return (
        config
        | {"architectures": ["OpenVLAForActionPrediction"], "auto_map": auto_map, "norm_stats": statistics}
        | ({"torch_dtype": dtype} if dtype else {})
    )


def _fill_in(folder: Path, config: dict[str, Any]) -> None:
    """Write what a release has and this checkpoint lacks."""
    if not (folder / "generation_config.json").is_file():
        pad = config.get("pad_token_id", 32000)
        write_json(
            folder / "generation_config.json",
            {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": pad},
        )
    if not (folder / "preprocessor_config.json").is_file():
        write_json(folder / "preprocessor_config.json", preprocessor_config(config))


def preprocessor_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return `preprocessor_config.json` with the release's keys, for a `config.json` that came without one."""
    pipeline = ImagePipeline.from_checkpoint(config | {"image_pipeline": None})
    letterbox = pipeline.strategy == "letterbox"
    size, count = pipeline.size, len(pipeline.means)
    resize = {
        "antialias": True,
        "interpolation": 3,
        "max_size": None,
        "size": size if letterbox else [size, size],
    }
    return {
        "image_processor_type": "PrismaticImageProcessor",
        "image_resize_strategy": pipeline.strategy,
        "input_sizes": [[3, size, size]] * count,
        "interpolations": ["bicubic"] * count,
        "means": pipeline.means,
        "stds": pipeline.stds,
        "processor_class": "PrismaticProcessor",
        "tvf_crop_params": [{"output_size": [size, size]}] * count,
        "tvf_do_letterbox": letterbox,
        "tvf_letterbox_fill": list(pipeline.letterbox_fill) if letterbox else None,
        "tvf_normalize_params": [
            {"inplace": False, "mean": mean, "std": std}
            for mean, std in zip(pipeline.means, pipeline.stds, strict=True)
        ],
        "tvf_resize_params": [resize] * count,
        "use_fused_vision_backbone": count == 2,
    }


def _check(folder: Path, dtypes: dict[str, str]) -> None:
    """Open the exported folder as a stranger would and hold it against the model that its config describes."""
    from vlaft.model.openvla import OpenVLAForActionPrediction

    table = tensor_table(folder)
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(load_config(folder))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    try:
        check_tensors({name: entry.shape for name, entry in table.items()}, expected, str(folder))
    except CheckpointError as error:
        raise CheckFailed(f"the exported folder is not right: {error}") from None
    if wrong := [name for name, entry in table.items() if entry.dtype != dtypes[name]]:
        raise CheckFailed(f"the exported folder is not right: '{wrong[0]}' is of type {table[wrong[0]].dtype}")
