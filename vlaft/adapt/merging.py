"""What an adapter adds to a weight, in float32: the arithmetic of merging, tensor by tensor.

LoRA, rsLoRA and DoRA, on linear layers, convolutions and embeddings. The formulas are those of the papers and of
peft's `merge`; the sum is rounded to the weight's type once, at the end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vlaft.adapt.adapter import PREFIX, adapter_table, base_parameters, read_settings
from vlaft.errors import CheckpointError
from vlaft.model.load import read_policy_files
from vlaft.weights.layout import tensor_table
from vlaft.weights.stream import DTYPES, read_tensor
from vlaft.weights.trained import ADAPTER_CONFIG, TRAINED_FILE, Trained, policy_part

_PARTS = ("A", "B", "embedding_A", "embedding_B", "magnitude_vector")
_ALTERS_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # peft's initialisations that subtract from the base


class Settings(Protocol):
    """What merging needs of an adapter's configuration; peft's `LoraConfig` has it."""

    @property
    def init_lora_weights(self) -> Any:
        """Name of the initialisation, or a boolean."""

    @property
    def lora_alpha(self) -> Any:
        """Numerator of the scaling."""

    @property
    def alpha_pattern(self) -> Any:
        """Other alphas, by patterns of module names."""

    @property
    def use_rslora(self) -> bool:
        """Whether the scaling divides by the rank's root."""


@dataclass(frozen=True)
class StoredSettings:
    """`Settings` as `adapter_config.json` has them."""

    init_lora_weights: Any
    lora_alpha: float
    alpha_pattern: Mapping[str, float]
    use_rslora: bool

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: str) -> StoredSettings:
        """Read the settings; what is missing has peft's default.

        Raises:
            CheckpointError: a value is of the wrong kind.
        """
        try:
            return cls(
                init_lora_weights=content.get("init_lora_weights", True),
                lora_alpha=float(content.get("lora_alpha", 8)),
                alpha_pattern={str(key): float(value) for key, value in (content.get("alpha_pattern") or {}).items()},
                use_rslora=bool(content.get("use_rslora")),
            )
        except (TypeError, ValueError, AttributeError):
            raise CheckpointError(f"{where}: lora_alpha or alpha_pattern is not what peft writes") from None


@dataclass(frozen=True)
class ModuleAdapter:
    """An adapter of one module.

    Attributes:
        a: `[r, in]`; `[r, in, kh, kw]` for a convolution; `[r, entries]` for an embedding.
        b: `[out, r]`; `[out, r, 1, 1]`; `[width, r]`.
        scaling: factor on the product.
        embedding: whether the module is an embedding, whose weight is transposed.
        magnitude: DoRA's trained norms, one per output, or None.
    """

    a: Tensor
    b: Tensor
    scaling: float
    embedding: bool = False
    magnitude: Tensor | None = None

    @property
    def by_rows(self) -> bool:
        """Whether each row of the weight can be merged alone: not where DoRA takes norms over all rows."""
        return not (self.embedding and self.magnitude is not None)

    def rows(self, begin: int, end: int) -> ModuleAdapter:
        """Return the adapter of the weight's rows from `begin` to before `end`, where `by_rows` holds."""
        if self.embedding:
            return replace(self, a=self.a[:, begin:end])
        magnitude = None if self.magnitude is None else self.magnitude.flatten()[begin:end]
        return replace(self, b=self.b[begin:end], magnitude=magnitude)

    def add_to(self, weight: Tensor) -> None:
        """Fold the adapter into a float32 weight, in place."""
        a, b = self.a.float(), self.b.float()
        left, right = (a.T, b.T) if self.embedding else (b.flatten(1), a.flatten(1))
        total = weight.flatten(1)
        total.addmm_(left, right, alpha=self.scaling)
        if self.magnitude is not None:
            # DoRA: the trained magnitude over the norm of each output's direction
            side = 0 if self.embedding else 1
            norms = torch.linalg.vector_norm(total, dim=side)
            total *= (self.magnitude.float().flatten() / norms).unsqueeze(side)

    def merged(self, weight: Tensor) -> Tensor:
        """Return the weight with the adapter folded in, of the weight's type and shape."""
        total = weight.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        self.add_to(total)
        return total.to(weight.dtype)


