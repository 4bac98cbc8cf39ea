"""Checkpoints of sharded weights: every process writes its own rows, and the set appears whole or not at all.

`trained-00001-of-00004.safetensors` and `optimizer-00001-of-00004.safetensors` are what the first of four processes
wrote, tensor by tensor, so that nothing is gathered and no process needs memory for more than two tensors of its own.
The main process waits for all, lists all checksums in `state.json` and renames the folder; before that there is no
checkpoint. How a process reads them does not depend on how many wrote them (`vlaft.weights.pieces`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from vlaft.checksums import checksum
from vlaft.errors import VlaftError
from vlaft.training.checkpoints import OPTIMIZER, optimizer_state, places, publish, random_state, writing
from vlaft.training.peers import Gather
from vlaft.training.sharding import local_part, own_rows
from vlaft.weights.pieces import piece_name, rows_metadata
from vlaft.weights.stream import TYPE_NAMES, ShardWriter
from vlaft.weights.trained import TRAINED


def write_checkpoint_set(
    folder: Path,
    step: int,
    *,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    rank: int,
    gather: Gather,
) -> Path:
    """Write a checkpoint aside, each process its rows, and rename it into place; all processes at once.

    Args:
        folder: the run's `checkpoints` folder, which all processes see.
        step: number of finished updates.
        parameters: what is trained, sharded, by the base's names.
        optimizer: its moments are stored.
        state: JSON-able rest (data position, best result ...), the main process's.
        rank: of this process; 0 is the main one.
        gather: exchanges numbers.

    Raises:
        VlaftError: one of the processes cannot write, in all alike; what was there before is untouched.
    """
    final, partial = places(folder, step)
    number, count = _number_of(next(iter(parameters.values())))
    files = {stem: partial / piece_name(stem, number, count) for stem in (TRAINED, OPTIMIZER)}
    scalars = {name: value for name, value in optimizer_state(optimizer) if not isinstance(value, Tensor)}

    def begin() -> list[int]:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        return []

    def write() -> list[int]:
        if number == 0:
            return [0, 0, 0]
        if not partial.is_dir():
            raise VlaftError(
                f"{final}: this machine does not see it: --out has to be on a disk that all machines share"
            )
        write_rows(files[TRAINED], parameters.items())
        write_rows(files[OPTIMIZER], _moments(optimizer, alone=number == 1))
        return [number, *(int(checksum(path), 16) for path in files.values())]

    def finish() -> list[int]:
        if rank == 0:
            names = {
                piece_name(stem, one, count): f"{sums[at]:08x}"
                for one, sums in sorted(written.items())
                for at, stem in enumerate(files)
            }
            there = {path.name for path in partial.iterdir()}
            if there != names.keys() or len(written) != count:
                raise VlaftError(
                    f"{final}: not all processes write into the same folder ({len(there)} of {2 * count} files are"
                    " there): --out has to be on a disk that all machines share"
                )
            publish(partial, final, state | {"step": step, "optimizer_scalars": scalars, "files": names})
        return []

    written: dict[int, list[int]] = {}
    try:
        _all(final, gather, begin)
        written |= {values[0]: values[1:] for values in _all(final, gather, write) if values[0]}
        _all(final, gather, finish)
    except VlaftError:  # all have gathered, so nobody is still writing
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def _all(final: Path, gather: Gather, work: Callable[[], list[int]]) -> list[list[int]]:
    """Let every process do its part; return what each had to tell, or raise in all where one of them failed."""
    error: VlaftError | None = None
    told: list[int] = []
    try:
        with writing(final):
            told = work()
    except VlaftError as caught:
        error = caught
    failed = [rank for rank, (flag,) in enumerate(gather([int(error is not None)])) if flag]
    if error is not None:
        raise error
    if failed:
        raise VlaftError(f"{final}: process {failed[0]} could not write its part of the checkpoint, and says why")
    return gather(told) if told else []


def _number_of(example: Tensor) -> tuple[int, int]:
    """Return this process's number among those that write, from 1, and how many write; 0 where it writes nothing.

    Nodes that hold copies write nothing, but for the first.
    """
    assert isinstance(example, DTensor)
    mesh = example.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    return (0 if any(coordinate[:-1]) else coordinate[-1] + 1), mesh.size(mesh.ndim - 1)


def _moments(optimizer: torch.optim.Optimizer, *, alone: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield what the optimizer keeps; with `alone`, what all processes have alike, and the random state, too."""
    for name, value in optimizer_state(optimizer):
        if isinstance(value, DTensor) or (alone and isinstance(value, Tensor)):
            yield name, value
    if alone:
        yield from random_state().items()


def write_rows(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write this process's rows of sharded tensors, and others whole, one at a time.

    Args:
        path: the file.
        tensors: pairs of name and tensor.
    """
    found = {name: (tensor, own_rows(tensor)) for name, tensor in tensors}
    found = {name: (tensor, rows) for name, (tensor, rows) in found.items() if len(rows) or not tensor.numel()}
    layout = {
        name: (TYPE_NAMES[tensor.dtype], (len(rows), *tensor.shape[1:]) if tensor.ndim else ())
        for name, (tensor, rows) in found.items()
    }
    metadata = rows_metadata({name: (rows.start, tensor.ndim) for name, (tensor, rows) in found.items()})
    with ShardWriter(path, layout, metadata) as writer:
        for name, (tensor, _) in found.items():
            writer.write(name, local_part(tensor.detach()))
