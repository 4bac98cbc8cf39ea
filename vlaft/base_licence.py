"""Under which licence a base is, as far as its folder or its name tells."""

from __future__ import annotations

from pathlib import Path

import yaml

from vlaft.known_bases import LICENCES


def base_licence(base: str, folder: Path) -> str | None:
    """Return the licence's identifier on the Hub, such as `mit`, or None where nothing states it.

    Args:
        base: the base's name.
        folder: the base's local folder, whose `README.md` may begin with a model card's metadata.
    """
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        text = ""
    if text.startswith("---\n"):
        try:
            head = yaml.safe_load(text[4:].partition("\n---")[0])
        except yaml.YAMLError:
            head = None
        if isinstance(head, dict) and isinstance(head.get("license"), str):
            return head["license"]
    return LICENCES.get(base)
