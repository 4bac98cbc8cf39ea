"""Storages are counted once, from birth to death."""

import torch
from torch import nn

from vlaft.accounting.tracker import ACTIVATIONS, GRADIENTS, WEIGHTS, StorageTracker


def sizes(tracker):
    trace = tracker.trace()
    return trace.sizes.tolist(), int(trace.live[-1]) if len(trace.sizes) else 0


def test_views_and_in_place_operations_add_nothing():
    with StorageTracker() as tracker:
        a = torch.ones(4, 8)
        b = a.view(8, 4).t()[1:]
        a.add_(1)
        assert sizes(tracker) == ([128], 128)
        del a
        assert sizes(tracker) == ([128], 128)  # the view still holds the storage
        del b
    assert sizes(tracker) == ([128, -128], 0)


def test_what_autograd_saves_stays_alive_until_the_backward_pass():
    for device in ("cpu", "meta"):
        weight = nn.Parameter(torch.empty(8, 8, device=device))
        tracker = StorageTracker()
        tracker.add(weight, WEIGHTS)
        with tracker:
            x = torch.ones(4, 8, device=device)
            loss = (x @ weight).exp().sum()
            del x
            held = int(tracker.trace().live[-1])
            # weight; x, saved for the product; exp's result, saved by itself; the loss
            assert held == 256 + 128 + 128 + 4
            loss.backward()
            del loss
            tracker.relabel(weight.grad, GRADIENTS)
        assert int(tracker.trace().live[-1]) == 512
        trace = tracker.trace()
        assert int(trace.sizes[trace.kinds == GRADIENTS].sum()) == 256


def test_remembered_shapes_are_those_of_the_operation():
    with StorageTracker():
        first = torch.empty(3, 5, device="meta").t() + 1
        again = torch.empty(3, 5, device="meta").t() + 1
    assert (first.shape, first.stride(), first.dtype) == (again.shape, again.stride(), again.dtype)
    with StorageTracker() as tracker:
        a = torch.empty(4, 6, device="meta")
        flat = torch.ops.aten._unsafe_view(a, [24])  # its schema hides that this is a view
        flat = torch.ops.aten._unsafe_view(a, [24])
        assert sizes(tracker)[1] == 96
        assert flat.shape == (24,)


def test_places_name_modules_in_both_directions():
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
    tracker = StorageTracker()
    with tracker, tracker.watching(model):
        loss = model(torch.ones(2, 4)).sum()
        tracker.begin("backward")
        loss.backward()
    names = tracker.trace().names
    assert "forward 0" in names and "forward 2" in names
    assert "backward 2" in names and "backward 0" in names
    assert ACTIVATIONS in tracker.trace().kinds
