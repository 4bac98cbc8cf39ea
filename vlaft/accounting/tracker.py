"""Every byte that lives during a training step, followed tensor by tensor.

A `StorageTracker` sits below autograd: it sees each operation's outputs, counts every storage once however many views
it has, and learns of its death from a weak reference. What autograd saves for the backward pass is storage like any
other, so it needs no accounting of its own. It works the same on real tensors and on the meta device.

Not seen: what a kernel allocates and frees inside itself.
"""

from __future__ import annotations

import functools
import weakref
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = ("weights", "adapters", "gradients", "optimizer state", "activations", "logits")
WEIGHTS, ADAPTERS, GRADIENTS, OPTIMIZER, ACTIVATIONS, LOGITS = range(len(KINDS))


_SHAPES: dict[Any, Any] = {}  # what `StorageTracker._run` remembers, over all traces of the process


@dataclass(frozen=True)
class Trace:
    """Births and deaths of storages, in order; E events.

    Attributes:
        sizes: `[E]` int64, bytes; negative where a storage dies.
        kinds: `[E]` int8, index into `KINDS`.
        keys: `[E]` int64, which storage; -1 for a change of kind, which frees and allocates nothing.
        places: `[E]` int32, index into `names`.
        names: `forward language_model.model.layers.3.mlp` and the like.
    """

    sizes: np.ndarray
    kinds: np.ndarray
    keys: np.ndarray
    places: np.ndarray
    names: list[str]

    @property
    def live(self) -> np.ndarray:
        """`[E]` int64, bytes alive after each event."""
        return np.cumsum(self.sizes)

    def at_peak(self) -> tuple[int, int]:
        """Return the most bytes alive at once, and the event at which they were."""
        live = self.live
        event = int(live.argmax())
        return int(live[event]), event


