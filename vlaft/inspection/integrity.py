"""Whether all that vlaft wrote into a folder is as it was written: every file is read anew, whatever its stamp says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlaft.action.statistics import STATISTICS_FILE
from vlaft.checksums import SEAL
from vlaft.errors import CheckpointError, VlaftError
from vlaft.weights.oft import OftFolder, is_oft
from vlaft.weights.trained import (
    ADAPTER_WEIGHTS,
    BASE_CHECKSUMS,
    ENVIRONMENT_FILE,
    RUN_FILE,
    STATE_FILE,
    STATISTICS_CHECKSUM,
    is_trained,
    read_document,
    read_run_statistics,
)


@dataclass(frozen=True)
class Reading:
    """What was read of one thing.

    Attributes:
        subject: the dataset, checkpoint, document or base.
        told: what came of it, in a sentence.
        intact: whether all checksums hold; None where there are none.
    """

    subject: Path
    told: str
    intact: bool | None


def check_folder(folder: Path) -> list[Reading]:
    """Read everything in a converted dataset, a run, or a checkpoint of a run, and hold it against its checksums.

    A run's base is read too, where it is on this machine.

    Raises:
        CheckpointError: the folder is none of these.
    """
    from vlaft.data.store import DATASET_FILE

    if (folder / DATASET_FILE).is_file():
        return [_reading(folder, lambda: _dataset(folder))]
    if (folder / RUN_FILE).is_file():
        return _run(folder)
    if (folder / STATE_FILE).is_file():
        return [_reading(folder, lambda: _checkpoint(folder))]
    if is_trained(folder):
        return [_reading(folder, lambda: _adapter(folder))]
    if is_oft(folder):
        return [_reading(folder, lambda: _oft(folder))]
    if (folder / "config.json").is_file():
        return [Reading(folder, "a base or merged checkpoint, which records no checksums of itself", None)]
    raise CheckpointError(f"{folder}: neither a converted dataset, nor a run, nor a checkpoint; give one of these")


def _reading(subject: Path, check: Callable[[], tuple[str, bool | None]]) -> Reading:
    try:
        return Reading(subject, *check())
    except VlaftError as error:
        return Reading(subject, str(error), False)


def _dataset(folder: Path) -> tuple[str, bool | None]:
    from vlaft.data.store import SPLITS, ConvertedDataset

    dataset = ConvertedDataset(folder)
    dataset.verify()
    rows = sum(dataset.rows(split) for split in SPLITS)
    if not dataset.has_checksum:
        return f"the shards of {rows:,} examples hold; dataset.json is of an earlier vlaft, without a checksum", None
    return f"{rows:,} examples, all checksums hold", True


def _run(run: Path) -> list[Reading]:
    from vlaft.training.checkpoints import list_checkpoints
    from vlaft.training.folder import RECIPE_FILE, RunFolder

    documents: dict[str, dict[str, Any]] = {RUN_FILE: {}, ENVIRONMENT_FILE: {}}

    def document(name: str) -> tuple[str, bool | None]:
        documents[name] = read_document(run / name)
        return _told(SEAL in documents[name])

    def statistics() -> tuple[str, bool | None]:
        read_run_statistics(run, documents[RUN_FILE])
        return _told(STATISTICS_CHECKSUM in documents[RUN_FILE])

    def recipe() -> tuple[str, bool | None]:
        return _told(RunFolder(run).check_recipe())

    readings = [_reading(run / name, lambda name=name: document(name)) for name in documents]  # type: ignore[misc]
    readings.append(_reading(run / STATISTICS_FILE, statistics))
    readings.append(_reading(run / RECIPE_FILE, recipe))
    for path in list_checkpoints(run / "checkpoints"):
        readings.append(_reading(path, lambda path=path: _checkpoint(path)))  # type: ignore[misc]
    base, checksums = documents[RUN_FILE].get("base"), documents[ENVIRONMENT_FILE].get(BASE_CHECKSUMS)
    if isinstance(base, str) and isinstance(checksums, str) and Path(base).is_dir():
        readings.append(_reading(Path(base), lambda: _base(Path(base), checksums)))
    return readings


def _told(checked: bool) -> tuple[str, bool | None]:
    return ("its checksum holds", True) if checked else ("an earlier vlaft wrote it, without a checksum", None)


def _checkpoint(path: Path) -> tuple[str, bool | None]:
    from vlaft.training.checkpoints import read_state

    state = read_state(path, fresh=True)
    if SEAL not in state:
        return (
            f"its {len(state['files'])} other files hold; {STATE_FILE} is of an earlier vlaft, without a checksum",
            None,
        )
    return f"{len(state['files']) + 1} files, all checksums hold", True


def _adapter(folder: Path) -> tuple[str, bool | None]:
    from vlaft.weights.layout import read_header

    count = len(read_header(folder / ADAPTER_WEIGHTS))
    return f"an adapter of {count} tensors without {STATE_FILE}, so without checksums", None


def _oft(folder: Path) -> tuple[str, bool | None]:
    """Say what a folder of OpenVLA-OFT's holds; each of its own files is read."""
    found = OftFolder.open(folder)
    reads = [f"a state of {found.state_size} numbers"] if found.state_size else []
    reads += ["the instruction in its ViTs (FiLM)"] if found.vision else []
    writes = f"writes {found.action_size} numbers an action" if found.action_size else "writes tokens"
    told = f"a policy in OpenVLA-OFT's layout, which {writes}{', and reads ' if reads else ''}{' and '.join(reads)}"
    return f"{told}; it records no checksums of itself", None


def _base(folder: Path, checksums: str) -> tuple[str, bool | None]:
    from vlaft.weights.layout import check_tensor_checksums

    check_tensor_checksums(folder, checksums, fresh=True)
    return f"the base: {len(checksums) // 8} tensors, all as they were in training", True
