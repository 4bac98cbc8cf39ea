"""The configuration of an OpenVLA checkpoint, field for field as `config.json` of the release has it.

Three keys are vlaft's own, all optional: `vision_overrides` (ViT sizes that replace what a timm id stands for;
how small models are described), `prompt_style` and `image_pipeline` (what training did to prompts and frames,
so that inference does the same).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, get_type_hints

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from vlaft.documents import WrongValue, read_as
from vlaft.errors import CheckpointError
from vlaft.recipe.settings import PolicyConfig

_LARGEST_SIZE = 2**20
_MOST_LAYERS = 1000
_LARGEST_IMAGE = 4096  # pixels a side
# What a `vision_backbone_id` stands for: image size per backbone, and timm ids in feature order
# (upstream's registry, without the CLIP and ImageNet backbones, which no released OpenVLA uses).
VISION_BACKBONES: dict[str, tuple[list[int], list[str]]] = {
    "dinov2-vit-l": ([224], ["vit_large_patch14_reg4_dinov2.lvd142m"]),
    "siglip-vit-so400m": ([224], ["vit_so400m_patch14_siglip_224"]),
    "siglip-vit-so400m-384px": ([384], ["vit_so400m_patch14_siglip_384"]),
    "dinosiglip-vit-so-224px": (
        [224, 224],
        ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
    ),
    "dinosiglip-vit-so-384px": (
        [384, 384],
        ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_384"],
    ),
}


@dataclass(frozen=True)
class _TextSizes:
    """What of `text_config` decides how large the language model is; Llama 2's defaults stand for what is missing."""

    vocab_size: int = 32064
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None

    def __post_init__(self) -> None:
        """Refuse what no language model has."""
        sizes = (self.vocab_size, self.hidden_size, self.intermediate_size, self.num_attention_heads)
        if not all(1 <= size <= _LARGEST_SIZE for size in sizes) or (self.num_key_value_heads or 1) < 1:
            raise ValueError(f"its sizes must be from 1 to {_LARGEST_SIZE}")
        if not 1 <= self.num_hidden_layers <= _MOST_LAYERS:
            raise ValueError(f"num_hidden_layers must be from 1 to {_MOST_LAYERS}, not {self.num_hidden_layers}")


@dataclass(frozen=True)
class _Numbers:
    """The numbers of `config.json` that shapes and loops depend on."""

    image_sizes: list[int] | None
    llm_max_length: int
    pad_to_multiple_of: int
    n_action_bins: int
    text_config: _TextSizes | None

    def __post_init__(self) -> None:
        """Refuse what no image and no vocabulary has."""
        if not all(1 <= size <= _LARGEST_IMAGE for size in self.image_sizes or ()):
            raise ValueError(f"image_sizes must be from 1 to {_LARGEST_IMAGE} pixels")
        if self.pad_to_multiple_of < 0 or self.n_action_bins < 2 or self.llm_max_length < 1:
            raise ValueError("pad_to_multiple_of, n_action_bins or llm_max_length is too small")


@dataclass(frozen=True)
class Policy(PolicyConfig):
    """What a policy reads and writes, and the sizes that the data gave it: `policy` in `config.json`.

    Attributes:
        action_size: A; None where the statistics tell.
        state_size: S; None where no state is read.
    """

    action_size: int | None = None
    state_size: int | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str) -> Policy:
        """Return what a `config.json` says, or what the released OpenVLA does where it says nothing.

        Raises:
            CheckpointError: a key holds what it cannot, or a size is missing; the sentence begins with `where`.
        """
        try:
            policy = read_as(cls, config.get("policy") or {}, "policy")
        except WrongValue as error:
            raise CheckpointError(f"{where}: {error}") from None
        if (policy.head == "l1" and not policy.action_size) or (policy.state and not policy.state_size):
            missing = "action_size" if policy.head == "l1" and not policy.action_size else "state_size"
            raise CheckpointError(f"{where}: policy.{missing} is missing, which its modules need")
        return policy


