"""`vlaft doctor`: whether this machine has what vlaft needs."""

from __future__ import annotations

from vlaft.cli.arguments import AsJson


def doctor(as_json: AsJson = False) -> None:
    """Say what this machine has and lacks: Python, torch, GPU, extras, disk space."""
    from vlaft.cli.console import show

    show("")
