"""A model and a batch on the meta device: shapes and number formats without a byte of data."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from vlaft.model.configuration import OpenVLAConfig, Policy
from vlaft.model.openvla import OpenVLAForActionPrediction
from vlaft.recipe.settings import PolicyConfig, RecipeConfig
from vlaft.training.step import Inputs, Normalization

META = torch.device("meta")
_INITIALISERS = (
    *(nn.init.normal_, nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.zeros_, nn.init.constant_),
    *(torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.zero_, torch.Tensor.fill_),
)


class WithoutValues(TorchFunctionMode):
    """Makes modules on the meta device and skips their initialisation, which would take seconds and do nothing."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Call `func`, unless it fills a tensor with numbers."""
        kwargs = kwargs or {}
        if func in _INITIALISERS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)

    def __enter__(self) -> WithoutValues:
        META.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        META.__exit__(*error)


def meta_model(config: OpenVLAConfig, dtype: torch.dtype = torch.float32) -> OpenVLAForActionPrediction:
    """Build a base on the meta device, in eval mode as checkpoints are loaded."""
    with WithoutValues():
        model = OpenVLAForActionPrediction(config)
    return model.to(dtype).eval()


_RELEASED = Policy()
# where no data tell: an arm with a gripper, as LIBERO has it in OpenVLA-OFT
ACTION_SIZE, STATE_SIZE = 7, 8


def policy_of(recipe: RecipeConfig, action_size: int = ACTION_SIZE, state_size: int = STATE_SIZE) -> Policy:
    """Return what a recipe's policy reads and writes.

    Args:
        recipe: resolved settings.
        action_size: A of the data.
        state_size: S of the data, where the policy reads a state.
    """
    if recipe.policy == PolicyConfig():
        return _RELEASED
    state = state_size if recipe.policy.state else None
    return Policy(**asdict(recipe.policy), action_size=action_size, state_size=state)


def usual_policy(recipe: RecipeConfig, config: OpenVLAConfig) -> Policy:
    """Return what a recipe's policy reads and writes, with the sizes of a base that is one already, else as usual."""
    begun = config.policy or {}
    return policy_of(recipe, begun.get("action_size") or ACTION_SIZE, begun.get("state_size") or STATE_SIZE)


def example_inputs(
    config: OpenVLAConfig,
    *,
    batch_size: int,
    tokens: int,
    labels: int,
    device: torch.device = META,
    policy: Policy = _RELEASED,
) -> Inputs:
    """Return a batch of zeros.

    Args:
        config: of the base.
        batch_size: B.
        tokens: T, prompt and actions after padding.
        labels: labels per example, the last ones of each row: K * A actions, and the end of the sequence.
        device: where; the meta device allocates nothing.
        policy: what is read and written.
    """
    side = config.image_sizes[0]  # type: ignore[index]
    positions = torch.arange(tokens - labels, tokens, device=device).repeat(batch_size, 1)
    return Inputs(
        input_ids=torch.zeros(batch_size, tokens, dtype=torch.int64, device=device),
        labels=torch.zeros(batch_size, tokens, dtype=torch.int64, device=device),
        label_positions=positions,
        images=torch.zeros(batch_size, len(policy.cameras), side, side, 3, dtype=torch.uint8, device=device),
        state=torch.zeros(batch_size, policy.state_size or 0, device=device) if policy.state else None,
        actions=torch.zeros(batch_size, policy.chunk, policy.action_size, device=device)
        if policy.action_size
        else None,
    )


def example_normalization(config: OpenVLAConfig) -> Normalization:
    """Return one normalisation per ViT; its values change no size."""
    half = [[0.5] * 3] * len(config.timm_model_ids)  # type: ignore[arg-type]
    return Normalization(half, half)
