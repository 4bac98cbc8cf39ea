"""Whether two models answer alike: base with adapter and merged model, checkpoint and export.

Both see the same few inputs, one after the other, so that only one of them is in memory. The first decodes actions by
itself; the second is given those tokens and asked for its own choice at each place, so that one differing token does
not hide what comes after it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlaft.action.tokens import IGNORED
from vlaft.adapt.adapter import base_parameters
from vlaft.adapt.rounding import Mode, generator_of, round_to
from vlaft.errors import CheckFailed, CheckpointError, DataError
from vlaft.files import read_json
from vlaft.machine import free_memory
from vlaft.model.configuration import Policy
from vlaft.observation.batch import Observation
from vlaft.observation.images import ImagePipeline
from vlaft.observation.prompts import preprocessor_of
from vlaft.release.record import data_paths
from vlaft.weights.layout import tensor_table
from vlaft.weights.trained import Trained, policy_part, statistics_of

_EXAMPLES = 4
_INSTRUCTION = "put the carrot on the plate"  # of inputs made here, where the training data are gone
_ACTION_SIZE = 7  # where the statistics do not tell
_ROOM = 1.15  # memory over that of the weights: activations, adapter, the interpreter
# How far rounding the merged weights to their type may move a logit, as a share of the logits' range: about four times
# what is seen. Choices nearer to each other than that may change places.
_ROUNDING = {torch.float32: 1e-5, torch.float16: 2.5e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Probe:
    """A batch for `compare`.

    Attributes:
        observation: B observations, on the CPU, in float32.
        action_size: A, the number of dimensions to compare.
        origin: `training data` or `synthetic`.
    """

    observation: Observation
    action_size: int
    origin: str


@dataclass(frozen=True)
class Comparison:
    """How two models' answers compare.

    Attributes:
        examples: number of inputs.
        inputs: where they come from.
        tokens: number of tokens compared; of a policy that writes all at once, of values.
        identical_tokens: how many of them are the same in both.
        ties: how many of the others lie between two choices that rounding cannot tell apart.
        largest_logit_difference: over all places and tokens of the vocabulary.
        logit_range: largest minus smallest logit of the first model.
        computed_in: number format of the computation.
        unrounded_tokens: where the first model was rounded as the second is: how many of the tokens it chose before are
            the second's too; None where it was not.
        unrounded_logit_difference: likewise, the largest difference of a logit.
        compared: `tokens`, or `values`: normalised numbers, which are the same where rounding cannot tell them apart
            and stand in the place of logits as well.
    """

    examples: int
    inputs: str
    tokens: int
    identical_tokens: int
    ties: int
    largest_logit_difference: float
    logit_range: float
    computed_in: str
    unrounded_tokens: int | None = None
    unrounded_logit_difference: float | None = None
    compared: str = "tokens"

    @property
    def holds(self) -> bool:
        """Whether the two choose the same tokens wherever rounding leaves a choice."""
        return self.identical_tokens + self.ties == self.tokens

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict."""
        return asdict(self)


def example_probe(trained: Trained | None, base: Path, count: int = _EXAMPLES) -> Probe:
    """Return examples of the data that a run was trained on, or fixed ones made here where those are gone.

    Args:
        trained: a run's weights; None makes inputs.
        base: the model's folder.
        count: how many.
    """
    config = read_json(base / "config.json", CheckpointError) | (dict(trained.inference) if trained else {})
    pipeline = ImagePipeline.from_checkpoint(config, preprocessor_of(base))
    policy = Policy.of(config, str(base / "config.json"))
    if trained is not None and (paths := data_paths(trained)):
        try:
            return data_probe(paths, pipeline, count, policy)
        except (DataError, CheckpointError, OSError):
            pass  # moved, changed or damaged since: the check needs inputs, not these
    sizes = [len(entry["action"]["q01"]) for entry in statistics_of(trained, base, config).values()]
    return _synthetic(base, pipeline, count, max(sizes, default=_ACTION_SIZE), policy)


