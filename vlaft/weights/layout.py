"""Checkpoints on disk: a folder (or a Hub repository) in the released OpenVLA layout, safetensors only.

A checkpoint is data: no code of the folder is run. The one pickled thing that is read, OpenVLA-OFT's heads, is read as
tensors and nothing else (`vlaft.weights.oft`).
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from vlaft.checksums import remembered
from vlaft.errors import CheckpointError
from vlaft.files import read_json, restored

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# Beside the weights and config.json, what a checkpoint's folder is made of (upstream's Python files are left out).
RELEASE_FILES = (
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_MAX_HEADER = 100 * 2**20  # safetensors' own bound on a header
_CHUNK = 2**20  # bytes read at once
_FEW = 20  # tensors that a disk or a download damages; where more differ, it is another checkpoint
_MOST_ELEMENTS = 2**48
_SAMPLE = 4096  # bytes of each tensor that the fingerprint reads
# What bitsandbytes keeps beside a weight of 4 bits (`weight.absmax` ...) or 8 bits (`SCB` ...).
_STATES_4BIT = ("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")
_PARTS_4BIT = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *_STATES_4BIT)
_PARTS_8BIT = ("SCB", "weight_format")
_ITEM_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2} | {
    f"{kind}{8 * size}": size for kind in "UIF" for size in (4, 8)
}  # bytes per element; types that are not here are not read


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies.

    Attributes:
        file: file name inside the checkpoint's folder.
        dtype: safetensors' name of the type: `BF16`, `F32` ...
        shape: the tensor's shape.
        begin: first byte in the file.
        end: byte after the last.
        name: of the tensor, where `crc32c` is given.
        crc32c: the checksum that its bytes have to have when they are read, or None where nothing says.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    name: str = ""
    crc32c: str | None = None


def resolve_checkpoint(name: str, *, weights: bool = True) -> Path:
    """Return the local folder of a checkpoint: the folder `name` itself, or the Hub repository `owner/model`.

    Args:
        name: as said.
        weights: download the weights as well, where it is a repository; else only what describes it.

    Raises:
        CheckpointError: neither a folder with a `config.json` nor a repository that can be had.
    """
    folder = restored(Path(name).expanduser() if name.startswith("~/") else Path(name))
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder}: no config.json here, so this is no checkpoint folder")
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder} is a file; give the checkpoint's folder")
    if not is_hub_name(name):
        raise CheckpointError(f"{name}: no such folder{nearest_base(name)}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "tokenizer.model"] + (["*.safetensors", "*_checkpoint.pt"] if weights else [])
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{name}: no such folder, and the Hub cannot be reached for a repository of that name;"
            " go online once, or give a local folder"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{name}: no such folder, and the Hub says: {reason}") from error


def is_hub_name(name: str) -> bool:
    """Say whether `name` is `owner/model`, as on the Hub, rather than a folder.

    >>> is_hub_name("openvla/openvla-7b"), is_hub_name("./model"), is_hub_name("model/")
    (True, False, False)
    """
    owner, _, model = name.partition("/")
    owned = bool(owner and model) and not set("/\\") & set(model) and not name.startswith((".", "~"))
    return owned and not Path(name).is_dir()


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Read a safetensors file's table of contents, without its tensors.

    Raises:
        CheckpointError: missing, truncated or damaged, or a git-LFS pointer.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: the file is missing; copy or download the checkpoint again")
    try:
        return _parse_header(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def read_header_metadata(path: Path) -> dict[str, str]:
    """Return the texts that a safetensors file carries beside its tensors.

    Raises:
        CheckpointError: as `read_header`.
    """
    read_header(path)  # says what is wrong with it
    with path.open("rb") as file:
        found = json.loads(file.read(struct.unpack("<Q", file.read(8))[0])).get("__metadata__") or {}
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def _parse_header(path: Path) -> dict[str, TensorEntry]:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start.startswith(b"version "):
            raise CheckpointError(f"{path} is a git-LFS pointer, not the weights: run git lfs pull")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise CheckpointError(f"{path}: not a safetensors file, or truncated")
        try:
            header = json.loads(file.read(length))
            entries = {
                name: TensorEntry(
                    path.name,
                    str(entry["dtype"]),
                    tuple(int(side) for side in entry["shape"]),
                    8 + length + int(entry["data_offsets"][0]),
                    8 + length + int(entry["data_offsets"][1]),
                )
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, OverflowError):
            raise CheckpointError(f"{path}: its safetensors header is damaged") from None
    if any(entry.end > size for entry in entries.values()):
        raise CheckpointError(f"{path}: truncated: tensors end beyond the file's {size:,} bytes")
    for name, entry in entries.items():
        stored, item = entry.end - entry.begin, _ITEM_SIZES.get(entry.dtype)
        fits = item is None or stored == item * math.prod(entry.shape)
        if (
            entry.begin < 8 + length
            or stored < 0
            or min(entry.shape, default=0) < 0
            or not fits
            or not _can_be(entry.shape)
        ):
            raise CheckpointError(f"{path}: its safetensors header is damaged at '{name}'")
    return entries


def _can_be(shape: tuple[int, ...]) -> bool:
    """Say whether any tensor has this shape; one side may be 0, and the others still not be without bounds."""
    return math.prod(max(side, 1) for side in shape) <= _MOST_ELEMENTS


def tensor_table(folder: Path) -> dict[str, TensorEntry]:
    """List every tensor of a checkpoint: names to places, over all shards.

    Raises:
        CheckpointError: no safetensors, a missing or damaged shard, weights in FP8, or an index that disagrees with
            its shards.
    """
    if (folder / INDEX_FILE).is_file():
        weight_map = read_json(folder / INDEX_FILE, CheckpointError).get("weight_map")
        if not isinstance(weight_map, Mapping) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{folder / INDEX_FILE}: weight_map is missing or malformed")
        table: dict[str, TensorEntry] = {}
        for file in sorted(set(weight_map.values())):
            if Path(file).name != file:
                raise CheckpointError(f"{folder / INDEX_FILE}: the shard '{file}' lies outside the folder")
            table |= read_header(folder / file)
        if set(table) != set(weight_map):
            odd = sorted(set(table) ^ set(weight_map))
            raise CheckpointError(f"{folder}: index and shards disagree on {len(odd)} tensors, first '{odd[0]}'")
        return _readable(table, folder)
    if (folder / SINGLE_FILE).is_file():
        return _readable(read_header(folder / SINGLE_FILE), folder)
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise CheckpointError(
            f"{folder}: only pickled weights here; vlaft reads safetensors only, so convert them first"
        )
    raise CheckpointError(f"{folder}: no {SINGLE_FILE} and no {INDEX_FILE} here")


def _readable(table: dict[str, TensorEntry], folder: Path) -> dict[str, TensorEntry]:
    """Return the table; weights in FP8 have their scales elsewhere, in a layout of each writer's own."""
    for name, entry in table.items():
        if entry.dtype.startswith("F8"):
            raise CheckpointError(
                f"{folder / entry.file}: '{name}' is in FP8 ({entry.dtype}), which cannot be read; take this"
                " checkpoint's weights in bfloat16"
            )
    return table


