"""The vision backbones: one ViT, or DINOv2 and SigLIP side by side, in timm's parameter names.

* Features are the output of the second-to-last block, without the final norm and without prefix tokens, as
  upstream takes them (`get_intermediate_layers(n={depth - 2})`).
* The last block, the final norm and SigLIP's pooling head are in every released checkpoint, so they exist here
  (same keys), but no forward pass runs them and no gradient reaches them.
* LayerScale's parameter is called `scale_factor`, as in the released files (timm says `gamma`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from vlaft.documents import WrongValue, read_as
from vlaft.errors import CheckpointError
from vlaft.model.policy_parts import FullPrecisionLinear, modulate

_MOST_BLOCKS = 1000  # the deepest ViTs have a tenth of that
_EPS = 1e-6  # LayerNorm epsilon of both timm models


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of one ViT.

    Attributes:
        embed_dim: width.
        depth: number of blocks, the unused last one included.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over `embed_dim`, truncated to an integer.
        patch_size: side of a patch in pixels.
        reg_tokens: number of register tokens (a class token comes with them).
        layer_scale: whether each residual branch is scaled by a learned vector.
        attention_pool: whether the checkpoint holds SigLIP's pooling head.
    """

    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    patch_size: int = 14
    reg_tokens: int = 0
    layer_scale: bool = False
    attention_pool: bool = False

    def __post_init__(self) -> None:
        """Refuse sizes of which no ViT can be built, or none that ends."""
        if min(self.embed_dim, self.num_heads, self.patch_size) < 1 or not 0 < self.mlp_ratio < _MOST_BLOCKS:
            raise ValueError("embed_dim, num_heads, patch_size and mlp_ratio must be above 0")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} does not divide into {self.num_heads} heads")
        if not 2 <= self.depth <= _MOST_BLOCKS or not 0 <= self.reg_tokens <= _MOST_BLOCKS:
            raise ValueError(f"depth must be from 2 to {_MOST_BLOCKS}, and reg_tokens at most that")

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the patches: DINOv2 has a class token and its registers, SigLIP none."""
        return self.reg_tokens + 1 if self.reg_tokens else 0


_SIGLIP = ViTConfig(embed_dim=1152, depth=27, num_heads=16, mlp_ratio=3.7362, attention_pool=True)
VIT_CONFIGS: dict[str, ViTConfig] = {
    "vit_large_patch14_reg4_dinov2.lvd142m": ViTConfig(
        embed_dim=1024, depth=24, num_heads=16, mlp_ratio=4.0, reg_tokens=4, layer_scale=True
    ),
    "vit_so400m_patch14_siglip_224": _SIGLIP,
    "vit_so400m_patch14_siglip_384": _SIGLIP,
}


def vit_config(timm_id: str, override: dict | None = None) -> ViTConfig:
    """Return the sizes that `timm_id` stands for, with those of `override` in their place.

    Raises:
        CheckpointError: an unknown timm id, or an unknown key or a wrong value in `override`.
    """
    if timm_id not in VIT_CONFIGS:
        raise CheckpointError(f"config.json: vision model '{timm_id}' is not supported ({', '.join(VIT_CONFIGS)})")
    unknown = set(override or {}) - {field.name for field in fields(ViTConfig)}
    if unknown:
        raise CheckpointError(f"config.json: unknown key in vision_overrides: {', '.join(sorted(unknown))}")
    known = VIT_CONFIGS[timm_id]
    try:
        return read_as(ViTConfig, asdict(known) | dict(override or {}))
    except WrongValue as error:
        raise CheckpointError(f"config.json: vision_overrides: {error}") from None


class LayerScale(nn.Module):
    """Multiply by a learned vector of shape `(dim,)`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Scale `x` `[..., dim]`."""
        return x * self.scale_factor


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` `[B, N, D]` to `[B, N, D]`."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, N, D/H]
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, dim))


class MLP(nn.Module):
    """Two linear layers around an exact GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` `[..., dim]` to `[..., dim]`."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(GradientCheckpointingLayer):
    """A pre-norm transformer block, with LayerScale on both branches where the model has it."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.norm1 = nn.LayerNorm(dim, eps=_EPS)
        self.attn = Attention(dim, config.num_heads)
        self.ls1: nn.Module = LayerScale(dim) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=_EPS)
        self.mlp = MLP(dim, int(dim * config.mlp_ratio))
        self.ls2: nn.Module = LayerScale(dim) if config.layer_scale else nn.Identity()
        self.scale: nn.Module | None = None  # FiLM, where a policy has it
        self.shift: nn.Module | None = None

    def add_film(self, text_dim: int) -> None:
        """Let an instruction's embedding of `text_dim` modulate the block."""
        width = self.norm1.normalized_shape[0]
        self.scale = FullPrecisionLinear(text_dim, width)
        self.shift = FullPrecisionLinear(text_dim, width)

    def forward(self, x: Tensor, language: Tensor | None = None) -> Tensor:
        """Map `x` `[B, N, D]` to `[B, N, D]`; `language` `[B, text width]` is read where the block has FiLM."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        if self.scale is not None and self.shift is not None:
            assert language is not None
            x = modulate(x, language, self.scale, self.shift)
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Cut images into patches and project each."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.embed_dim, kernel_size=config.patch_size, stride=config.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `[B, 3, H, W]` to patches `[B, P, D]`, row by row."""
        return self.proj(images).flatten(2).transpose(1, 2)


class AttentionPool(nn.Module):
    """Parameters of SigLIP's pooling head; stored in every checkpoint, never run."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.latent = nn.Parameter(torch.empty(1, 1, dim))
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=_EPS)
        self.mlp = MLP(dim, int(dim * config.mlp_ratio))


class VisionTransformer(nn.Module):
    """One ViT; its output is patch features of the second-to-last block."""

    def __init__(self, config: ViTConfig, image_size: int) -> None:
        super().__init__()
        self.config = config
        self.num_patches = (image_size // config.patch_size) ** 2
        if config.prefix_tokens:
            self.cls_token = nn.Parameter(torch.empty(1, 1, config.embed_dim))
            self.reg_token = nn.Parameter(torch.empty(1, config.reg_tokens, config.embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, self.num_patches, config.embed_dim))
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.embed_dim, eps=_EPS)
        if config.attention_pool:
            self.attn_pool = AttentionPool(config)

    @property
    def live_blocks(self) -> list[Block]:
        """The blocks that a forward pass runs: all but the last."""
        return list(self.blocks[:-1])  # type: ignore[arg-type]

    def forward(self, images: Tensor, language: Tensor | None = None) -> Tensor:
        """Map normalised images `[B, 3, H, W]` to patch features `[B, P, D]`; `language` is for FiLM."""
        x = self.patch_embed(images) + self.pos_embed  # positions belong to patches only (timm: no_embed_class)
        if self.config.prefix_tokens:
            batch = x.shape[0]
            x = torch.cat([self.cls_token.expand(batch, -1, -1), self.reg_token.expand(batch, -1, -1), x], dim=1)
        for block in self.live_blocks:
            x = block(x) if language is None else block(x, language)
        return x[:, self.config.prefix_tokens :]


class VisionBackbone(nn.Module):
    """One ViT (`featurizer`), or two whose features are joined (`featurizer`, then `fused_featurizer`)."""

    def __init__(self, configs: list[ViTConfig], image_sizes: list[int]) -> None:
        super().__init__()
        self.featurizer = VisionTransformer(configs[0], image_sizes[0])
        self.fused_featurizer = VisionTransformer(configs[1], image_sizes[1]) if len(configs) == 2 else None
        self.embed_dim = sum(config.embed_dim for config in configs)

    @property
    def featurizers(self) -> list[VisionTransformer]:
        """The ViTs in feature order."""
        return [vit for vit in (self.featurizer, self.fused_featurizer) if vit is not None]

    @property
    def num_patches(self) -> int:
        """Patches per image; equal for both ViTs, whose grids coincide."""
        return self.featurizer.num_patches

    def forward(self, pixel_values: Tensor, language: Tensor | None = None) -> Tensor:
        """Map the frames of N cameras to patch features.

        Args:
            pixel_values: `[B, N * 3 * number of ViTs, H, W]`: camera by camera, three normalised channels for each ViT.
            language: `[B, text width]`, the instruction's mean embedding, for FiLM.

        Returns:
            `[B, N * P, sum of widths]`, camera by camera.
        """
        batch, channels = pixel_values.shape[:2]
        vits = self.featurizers
        cameras = channels // (3 * len(vits))
        frames = pixel_values.reshape(batch * cameras, 3 * len(vits), *pixel_values.shape[2:]).split(3, dim=1)
        if language is not None:
            language = language.repeat_interleave(cameras, dim=0)
        features = torch.cat([vit(frame, language) for vit, frame in zip(vits, frames, strict=True)], dim=-1)
        return features.view(batch, cameras * self.num_patches, -1)


class Projector(nn.Module):
    """An MLP with exact GELU and biases.

    A single backbone has two layers (`fc1`: V to D, `fc2`: D to D), the fused one three (`fc1`: V to 4V,
    `fc2`: 4V to D, `fc3`: D to D), as in the released checkpoints.
    """

    def __init__(self, vision_dim: int, text_dim: int, *, fused: bool) -> None:
        super().__init__()
        hidden = 4 * vision_dim if fused else text_dim
        self.fc1 = nn.Linear(vision_dim, hidden)
        self.fc2 = nn.Linear(hidden, text_dim)
        self.fc3 = nn.Linear(text_dim, text_dim) if fused else None

    def forward(self, features: Tensor) -> Tensor:
        """Map `[B, P, V]` to `[B, P, D]`."""
        x = self.fc2(F.gelu(self.fc1(features)))
        return x if self.fc3 is None else self.fc3(F.gelu(x))