class OpenVLAConfig(PretrainedConfig):
    """Configuration of `OpenVLAForActionPrediction`; defaults are those of upstream's config class.

    Attributes:
        vision_backbone_id: key of `VISION_BACKBONES`.
        use_fused_vision_backbone: two ViTs side by side; None means "as the id says".
        image_sizes: side of the square input in pixels, one per ViT.
        timm_model_ids: one per ViT, in feature order.
        vision_overrides: one dict per ViT with sizes that replace those of its timm id, or None.
        text_config: the language model's configuration (Llama).
        n_action_bins: number of action tokens, the last ids of the vocabulary before padding.
        norm_stats: dataset statistics by dataset name, in OpenVLA's layout.
        prompt_style: `openvla` or `vicuna`; None means "as the language model's id says".
        image_pipeline: how training prepared frames, or None for what `preprocessor_config.json` says.
        policy: what it reads and writes (fields of `Policy`), or None for what the released OpenVLA does.
    """

    model_type = "openvla"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}

    vision_backbone_id: str = "siglip-vit-so400m"
    llm_backbone_id: str = "vicuna-v15-7b"
    arch_specifier: str = "no-align+gelu-mlp"
    use_fused_vision_backbone: bool | None = None
    image_resize_strategy: str = "letterbox"
    image_sizes: list | None = None
    timm_model_ids: list | None = None
    timm_override_act_layers: list | None = None
    vision_overrides: list | None = None
    text_config: Any = None
    llm_max_length: int = 2048
    pad_token_id: int | None = 32000
    pad_to_multiple_of: int = 64
    output_projector_states: bool = False
    hf_llm_id: str | None = None
    n_action_bins: int = 256
    norm_stats: dict | None = None
    prompt_style: str | None = None
    image_pipeline: dict | None = None
    policy: dict | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.vision_backbone_id not in VISION_BACKBONES:
            raise CheckpointError(
                f"config.json: vision_backbone_id '{self.vision_backbone_id}' is not supported"
                f" (supported: {', '.join(VISION_BACKBONES)})"
            )
        sizes, timm_ids = VISION_BACKBONES[self.vision_backbone_id]
        if self.use_fused_vision_backbone is None:
            self.use_fused_vision_backbone = len(timm_ids) == 2
        self._check_numbers()
        self.image_sizes = self.image_sizes or sizes
        self.timm_model_ids = self.timm_model_ids or timm_ids
        backbones = 2 if self.use_fused_vision_backbone else 1
        for key in ("image_sizes", "timm_model_ids", "vision_overrides"):
            value = getattr(self, key)
            if value is not None and not (isinstance(value, list | tuple) and len(value) == backbones):
                raise CheckpointError(f"config.json: {key} must have one entry per vision backbone ({backbones})")
        text = self.text_config or {"vocab_size": 32064, "pad_token_id": self.pad_token_id}
        if isinstance(text, dict):
            model_type = text.get("model_type", "llama")
            if model_type != "llama":
                raise CheckpointError(
                    f"config.json: a language model of type '{model_type}' is not supported; only 'llama' is"
                )
            text = CONFIG_MAPPING[model_type](**{key: value for key, value in text.items() if key != "model_type"})
        self.text_config = text
        super().__post_init__(**kwargs)

    def _check_numbers(self) -> None:
        """Refuse numbers with which no model can be built, or none that ends.

        Raises:
            CheckpointError: the first one.
        """
        try:
            values = {name: getattr(self, name) for name in get_type_hints(_Numbers)}
            read_as(_Numbers, values | ({} if isinstance(self.text_config, dict) else {"text_config": None}))
        except WrongValue as error:
            raise CheckpointError(f"config.json: {error}") from None

    @property
    def action_vocab_size(self) -> int:
        """First id after the action tokens: 32064 - 64 = 32000 in the release, as upstream computes it."""
        return int(self.text_config.vocab_size) - self.pad_to_multiple_of


AutoConfig.register(OpenVLAConfig.model_type, OpenVLAConfig, exist_ok=True)
