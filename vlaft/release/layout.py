"""The files of a release beside its weights: configurations with every field that upstream's code and vLLM look for.

Upstream's Python files are not part of it: `auto_map` points at the Hub repository that has them, for those who load
with remote code.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlaft.action.statistics import STATISTICS_FILE, check_statistics
from vlaft.errors import CheckpointError
from vlaft.files import read_json, write_json
from vlaft.model.configuration import Policy
from vlaft.model.load import load_config
from vlaft.observation.images import ImagePipeline, recorded
from vlaft.observation.prompts import preprocessor_of
from vlaft.release.merge import MERGE_FILE, copy_release_files, merge_record
from vlaft.weights.layout import is_hub_name
from vlaft.weights.trained import POLICY_PARTS, is_trained, statistics_of

_CODE_REPOSITORY = "openvla/openvla-7b"
CONFIG_MAP = {
    "AutoConfig": "configuration_prismatic.OpenVLAConfig",
    "AutoModelForVision2Seq": "modeling_prismatic.OpenVLAForActionPrediction",
}
_PREPROCESSOR_MAP = {
    "AutoImageProcessor": "processing_prismatic.PrismaticImageProcessor",
    "AutoProcessor": "processing_prismatic.PrismaticProcessor",
}
# Of preprocessor_config.json: what upstream's processor does to a frame that is not of the model's size yet.
_RESIZE_KEYS = ("image_resize_strategy", "tvf_do_letterbox", "tvf_letterbox_fill", "tvf_resize_params")
_TOKENIZER_MAP = {"AutoProcessor": "processing_prismatic.PrismaticProcessor"}
_CONFIG_FIELDS = (
    "arch_specifier",
    "hf_llm_id",
    "image_resize_strategy",
    "image_sizes",
    "llm_backbone_id",
    "llm_max_length",
    "n_action_bins",
    "output_projector_states",
    "pad_to_multiple_of",
    "pad_token_id",
    "timm_model_ids",
    "use_fused_vision_backbone",
    "vision_backbone_id",
)
_LLM_IDS = {
    "llama2-7b-pure": "meta-llama/Llama-2-7b-hf",
    "llama2-13b-pure": "meta-llama/Llama-2-13b-hf",
    "llama2-7b-chat": "meta-llama/Llama-2-7b-chat-hf",
    "llama2-13b-chat": "meta-llama/Llama-2-13b-chat-hf",
    "vicuna-v15-7b": "lmsys/vicuna-7b-v1.5",
    "vicuna-v15-13b": "lmsys/vicuna-13b-v1.5",
}
_TRANSFORMERS = "4.40.1"  # upstream's, which wrote the release


@dataclass(frozen=True)
class Source:
    """A checkpoint to export, looked through beforehand.

    Attributes:
        folder: where it is.
        config: its `config.json`.
        statistics: its dataset statistics.
    """

    folder: Path
    config: Mapping[str, Any]
    statistics: Mapping[str, Any]

    @property
    def policy(self) -> Policy:
        """What it reads and writes."""
        return Policy.of(self.config, str(self.folder / "config.json"))

    @property
    def merge_record(self) -> dict[str, Any] | None:
        """What `vlaft merge` recorded, or None for a checkpoint that it did not write."""
        return merge_record(self.folder)


def open_source(folder: Path) -> Source:
    """Look through a checkpoint before it is exported.

    Raises:
        CheckpointError: it is no plain checkpoint, or lacks statistics or a tokenizer.
    """
    if is_trained(folder):
        raise CheckpointError(f"{folder} is not merged yet; run: vlaft merge {folder} --out {folder}-merged")
    load_config(folder)
    config = read_json(folder / "config.json", CheckpointError)
    if config.get("quantization_config"):
        raise CheckpointError(f"{folder} is quantised already; export the checkpoint that it was made from")
    statistics = statistics_of(None, folder, config)
    if not statistics:
        raise CheckpointError(
            f"{folder}: neither {STATISTICS_FILE} nor norm_stats in config.json, so its actions have no units;"
            f" put the {STATISTICS_FILE} of the training data there"
        )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: {name} is missing; copy it from the base")
    config = recorded(config, preprocessor_of(folder), statistics)
    return Source(folder, config, check_statistics(statistics, str(folder)))


def write_release_files(
    source: Source, target: Path, dtype: str | None, extra: Mapping[str, Any] | None = None
) -> None:
    """Write everything but the weights that are the released model's: a policy's own modules as they are.

    Args:
        source: the checkpoint.
        target: an existing folder.
        dtype: of the weights, for `torch_dtype`; None leaves what is there.
        extra: further keys of `config.json`.
    """
    copy_release_files(source.folder, target)
    for path in policy_files(source.folder):
        shutil.copyfile(path, target / path.name)
    config = release_config(source, dtype) | dict(extra or {})
    if source.policy != Policy():
        del config["auto_map"]  # upstream's code would read it as the released policy, and not say so
    write_json(target / "config.json", config)
    write_json(target / STATISTICS_FILE, source.statistics)
    if not (target / "generation_config.json").is_file():
        pad = config["pad_token_id"]
        content = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": pad}
        write_json(target / "generation_config.json", content | {"transformers_version": _TRANSFORMERS})
    preprocessor = target / "preprocessor_config.json"
    made = preprocessor_config(source.config)
    content = read_json(preprocessor, CheckpointError) if preprocessor.is_file() else made
    if isinstance(source.config.get("image_pipeline"), Mapping):  # what it was trained on, whatever its base says
        content |= {key: made[key] for key in _RESIZE_KEYS}
    write_json(preprocessor, content | {"auto_map": _auto_map(content, _PREPROCESSOR_MAP)})
    tokenizer = target / "tokenizer_config.json"
    content = read_json(tokenizer, CheckpointError)
    content.setdefault("processor_class", "PrismaticProcessor")
    write_json(tokenizer, content | {"auto_map": _auto_map(content, _TOKENIZER_MAP)})
    if (record := source.merge_record) is not None:
        write_json(target / MERGE_FILE, public_record(record))


def policy_files(folder: Path) -> list[Path]:
    """Return the files of a policy's own modules, beside the weights."""
    files = [folder / f"{part}.safetensors" for part in POLICY_PARTS]
    return [path for path in files if path.is_file()]


