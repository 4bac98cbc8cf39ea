"""What a run or an adapter folder holds, found and described: the input of merge, export, evaluate and predict.

Three kinds of folder are understood: a run (`vlaft train` wrote it: `run.json`), one checkpoint of a run
(`checkpoints/step-000500`), and an adapter in peft's layout from anywhere, upstream's script included. What has a
checksum is held against it here, once for all that use trained weights.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vlaft.action.statistics import BOUNDS, STATISTICS_FILE, Statistics, check_statistics, read_statistics
from vlaft.checksums import SEAL, UNSEALED, content_checksum, holds, seal_holds
from vlaft.documents import WrongValue, read_as, shown
from vlaft.errors import CheckpointError, Unchecked
from vlaft.files import read_json, restored
from vlaft.weights.layout import check_tensor_checksums
from vlaft.weights.pieces import StoredTensors, pieces_in

RUN_FILE = "run.json"
STATISTICS_CHECKSUM = "statistics_crc32c"  # in `run.json`: the checksum of their content
ENVIRONMENT_FILE = "environment.json"
BASE_CHECKSUMS = "base_checksums"  # in there
STATE_FILE = "state.json"  # of a checkpoint; lists the checksums of its other files
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TRAINED = "trained"  # whole tensors: one file, or what each process wrote (`vlaft.weights.pieces`)
TRAINED_FILE = f"{TRAINED}.safetensors"
FINGERPRINT_KEY = "base_fingerprint"  # in an adapter's metadata, as is `BASE_CHECKSUMS`
CHECKPOINT_NAME = re.compile(r"^step-(\d{6,15})$")


@dataclass(frozen=True)
class Trained:
    """Trained weights and what is known about them: an adapter, whole tensors in the base's place, or both.

    Attributes:
        weights: folder with an adapter, with `trained.safetensors`, or with both.
        base: folder or Hub id of the base, or None when nothing says.
        base_fingerprint: fingerprint of the base's weights, or None when nothing says.
        base_checksums: `tensor_checksums` of the base, or None when nothing says.
        statistics: dataset statistics of the training data, empty when there are none.
        inference: keys for the merged `config.json` (`prompt_style`, `image_pipeline`), empty when unknown.
        recipe: name of the recipe, or None.
        run: the run's folder, or None where the weights come without one.
    """

    weights: Path
    base: str | None
    base_fingerprint: str | None = None
    base_checksums: str | None = None
    statistics: Mapping[str, Any] = field(default_factory=dict)
    inference: Mapping[str, Any] = field(default_factory=dict)
    recipe: str | None = None
    run: Path | None = None

    @property
    def has_adapter(self) -> bool:
        """Whether there is an adapter, which is added to the base's weights."""
        return (self.weights / ADAPTER_CONFIG).is_file()

    @property
    def has_tensors(self) -> bool:
        """Whether there are whole tensors, in the place of the base's."""
        return bool(pieces_in(self.weights, TRAINED))

    def tensors(self) -> StoredTensors:
        """Return the whole tensors, under the base's names; none where there are none.

        Raises:
            CheckpointError: damaged.
        """
        return StoredTensors(self.weights, TRAINED)


@dataclass(frozen=True)
class RunStatus:
    """`run.json`: what a run says of itself; each key appears when it is known."""

    status: str | None = None
    recipe: str | None = None
    base: str | None = None
    base_fingerprint: str | None = None
    data_fingerprint: str | None = None
    inference: dict[str, Any] | None = None
    last: str | None = None
    best: str | None = None
    step: int = 0
    best_l1: float | None = None
    best_success: float | None = None
    statistics_crc32c: str | None = None

    def __post_init__(self) -> None:
        """Refuse names that are no checkpoint's."""
        for name in (self.last, self.best):
            if name is not None and not CHECKPOINT_NAME.match(name):
                raise ValueError(f"{shown(name)} is no name of a checkpoint, such as step-000500")


def read_status(run: Path) -> dict[str, Any]:
    """Return a run's `run.json`, whose keys are as `RunStatus` says.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    content = read_document(run / RUN_FILE)
    try:
        read_as(RunStatus, content)
    except WrongValue as error:
        raise CheckpointError(
            f"{run / RUN_FILE}: {error}; delete the file, and vlaft train --resume writes it anew"
        ) from None
    return content


def is_trained(folder: Path) -> bool:
    """Say whether `folder` is a run, a run's checkpoint, or an adapter."""
    folder = restored(folder)
    files = any((folder / name).is_file() for name in (RUN_FILE, ADAPTER_CONFIG, TRAINED_FILE))
    return files or any(folder.glob(f"{TRAINED}-*-of-*.safetensors"))


