"""OpenVLA: vision backbone, projector and Llama, with the state-dict keys of the released checkpoints.

* The sequence is `[BOS] [patches] [rest of the prompt and actions]`; there is no image placeholder token.
* With labels, logits are computed at label positions only: the head sees 8 rows per example instead of ~290. Where
  the positions are known beforehand, so is the last decoder block (see `vlaft.model.last_layer`).
* Rows are padded on the right. Causal attention never lets a token see what is to its right, so with labels no
  padding mask is needed: every position that has a label is computed exactly as without padding, and attention
  takes the kernel for plain causal masks.
"""

from __future__ import annotations

from dataclasses import asdict
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, LlamaForCausalLM, PreTrainedModel
from transformers import initialization as init

from vlaft.action.tokens import IGNORED, ActionTokenizer
from vlaft.errors import CheckpointError
from vlaft.model.configuration import OpenVLAConfig, Policy
from vlaft.model.heads import Head
from vlaft.model.heads.regression import RegressionHead
from vlaft.model.heads.tokens import TokenHead, TokenOutput
from vlaft.model.last_layer import LastDecoderLayer
from vlaft.model.policy_parts import ProprioProjector
from vlaft.model.vision import AttentionPool, LayerScale, Projector, VisionBackbone, VisionTransformer, vit_config
from vlaft.weights.trained import policy_part

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
        self.policy = Policy()
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

        Raises:
            CheckpointError: the checkpoint is of another policy than the released one; read as that, it would write
                other actions and not say so.
        """
        loaded = super().from_pretrained(*arguments, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.config.policy:
            raise CheckpointError(
                f"{model.name_or_path}: a policy that reads or writes otherwise than the released OpenVLA; load it with"
                " vlaft.load"
            )
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return loaded

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.language_model.get_output_embeddings()

    def attach(self, policy: Policy) -> None:
        """Become a policy that reads and writes as `policy` says, with new modules as torch initialises them.

        After adapters, so that these do not take the new modules for the base's.

        Args:
            policy: with the sizes of action and state where it needs them.
        """
        self.policy = policy
        self.config.policy = asdict(policy)
        width = self.config.text_config.hidden_size
        if policy.head == "l1":
            assert policy.action_size is not None
            self.action_head = RegressionHead(policy.chunk, policy.action_size, width)
        if policy.state:
            assert policy.state_size is not None
            self.proprio_projector = ProprioProjector(policy.state_size, width)
        if policy.film:
            for block in chain.from_iterable(self.stacks()[:-1]):
                block.add_film(width)  # type: ignore[operator]
        self.to(self.device)

    def policy_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that `attach` added, by name: those of the head, the state's projector, and FiLM."""
        return {name: parameter for name, parameter in self.named_parameters() if policy_part(name) is not None}

    @property
    def head(self) -> Head:
        """The part that writes actions."""
        if self.policy.head == "l1":
            return self.action_head  # type: ignore[return-value]
        actions = ActionTokenizer(self.config.action_vocab_size, self.config.n_action_bins)
        return TokenHead(self.get_output_embeddings(), actions, self.policy.chunk if self.policy.parallel else None)

    def parts(self) -> dict[str, nn.Module]:
        """Return the model's parts, by the names of `PARTS`."""
        return {name: self.get_submodule(place) for name, place in PARTS.items()}

    def stacks(self) -> list[nn.ModuleList]:
        """Return the stacks of like blocks: of each ViT, and last of the language model."""
        return [*(vit.blocks for vit in self.vision_backbone.featurizers), self.language_model.model.layers]

    @property
    def context_size(self) -> int:
        """M, the positions between the first token and the rest of the text: patches of all cameras, and the state."""
        return len(self.policy.cameras) * self.vision_backbone.num_patches + int(self.policy.state)

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        vision_features: Tensor | None = None,
        *,
        state: Tensor | None = None,
        empty: Tensor | None = None,
        spoken: Tensor | None = None,
    ) -> Tensor:
        """Splice projected patches, and the state, behind the first token.

        Args:
            input_ids: `[B, T]` int64, beginning with BOS.
            pixel_values: `[B, N * 3 * number of ViTs, H, W]`, normalised, camera by camera.
            vision_features: `[B, N * P, V]`, what the vision backbone gave for them earlier; then no pixels are needed.
            state: `[B, S]`, normalised, of a policy that reads it.
            empty: `[B, T]` bool, True on tokens whose embedding is to be zero.
            spoken: `[B, T]` bool, True on the tokens whose mean embedding modulates the ViTs, of a policy with FiLM.

        Returns:
            `[B, 1 + M + (T - 1), D]`.
        """
        language = None
        if self.policy.film:
            assert spoken is not None
            said = self.get_input_embeddings()(input_ids) * spoken[..., None]
            language = said.sum(dim=1) / spoken.sum(dim=1, keepdim=True)
        if vision_features is None:
            vision_features = self.vision_backbone(pixel_values, language)
        context = [self.projector(vision_features)]
        if self.policy.state:
            assert state is not None
            context.append(self.proprio_projector(state)[:, None])
        text = self.get_input_embeddings()(input_ids)
        if empty is not None:
            text = text.masked_fill(empty[..., None], 0)
        return torch.cat([text[:, :1], *(part.to(text.dtype) for part in context), text[:, 1:]], dim=1)

    def splice_mask(self, attention_mask: Tensor) -> Tensor:
        """Widen a text mask `[B, T]` to the spliced sequence `[B, 1 + M + (T - 1)]`; the context is attended."""
        context = attention_mask.new_ones(attention_mask.shape[0], self.context_size)
        return torch.cat([attention_mask[:, :1], context, attention_mask[:, 1:]], dim=1)

    def label_states(
        self,
        input_ids: Tensor,
        label_positions: Tensor,
        pixel_values: Tensor | None,
        vision_features: Tensor | None = None,
        state: Tensor | None = None,
        padding_speaks: bool = True,
    ) -> Tensor:
        """Return the hidden states that labels are predicted from, each one position before its label.

        Args:
            input_ids: `[B, T]` int64, beginning with BOS, padded on the right.
            label_positions: `[B, R]` int64, columns of `input_ids`. Of a policy that writes all at once, those of its
                actions and, last, of the end of the sequence, which is the row's last token.
            pixel_values: as `embed` takes them.
            vision_features: likewise.
            state: likewise.
            padding_speaks: whether FiLM's mean is over padding too, where `policy.film_mean` says so.

        Returns:
            `[B, R, D]`.
        """
        # columns that hold no label may lie before the row's first token: any position will do for them
        rows = self.context_size + (label_positions - 1).clamp(min=0)
        if not self.policy.parallel:
            return self.decode(self.embed(input_ids, pixel_values, vision_features, state=state), rows=rows)
        empty = torch.zeros_like(input_ids, dtype=torch.bool).scatter(1, label_positions[:, :-1], True)
        real = torch.arange(input_ids.shape[1], device=input_ids.device) <= label_positions[:, -1:]
        spoken = ~empty if padding_speaks and self.policy.film_mean == "padded" else real & ~empty
        embeddings = self.embed(
            input_ids, pixel_values, vision_features, state=state, empty=empty, spoken=spoken.to(torch.float32)
        )
        mask = self.splice_mask(real)[:, None, None]  # the same keys for every query: [B, 1, 1, S]
        return self.decode(embeddings, mask=mask, rows=rows, causal=False)

    def decode(
        self,
        embeddings: Tensor,
        *,
        mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any | None = None,
        rows: Tensor | None = None,
        causal: bool = True,
    ) -> Tensor:
        """Run the decoder blocks and the final norm.

        transformers' own `LlamaModel.forward` looks at values of `position_ids` (for packed sequences), which on a
        GPU costs a synchronisation per call and on the meta device cannot be done; its blocks are used as they are.

        Args:
            embeddings: `[B, S, D]`.
            mask: `[B, 1, S or 1, keys]` bool, True where a query may look; None for plain causal attention.
            position_ids: `[B or 1, S]` int64; None counts from 0.
            cache: keys and values of what came before; filled with those of this call.
            rows: `[B, K]` int64, positions whose hidden states are wanted; None for all. Causally, without `mask` only.
            causal: False where every query may look at all that `mask` shows.

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
            **({} if causal else {"is_causal": False}),
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
        state: Tensor | None = None,
        actions: Tensor | None = None,
        **_: Any,
    ) -> Any:
        """Compute logits, and the loss when there are labels.

        Args:
            input_ids: `[B, T]` int64, beginning with BOS, padded on the right.
            pixel_values: `[B, 3 * number of ViTs, H, W]`, normalised.
            attention_mask: `[B, T]`, 1 where there is a token; used without labels only (see the module's notes).
            labels: `[B, T]` int64, `IGNORED` where there is none; label t is predicted from what is before t.
            label_positions: `[B, R]` int64, columns of `labels` to use. Saves a look at `labels` and, on a GPU, the
                synchronisation that comes with it. Columns that hold `IGNORED` are skipped by the loss.
            vision_features: in place of `pixel_values`, as `embed` takes them.
            state: as `embed` takes it.
            actions: float32 `[B, K, A]`, normalised; what a head that regresses is trained on.

        Returns:
            The head's output: a `TokenOutput`, or a `RegressionOutput`.

        Raises:
            ValueError: neither labels nor their positions, of a policy that writes all at once: it has no next token,
                and read causally it would write other actions. Ask its head.
        """
        if label_positions is None and self.policy.parallel:
            if labels is None:
                raise ValueError("a policy that writes all its actions at once: ask model.head.predict, or give labels")
            label_positions = torch.nonzero(labels != IGNORED)[:, 1].view(len(labels), -1)  # as many in each row
        if label_positions is not None:
            assert labels is not None
            hidden = self.label_states(input_ids, label_positions, pixel_values, vision_features, state)
            return self.head.loss(hidden, labels.gather(1, label_positions.clamp(min=0)), actions)
        embeddings = self.embed(input_ids, pixel_values, vision_features, state=state)
        if labels is None:
            mask = None
            if attention_mask is not None:
                keys = self.splice_mask(attention_mask).bool()[:, None, None]  # [B, 1, 1, S]
                mask = keys & torch.ones(keys.shape[-1], keys.shape[-1], dtype=torch.bool, device=keys.device).tril()
            return TokenOutput(logits=self.language_model.lm_head(self.decode(embeddings, mask=mask)))
        # Text column t lies at position M + t of the sequence and is predicted from the position before it.
        examples, columns = torch.nonzero(labels[:, 1:] != IGNORED, as_tuple=True)
        hidden = self.decode(embeddings)[examples, self.context_size + columns]
        return self.head.loss(hidden, labels[examples, columns + 1], actions)


AutoModelForImageTextToText.register(OpenVLAConfig, OpenVLAForActionPrediction, exist_ok=True)
