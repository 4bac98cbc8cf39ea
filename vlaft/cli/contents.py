"""What lies in a source, drawn as a tree of names, shapes and types."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlaft.data.contents import Contents, Entry


def show_contents(contents: Contents) -> None:
    """Print the tree on stdout; long names do not push the shapes out of a narrow terminal."""
    from vlaft.cli.console import show, stdout_console

    show(f"in {contents.of}:")
    labels = [_label(entry) for entry in contents.entries]
    width = min(max(map(len, labels), default=0), stdout_console().width // 2, 48)
    for label, entry in zip(labels, contents.entries, strict=True):
        show(f"{label:{width}}  {_told(entry)}".rstrip())


def _label(entry: Entry) -> str:
    *above, name = entry.path.split("/")
    if entry.kind == "file":
        return f"  {entry.path}"
    return "  " * (len(above) + 1) + name + ("/" if entry.kind == "group" and name else "")


def _told(entry: Entry) -> str:
    if entry.kind == "attribute":
        return f"= {entry.note}"
    shape = "" if entry.shape is None else str(list(entry.shape))
    kind = "" if entry.kind in ("group", "file") else entry.kind
    return "  ".join(filter(None, [shape, kind, f"({entry.note})" if entry.note else ""]))