class StorageTracker(TorchDispatchMode):
    """Counts storages from birth to death while it is entered.

    Attributes:
        kind: index into `KINDS` of what is born next.
        phase: word that opens the name of a place: `forward`, `backward`, `optimizer`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kind = ACTIVATIONS
        self.phase = "forward"
        self._alive: dict[int, tuple[weakref.ref, int, int, int]] = {}  # address: reference, bytes, kind, key
        self._sizes: list[int] = []
        self._kinds: list[int] = []
        self._keys: list[int] = []
        self._places: list[int] = []
        self._names: dict[str, int] = {}
        self._stack: list[str] = []  # modules under way
        self._marks: tuple[list[int], list[str]] = ([], [])  # autograd sequence numbers, and the module from there on
        self._head_from: int | None = None
        self._place = ""
        self._closed = False

    def trace(self) -> Trace:
        """Return what happened so far."""
        return Trace(
            np.array(self._sizes, dtype=np.int64),
            np.array(self._kinds, dtype=np.int8),
            np.array(self._keys, dtype=np.int64),
            np.array(self._places, dtype=np.int32),
            list(self._names),
        )

    def close(self) -> None:
        """Stop listening to deaths."""
        self._closed = True
        self._alive.clear()

    # -- storages -------------------------------------------------------------------------------------------------

    def add(self, tensor: Tensor, kind: int | None = None) -> None:
        """Count a tensor's storage from now on, unless it is counted already."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._alive:
            return
        size = storage.nbytes()
        kind = self.kind if kind is None else kind
        key = len(self._sizes)
        reference = weakref.ref(storage, partial(self._died, address))
        self._alive[address] = (reference, size, kind, key)
        self._record(size, kind, key)

    def relabel(self, tensor: Tensor, kind: int) -> None:
        """Count a tensor's storage under another kind from now on."""
        address = tensor.untyped_storage()._cdata
        if address not in self._alive:
            self.add(tensor, kind)
            return
        reference, size, old, key = self._alive[address]
        if old != kind:
            self._alive[address] = (reference, size, kind, key)
            self._record(-size, old, -1)
            self._record(size, kind, -1)

    def _died(self, address: int, _: weakref.ref) -> None:
        entry = self._alive.pop(address, None)
        if entry is not None and not self._closed:
            self._record(-entry[1], entry[2], entry[3])

    def _record(self, size: int, kind: int, key: int) -> None:
        place = f"{self.phase} {self._place}"
        self._sizes.append(size)
        self._kinds.append(kind)
        self._keys.append(key)
        self._places.append(self._names.setdefault(place, len(self._names)))

    # -- operations -----------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run an operation and count what it made."""
        result = self._run(func, args, kwargs or {})
        if not self._stack:
            self._locate()
        for leaf in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result

    def _run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Run an operation; on the meta device, remember what comes out and do not work it out again.

        Meta kernels are written in Python and take most of a trace's time; a model of 32 equal blocks asks them for
        the same shapes 32 times.
        """
        key = _signature(func, args, kwargs)
        if key is None:
            return func(*args, **kwargs)
        known = _SHAPES.get(key)
        if known is not None:
            packing, outputs = known
            return packing([torch.empty_strided(shape, stride, dtype=t, device="meta") for shape, stride, t in outputs])
        result = func(*args, **kwargs)
        outputs = [result] if isinstance(result, Tensor) else list(result) if isinstance(result, tuple) else []
        fresh = bool(outputs) and all(isinstance(one, Tensor) and one.is_meta for one in outputs)
        if fresh:
            addresses = {one.untyped_storage()._cdata for one in outputs}
            # an operation may return its input's storage without saying so in its schema
            fresh = len(addresses) == len(outputs) and not addresses & self._alive.keys()
            fresh = fresh and all(one.untyped_storage().nbytes() == one.numel() * one.itemsize for one in outputs)
        if fresh:
            _SHAPES[key] = (
                tuple if isinstance(result, tuple) else _only,
                [(tuple(one.shape), one.stride(), one.dtype) for one in outputs],
            )
        return result

    # -- places ---------------------------------------------------------------------------------------------------

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Name places after the modules of `model`, and tell its gradients and logits from other storages."""
        handles: list[Any] = []
        for name, module in model.named_modules():
            name = name.removeprefix("base_model.model").lstrip(".")
            last = name.rpartition(".")[2]
            if not name or "lora_" in name or last == "base_layer":
                continue
            head = last == "lm_head"
            handles.append(module.register_forward_pre_hook(partial(self._entered, name, head)))
            handles.append(module.register_forward_hook(self._left, always_call=True))
        for parameter in model.parameters():
            if parameter.requires_grad:
                handles.append(parameter.register_post_accumulate_grad_hook(self._accumulated))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, phase: str) -> None:
        """Say what comes next."""
        self.phase, self._place = phase, ""
        if phase == "forward":
            self.kind, self._head_from = ACTIVATIONS, None

    def _entered(self, name: str, head: bool, *_: Any) -> None:
        self._stack.append(name)
        self._place = name
        self._mark(name)
        if head:
            self._head_from = self._marks[0][-1]
            self.kind = LOGITS

    def _left(self, *_: Any) -> None:
        self._stack.pop()
        self._place = self._stack[-1] if self._stack else ("loss" if self.kind == LOGITS else "")
        self._mark(self._place)

    def _mark(self, name: str) -> None:
        self._marks[0].append(torch._C._autograd._get_sequence_nr())
        self._marks[1].append(name)

    def _locate(self) -> None:
        """In the backward pass, find the module whose operation is being differentiated."""
        node = torch._C._current_autograd_node()
        if node is None:
            return
        number = node._sequence_nr()
        if number > 2**62:  # the accumulation of a leaf's gradient has no place of its own
            return
        at = bisect_right(self._marks[0], number) - 1
        if at >= 0:
            self._place = self._marks[1][at]
        if self._head_from is not None:
            self.kind = LOGITS if number >= self._head_from else ACTIVATIONS
            if self.kind == ACTIVATIONS:
                self._head_from = None  # recomputed blocks have higher numbers than the head

    def _accumulated(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.relabel(parameter.grad, GRADIENTS)


def _only(outputs: list) -> Any:
    return outputs[0]


def _signature(func: Any, args: tuple, kwargs: dict) -> Any:
    """Return what determines the result's shape on the meta device, or None where it is not a pure function of it."""
    if not _makes_new(func):
        return None
    parts: list[Any] = [func]
    for value in (*args, *kwargs.values()):
        part = _part(value)
        if part is None:
            return None
        parts.append(part)
    parts.append(tuple(kwargs))
    return tuple(parts)


@functools.cache
def _makes_new(func: Any) -> bool:
    return not func._schema.is_mutable and all(one.alias_info is None for one in func._schema.returns)


def _part(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype) if value.is_meta else None
    if isinstance(value, list | tuple):
        inner = tuple(_part(one) for one in value)
        return None if any(one is None for one in inner) else (len(inner), *inner)
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device | torch.layout):
        return (type(value).__name__, value)
    return ("other", value) if isinstance(value, torch.memory_format) else None
