"""OpenVLA: vision backbone, projector and Llama, with the state-dict keys of the released checkpoints.

* The sequence is `[BOS] [patches] [rest of the prompt and actions]`; there is no image placeholder token.
* With labels, logits are computed at label positions only: the head sees 8 rows per example instead of ~290. Where
  the positions are known beforehand, so is the last decoder block (see `vlaft.model.last_layer`).
* Rows are padded on the right. Causal attention never lets a token see what is to its right, so with labels no
  padding mask is needed: every position that has a label is computed exactly as without padding, and attention
  takes the kernel for plain causal masks.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, LlamaForCausalLM, PreTrainedModel
from transformers import initialization as init

from vlaft.action.tokens import IGNORED, ActionTokenizer
from vlaft.model.configuration import OpenVLAConfig
from vlaft.model.heads.tokens import TokenHead, TokenOutput
from vlaft.model.last_layer import LastDecoderLayer
from vlaft.model.vision import AttentionPool, LayerScale, Projector, VisionBackbone, VisionTransformer, vit_config

# What recipes, reports and shards tell apart, and where it lies in the model.
PARTS = {
    "vision": "vision_backbone",
    "projector": "projector",
    "language model": "language_model.model",
    "head": "language_model.lm_head",
}


class OpenVLAForActionPrediction(PreTrainedModel):
    """A vision-language-action model that writes actions as tokens."""

    config_class = OpenVLAConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules: ClassVar[list[str]] = ["LlamaDecoderLayer", "LastDecoderLayer", "Block"]

    def __init__(self, config: OpenVLAConfig) -> None:
        super().__init__(config)
        names, sizes = config.timm_model_ids or [], config.image_sizes or []  # never empty: see the configuration
        overrides = config.vision_overrides or [None] * len(names)
        vits = [vit_config(name, override) for name, override in zip(names, overrides, strict=True)]
        self.vision_backbone = VisionBackbone(vits, sizes)
        self.projector = Projector(
            self.vision_backbone.embed_dim, config.text_config.hidden_size, fused=bool(config.use_fused_vision_backbone)
        )
        self.language_model = LlamaForCausalLM(config.text_config)
        self.language_model.model.layers[-1].__class__ = LastDecoderLayer  # same parameters, one argument more
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LayerScale):
            init.ones_(module.scale_factor)
        elif isinstance(module, VisionTransformer):
            init.normal_(module.pos_embed, std=0.02)
            if module.config.prefix_tokens:
                init.normal_(module.cls_token, std=0.02)
                init.normal_(module.reg_token, std=0.02)
        elif isinstance(module, AttentionPool):
            init.normal_(module.latent, std=0.02)

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        """Load a checkpoint as transformers does, and keep 4-bit weights as they are stored.

        On some CPUs bitsandbytes repacks them for a kernel that fails on widths that 64 does not divide, SigLIP's 4304
        among them.
        """
        loaded = super().from_pretrained(*arguments, **options)
        for module in (loaded[0] if isinstance(loaded, tuple) else loaded).modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return loaded

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.language_model.get_output_embeddings()

    @property
    def head(self) -> TokenHead:
        """The part that writes actions."""
        actions = ActionTokenizer(self.config.action_vocab_size, self.config.n_action_bins)
        return TokenHead(self.get_output_embeddings(), actions)

    def parts(self) -> dict[str, nn.Module]:
        """Return the model's parts, by the names of `PARTS`."""
        return {name: self.get_submodule(place) for name, place in PARTS.items()}

    def stacks(self) -> list[nn.ModuleList]:
        """Return the stacks of like blocks: of each ViT, and last of the language model."""
        return [*(vit.blocks for vit in self.vision_backbone.featurizers), self.language_model.model.layers]

    @property
    def num_patches(self) -> int:
        """Patch positions that every image takes in the sequence."""
        return self.vision_backbone.num_patches

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None, vision_features: Tensor | None = None) -> Tensor:
        """Splice projected patches behind the first token.

        Args:
            input_ids: `[B, T]` int64, beginning with BOS.
            pixel_values: `[B, 3 * number of ViTs, H, W]`, normalised.
            vision_features: `[B, P, V]`, what the vision backbone gave for them earlier; then no pixels are needed.

        Returns:
            `[B, 1 + P + (T - 1), D]`.
        """
        features = self.vision_backbone(pixel_values) if vision_features is None else vision_features
        patches = self.projector(features)
        text = self.get_input_embeddings()(input_ids)
        return torch.cat([text[:, :1], patches.to(text.dtype), text[:, 1:]], dim=1)

    def splice_mask(self, attention_mask: Tensor) -> Tensor:
        """Widen a text mask `[B, T]` to the spliced sequence `[B, 1 + P + (T - 1)]`; patches are attended."""
        patches = attention_mask.new_ones(attention_mask.shape[0], self.num_patches)
        return torch.cat([attention_mask[:, :1], patches, attention_mask[:, 1:]], dim=1)

    def decode(
        self,
        embeddings: Tensor,
        *,
        mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Run the decoder blocks and the final norm.

        transformers' own `LlamaModel.forward` looks at values of `position_ids` (for packed sequences), which on a
        GPU costs a synchronisation per call and on the meta device cannot be done; its blocks are used as they are.

        Args:
            embeddings: `[B, S, D]`.
            mask: `[B, 1, S, keys]` bool, True where a query may look; None for plain causal attention.
            position_ids: `[B or 1, S]` int64; None counts from 0.
            cache: keys and values of what came before; filled with those of this call.
            rows: `[B, K]` int64, positions whose hidden states are wanted; None for all. Without `mask` only.

        Returns:
            Hidden states `[B, S, D]`, or `[B, K, D]` of `rows`.
        """
        llama = self.language_model.model
        if position_ids is None:
            position_ids = torch.arange(embeddings.shape[1], device=embeddings.device)[None]
        rotary = llama.rotary_emb(embeddings, position_ids=position_ids)
        hidden = embeddings
        shared = {
            "attention_mask": mask,
            "position_ids": position_ids,
            "past_key_values": cache,
            "use_cache": cache is not None,
            "position_embeddings": rotary,
        }
        for layer in llama.layers[:-1]:
            hidden = layer(hidden, **shared)
        hidden = llama.layers[-1](hidden, **shared, rows=rows)
        return llama.norm(hidden)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        label_positions: Tensor | None = None,
        vision_features: Tensor | None = None,
        **_: Any,
    ) -> TokenOutput:
        """Compute logits, and the loss when there are labels.

        Args:
            input_ids: `[B, T]` int64, beginning with BOS, padded on the right.
            pixel_values: `[B, 3 * number of ViTs, H, W]`, normalised.
            attention_mask: `[B, T]`, 1 where there is a token; used without labels only (see the module's notes).
            labels: `[B, T]` int64, `IGNORED` where there is none; label t is predicted from what is before t.
            label_positions: `[B, K]` int64, columns of `labels` to use. Saves a look at `labels` and, on a GPU, the
                synchronisation that comes with it. Columns that hold `IGNORED` are skipped by the loss.
            vision_features: in place of `pixel_values`, as `embed` takes them.
        """
        embeddings = self.embed(input_ids, pixel_values, vision_features)
        if labels is None:
            mask = None
            if attention_mask is not None:
                keys = self.splice_mask(attention_mask).bool()[:, None, None]  # [B, 1, 1, S]
                mask = keys & torch.ones(keys.shape[-1], keys.shape[-1], dtype=torch.bool, device=keys.device).tril()
            return TokenOutput(logits=self.language_model.lm_head(self.decode(embeddings, mask=mask)))

        # Text column t lies at position P + t of the sequence and is predicted from the position before it.
        if label_positions is None:
            examples, columns = torch.nonzero(labels[:, 1:] != IGNORED, as_tuple=True)
            hidden = self.decode(embeddings)[examples, self.num_patches + columns]
            label_ids = labels[examples, columns + 1]
        else:
            # columns that hold no label may lie before the row's first token: any position will do for them
            hidden = self.decode(embeddings, rows=self.num_patches + (label_positions - 1).clamp(min=0))
            label_ids = labels.gather(1, label_positions.clamp(min=0))
        return self.head.loss(hidden, label_ids)


AutoModelForImageTextToText.register(OpenVLAConfig, OpenVLAForActionPrediction, exist_ok=True)
