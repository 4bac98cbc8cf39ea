"""The instruction of a LeRobot episode.

The canonical one is each row's `task_index`, looked up in the tasks table by value. GR00T-style datasets put
labels such as `valid` into the same table and point at it from `annotation.*` columns too.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from vlaft.data.readers.lerobot_meta import Metadata
from vlaft.data.readers.lerobot_rows import is_text

_LABELS = frozenset({"valid", "invalid", "success", "failure", "true", "false"})
_TEXT_COLUMNS = ("task", "language_instruction", "instruction")
_TELLING = ("task_description", "task", "instruction", "language", "coarse_action")


def find_instruction(table: pa.Table, meta: Metadata, listed: tuple[str, ...], where: str, warnings: list[str]) -> str:
    """Return the episode's instruction: the most frequent over its rows; empty when the dataset does not say.

    Args:
        table: the episode's rows.
        meta: the dataset's metadata, for its tasks table.
        listed: the tasks that the episodes list names, used when no column points at the tasks table.
        where: names the episode in warnings.
        warnings: gets a sentence when there are several instructions, or none.
    """
    several = []
    for name in _candidates(table, meta):
        texts = [text for text in _texts(table.column(name), meta) if _is_instruction(text)]
        if len(texts) > 1:
            several = texts
        if texts:
            if several:
                warnings.append(
                    f"{where}: the rows name {len(several)} instructions; the most frequent was taken:"
                    f" '{texts[0][:80]}'"
                )
            return texts[0]
    for text in listed:
        if _is_instruction(text):
            return text.strip()
    if len(meta.tasks) == 1 and "task_index" not in table.schema.names:
        text = next(iter(meta.tasks.values()))
        if _is_instruction(text):
            return text.strip()
    said = "some episodes have no instruction (no column points at a task); give it as instruction=..."
    if said not in warnings:
        warnings.append(said)
    return ""


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
    """Return the texts of a column, the most frequent first (the earlier one of equals); nothing when it has none."""
    column = column.drop_null()
    if is_text(column.type):
        values = column.to_pylist()
    elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        numbers = np.asarray(column.to_numpy())
        values = [meta.tasks.get(int(value)) for value in numbers[np.isfinite(numbers)]]
    else:
        return []
    counts: dict[str, int] = {}
    for value in values:
        if isinstance(value, str):
            counts[value.strip()] = counts.get(value.strip(), 0) + 1
    return sorted(counts, key=lambda text: -counts[text])


def _is_instruction(text: str) -> bool:
    return bool(text.strip()) and text.strip().lower() not in _LABELS
