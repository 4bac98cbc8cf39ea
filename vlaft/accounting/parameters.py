"""How many parameters a recipe trains, where they are, and how many of them a loss ever reaches.

Counted on the meta device: no weights are needed and none are made. Quantised bases are counted as they are before
quantisation: a packed weight holds as many parameters as it stands for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from vlaft.accounting.meta import (
    ACTION_SIZE,
    WithoutValues,
    example_inputs,
    example_normalization,
    meta_model,
    usual_policy,
)
from vlaft.adapt import adapt
from vlaft.adapt.methods import trained_modules
from vlaft.model.configuration import OpenVLAConfig, Policy
from vlaft.model.openvla import PARTS, OpenVLAForActionPrediction
from vlaft.recipe.settings import AdaptConfig, RecipeConfig
from vlaft.training.step import forward
from vlaft.weights.trained import policy_part

_PREFIX = "base_model.model."  # peft's
_NUMBERED = re.compile(r"\.(\d+)(?=\.|$)")
_ADAPTER = re.compile(r"\.(base_layer|lora_\w+)(\..*)?$")


@dataclass(frozen=True)
class PartCount:
    """Parameters of one part of a model.

    Attributes:
        total: all of them, adapters included.
        trainable: those that the recipe trains.
    """

    total: int = 0
    trainable: int = 0


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of an adapted model.

    Attributes:
        trainable: those that the recipe trains.
        total: all, adapters included.
        reached_by_gradient: trainable ones that a backward pass gave a gradient.
        parts: by part, keys `PARTS` and those of `POLICY_PARTS` that the model has.
        modules: by module of the base, numbered ones folded: `language_model.model.layers.N.mlp.up_proj`.
    """

    trainable: int
    total: int
    reached_by_gradient: int
    parts: dict[str, PartCount]
    modules: dict[str, PartCount]


def part_of(name: str) -> str:
    """Return the part of the model, one of `PARTS` or of `POLICY_PARTS`, that a parameter or module belongs to.

    >>> part_of("base_model.model.language_model.lm_head.base_layer.weight"), part_of("projector.fc1.bias")
    ('head', 'projector')
    """
    name = name.removeprefix(_PREFIX)
    return policy_part(name) or next(part for part, place in PARTS.items() if name.startswith(place))


def base_name(name: str) -> str:
    """Return a parameter's name in the base's own files.

    >>> base_name("base_model.model.projector.fc1.base_layer.weight")
    'projector.fc1.weight'
    """
    return name.removeprefix(_PREFIX).replace(".base_layer.", ".")


def folded_module(name: str) -> str:
    """Return the base's module that a parameter belongs to, block numbers replaced by N.

    >>> folded_module("base_model.model.language_model.model.layers.31.mlp.up_proj.lora_A.default.weight")
    'language_model.model.layers.N.mlp.up_proj'
    """
    module = _ADAPTER.sub("", name.removeprefix(_PREFIX))
    if module == name.removeprefix(_PREFIX):
        module = module.rpartition(".")[0]
    return _NUMBERED.sub(".N", module)


def trained_by(settings: AdaptConfig, model: nn.Module, base: OpenVLAForActionPrediction) -> set[str]:
    """Return the names of the parameters of `model` that a recipe trains, those that no loss reaches included.

    Args:
        settings: the recipe's section.
        model: adapted, possibly with what no loss reaches frozen again.
        base: what is inside `model`.
    """
    if settings.method == "lora":
        return {name for name, _ in model.named_parameters() if ".lora_" in name or policy_part(base_name(name))}
    chosen = {id(parameter) for module in trained_modules(base, settings.method) for parameter in module.parameters()}
    chosen |= {id(parameter) for parameter in base.policy_parameters().values()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in chosen}


def count(model: nn.Module, trained: set[str]) -> ParameterCount:
    """Count the parameters of a model that `make_trainable` prepared, of which those named in `trained` are trained.

    `make_trainable` freezes what no loss reaches, so what still asks for a gradient is reached; `count_parameters`
    and the tests hold this against a backward pass.
    """
    named = list(model.named_parameters())
    return ParameterCount(
        trainable=sum(parameter.numel() for name, parameter in named if name in trained),
        total=sum(parameter.numel() for _, parameter in named),
        reached_by_gradient=sum(parameter.numel() for _, parameter in named if parameter.requires_grad),
        parts=_group(model, trained, part_of, PARTS),
        modules=_group(model, trained, folded_module),
    )


def _group(
    model: nn.Module, trained: set[str], key: Callable[[str], str], keys: Iterable[str] = ()
) -> dict[str, PartCount]:
    groups = dict.fromkeys(keys, PartCount())
    for name, parameter in model.named_parameters():
        old = groups.get(key(name), PartCount())
        size = parameter.numel()
        groups[key(name)] = PartCount(old.total + size, old.trainable + (size if name in trained else 0))
    return groups


def count_parameters(recipe: RecipeConfig, config: OpenVLAConfig, policy: Policy | None = None) -> ParameterCount:
    """Count what `recipe` trains on a base, by running a forward and a backward pass on the meta device.

    Args:
        recipe: resolved settings; only `adapt` and `policy` matter.
        config: of the base.
        policy: what is read and written; None takes the recipe's on usual data.

    Raises:
        ConfigError: LoRA targets that the base does not have.
    """
    policy = policy or usual_policy(recipe, config)
    base = meta_model(config)
    with WithoutValues():
        model = adapt(base, recipe.adapt)
        if policy != Policy():
            base.attach(policy)
    written = policy.chunk * (policy.action_size or ACTION_SIZE) + 1
    inputs = example_inputs(config, batch_size=1, tokens=8 + written, labels=written, policy=policy)
    loss = forward(model, inputs, example_normalization(config), torch.float32).loss
    assert loss is not None
    loss.backward()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    return count(model, trained_by(recipe.adapt, model, base))
