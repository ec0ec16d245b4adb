"""What this machine has to spare: cores that may be used, and memory that is free, or will be."""

import ctypes
from contextlib import suppress
from pathlib import Path

import psutil

# The limit of a control group, what it uses, and of what: version 2, and version 1.
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)
_CACHED = ("active_file", "inactive_file")  # of files; the kernel gives it back


def count_cores() -> int:
    """The cores that this process may use."""
    process = psutil.Process()
    return len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else psutil.cpu_count() or 1  # macOS


def find_free_bytes() -> int:
    """The memory that this process can still take: the machine's, or what its control group has left."""
    free = psutil.virtual_memory().available + psutil.swap_memory().free
    for limit, used, of_what in _CGROUPS:
        with suppress(OSError, ValueError):  # "max", or no such control group
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()) + _read_cached(Path(of_what)))
    return free


def give_back_memory() -> None:
    """Return the pages that the C library keeps after they were freed to the system; nothing where it is not glibc.

    Matrices of a few megabytes leave it with holes as large as all of them were together.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _read_cached(path: Path) -> int:
    """Bytes of files in a control group's memory; version 1 counts those of the groups inside apart, as "total"."""
    known = {name: int(value) for name, value in map(str.split, path.read_text().splitlines())}
    return sum(known.get(f"total_{name}", known.get(name, 0)) for name in _CACHED)