@dataclass(frozen=True)
class Parts:
    """Which of an adapter's tensors change one weight.

    Attributes:
        a: name of the tensor A.
        b: name of the tensor B.
        magnitude: name of DoRA's magnitudes, or None.
        scaling: factor on the product.
        embedding: whether the module is an embedding.
        shape: of the weight.
    """

    a: str
    b: str
    magnitude: str | None
    scaling: float
    embedding: bool
    shape: tuple[int, ...]

    def load(self, read: Callable[[str], Tensor]) -> ModuleAdapter:
        """Return the adapter with its tensors, each read by its name."""
        magnitude = None if self.magnitude is None else read(self.magnitude)
        return ModuleAdapter(read(self.a), read(self.b), self.scaling, self.embedding, magnitude)


def module_adapters(config: Settings, tensors: Mapping[str, Tensor]) -> dict[str, ModuleAdapter]:
    """Sort an adapter's tensors by the weight that each pair changes; see `sort_parts`."""
    parts = sort_parts(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    return {name: part.load(tensors.__getitem__) for name, part in parts.items()}


def sort_parts(config: Settings, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Parts]:
    """Sort an adapter's tensors by the weight that each pair changes.

    Args:
        config: the adapter's configuration (alpha, rsLoRA).
        shapes: of the tensors in `adapter_model.safetensors`, by name.

    Returns:
        Name of the base's weight to what changes it.

    Raises:
        CheckpointError: a tensor without its partner, one that is no part of a LoRA adapter, or an adapter whose
            initialisation changed the base.
    """
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(_ALTERS_BASE):
        raise CheckpointError(
            f"the adapter was initialised with '{init}', which changes the base's weights, so it cannot be merged"
            " into the base as released; save it converted to plain LoRA first"
        )
    modules: dict[str, dict[str, str]] = {}
    for name in shapes:
        module, separator, part = name.removeprefix(PREFIX).rpartition(".lora_")
        part = part.removesuffix(".weight")
        if not separator or not name.startswith(PREFIX) or part not in _PARTS:
            raise CheckpointError(f"adapter tensor '{name}' is not one that can be merged")
        modules.setdefault(module, {})[part] = name
    return {f"{module}.weight": _parts_of(module, found, shapes, config) for module, found in modules.items()}


def _parts_of(module: str, found: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], config: Settings) -> Parts:
    embedding = "embedding_A" in found
    names = [found.get(f"{'embedding_' if embedding else ''}{side}") for side in "AB"]
    if names[0] is None or names[1] is None:
        raise CheckpointError(f"adapter of '{module}': one of its two matrices is missing")
    a, b = shapes[names[0]], shapes[names[1]]
    magnitude = found.get("magnitude_vector")
    fits = len(a) in (2, 4) and len(a) == len(b) and a[0] > 0 and math.prod(b) == b[0] * a[0]
    if not fits or (magnitude is not None and math.prod(shapes[magnitude]) != b[0]):
        raise CheckpointError(f"adapter of '{module}': the shapes of its tensors do not fit together")
    rank = a[0]
    return Parts(
        a=names[0],
        b=names[1],
        magnitude=magnitude,
        scaling=scaling_of(module, rank, config),
        embedding=embedding,
        shape=(a[1], b[0]) if embedding else (b[0], *a[1:]),
    )


def scaling_of(module: str, rank: int, config: Settings) -> float:
    """Return the factor on the product of an adapter's matrices.

    Args:
        module: whose it is.
        rank: of its matrices.
        config: of the adapter.
    """
    alpha = config.alpha_pattern.get(_pattern_of(module, config.alpha_pattern), config.lora_alpha)
    return float(alpha / (math.sqrt(rank) if config.use_rslora else rank))


