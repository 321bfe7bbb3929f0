"""What this machine offers to a process: cores and memory."""

import os
import re
import sys
from contextlib import suppress
from pathlib import Path

import psutil

MEMORY_SHARE = 0.6


def default_threads() -> int:
    """Return the number of cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores or 1)


def default_memory() -> int:
    """Return 60 % of what is available to this process, cgroup limits included."""
    available = psutil.virtual_memory().available
    groups = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):
            free = int((groups / limit).read_text()) - int((groups / used).read_text())
            available = min(available, max(free, 0))
    return int(MEMORY_SHARE * available)


def peak_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # unlike ru_maxrss, it does not start at the parent process's peak
        match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if match:
            return int(match[1]) * 1024
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = psutil.Process().memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))  # the former on Windows
