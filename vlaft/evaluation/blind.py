"""Whether a policy looks: what becomes of its actions when its frames or its instruction are those of another moment.

Every change is measured against what the policy's actions differ by between two moments anyway. With s(i) the moment
that lends to moment i, and p(i) what is written there,

    share = mean |p(i with the frames of s(i)) - p(i)| / mean |p(s(i)) - p(i)|

(L1 over normalised actions, whole chunks). Swapped frames are frames that the policy may meet, unlike black and white
ones, so that they alone decide. A policy that goes by its frames alone has a share of exactly 1, as has any that looks
where there is one instruction and no state; one that does not look has 0, whatever it makes of the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlaft.observation.batch import Observation
from vlaft.observation.images import ImagePipeline

FEWEST = 8  # examples that tell anything
EXAMPLES = 24  # of a look; each is predicted five times, and thrice more for each further camera
# What does not look has 0 but for rounding and the chance that a frame moves a token; what looks was seen to have nine
# tenths (docs/evaluation.md), and less where a state tells much of the same. A tenth leaves room on both sides.
BLIND = 0.1
# One camera of several, and the instruction, may well matter little to a good policy: told is what does nothing at all.
UNUSED = 0.02
CONSTANT = 0.05  # of what demonstrated actions differ by between moments; a policy that hedges still has a quarter
_ALIKE = 0.01  # mean difference of normalised pixels: about a level of 255
_APART = 0.382  # of the examples lie between a moment and its lender: no round share, so that they differ in phase too


@dataclass(frozen=True)
class Shares:
    """How far actions move when a camera's frames change, as a share of how far they differ between moments.

    Attributes:
        swapped: with the frames of another moment; None where these are the same, so that nothing can be told.
        black: with black frames.
        white: with white ones.
    """

    swapped: float | None
    black: float
    white: float


@dataclass(frozen=True)
class Sight:
    """What was found about one policy.

    Attributes:
        examples: how many moments were looked at.
        spread: mean distance of the actions at two moments, normalised.
        demonstrated_spread: the same of the demonstrations.
        cameras: by name, each changed by itself while the others, the instruction and the state stay.
        together: all cameras changed at once; of a single camera, that one. None where actions do not differ at all.
        instruction: share with the instruction of another moment; None where all are the same, or actions are.
        state: share with the state of another moment; None of a policy that reads none.
    """

    examples: int
    spread: float
    demonstrated_spread: float
    cameras: Mapping[str, Shares]
    together: Shares | None
    instruction: float | None
    state: float | None

    @property
    def constant(self) -> bool:
        """Whether the policy writes nearly the same at all moments, where demonstrations differ."""
        return self.spread < CONSTANT * self.demonstrated_spread

    @property
    def looks(self) -> bool | None:
        """Whether what the policy does depends on its frames; None where these data cannot tell."""
        if self.constant:
            return False
        if self.together is None or self.together.swapped is None:
            return None
        return self.together.swapped >= BLIND

    def warnings(self) -> list[str]:
        """Return what is wrong as sentences without their subject, the worst alone where it explains the rest."""
        if self.constant:
            share = self.spread / self.demonstrated_spread
            return [
                "writes nearly the same actions whatever it is shown: between moments they differ by"
                f" {share:.1%} of what the demonstrated ones do; train it longer, or look for a mistake in its data"
            ]
        if self.looks is False:
            assert self.together is not None and self.together.swapped is not None
            others = "its state and instruction" if self.state is not None else "its instruction"
            return [
                f"does not look: with frames of other moments its actions move by {self.together.swapped:.1%} of what"
                f" they differ by between moments (black frames: {self.together.black:.0%}, white:"
                f" {self.together.white:.0%}), so it goes by {others}; it will not find what has moved"
            ]
        sentences = [
            f"does not look through the camera '{name}': with its frames of other moments actions move by"
            f" {shares.swapped:.1%} of what they differ by between moments"
            for name, shares in self.cameras.items()
            if shares.swapped is not None and shares.swapped < UNUSED
        ]
        if self.instruction is not None and self.instruction < UNUSED:
            sentences.append(
                f"does not listen: with other instructions its actions move by {self.instruction:.1%} of what they"
                " differ by between moments; it need not where the scene alone tells the task"
            )
        return sentences

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict, verdict and warnings included."""
        return {**asdict(self), "looks": self.looks, "warnings": self.warnings()}


