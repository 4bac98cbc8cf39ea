"""From a checkpoint's folder, or a released base's sizes, to a model."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlaft.errors import CheckpointError, MissingExtra
from vlaft.files import read_json
from vlaft.model.configuration import OpenVLAConfig, Policy
from vlaft.weights.layout import TensorEntry, check_tensors, plain_shapes, resolve_checkpoint, tensor_table
from vlaft.weights.trained import POLICY_PARTS, policy_part

_LLAMA_2_7B = {"model_type": "llama", "pad_token_id": 32000, "vocab_size": 32064}

# The released bases, described without a download: what `report` counts and `doctor` names. Weights, tokenizer and
# statistics come from the Hub.
BASES: dict[str, dict] = {
    "openvla/openvla-7b": {
        "dtype": "bfloat16",
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "llm_backbone_id": "llama2-7b-pure",
        "arch_specifier": "no-align+fused-gelu-mlp",
        "image_resize_strategy": "resize-naive",
        "text_config": _LLAMA_2_7B,
    },
    "openvla/openvla-v01-7b": {
        "dtype": "bfloat16",
        "vision_backbone_id": "siglip-vit-so400m",
        "llm_backbone_id": "vicuna-v15-7b",
        "arch_specifier": "no-align+gelu-mlp",
        "image_resize_strategy": "letterbox",
        "text_config": _LLAMA_2_7B,
    },
}


def base_config(base: str) -> OpenVLAConfig:
    """Return the configuration of a base: a local folder, one of `BASES` (no network), or another Hub repository.

    Raises:
        CheckpointError: no such folder or repository, or not an OpenVLA model.
    """
    if base in BASES and not Path(base).is_dir():
        return OpenVLAConfig(**BASES[base])
    return load_config(resolve_checkpoint(base, weights=False))


def load_config(folder: Path) -> Any:
    """Read `config.json` as an `OpenVLAConfig`.

    Raises:
        CheckpointError: not an OpenVLA configuration.
    """
    content = read_json(folder / "config.json", CheckpointError)
    if content.get("model_type") != "openvla":
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type is '{content.get('model_type')}', and only 'openvla' is supported"
        )
    try:
        return OpenVLAConfig.from_dict(content)
    except CheckpointError:
        raise
    except Exception as error:  # transformers' strict validation has kinds of its own
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{folder / 'config.json'}: {reason}") from None


def empty_model(folder: Path, *, quantization: Any = None) -> tuple[Any, dict[str, TensorEntry]]:
    """Build a checkpoint's model on the meta device, bare of a policy's modules, and hold its tensors against it.

    Args:
        folder: the checkpoint's folder.
        quantization: what it is to be quantised by; a checkpoint saved quantised cannot be.

    Returns:
        The model, whose parameters have shapes and no bytes, and where its tensors lie.

    Raises:
        MissingExtra: the checkpoint was saved quantised and bitsandbytes is not installed.
        CheckpointError: tensors missing, left over, or of another shape than the configuration says.
    """
    import torch

    from vlaft.model.openvla import OpenVLAForActionPrediction

    config = load_config(folder)
    config.policy = None  # its modules come after the weights, and say so themselves
    table = tensor_table(folder)
    try:
        with torch.device("meta"):
            model = OpenVLAForActionPrediction(config)
    except (TypeError, ValueError, LookupError, ArithmeticError, RuntimeError, AttributeError, AssertionError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: no model can be built from it ({error})") from None
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored = _stored_quantization(folder)
    if stored and quantization is not None:
        raise CheckpointError(f"{folder} is quantised already; give the checkpoint that it was made from")
    found = plain_shapes(table, expected) if stored else {name: entry.shape for name, entry in table.items()}
    check_tensors(found, expected, str(folder))
    return model, table


def load_model(
    folder: Path, *, dtype: Any = None, device: Any = "cpu", quantization: Any = None, bare: bool = False
) -> Any:
    """Load a checkpoint into `OpenVLAForActionPrediction`, in eval mode, every tensor accounted for.

    Args:
        folder: the checkpoint's folder.
        dtype: torch dtype of the weights; None keeps what is stored.
        device: where to put them.
        quantization: a transformers quantization config, or None; a checkpoint saved quantised needs none.
        bare: of a policy with modules of its own, the model without them, which adapters go into before they come.

    Raises:
        MissingExtra: the checkpoint was saved quantised and bitsandbytes is not installed.
        CheckpointError: tensors missing, left over, or of another shape than the configuration says.
    """
    from safetensors import SafetensorError
    from transformers.utils import logging

    from vlaft.model.openvla import OpenVLAForActionPrediction

    empty, _ = empty_model(folder, quantization=quantization)
    config = empty.config
    stored, policy = _stored_quantization(folder), load_config(folder).policy
    del empty
    quantized = stored or quantization is not None
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # the caller has its own
    try:
        model = OpenVLAForActionPrediction.from_pretrained(
            folder,
            config=config,
            dtype=dtype if dtype is not None and not stored else "auto",
            device_map={"": device} if quantized else None,
            quantization_config=quantization,
            use_safetensors=True,
            local_files_only=True,
        )
    except SafetensorError as error:
        raise CheckpointError(f"{folder}: the weights are damaged ({error})") from None
    except OSError as error:
        raise CheckpointError(f"{folder}: the weights cannot be read ({error.strerror or error})") from None
    finally:
        if bar:
            logging.enable_progress_bar()
    if stored and dtype is not None:  # transformers leaves what is not quantised as it lies there
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    if not quantized:
        model = model.to(device)
    if policy and not bare:
        model.attach(Policy.of({"policy": policy}, str(folder / "config.json")))
        fill_policy(model, read_policy_files(folder), str(folder))
    return model.eval()


def read_policy_files(folder: Path) -> dict[str, Any]:
    """Return a policy's own tensors from their files beside the weights, by their names in the model.

    Raises:
        CheckpointError: a file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, Any] = {}
    for part in POLICY_PARTS:
        file = folder / f"{part}.safetensors"
        try:
            found = load_file(file) if file.is_file() else {}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: cannot be read ({error}); copy or download the checkpoint again") from None
        tensors |= {name if part == "film" else f"{part}.{name}": tensor for name, tensor in found.items()}
    return tensors


