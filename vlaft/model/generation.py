"""Greedy decoding of exactly A action tokens, for a batch of prompts of different lengths, with a static cache.

* Every prompt token is attended, the blank (29871) that ends an OpenVLA prompt included; upstream leaves that
  one out of its mask, which today's transformers would hide from the model.
* Exactly A tokens are decoded: an end-of-sequence token is a token like any other here.
* Prompts stay padded on the right, as in training. The padding between a short prompt and its first new token is
  masked, and positions count real tokens only, so each row is what it would be alone.
* Of the prompt, only the last position's hidden state is wanted, so the last decoder block computes only that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlaft.model.cuda_graphs import CudaGraphs


class KeyValues:
    """Keys and values of every decoder block; transformers' attention asks a cache for no more than `update`.

    Attributes:
        capacity: positions that there is room for.
        length: positions that are filled; the next tokens go behind them. Whoever decodes advances it, and may set it
            back to overwrite what came later.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._blocks: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store keys and values `[B, H, N, d]` of the next N positions of a block; return all up to and with them."""
        begin, end = self.length, self.length + key.shape[2]
        if layer_idx not in self._blocks:
            shape = (*key.shape[:2], self.capacity)
            self._blocks[layer_idx] = key.new_empty(*shape, key.shape[3]), value.new_empty(*shape, value.shape[3])
        keys, values = self._blocks[layer_idx]
        keys[:, :, begin:end] = key
        values[:, :, begin:end] = value
        if begin == 0:
            return key, value
        return keys[:, :, :end], values[:, :, :end]


@dataclass(frozen=True)
class Prompt:
    """A batch of images and prompts that the model has seen.

    Attributes:
        cache: keys and values of the prompt's S positions, with room for the tokens to come.
        visible: `[B, S]` bool, False on padding; None where no row is padded.
        lengths: `[B]` int64, patches and real tokens of each row.
        last: `[B, D]`, the hidden state from which the first token is read.
        positions: S.
    """

    cache: KeyValues
    visible: Tensor | None
    lengths: Tensor
    last: Tensor
    positions: int


@torch.inference_mode()
def generate_action_ids(
    model: Any,
    input_ids: Tensor,
    pixel_values: Tensor,
    attention_mask: Tensor | None = None,
    *,
    num_tokens: int,
    action_ids_only: bool = False,
    graphs: CudaGraphs | None = None,
) -> Tensor:
    """Decode `num_tokens` tokens for each row, greedily.

    Args:
        model: an `OpenVLAForActionPrediction`, bare or wrapped by peft.
        input_ids: `[B, T]` int64 prompts beginning with BOS, padded on the right.
        pixel_values: `[B, 3 * number of ViTs, H, W]`, normalised, of the model's dtype.
        attention_mask: `[B, T]`, 1 where there is a token; None when no row is padded.
        num_tokens: A, the number of action dimensions.
        action_ids_only: choose among action tokens only (upstream chooses among all).
        graphs: recordings of earlier calls with this model, whose weights must not have moved since.

    Returns:
        `[B, num_tokens]` int64.
    """

    def run(ids: Tensor, pixels: Tensor, mask: Tensor | None) -> Tensor:
        prompt = read_prompt(model, ids, pixels, mask, room=num_tokens - 1)
        return continue_greedily(model, prompt, num_tokens, action_ids_only=action_ids_only)

    was_training = model.training
    model.eval()
    try:
        if graphs is None:
            return run(input_ids, pixel_values, attention_mask)
        return graphs.run((num_tokens, action_ids_only), run, input_ids, pixel_values, attention_mask)
    finally:
        model.train(was_training)


def read_prompt(
    model: Any,
    input_ids: Tensor,
    pixel_values: Tensor,
    attention_mask: Tensor | None,
    *,
    room: int,
) -> Prompt:
    """Run images and prompts through the model, leaving `room` positions in the cache.

    Args:
        model: in eval mode.
        input_ids: as `generate_action_ids` takes them.
        pixel_values: likewise.
        attention_mask: likewise.
        room: how many tokens will be fed after the prompt at most.
    """
    embeddings = model.embed(input_ids, pixel_values)
    batch, positions = embeddings.shape[:2]
    visible = None if attention_mask is None else model.splice_mask(attention_mask).bool()
    lengths = torch.full((batch,), positions, device=embeddings.device) if visible is None else visible.sum(dim=1)
    cache = KeyValues(positions + room)
    # Causal attention keeps what lies to the right of a prompt's last token out of it, padding included.
    last = model.decode(embeddings, cache=cache, rows=lengths[:, None] - 1)[:, 0]
    return Prompt(cache, visible, lengths, last, positions)


def feed(model: Any, prompt: Prompt, tokens: Tensor, fed: int) -> Tensor:
    """Feed tokens `[B, N]` behind the prompt and `fed` tokens before them; return hidden states `[B, N, D]`.

    What was fed from there on in earlier calls is overwritten.
    """
    count = tokens.shape[1]
    mask = None
    if count > 1 or prompt.visible is not None:
        visible = prompt.visible
        if visible is None:
            visible = torch.ones(len(tokens), prompt.positions, dtype=torch.bool, device=tokens.device)
        causal = torch.ones(count, fed + count, dtype=torch.bool, device=tokens.device).tril(diagonal=fed)
        # hides the padding that lies between a short prompt and its new tokens
        both = [visible[:, None].expand(-1, count, -1), causal.expand(len(tokens), -1, -1)]
        mask = torch.cat(both, dim=-1)[:, None]
    prompt.cache.length = prompt.positions + fed
    return model.decode(
        model.get_input_embeddings()(tokens),
        mask=mask,
        position_ids=prompt.lengths[:, None] + torch.arange(fed, fed + count, device=tokens.device),
        cache=prompt.cache,
    )


def continue_greedily(model: Any, prompt: Prompt, num_tokens: int, *, action_ids_only: bool = False) -> Tensor:
    """Decode `num_tokens` tokens after the prompt, each the likeliest; `[B, num_tokens]` int64."""
    tokens = [likeliest(model, prompt.last, action_ids_only=action_ids_only)]
    for fed in range(num_tokens - 1):
        hidden = feed(model, prompt, tokens[-1][:, None], fed)[:, -1]
        tokens.append(likeliest(model, hidden, action_ids_only=action_ids_only))
    return torch.stack(tokens, dim=1)


def likeliest(model: Any, hidden: Tensor, *, action_ids_only: bool = False) -> Tensor:
    """Return the likeliest token after each hidden state `[..., D]`, of all or of the action tokens: `[...]` int64."""
    head = model.get_output_embeddings()
    if not action_ids_only:
        return head(hidden).argmax(dim=-1)
    stop = model.config.action_vocab_size
    start = stop - model.config.n_action_bins
    if type(head) is nn.Linear:  # neither adapted nor quantised: the other rows need not be computed
        logits = F.linear(hidden, head.weight[start:stop], None if head.bias is None else head.bias[start:stop])
    else:
        logits = head(hidden)[..., start:stop]
    return logits.argmax(dim=-1) + start


@torch.inference_mode()
def decode_both(
    model: Any, prompts: Tensor, mask: Tensor | None, pixel_values: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the tokens that the model finds most likely, teacher-forced and free-running.

    Image and prompt are nearly the whole cost of a prediction, and both ways share them: their keys and values are
    computed once, extended by the demonstrated tokens, and then by the model's own in their place.

    Args:
        model: bare or wrapped by peft, in eval mode.
        prompts: `[B, T]` int64, beginning with BOS, padded on the right.
        mask: `[B, T]`, 1 where there is a token; None when no row is padded.
        pixel_values: `[B, 3 * number of ViTs, H, W]`, normalised, of the model's dtype.
        targets: `[B, A]` int64, the demonstrated action tokens.

    Returns:
        Two tensors `[B, A]` int64. The first is what `forward` with labels gives by argmax, the second what
        `generate_action_ids` gives.
    """
    count = targets.shape[1]
    prompt = read_prompt(model, prompts, pixel_values, mask, room=count - 1)
    hidden = prompt.last[:, None]
    if count > 1:  # the first token needs no other
        hidden = torch.cat([hidden, feed(model, prompt, targets[:, :-1], fed=0)], dim=1)
    return likeliest(model, hidden), continue_greedily(model, prompt, count)
