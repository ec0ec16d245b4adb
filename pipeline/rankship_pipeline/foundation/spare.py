"""What this machine has to spare: cores that may be used, and memory that is free."""

from contextlib import suppress
from pathlib import Path

import psutil

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def count_cores() -> int:
    """The cores that this process may use."""
    process = psutil.Process()
    return len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else psutil.cpu_count() or 1  # macOS


def find_free_bytes() -> int:
    """The memory that can still be taken: the machine's, or what this process's control group has left."""
    free = psutil.virtual_memory().available
    for limit, used in _CGROUPS:
        with suppress(OSError, ValueError):  # "max", or no such control group
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
    return free
