"""Training checkpoints: written aside and renamed, rotated, read back to continue bit for bit.

A checkpoint `step-000500/` holds
* the adapter in peft's layout, or `trained.safetensors` with the trained tensors under the base's names;
* `optimizer.safetensors` and `state.json`: moments, random state, position in the data, best result so far.

Where whole weights are sharded, each process writes its own rows of the two large files (`checkpoint_sets`).

Nothing is pickled. `state.json` lists a checksum of each other file, carries its own, and is written last, so that a
folder in which one does not hold is told apart from a good one.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from vlaft.adapt.adapter import base_parameters
from vlaft.checksums import SEAL, checksum, holds, sealed, unsealed
from vlaft.documents import read_as, shown
from vlaft.errors import CheckpointError, VlaftError
from vlaft.files import read_json, sync
from vlaft.training.sharding import as_part, gathered, local_part, own_rows, spread_like
from vlaft.weights.pieces import StoredTensors, pieces_in
from vlaft.weights.trained import CHECKPOINT_NAME, STATE_FILE, TRAINED, TRAINED_FILE, state_seal_holds

OPTIMIZER = "optimizer"  # moments and random state: one file, or what each process wrote
_OPTIMIZER_FILE = f"{OPTIMIZER}.safetensors"
_SCALAR = re.compile(r"\d{1,9}\.\w+")
_CONSTANTS = ("qmap1", "qmap2")  # code books of 8-bit optimizers, the same for all


@dataclass
class RunProgress:
    """What changes from step to step and is kept in a checkpoint."""

    step: int = 0
    best: str | None = None
    best_l1: float | None = None
    evaluations_since_best: int = 0
    best_success: float | None = None

    def __post_init__(self) -> None:
        """Refuse what no run comes to."""
        if self.step < 0 or self.evaluations_since_best < 0:
            raise ValueError(f"step {self.step} and {self.evaluations_since_best} evaluations cannot be")
        if self.best is not None and not CHECKPOINT_NAME.match(self.best):
            raise ValueError(f"the best checkpoint cannot be called {shown(self.best)}")


@dataclass(frozen=True)
class _Position:
    """Where in the data a run is: `ExampleLoader.state_dict`."""

    seed: int
    epoch: int
    offset: int
    data: str

    def __post_init__(self) -> None:
        """Refuse what no order of examples has."""
        if not (0 <= self.epoch < 2**31 and 0 <= self.offset < 2**40):
            raise ValueError(f"epoch {self.epoch}, example {self.offset} cannot be")


@dataclass(frozen=True)
class _State:
    """`state.json`; what is not of the checkpoint itself is there in a run's."""

    step: int
    optimizer_scalars: dict[str, int | float | bool]
    files: dict[str, int | str]
    progress: RunProgress | None = None
    loader: _Position | None = None
    effective_batch: int | None = None

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        if self.progress is not None and self.step != self.progress.step:
            raise ValueError(f"step {self.step} and progress.step {self.progress.step} are not the same")
        if odd := [name for name in self.optimizer_scalars if not _SCALAR.fullmatch(name)]:
            raise ValueError(f"{shown(odd[0])} is nothing that an optimizer keeps")


def checkpoint_name(step: int) -> str:
    """Return `step-000500` for 500."""
    return f"step-{step:06d}"