def look(
    model: Any,
    observation: Observation,
    demonstrated: NDArray[np.floating],
    pipeline: ImagePipeline,
    *,
    batch_size: int = 16,
    advance: Callable[[int], None] = lambda count: None,
) -> Sight | None:
    """Measure whether a policy looks.

    Args:
        model: in eval mode, with its head.
        observation: B moments, on its device: different ones of several demonstrations.
        demonstrated: `[B, K, A]`, normalised, as the head writes them.
        pipeline: what the pixels were normalised by.
        batch_size: moments per forward pass.
        advance: called with the number of predictions that each pass has made.

    Returns:
        None where there are fewer than `FEWEST` moments.
    """
    count, names = len(observation), tuple(model.policy.cameras)
    if count < FEWEST:
        return None

    def written(changed: Observation) -> NDArray[np.float64]:
        parts = []
        for start in range(0, count, batch_size):
            part = _rows(changed, slice(start, start + batch_size))
            parts.append(model.head.predict(model, part, demonstrated.shape[-1]).actions)
            advance(len(part))
        return np.concatenate(parts)

    lender = (np.arange(count) + max(1, round(_APART * count))) % count
    own = written(observation)
    spread = _distance(own, own[lender])
    demonstrated_spread = _distance(demonstrated, demonstrated[lender])
    if demonstrated_spread == 0 or spread < CONSTANT * demonstrated_spread:
        return Sight(count, spread, demonstrated_spread, {}, None, None, None)
    pixels = observation.pixel_values.unflatten(1, (len(names), -1))  # [B, N, channels, H, W]

    def shares(cameras: Sequence[int]) -> Shares:
        def seen(frames: Tensor) -> float:
            changed = pixels.clone()
            changed[:, cameras] = frames
            return _distance(own, written(replace(observation, pixel_values=changed.flatten(1, 2)))) / spread

        lent = pixels[lender][:, cameras]
        alike = float((lent - pixels[:, cameras]).abs().float().mean()) < _ALIKE
        black, white = (_blank(pipeline, level).to(pixels) for level in (0.0, 1.0))
        return Shares(None if alike else seen(lent), seen(black), seen(white))

    cameras = {name: shares([number]) for number, name in enumerate(names)}
    together = shares(range(len(names))) if len(names) > 1 else next(iter(cameras.values()))
    state = None
    if observation.state is not None:
        state = _distance(own, written(replace(observation, state=observation.state[lender]))) / spread
    return Sight(
        examples=count,
        spread=spread,
        demonstrated_spread=demonstrated_spread,
        cameras=cameras,
        together=together,
        instruction=_heard(observation, own, written),
        state=state,
    )


def _heard(
    observation: Observation, own: NDArray[np.float64], written: Callable[[Observation], NDArray[np.float64]]
) -> float | None:
    """Return how far actions move with the next different instruction; None where all are the same."""
    prompts = [tuple(row) for row in observation.prompt_ids.tolist()]
    count = len(prompts)
    lender = np.arange(count)
    for row in range(count):
        further = ((row + step) % count for step in range(1, count))
        lender[row] = next((other for other in further if prompts[other] != prompts[row]), row)
    spread = _distance(own, own[lender])
    if (lender == np.arange(count)).any() or spread == 0:
        return None
    mask = None if observation.prompt_mask is None else observation.prompt_mask[lender]
    changed = replace(observation, prompt_ids=observation.prompt_ids[lender], prompt_mask=mask)
    return _distance(own, written(changed)) / spread


def _rows(observation: Observation, rows: slice) -> Observation:
    mask, state = (None if each is None else each[rows] for each in (observation.prompt_mask, observation.state))
    return Observation(observation.prompt_ids[rows], mask, observation.pixel_values[rows], state)


def _distance(left: NDArray[np.floating], right: NDArray[np.floating]) -> float:
    return float(np.abs(np.asarray(left, np.float64) - right).mean())


def _blank(pipeline: ImagePipeline, level: float) -> Tensor:
    """Return a frame's normalised pixels where all of it is black (0.0) or white (1.0), `[3 * backbones, 1, 1]`."""
    means, stds = (torch.tensor(values).flatten()[:, None, None] for values in (pipeline.means, pipeline.stds))
    return (level - means) / stds