def write_policy_files(folder: Path, tensors: Mapping[str, Any]) -> None:
    """Write a policy's own tensors as `read_policy_files` reads them, in the names that OpenVLA-OFT's modules have."""
    from safetensors.torch import save_file

    for part in POLICY_PARTS:
        found = {name: tensor for name, tensor in tensors.items() if policy_part(name) == part}
        if found:
            plain = {name if part == "film" else name.removeprefix(f"{part}."): found[name] for name in found}
            save_file(plain, folder / f"{part}.safetensors", metadata={"format": "pt"})


def fill_policy(model: Any, tensors: Mapping[str, Any], where: str) -> None:
    """Put a policy's own tensors into a model that they were attached to, in float32.

    Raises:
        CheckpointError: one is missing, left over, or of another shape.
    """
    parameters = model.policy_parameters()
    check_tensors(
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        {name: tuple(parameter.shape) for name, parameter in parameters.items()},
        where,
    )
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[name])


def _stored_quantization(folder: Path) -> bool:
    """Say whether the checkpoint was saved quantised.

    Raises:
        CheckpointError: by something else than bitsandbytes.
        MissingExtra: bitsandbytes is not installed.
    """
    settings = read_json(folder / "config.json", CheckpointError).get("quantization_config")
    if not settings:
        return False
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    if method != "bitsandbytes":
        raise CheckpointError(f"{folder / 'config.json'}: quantised by '{method}'; only bitsandbytes can be read")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtra(f"{folder} is quantised, and loading it", "bitsandbytes", "qlora")
    return True
