"""How much memory a policy needs to act, predicted from a trace of one answer on the meta device.

The checkpoint is merged: adapters are folded in. Not counted: what recorded kernels keep for themselves
(`vlaft.model.cuda_graphs`), and what loading takes besides the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlaft.accounting.gpu import DeviceEmulation, quantize_stand_in
from vlaft.accounting.memory import LABELS, peak_terms, usual_tokens
from vlaft.accounting.meta import ACTION_SIZE, META, WithoutValues, meta_model
from vlaft.accounting.parameters import part_of
from vlaft.accounting.step import held
from vlaft.accounting.tracker import WEIGHTS, StorageTracker
from vlaft.model.configuration import OpenVLAConfig, Policy
from vlaft.observation.batch import Observation
from vlaft.recipe.settings import AdaptConfig


@dataclass(frozen=True)
class InferenceMemory:
    """What answering one observation needs on a GPU.

    Attributes:
        weights: bytes by part of the model, as in `ParameterCount.parts`.
        terms: bytes by term at the moment of the peak, as in `MemoryPrediction`; their sum is `peak`.
    """

    weights: dict[str, int]
    terms: dict[str, int]

    @property
    def peak(self) -> int:
        """Bytes that the GPU must have."""
        return sum(self.terms.values())

    @property
    def allocated(self) -> int:
        """Bytes that `torch.cuda.max_memory_allocated` reports."""
        return self.peak - self.terms["fragmentation"] - self.terms["CUDA context"]


def predict_inference(
    config: OpenVLAConfig, policy: Policy, *, quantized: bool = False, tokens: int | None = None
) -> InferenceMemory:
    """Predict the memory of answering one observation in bfloat16.

    Args:
        config: of the base.
        policy: what is read and written.
        quantized: whether the released model's linear layers are held in nf4, as `vlaft.load(..., dtype="nf4")` does;
            what a policy has besides stays in float32.
        tokens: text tokens of an example with one action, as in training; None: as usual for the base.
    """
    model = meta_model(config, torch.bfloat16)
    size = policy.action_size or ACTION_SIZE
    with WithoutValues():
        if policy != Policy():
            model.attach(policy)
    if quantized:
        quantize_stand_in(model, AdaptConfig(quantize="nf4", double_quant=True), torch.bfloat16)
    model.eval().requires_grad_(False)
    assert config.image_sizes and config.timm_model_ids
    side, channels = config.image_sizes[0], 3 * len(config.timm_model_ids) * len(policy.cameras)
    observation = Observation(
        prompt_ids=torch.zeros(1, (tokens or usual_tokens(config)) - LABELS, dtype=torch.int64, device=META),
        prompt_mask=None,
        pixel_values=torch.zeros(1, channels, side, side, dtype=torch.bfloat16, device=META),
        state=torch.zeros(1, policy.state_size or 0, device=META) if policy.state else None,
    )
    tracker, weights = StorageTracker(), dict[str, int]()
    for name, tensor in held(model):
        tracker.add(tensor, WEIGHTS)
        weights[part_of(name)] = weights.get(part_of(name), 0) + tensor.nbytes
    for given in (observation.prompt_ids, observation.pixel_values, observation.state):
        if given is not None:
            tracker.add(given)
    with tracker, tracker.watching(model), DeviceEmulation(on_gpu=True):
        try:
            model.head.predict(model, observation, size)
        except NotImplementedError as error:
            if "meta tensor" not in str(error):  # but for the answer itself, which cannot leave the device
                raise
    trace = tracker.trace()
    tracker.close()
    terms, _ = peak_terms(trace, trace.sizes)
    return InferenceMemory(weights, {term: size for term, size in terms.items() if size})