def checkpoint_step(checkpoint: Path) -> int:
    """Return 500 for `step-000500`."""
    return int(checkpoint.name.removeprefix("step-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the finished checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := CHECKPOINT_NAME.match(path.name))]
    return [path for _, path in sorted(found)]


def trained_tensors(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the parameters of `names`, whole, on the CPU; all processes must ask at once."""
    parameters = dict(model.named_parameters())
    return {name: stored(parameters[name]) for name in names}


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an optimizer's state as whole tensors `index.key` and a JSON-able rest (scalars, without the groups).

    The index counts parameters in the order of the groups. All processes must ask at once.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for name, value in optimizer_state(optimizer):
        if isinstance(value, Tensor):
            tensors[name] = stored(value)
        else:
            scalars[name] = value
    return tensors, scalars


def optimizer_state(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Any]]:
    """Yield what an optimizer keeps, as `index.key`: tensors, whole or sharded, and scalars."""
    for index, parameter in enumerate(_parameters(optimizer)):
        for key, value in optimizer.state.get(parameter, {}).items():
            if key not in _CONSTANTS:
                yield f"{index}.{key}", value


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]
) -> None:
    """Put back what `flatten_optimizer` gave; the optimizer has the same groups.

    Of `StoredTensors` and a sharded parameter, this process's rows are read and no others.

    Raises:
        CheckpointError: the state is of an optimizer over other parameters.
    """
    parameters = _parameters(optimizer)
    state: dict[int, dict[str, Any]] = {}
    names = [(int(name.split(".", 1)[0]), name.split(".", 1)[1], name) for name in [*tensors, *scalars]]
    if any(index >= len(parameters) for index, _, _ in names):
        most = max(index for index, _, _ in names) + 1
        raise CheckpointError(f"the optimizer's state is of {most} tensors, here are {len(parameters)}")
    for index, key, name in names:
        value = scalars[name] if name in scalars else _own(tensors, name, parameters[index])
        state.setdefault(index, {})[key] = value
    if hasattr(optimizer, "init_state"):
        _restore_8bit(optimizer, state)
        return
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _own(tensors: Mapping[str, Tensor], name: str, example: Tensor) -> Tensor:
    """Return a tensor sharded as a parameter of its shape is, and whole where its shape is another."""
    if not isinstance(tensors, StoredTensors):
        return spread_like(tensors[name], example) if tensors[name].shape == example.shape else tensors[name]
    if tensors.spreads[name].shape != tuple(example.shape):
        return tensors[name]
    return as_part(tensors.rows(name, own_rows(example)), example) if example.ndim else tensors[name]


def _restore_8bit(optimizer: Any, state: dict[int, dict[str, Any]]) -> None:
    """Fill the buffers of a bitsandbytes optimizer, which it makes itself: paged ones stay paged."""
    index = 0
    for group_index, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            if index in state:
                optimizer.init_state(group, parameter, group_index, position)
                own = optimizer.state[parameter]
                for key, value in state[index].items():
                    if isinstance(value, Tensor):
                        own[key].copy_(value)
                    else:
                        own[key] = value
            index += 1


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def stored(tensor: Tensor) -> Tensor:
    """Return a tensor whole, on the CPU; of a sharded one all processes must ask at once."""
    return gathered(tensor.detach()).cpu().contiguous()


def random_state() -> dict[str, Tensor]:
    """Return torch's random state on the CPU and on the current GPU."""
    state = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["random.cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Tensor]) -> None:
    """Put back what `random_state` gave; a GPU's state is left out where there is none."""
    torch.set_rng_state(state["random.cpu"])
    if torch.cuda.is_available() and "random.cuda" in state:
        torch.cuda.set_rng_state(state["random.cuda"])


def write_checkpoint(
    folder: Path,
    step: int,
    *,
    write_weights: Callable[[Path], None],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
) -> Path:
    """Write a checkpoint aside and rename it into place.

    Args:
        folder: the run's `checkpoints` folder.
        step: number of finished updates.
        write_weights: called with the folder to write the adapter or the trained tensors into.
        optimizer: its moments are stored.
        state: JSON-able rest (data position, best result ...).

    Raises:
        VlaftError: the disk is full or not writable; what was there before is untouched.
    """
    final, partial = places(folder, step)
    tensors, scalars = flatten_optimizer(optimizer)
    with writing(final):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            write_weights(partial)
            save_file(tensors | random_state(), partial / _OPTIMIZER_FILE)
            files = {path.name: checksum(path) for path in sorted(partial.iterdir())}
            publish(partial, final, state | {"step": step, "optimizer_scalars": scalars, "files": files})
        except (OSError, SafetensorError):
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return final


def places(folder: Path, step: int) -> tuple[Path, Path]:
    """Return where the checkpoint of a step lies, and where it is written."""
    final = folder / checkpoint_name(step)
    return final, folder / f".{final.name}.partial"


@contextmanager
def writing(final: Path) -> Iterator[None]:
    """Turn what a disk answers while `final` is written into a sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise VlaftError(
            f"{final}: the checkpoint could not be written ({reason}); earlier checkpoints are untouched:"
            " make room and continue with --resume"
        ) from error


def publish(partial: Path, final: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint's `state.json`, its last file, and give its folder the name that it is found by."""
    (partial / STATE_FILE).write_text(json.dumps(sealed(content), indent=2) + "\n")
    for path in partial.iterdir():
        sync(path)
    replaced = final.with_name(f".{final.name}.old")
    if final.exists():  # the same step, written before an interruption
        _move_away(final, replaced)
    partial.rename(final)
    sync(final.parent)
    _delete(replaced)


def read_state(folder: Path, *, fresh: bool = False, check_files: bool = True) -> dict[str, Any]:
    """Read a checkpoint's `state.json` and hold it and the other files against their checksums.

    Args:
        folder: the checkpoint.
        fresh: read also files that are as they were when they were last read.
        check_files: False leaves the other files unread, where another process has seen that they hold.

    Returns:
        Its content, with its own checksum where it carries one.

    Raises:
        CheckpointError: a file is missing or does not match its checksum.
    """
    try:
        state = read_json(folder / STATE_FILE, CheckpointError)
        files = read_as(_State, state).files
        if not state_seal_holds(state):
            raise CheckpointError(f"{folder / STATE_FILE}: the file does not match its checksum")
        for name, recorded in files.items():
            if Path(name).name != name or (check_files and not holds(folder / name, recorded, fresh=fresh)):
                raise CheckpointError(f"{folder / name}: the file does not match its checksum")
        for path in (path for stem in (TRAINED, OPTIMIZER) for path in pieces_in(folder, stem)):
            if path.name not in files:
                raise CheckpointError(f"{path}: of another checkpoint, copied over this one; remove it")
        if not any(name.startswith(OPTIMIZER) for name in files):
            raise CheckpointError(f"{folder / STATE_FILE}: it does not describe a whole checkpoint")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{folder}: the checkpoint is damaged ({error})") from None
    return state  # type: ignore[no-any-return]


def read_checkpoint(
    folder: Path, *, check_files: bool = True
) -> tuple[dict[str, Any], StoredTensors, dict[str, Tensor]]:
    """Read a checkpoint's state, its optimizer tensors (each when it is asked for) and its random state.

    Args:
        folder: the checkpoint.
        check_files: as `read_state` takes it.

    Raises:
        CheckpointError: a file is missing or does not match its checksum.
    """
    state = unsealed(read_state(folder, check_files=check_files))
    tensors = StoredTensors(folder, OPTIMIZER)
    random = {name: tensors[name] for name in tensors if name.startswith("random.")}
    for name in random:
        del tensors.spreads[name]
    return state, tensors, random


def newest_good(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that is whole, and a sentence for each damaged one that was passed over.

    A whole one whose state could not be checked gives a sentence as well.
    """
    warnings = []
    for path in reversed(list_checkpoints(folder)):
        try:
            state = read_state(path)
        except CheckpointError as error:
            warnings.append(f"{error}; falling back to the one before")
            continue
        if SEAL not in state:
            warnings.append(
                f"{path / STATE_FILE}: an earlier vlaft wrote it without a checksum, so a change in it would not be"
                " seen; those of the other files hold"
            )
        return path, warnings
    return None, warnings


def examples_per_step(folder: Path) -> int | None:
    """Return what the newest checkpoint says of how many examples a step had; None where there is none."""
    found = list_checkpoints(folder)
    try:
        return read_as(_State, read_json(found[-1] / STATE_FILE, CheckpointError)).effective_batch if found else None
    except (CheckpointError, OSError, ValueError, TypeError, RecursionError):
        return None  # damaged: whoever reads it says so


def set_aside(folder: Path, chosen: Path | None) -> None:
    """Rename the damaged checkpoints behind `chosen`, so that they neither count nor are taken for good ones.

    They are deleted once a new checkpoint is written.

    Raises:
        VlaftError: one of them cannot be renamed.
    """
    for path in reversed(list_checkpoints(folder)):
        if path == chosen:
            break
        try:
            _move_away(path, folder / f".{path.name}.damaged")
        except OSError as error:
            raise VlaftError(
                f"{path}: this damaged checkpoint cannot be set aside ({error.strerror or error}); delete it, then"
                " continue with --resume"
            ) from error


def rotate_checkpoints(folder: Path, keep: int, best: str | None) -> list[str]:
    """Delete all but the newest `keep` checkpoints and the best; the newest always stays.

    What kills and damage left behind goes too.

    Returns:
        A sentence for each that could not be deleted: they take room and nothing else, so the run goes on.
    """
    warnings = []
    for path in list_checkpoints(folder)[: -max(keep, 1)]:
        if path.name != best:
            try:
                # Renamed first: a kill in mid-deletion leaves nothing that looks like a checkpoint.
                _move_away(path, folder / f".{path.name}.old")
            except OSError as error:
                warnings.append(_not_deleted(path, error))
    for path in folder.glob(".step-*"):
        try:
            _delete(path)
        except OSError as error:
            warnings.append(_not_deleted(path, error))
    return warnings


def _move_away(path: Path, target: Path) -> None:
    _delete(target)
    path.rename(target)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _not_deleted(path: Path, error: OSError) -> str:
    return f"{path}: an old checkpoint could not be deleted ({error.strerror or error}); delete it to make room"


def write_trained(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write trained tensors, under the base's names, into the existing `folder`."""
    save_file(dict(tensors), folder / TRAINED_FILE, metadata={"format": "pt"})


@torch.no_grad()
def load_trained(model: nn.Module, folder: Path) -> None:
    """Put trained tensors into `model`, one at a time, of a sharded one this process's rows.

    Raises:
        CheckpointError: the file is damaged or belongs to another model.
    """
    parameters, tensors = base_parameters(model), StoredTensors(folder, TRAINED)
    if not tensors:
        raise CheckpointError(f"{folder / TRAINED_FILE}: the file is missing; copy the run again")
    for name, spread in tensors.spreads.items():
        if name not in parameters or tuple(parameters[name].shape) != spread.shape:
            raise CheckpointError(f"{folder}: trained on another base: '{name}' does not fit the model")
        local_part(parameters[name].detach()).copy_(tensors.rows(name, own_rows(parameters[name])))
