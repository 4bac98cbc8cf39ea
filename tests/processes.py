"""Whether processes are still there: what tests ask that nothing is left running."""

from __future__ import annotations

import time
from pathlib import Path


def alive(pid: int) -> bool:
    """Say whether a process runs; one that ended and was not waited for does not."""
    try:
        return not Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0].startswith("Z")
    except FileNotFoundError:
        return False


def gone(pid: int) -> bool:
    """Wait until a process is no more; say whether it is."""
    for _ in range(300):
        if not alive(pid):
            return True
        time.sleep(0.1)
    return False