def fingerprint(folder: Path) -> str:
    """Return a short hash of a checkpoint's tensors: names, types, shapes and a sample of each one's bytes.

    Reads a few kilobytes per tensor, so that 15 GB take about a second; sharding does not matter.

    Raises:
        CheckpointError: a file is missing, damaged or cannot be read.
    """
    digest = hashlib.sha256()
    table = tensor_table(folder)
    for name in sorted(table):
        entry = table[name]
        digest.update(f"{name} {entry.dtype} {entry.shape}\n".encode())
        with _opened(folder / entry.file) as file:
            for begin in sorted({entry.begin, max(entry.begin, entry.end - _SAMPLE)}):
                file.seek(begin)
                digest.update(file.read(min(_SAMPLE, entry.end - begin)))
    return digest.hexdigest()[:32]


def tensor_checksums(folder: Path, *, fresh: bool = False) -> str:
    """Return the CRC-32C of every tensor's bytes, eight hexadecimal digits each, in the order of their names.

    Reads all bytes, but each file once as long as it stays as it is; sharding does not matter.

    Args:
        folder: of a checkpoint.
        fresh: read also files that are as they were when they were last read.

    Raises:
        CheckpointError: a file is missing, damaged, or cannot be read.
    """
    found: dict[str, str] = {}
    table = tensor_table(folder)
    for file in sorted({entry.file for entry in table.values()}):
        try:
            found |= remembered(folder / file, _checksums_in, fresh=fresh)
        except OSError as error:
            raise CheckpointError(f"{folder / file}: cannot be read ({error.strerror or error})") from None
    return "".join(found[name] for name in sorted(table))


def _checksums_in(path: Path) -> dict[str, str]:
    """Return the CRC-32C of the tensors in one file."""
    entries = read_header(path)
    with path.open("rb", buffering=0) as file:
        return {name: _checksum_between(file, entries[name].begin, entries[name].end) for name in entries}


def _checksum_between(file: FileIO, begin: int, end: int) -> str:
    import google_crc32c

    file.seek(begin)
    value = 0
    while begin < end and (block := file.read(min(_CHUNK, end - begin))):
        value = google_crc32c.extend(value, block)
        begin += len(block)
    return f"{value:08x}"