def data_probe(paths: list[Path], pipeline: ImagePipeline, count: int, policy: Policy) -> Probe:
    """Return held-out examples of converted datasets, evenly spread; training examples where none are held out.

    Raises:
        DataError: a dataset is missing or damaged.
    """
    from vlaft.data.held_out import HeldOut

    try:
        examples = HeldOut.open(paths, "val", count)
    except DataError:  # converted without a held-out split
        examples = HeldOut.open(paths, "train", count)
    rows = examples.chosen
    return _batch(
        [examples.prompts[int(row)] for row in rows],
        list(examples.images(rows)),
        pipeline,
        examples.action.shape[1],
        "training data",
        policy,
    )


def _synthetic(base: Path, pipeline: ImagePipeline, count: int, action_size: int, policy: Policy) -> Probe:
    import numpy as np

    prompt = [1, *range(3, 20)]  # for models that have no tokenizer
    if (base / "tokenizer.json").is_file():
        from vlaft.observation.prompts import load_base_files

        prompt = load_base_files(base).prompt_token_ids(_INSTRUCTION)
    generator = np.random.default_rng(0)
    size = pipeline.size
    coarse = generator.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    images = [np.kron(image, np.ones((size // 8 + 1, size // 8 + 1, 1), np.uint8))[:size, :size] for image in coarse]
    return _batch([prompt] * count, images, pipeline, action_size, "synthetic", policy)


def _batch(
    prompts: list[list[int]], images: list[Any], pipeline: ImagePipeline, action_size: int, origin: str, policy: Policy
) -> Probe:
    import numpy as np

    # any frames and any states will do for a comparison, if only each camera and each number of a state is another
    prepared = [pipeline.prepare(image) for image in images]
    step = pipeline.size // len(policy.cameras)
    frames = np.stack([[np.roll(one, step * n, axis=0) for n in range(len(policy.cameras))] for one in prepared])
    shape = (len(images), policy.state_size or 0)
    state = np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32) if policy.state else None
    pipeline = replace(pipeline, center_crop=False)  # a merge does not depend on it
    return Probe(Observation.of(prompts, frames, pipeline, pad_id=0, state=state), action_size, origin)


def choose_dtype(folder: Path) -> tuple[torch.dtype, torch.device] | None:
    """Return the number format and device in which the checkpoint fits into free memory, float32 first, or None."""
    from vlaft.weights.stream import DTYPES

    places = []
    if torch.cuda.is_available():
        places.append((torch.device("cuda"), torch.cuda.mem_get_info()[0]))
    places.append((torch.device("cpu"), free_memory()))
    table = tensor_table(folder)
    numbers = sum(torch.Size(entry.shape).numel() for entry in table.values())
    stored = {DTYPES[entry.dtype] for entry in table.values() if entry.dtype in DTYPES}
    half = torch.float16 if stored == {torch.float16} else torch.bfloat16
    for device, free in places:
        for dtype in (torch.float32, half):
            if numbers * dtype.itemsize * _ROOM < free:
                return dtype, device
    return None


@torch.inference_mode()
def compare(
    first: Callable[[], Any],
    second: Callable[[], Any],
    inputs: Probe,
    rounding: torch.dtype,
    round_first: Callable[[Any], None] | None = None,
) -> Comparison:
    """Compare two models' choices.

    Args:
        first: loads the model whose own tokens are the reference.
        second: loads the other; called when the first is no longer in memory.
        inputs: what both see.
        rounding: type to which the second's weights were rounded.
        round_first: rounds the first's weights likewise, in place, when it has chosen its tokens. What rounding changes
            is then told apart from what is wrong.
    """
    model = first()
    device, dtype = next(model.parameters()).device, model.dtype
    observation = inputs.observation.to(device, dtype)
    if model.policy.parallel:
        return _compare_actions(model, second, inputs, observation, rounding, round_first)
    tokens = torch.from_numpy(model.head.predict(model, observation, inputs.action_size).token_ids[:, 0]).to(device)
    exact = reference = _logits(model, observation, tokens)
    if round_first is not None:
        round_first(model)
        reference = _logits(model, observation, tokens)
    del model
    gc.collect()
    model = second()
    other = _logits(model, observation.to(device, model.dtype), tokens)
    del model
    gc.collect()

    spread = float(reference.max() - reference.min())
    best, choice = reference.argmax(dim=-1), other.argmax(dim=-1)
    margin = reference.gather(1, best[:, None]) - reference.gather(1, choice[:, None])
    differ = best != choice
    tie = max(_ROUNDING[rounding], _ROUNDING.get(dtype, 0.0)) * spread
    return Comparison(
        examples=len(observation),
        inputs=inputs.origin,
        tokens=best.numel(),
        identical_tokens=int((~differ).sum()),
        ties=int((differ & (margin[:, 0] <= tie)).sum()),
        largest_logit_difference=float((reference - other).abs().max()),
        logit_range=spread,
        computed_in=str(dtype).removeprefix("torch."),
        unrounded_tokens=int((exact.argmax(dim=-1) == choice).sum()) if round_first else None,
        unrounded_logit_difference=float((exact - other).abs().max()) if round_first else None,
    )


def _compare_actions(
    first: Any,
    second: Callable[[], Any],
    inputs: Probe,
    observation: Observation,
    rounding: torch.dtype,
    round_first: Callable[[Any], None] | None,
) -> Comparison:
    """Compare what two policies write all at once: values take the place of tokens, and of logits."""
    device, dtype = observation.pixel_values.device, first.dtype
    exact = reference = first.head.predict(first, observation, inputs.action_size).actions
    if round_first is not None:
        round_first(first)
        reference = first.head.predict(first, observation, inputs.action_size).actions
    del first
    gc.collect()
    model = second()
    other = model.head.predict(model, observation.to(device, model.dtype), inputs.action_size).actions
    spread = float(reference.max() - reference.min())
    near = max(_ROUNDING[rounding], _ROUNDING.get(dtype, 0.0)) * spread
    return Comparison(
        examples=len(observation),
        inputs=inputs.origin,
        tokens=reference.size,
        identical_tokens=int((abs(reference - other) <= near).sum()),
        ties=0,
        largest_logit_difference=float(abs(reference - other).max()),
        logit_range=spread,
        computed_in=str(dtype).removeprefix("torch."),
        unrounded_tokens=int((abs(exact - other) <= near).sum()) if round_first else None,
        unrounded_logit_difference=float(abs(exact - other).max()) if round_first else None,
        compared="values",
    )


def _logits(model: Any, observation: Observation, tokens: Tensor) -> Tensor:
    """Return float32 `[B * A, vocabulary]`: what the model would write in each place of `tokens`."""
    ids, mask = observation.prompt_ids, observation.prompt_mask
    lengths = torch.full_like(ids[:, :1], ids.shape[1]) if mask is None else mask.sum(dim=1, keepdim=True)
    columns = lengths + torch.arange(tokens.shape[1], device=ids.device)
    joined = torch.cat([ids, torch.zeros_like(tokens)], dim=1).scatter(1, columns, tokens)
    labels = torch.full_like(joined, IGNORED).scatter(1, columns, tokens)
    pixels = observation.pixel_values
    logits: Tensor = model(input_ids=joined, pixel_values=pixels, labels=labels, label_positions=columns).logits
    return logits.float().cpu()


def merge_check(
    trained: Trained,
    base: Path,
    dtype: torch.dtype,
    device: torch.device,
    mode: Mode = "nearest",
    look: Callable[[Any, Path], Any] | None = None,
) -> Callable[[Path], dict[str, Any]]:
    """Return the check that `merge` calls on its finished folder.

    Args:
        trained: what is merged.
        base: into which base.
        dtype: number format of both computations.
        device: where they run.
        mode: how the merge rounds.
        look: called with the merged model and its folder while it is in memory; what it returns goes into the record
            as `sight`.

    Returns:
        A function of the merged folder that returns a record for `merge.json`, and raises `CheckFailed` when the
        two models choose different tokens.
    """

    def check(folder: Path) -> dict[str, Any]:
        from vlaft.model.load import load_model
        from vlaft.weights.stream import DTYPES

        record: dict[str, Any] = {}

        def merged() -> Any:
            model = load_model(folder, dtype=dtype, device=device)
            if look is not None:
                record["sight"] = look(model, folder)
            return model

        kinds = {name: DTYPES[entry.dtype] for name, entry in tensor_table(folder).items()}
        floats = set(kinds.values()) & set(_ROUNDING)
        result = compare(
            lambda: _attach(load_model(base, dtype=dtype, device=device, bare=True), trained, base),
            merged,
            example_probe(trained, base),
            max(floats, key=lambda kind: _ROUNDING[kind], default=torch.float32),
            partial(_round, trained=trained, kinds=kinds, mode=mode) if floats - {torch.float32} else None,
        )
        if not result.holds:
            raise CheckFailed(
                f"the merged model does not answer as base and trained weights do: {result.identical_tokens} of"
                f" {result.tokens} {result.compared} are the same, and"
                f" {'logits' if result.compared == 'tokens' else 'these'} differ by up to"
                f" {result.largest_logit_difference:.3g}; nothing was written"
            )
        return result.to_json() | record

    return check


def _attach(model: Any, trained: Trained, base: Path) -> Any:
    from vlaft.adapt.adapter import load_adapter
    from vlaft.adapt.merging import policy_tensors
    from vlaft.model.load import fill_policy
    from vlaft.training.checkpoints import load_trained

    adapted = load_adapter(model, trained.weights) if trained.has_adapter else model
    config = read_json(base / "config.json", CheckpointError) | dict(trained.inference)
    if config.get("policy"):
        model.attach(Policy.of(config, str(trained.weights)))
        fill_policy(model, policy_tensors(trained, base), str(trained.weights))
    if trained.has_tensors:
        load_trained(adapted, trained.weights)
    return adapted


def round_parameters(model: Any, kinds: Mapping[str, torch.dtype]) -> None:
    """Round each parameter that has a type in `kinds` to that type, in place; the model's own type stays."""
    for name, parameter in base_parameters(model).items():
        if name in kinds:
            parameter.copy_(parameter.to(kinds[name]))


def _round(model: Any, trained: Trained, kinds: Mapping[str, torch.dtype], mode: Mode) -> None:
    """Put the trained weights into the base's and round the sum, as merging does; adapters by peft's arithmetic."""

    def rounded(name: str, exact: Tensor) -> Tensor:
        generator = generator_of(name) if mode == "stochastic" else None
        return round_to(exact.float().cpu(), torch.empty(exact.shape, dtype=kinds[name]), generator)

    if trained.has_adapter:
        from peft.tuners.lora import LoraLayer

        for name, module in model.get_base_model().named_modules():
            if isinstance(module, LoraLayer):
                _merge_layer(module, partial(rounded, f"{name}.weight"))
    stored, parameters = trained.tensors(), base_parameters(model)
    for name in stored:
        if policy_part(name) is None:  # those of a policy are kept as they are
            parameters[name].copy_(rounded(name, stored[name]))
    round_parameters(model, kinds)


def _merge_layer(layer: Any, rounded: Callable[[Tensor], Tensor]) -> None:
    """Merge a layer's adapter in float32, whatever the model computes in, and round once."""
    weight: nn.Parameter = layer.get_base_layer().weight
    kind = weight.dtype
    weight.data = weight.data.float()
    layer.merge()
    weight.data = rounded(weight.data).to(device=weight.device, dtype=kind)
