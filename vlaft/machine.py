"""What the machine has left for us: processors and main memory."""

from __future__ import annotations

import os
from pathlib import Path


def available_cpus() -> int:
    """Return how many CPUs this process may use, which in a container is fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> int:
    """Return the bytes of main memory that this process may still take: the machine's, or its control group's."""
    free = 2**62
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError, StopIteration, IndexError):
        pass
    return free