def _pattern_of(module: str, patterns: Mapping[str, float]) -> str:
    """Return the first pattern that matches the end of a module's name (peft's rule), else the name."""
    try:
        return next((key for key in patterns if re.fullmatch(rf"(.*\.)?({key})", module)), module)
    except re.error as error:
        raise CheckpointError(f"adapter_config.json: a pattern in alpha_pattern cannot be read ({error})") from None


@dataclass(frozen=True)
class Change:
    """What training made of one weight, read when its turn comes.

    Attributes:
        shape: of the weight.
        load: returns what is added to the weight, or the tensor that takes its place.
    """

    shape: tuple[int, ...]
    load: Callable[[], ModuleAdapter | Tensor]


def changes(
    trained: Trained, base: Path, *, adapter: bool = True, only: Callable[[str], bool] = lambda name: True
) -> dict[str, Change]:
    """Return what training changes, by the names of the base's weights.

    Args:
        trained: an adapter, whole tensors, or both.
        base: the base's folder.
        adapter: False leaves the adapter out.
        only: says of a weight's name whether what the adapter changes of it counts.

    Raises:
        CheckpointError: the trained weights are damaged, of a kind that cannot be merged, or made for another base.
    """
    stored = trained.tensors()
    if not trained.has_adapter and not stored:
        raise CheckpointError(f"{trained.weights}: neither an adapter nor {TRAINED_FILE} here; copy or train it again")
    found: dict[str, Change] = {}
    for name, spread in stored.spreads.items():
        if policy_part(name) is None:  # a policy's own modules are in no base
            found[name] = Change(spread.shape, partial(stored.rows, name))
    if trained.has_adapter and adapter:
        settings = StoredSettings.from_json(read_settings(trained.weights), str(trained.weights / ADAPTER_CONFIG))
        entries = adapter_table(trained.weights)

        def read(name: str) -> Tensor:
            return read_tensor(trained.weights, entries[name])

        for name, parts in sort_parts(settings, {name: entry.shape for name, entry in entries.items()}).items():
            if not only(name):
                continue
            if name in found:
                raise CheckpointError(f"{trained.weights}: '{name}' is in the adapter and among the whole tensors too")
            found[name] = Change(parts.shape, partial(parts.load, read))
    table = tensor_table(base)
    for name, change in found.items():
        if name not in table:
            raise CheckpointError(f"{trained.weights} belongs to another base: {base} has no tensor '{name}'")
        if table[name].shape != change.shape:
            raise CheckpointError(
                f"{trained.weights} belongs to another base: '{name}' is {change.shape} there"
                f" and {table[name].shape} in {base}"
            )
    return found


def policy_tensors(trained: Trained, base: Path) -> dict[str, Tensor]:
    """Return the tensors of a policy's own modules (head, state's projector, FiLM), by their names in the model.

    Those of training take the place of the base's, where that is a policy already.
    """
    stored = trained.tensors()
    found = {name: stored[name] for name in stored if policy_part(name)}
    return found or read_policy_files(base)


@torch.no_grad()
def fold(model: nn.Module, base: Path, changed: Mapping[str, Change]) -> None:
    """Put what training changed into `model`, in place: the sums start from the base's stored weights.

    Args:
        model: loaded from `base`, on any device and of any floating-point type.
        base: the base's folder.
        changed: from `changes`.

    Raises:
        CheckpointError: one of the weights is quantised in `model`.
    """
    table, parameters = tensor_table(base), base_parameters(model)
    for name, change in changed.items():
        weight = parameters[name]
        if weight.shape != change.shape or not weight.is_floating_point():
            raise CheckpointError(
                f"'{name}' was trained as a whole tensor, which cannot be put into quantised weights: merge it first,"
                " then load the merged checkpoint quantised"
            )
        made = change.load()
        if isinstance(made, ModuleAdapter):
            weight.copy_(made.merged(read_tensor(base, table[name])))
        else:
            weight.copy_(made.to(DTYPES[table[name].dtype]))
