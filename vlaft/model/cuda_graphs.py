"""CUDA graphs: a prediction's kernels recorded once and replayed, because launching them one by one costs more time.

A 7B model has some two thousand kernels in its prompt and as many in each token; Python launches them slower than a
fast GPU runs them. A robot asks the same question again and again (same instruction, same image size), so the whole
prediction, from pixels to tokens, can be recorded for its shapes. What is recorded is the very function that runs
otherwise, and nothing in it looks at values on the host.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from threading import Lock

import torch
from torch import Tensor

Function = Callable[..., Tensor]
Replay = Callable[[Sequence[Tensor | None]], Tensor]
_KEPT = 4  # recordings; each holds the activations of its prediction
_REMEMBERED = 256  # shapes seen once
_log = logging.getLogger(__name__)


def record(function: Function, inputs: Sequence[Tensor | None]) -> Replay:
    """Record `function` on copies of `inputs`, which are on a GPU; return what replays it on others of their shapes."""
    held = [None if tensor is None else tensor.clone() for tensor in inputs]
    device = next(tensor.device for tensor in held if tensor is not None)
    with torch.cuda.device(device):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries choose kernels and allocate workspaces on their first calls
            for _ in range(2):
                function(*held)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = function(*held)

    def replay(others: Sequence[Tensor | None]) -> Tensor:
        for place, tensor in zip(held, others, strict=True):
            if place is not None and tensor is not None:
                place.copy_(tensor)
        with torch.cuda.device(device):
            graph.replay()
        return output.clone()

    return replay


class CudaGraphs:
    """Recordings of one model's predictions, by shape.

    A shape is recorded when it comes the second time: recording takes as long as a few predictions, which shapes that
    never come back should not cost. Where recording fails, predictions go on without it.
    """

    def __init__(self, record: Callable[[Function, Sequence[Tensor | None]], Replay] = record) -> None:
        self._record = record
        self._recordings: OrderedDict[Hashable, Replay] = OrderedDict()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self._usable = True
        self._lock = Lock()  # a recording has one set of buffers

    def run(self, variant: Hashable, function: Function, *inputs: Tensor | None) -> Tensor:
        """Return `function(*inputs)`, replayed where it has been recorded.

        Args:
            variant: whatever else `function` depends on, beside shapes and types of `inputs`.
            function: computes a tensor from tensors, without looking at their values on the host.
            inputs: tensors on one GPU, or None.
        """
        key = (variant, *((tensor.shape, tensor.dtype) if tensor is not None else None for tensor in inputs))
        with self._lock:
            if self._usable and key not in self._recordings and key in self._seen:
                self._try(key, function, inputs)
            if key in self._recordings:
                self._recordings.move_to_end(key)
                return self._recordings[key](inputs)
            self._seen[key] = None
            while len(self._seen) > _REMEMBERED:
                self._seen.popitem(last=False)
        return function(*inputs)

    def _try(self, key: Hashable, function: Function, inputs: Sequence[Tensor | None]) -> None:
        while len(self._recordings) >= _KEPT:
            self._recordings.popitem(last=False)
        try:
            self._recordings[key] = self._record(function, inputs)
        except RuntimeError as error:  # memory included; torch.AcceleratorError is one too
            self._usable = False
            _log.warning("predictions are not recorded as CUDA graphs: %s", str(error).strip().splitlines()[0])
