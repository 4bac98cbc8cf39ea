"""The instructions of a LeRobot episode.

The canonical one is each row's `task_index`, looked up in the tasks table by value. GR00T-style datasets put
labels such as `valid` into the same table and point at it from `annotation.*` columns too.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite

import pyarrow as pa

from vlaft.data.readers.lerobot_meta import Metadata
from vlaft.data.readers.lerobot_rows import is_text
from vlaft.data.readers.step_instructions import gather

_LABELS = frozenset({"valid", "invalid", "success", "failure", "true", "false"})
_TEXT_COLUMNS = ("task", "language_instruction", "instruction")
_TELLING = ("task_description", "task", "instruction", "language", "coarse_action")


def find_instruction(
    table: pa.Table, meta: Metadata, listed: tuple[str, ...], where: str, warnings: list[str]
) -> tuple[str, tuple[str, ...]]:
    """Return the episode's instruction and those of its rows where they differ, as `Episode` holds them.

    The instruction is empty when the dataset does not say.

    Args:
        table: the episode's rows.
        meta: the dataset's metadata, for its tasks table.
        listed: the tasks that the episodes list names, used when no column points at the tasks table.
        where: names the episode in warnings.
        warnings: gets a sentence when rows have none beside others that have, or none has one.
    """
    for name in _candidates(table, meta):
        found = gather(_texts(table.column(name), meta), where)
        if found.told:
            warnings.append(found.told)
        if found.most:
            return found.most, found.own
    for text in listed:
        if _is_instruction(text):
            return text.strip(), ()
    if len(meta.tasks) == 1 and "task_index" not in table.schema.names:
        text = next(iter(meta.tasks.values()))
        if _is_instruction(text):
            return text.strip(), ()
    said = "some episodes have no instruction (no column points at a task); give it as instruction=..."
    if said not in warnings:
        warnings.append(said)
    return "", ()


def _candidates(table: pa.Table, meta: Metadata) -> Iterator[str]:
    """Yield the columns that may hold the instruction, the most trustworthy first."""
    names = table.schema.names
    if "task_index" in names:
        yield "task_index"
    yield from (name for name in _TEXT_COLUMNS if name in names and is_text(table.schema.field(name).type))
    annotation = meta.modality.get("annotation")
    keys = [
        str(entry.get("original_key", f"annotation.{part}")) if isinstance(entry, dict) else f"annotation.{part}"
        for part, entry in (annotation if isinstance(annotation, dict) else {}).items()
    ]
    keys += [name for name in names if name.startswith("annotation.")]
    for key in dict.fromkeys(keys):
        if key in names and key != "task_index" and any(word in key for word in _TELLING):
            yield key


def _texts(column: pa.ChunkedArray, meta: Metadata) -> list[str]:
    """Return the instruction that each row of a column names, blank where there is none; nothing for other columns."""
    numbers = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
    if not numbers and not is_text(column.type):
        return []
    values = column.to_pylist()
    if numbers:
        values = [None if value is None or not isfinite(value) else meta.tasks.get(int(value)) for value in values]
    return [value.strip() if isinstance(value, str) and _is_instruction(value) else "" for value in values]


def _is_instruction(text: str) -> bool:
    return bool(text.strip()) and text.strip().lower() not in _LABELS