def find_trained(folder: Path, checkpoint: str | None = None) -> Trained:
    """Describe the trained weights in `folder`, and see that they are as they were written.

    Args:
        folder: a run, a run's checkpoint, or an adapter.
        checkpoint: of a run: `best`, `last`, or a name such as `step-000500`; None takes the best, else the last.

    Raises:
        CheckpointError: nothing of the kind is there, the checkpoint asked for is not, or a file does not match its
            checksum.
    """
    if not restored(folder).is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if (folder / RUN_FILE).is_file():
        return _of_run(folder, checkpoint)
    if not is_trained(folder):
        raise CheckpointError(
            f"{folder}: neither a run ({RUN_FILE}) nor an adapter ({ADAPTER_CONFIG}); give what vlaft train wrote"
        )
    if checkpoint is not None:
        raise CheckpointError(f"{folder} is a single checkpoint; --checkpoint chooses within a run")
    run = folder.parent.parent
    if folder.parent.name == "checkpoints" and (run / RUN_FILE).is_file():
        return _of_run(run, folder.name)
    return _of_adapter(folder)


def _of_run(run: Path, checkpoint: str | None) -> Trained:
    content = read_status(run)
    environment = read_document(run / ENVIRONMENT_FILE) if (run / ENVIRONMENT_FILE).is_file() else {}
    name = checkpoint
    if checkpoint in (None, "best", "last"):
        name = content.get(checkpoint) if checkpoint else content.get("best") or content.get("last")
    if not name:
        raise CheckpointError(f"{run}: the run has no {checkpoint or 'finished'} checkpoint yet")
    weights = run / "checkpoints" / name
    if not CHECKPOINT_NAME.match(name) or not weights.is_dir():
        there = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
        raise CheckpointError(f"{run}: no checkpoint '{name}' (there are: {', '.join(there) or 'none'})")
    checked = check_weights(weights)
    if not checked or SEAL not in content or BASE_CHECKSUMS not in environment:
        warnings.warn(
            f"{run}: an earlier vlaft wrote this run without checksums of all its files and of its base, so a change in"
            " those would not be seen",
            Unchecked,
            stacklevel=3,
        )
    return Trained(
        weights=weights,
        base=content.get("base"),
        base_fingerprint=content.get("base_fingerprint"),
        base_checksums=environment.get(BASE_CHECKSUMS),
        statistics=read_run_statistics(run, content),
        inference=content.get("inference") or {},
        recipe=content.get("recipe"),
        run=run,
    )


def read_document(path: Path) -> dict[str, Any]:
    """Read a JSON object that may carry its own checksum, and hold it against that.

    Raises:
        CheckpointError: missing, damaged, or not as it was written.
    """
    content = read_json(path, CheckpointError)
    if seal_holds(content) is False:
        raise CheckpointError(
            f"{path}: the file does not match its checksum; take it from a copy of the run ({UNSEALED})"
        )
    return content