def release_config(source: Source, dtype: str | None) -> dict[str, Any]:
    """Return `config.json` with every field of the release (docs/upstream.md, Configuration)."""
    full = load_config(source.folder)
    fields: dict[str, Any] = {key: getattr(full, key) for key in _CONFIG_FIELDS}
    fields["hf_llm_id"] = fields["hf_llm_id"] or _LLM_IDS.get(fields["llm_backbone_id"])
    fields["timm_override_act_layers"] = [None] * len(fields["timm_model_ids"])
    fields["transformers_version"] = _TRANSFORMERS
    given = {key: value for key, value in source.config.items() if value is not None}
    config = fields | given
    text = dict(config.get("text_config") or {})
    text.setdefault("model_type", "llama")
    text.setdefault("vocab_size", int(full.text_config.vocab_size))
    text.setdefault("pad_token_id", config["pad_token_id"])
    # What transformers 5 calls `dtype` is `torch_dtype` to upstream's 4.40.1.
    stored = config.pop("dtype", None)
    name = dtype or config.get("torch_dtype") or stored
    text.pop("dtype", None)
    config |= {
        "architectures": ["OpenVLAForActionPrediction"],
        "auto_map": _auto_map(config, CONFIG_MAP),
        "model_type": "openvla",
        "norm_stats": dict(source.statistics),
    }
    if isinstance(config.get("image_pipeline"), Mapping):
        # In the open, where those who load the checkpoint by upstream's code find it as `config.center_crop`.
        pipeline = ImagePipeline.from_checkpoint(config)
        config |= {"center_crop": pipeline.center_crop, "image_resize_strategy": pipeline.strategy}
    if name:
        config["torch_dtype"] = text["torch_dtype"] = name
    return config | {"text_config": text}


def _auto_map(content: Mapping[str, Any], default: Mapping[str, str]) -> dict[str, str]:
    """Return references to upstream's code on the Hub, since its files are not copied."""
    found = content.get("auto_map")
    references = dict(found) if isinstance(found, Mapping) and found else dict(default)
    return {
        key: value if not isinstance(value, str) or "--" in value else f"{_CODE_REPOSITORY}--{value}"
        for key, value in references.items()
    }


def preprocessor_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `preprocessor_config.json` with the release's keys, for a `config.json` that came without one.

    Of the frames' pipeline it holds what upstream's processor knows: that resizes by bicubic and never crops.
    """
    pipeline = ImagePipeline.from_checkpoint(config)
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


def public_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a merge's record without the machine's paths."""
    earlier = record.get("earlier")
    return {
        **record,
        "base": public_name(str(record.get("base") or "")),
        "earlier": public_record(earlier) if isinstance(earlier, Mapping) else None,
    }


def public_name(base: str) -> str:
    """Return a base's name on the Hub as it is, and of a folder its last part."""
    return base if is_hub_name(base) else Path(base).name


def copy_licence(source: Path, target: Path) -> None:
    """Copy the licence texts that lie in a folder."""
    for path in sorted(source.glob("LICENSE*")):
        if path.is_file():
            shutil.copyfile(path, target / path.name)