def expecting(table: Mapping[str, TensorEntry], folder: Path, recorded: str) -> dict[str, TensorEntry]:
    """Return the table of `folder` with the checksum that each tensor has to have when it is read.

    Args:
        table: all tensors of a checkpoint.
        folder: of the checkpoint, for the message.
        recorded: what `tensor_checksums` returned.

    Raises:
        CheckpointError: the checksums are those of other tensors.
    """
    if len(recorded) != 8 * len(table):
        raise CheckpointError(f"{folder}: {len(recorded) // 8} checksums are recorded for its {len(table)} tensors")
    return {
        name: replace(table[name], name=name, crc32c=recorded[8 * number : 8 * number + 8])
        for number, name in enumerate(sorted(table))
    }


def check_tensor_checksums(folder: Path, recorded: str, *, fresh: bool = False) -> None:
    """Hold a checkpoint's tensors against the checksums that were recorded of them.

    Raises:
        CheckpointError: some of the tensors are not as they were, all of it is another checkpoint, or a file cannot be
            read.
    """
    now = tensor_checksums(folder, fresh=fresh)
    table = tensor_table(folder)
    changed = [
        entry
        for number, entry in enumerate(expecting(table, folder, recorded).values())
        if entry.crc32c != now[8 * number : 8 * number + 8]
    ]
    if len(changed) > _FEW:
        raise CheckpointError(
            f"{folder}: {len(changed)} of {len(table)} tensors are not those of training, so this is another base; give"
            " the right one with --base"
        )
    if changed:
        raise changed_tensor(folder, changed[0])


def changed_tensor(folder: Path, entry: TensorEntry) -> CheckpointError:
    """Return the error for a tensor of a base that does not match its checksum."""
    return CheckpointError(
        f"{folder / entry.file}: the tensor '{entry.name}' is not as it was in training (its checksum is another), so"
        " the file is damaged or of another base: download or copy the base again, or give the right one with --base"
    )


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def plain_shapes(
    table: Mapping[str, TensorEntry], expected: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a checkpoint saved quantised with the shapes that they stand for.

    Two 4-bit numbers share a byte, so those lie as `[ceil(n / 2), 1]`; scales and tables of codes, which go with a
    weight, are left out.

    Args:
        table: the checkpoint's tensors.
        expected: names and shapes of the model that is not quantised.
    """
    shapes = {}
    for name, entry in table.items():
        owner, _, part = name.partition(".weight.")
        if part in _PARTS_4BIT and f"{owner}.weight" in table:
            continue
        owner, _, part = name.rpartition(".")
        if part in _PARTS_8BIT and f"{owner}.weight" in table:
            continue
        shape = expected.get(name, ())
        has_scales = f"{name}.absmax" in table and any(f"{name}.{part}" in table for part in _STATES_4BIT)
        packed = entry.dtype == "U8" and has_scales and math.prod(entry.shape) == (math.prod(shape) + 1) // 2
        shapes[name] = shape if packed else entry.shape
    return shapes


def check_tensors(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Compare names and shapes of a checkpoint with those of the model that its config describes.

    Raises:
        CheckpointError: the first difference of each kind, in one sentence.
    """
    problems = []
    if missing := sorted(set(expected) - set(found)):
        problems.append(f"{len(missing)} tensors are missing, first '{missing[0]}'")
    if extra := sorted(set(found) - set(expected)):
        problems.append(f"{len(extra)} tensors are not the model's, first '{extra[0]}'")
    if odd := sorted(name for name in set(found) & set(expected) if found[name] != expected[name]):
        name = odd[0]
        problems.append(f"{len(odd)} have another shape, first '{name}': {found[name]}, expected {expected[name]}")
    if problems:
        raise CheckpointError(f"{where}: weights and config.json do not fit together: {'; '.join(problems)}")


# Licences as their pages on the Hub say; a download of the weights does not bring the page along.
LICENCES = {"openvla/openvla-7b": "mit", "openvla/openvla-v01-7b": "mit"}


def nearest_base(name: str) -> str:
    """Return `"; did you mean 'openvla/openvla-7b'?"` for a model's plain name, or an empty string.

    Only a name without an owner can be one: whoever writes a slash means a folder or knows the owner.

    >>> nearest_base("openvla-7b")
    "; did you mean 'openvla/openvla-7b'?"
    >>> nearest_base("data/openvla-7b")
    ''
    """
    if "/" in name:
        return ""
    known = {full.partition("/")[2]: full for full in LICENCES}
    near = get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    return f"; did you mean '{known[near[0]]}'?" if near else ""