def read_run_statistics(run: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's dataset statistics, empty where there are none.

    Args:
        run: the run's folder.
        content: of its `run.json`, which has their checksum.

    Raises:
        CheckpointError: damaged, or not as they were written.
        DataError: no dataset statistics.
    """
    path = run / STATISTICS_FILE
    statistics = read_json(path, CheckpointError) if path.is_file() else {}
    if content.get(STATISTICS_CHECKSUM) not in (None, content_checksum(statistics)):
        raise CheckpointError(
            f"{path}: the file does not match its checksum; continue the run with --resume, which writes it anew from"
            " the training data"
        )
    return check_statistics(statistics, str(path), BOUNDS) if statistics else {}


def base_name(trained: Trained, given: str | None) -> str:
    """Return folder or Hub id of the base: the one that is given, else the one that training noted.

    Raises:
        CheckpointError: neither is there.
    """
    if (name := given or trained.base) is None:
        raise CheckpointError(
            f"{trained.run or trained.weights} does not say on which base it was trained; give it with --base"
        )
    return name


def check_base(trained: Trained, base: Path, base_fingerprint: str) -> None:
    """Hold a base's fingerprint against the one that training noted.

    Raises:
        CheckpointError: it is another base, or the same with a damaged tensor.
    """
    if trained.base_fingerprint in (None, base_fingerprint):
        return
    if trained.base_checksums is not None:
        check_tensor_checksums(base, trained.base_checksums)  # a damaged base is told apart from another one
    raise CheckpointError(
        f"{trained.weights} was trained on another base (fingerprint {str(trained.base_fingerprint)[:12]}) than {base}"
        f" ({base_fingerprint[:12]}); give the right one with --base"
    )


def statistics_of(trained: Trained | None, folder: Path, config: Mapping[str, Any]) -> Statistics:
    """Return the statistics by which a model acts, empty where there are none.

    Those of what was trained win, then the file beside the weights, then `norm_stats` of the config: upstream's
    fine-tuning leaves the base's there.

    Args:
        trained: what was trained on the checkpoint, or None where it is used as it is.
        folder: the checkpoint.
        config: its `config.json`.

    Raises:
        DataError: no dataset statistics.
    """
    if trained is not None and trained.statistics:
        return dict(trained.statistics)
    if (folder / STATISTICS_FILE).is_file():
        return read_statistics(folder, BOUNDS)
    norm_stats = config.get("norm_stats")
    return check_statistics(norm_stats, f"{folder / 'config.json'}: norm_stats", BOUNDS) if norm_stats else {}


def check_weights(weights: Path) -> bool:
    """Hold the trained weights in a checkpoint against their checksums; say whether there are any.

    Raises:
        CheckpointError: a file does not match.
    """
    if not (weights / STATE_FILE).is_file():
        return False
    state = read_json(weights / STATE_FILE, CheckpointError)
    files = state.get("files")
    damaged: str | None = None
    if not isinstance(files, Mapping) or not state_seal_holds(state):
        damaged, files = STATE_FILE, {}
    for name in files:
        if name not in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) and not str(name).startswith(TRAINED):
            continue
        try:
            if Path(name).name != name or not holds(weights / name, files[name]):
                damaged = name
        except OSError as error:
            raise CheckpointError(f"{weights / name}: cannot be read ({error.strerror or error})") from None
    if damaged is not None:
        others = sorted((path.name for path in weights.parent.glob("step-*") if path != weights), reverse=True)
        advice = f"take --checkpoint {' or '.join(others)}" if others else "copy or train it again"
        raise CheckpointError(f"{weights / damaged}: the file does not match its checksum; {advice}")
    return SEAL in state


def state_seal_holds(state: Mapping[str, Any]) -> bool:
    """Say whether a checkpoint's `state.json` is as it was written, or is of a version that did not seal it.

    That version noted the sums of the other files as numbers.
    """
    held = seal_holds(state)
    return all(isinstance(recorded, int) for recorded in state["files"].values()) if held is None else held


def _of_adapter(folder: Path) -> Trained:
    if not (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"{folder}: trained tensors without their run; give the run's folder")
    if any(folder.parent.glob("action_head--*_checkpoint.pt")):
        raise CheckpointError(
            f"{folder} belongs to a policy of OpenVLA-OFT's, whose head lies beside it: give {folder.parent} itself"
        )
    if (folder / STATE_FILE).is_file():
        raise CheckpointError(
            f"{folder}: a checkpoint without its run, which says what was trained; give the run's folder"
        )
    check_weights(folder)
    fingerprint, checksums = adapter_base(folder)
    base = read_json(folder / ADAPTER_CONFIG, CheckpointError).get("base_model_name_or_path")
    # Upstream leaves the statistics beside the adapter or in the folder above it.
    places = [folder / STATISTICS_FILE, folder.parent / STATISTICS_FILE]
    statistics = next((read_statistics(place, BOUNDS) for place in places if place.is_file()), {})
    return Trained(
        weights=folder,
        base=base if isinstance(base, str) and base else None,
        base_fingerprint=fingerprint,
        base_checksums=checksums,
        statistics=statistics,
    )


def base_metadata(fingerprint: str | None, checksums: str | None) -> dict[str, str]:
    """Return the safetensors metadata of an adapter, which say on which base it was trained."""
    known = {FINGERPRINT_KEY: fingerprint, BASE_CHECKSUMS: checksums}
    return {"format": "pt"} | {key: value for key, value in known.items() if value}


def adapter_base(folder: Path) -> tuple[str | None, str | None]:
    """Return fingerprint and `tensor_checksums` of the base that an adapter was trained on; None where it says nothing.

    Raises:
        CheckpointError: the adapter's file is missing or damaged.
    """
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            metadata = file.metadata() or {}
            return metadata.get(FINGERPRINT_KEY), metadata.get(BASE_CHECKSUMS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / ADAPTER_WEIGHTS}: {error}") from None


POLICY_PARTS = ("action_head", "proprio_projector", "film")


def policy_part(name: str) -> str | None:
    """Return which of a policy's own modules a parameter belongs to, or None where it is the released model's.

    >>> policy_part("action_head.model.fc1.weight"), policy_part("vision_backbone.featurizer.blocks.3.scale.bias")
    ('action_head', 'film')
    >>> policy_part("projector.fc1.weight") is None
    True
    """
    if name.startswith(("action_head.", "proprio_projector.")):
        return name.partition(".")[0]
    return "film" if re.search(r"\.blocks\.\d+\.(scale|shift)\.", name) else None
