"""A model server config for AllenAI's vla-evaluation-harness, which runs LIBERO, SimplerEnv and other simulators.

`vla-eval serve --config FILE`, called in a checkout of the harness, starts the harness's own OpenVLA server on an
exported checkpoint; `vla-eval run` then evaluates it. The file's members are the harness's: `script`, a path in its
checkout, and `args`, handed to that script's server class but for `port` and `host` (its configs/README.md and
configs/model_servers/openvla/).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from vlaft.action.statistics import choose_key, read_statistics
from vlaft.errors import CheckpointError
from vlaft.observation.images import ImagePipeline
from vlaft.observation.prompts import prompt_style_of
from vlaft.weights.layout import read_json

FILE_NAME = "vla_eval_server.yaml"
_SCRIPT = "src/vla_eval/model_servers/openvla.py"
_IMAGE_SIZE = 224
_ACTION_SIZE = 7


def write_server_config(folder: Path, *, model_path: str | None = None, unnorm_key: str | None = None) -> Path:
    """Write `vla_eval_server.yaml` into an exported checkpoint, and return its path.

    Args:
        folder: the checkpoint in the release's layout.
        model_path: where the harness shall find it: a folder or a name on the Hub; None is the name of `folder`
            without the way to it, which is of no use on another machine and nobody's business there.
        unnorm_key: name of the statistics; needed only where there are several.

    Raises:
        CheckpointError: the harness's OpenVLA server would use this checkpoint otherwise than it was trained.
        DataError: the statistics are missing, or hold several datasets and none is named.
    """
    config = read_json(folder / "config.json")
    preprocessor = folder / "preprocessor_config.json"
    pipeline = ImagePipeline.from_checkpoint(config, read_json(preprocessor) if preprocessor.is_file() else None)
    statistics = read_statistics(folder)
    key = choose_key(statistics, unnorm_key)
    if reason := _misfit(config, pipeline, len(statistics[key]["action"]["q01"])):
        raise CheckpointError(f"{folder}: vla-evaluation-harness cannot serve this checkpoint, {reason}")
    path = folder / FILE_NAME
    text = server_config(model_path or folder.resolve().name, key, center_crop=pipeline.center_crop)
    path.write_text(text, encoding="utf-8")
    return path


def server_config(model_path: str, unnorm_key: str, *, center_crop: bool, port: int = 8000) -> str:
    """Return the YAML text for the harness's OpenVLA server.

    Raises:
        CheckpointError: a name holds `${`, which the harness would read as a reference.
    """
    for text in (model_path, unnorm_key):
        if "${" in text:
            raise CheckpointError(f"'{text}' holds '${{', which vla-evaluation-harness would replace; rename it")
    arguments: dict[str, Any] = {"model_path": model_path, "unnorm_key": unnorm_key}
    if center_crop:
        arguments["center_crop"] = True
    value = {"script": _SCRIPT, "args": arguments | {"chunk_size": 1, "port": port}}
    head = (
        "# Model server config for github.com/allenai/vla-evaluation-harness; in a checkout of it:\n"
        "#   vla-eval serve --config THIS_FILE, then vla-eval run --config configs/<benchmark>.yaml\n"
        "# model_path is a name on the Hub, or this folder as seen from that checkout: put its place there.\n"
    )
    return head + yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def _misfit(config: Mapping[str, Any], pipeline: ImagePipeline, action_size: int) -> str | None:
    """Say where the harness's server differs from the checkpoint's training (as its openvla.py is written)."""
    if config.get("quantization_config"):
        return (
            "which is quantised: its server moves the loaded model, and transformers 4.40.1 refuses that; use bfloat16"
        )
    if prompt_style_of(config) != "openvla":
        return f"whose prompt style is {prompt_style_of(config)}: its server knows OpenVLA's prompt alone"
    if pipeline.size != _IMAGE_SIZE or pipeline.strategy != "resize-naive":
        return (
            f"which takes images of {pipeline.size} pixels by {pipeline.strategy}:"
            f" its server resizes to {_IMAGE_SIZE} pixels without letterbox"
        )
    if action_size != _ACTION_SIZE:
        return (
            f"whose actions have {action_size} numbers: its server takes position, rotation and gripper, {_ACTION_SIZE}"
        )
    return None
