"""The command `probe`: what the device is and has, without importing any runtime."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from .health import read_health
from .programs import find_program
from .protocol import Event, Fault, Request
from .runtimes import RUNTIMES, find_runtime, find_version
from .system import SYSTEM, read_kilobytes, read_state, read_text


def probe(request: Request) -> Iterator[Event]:
    """Describe the device without importing any runtime."""
    disk = os.statvfs(request["workdir"])
    model = re.search(r"^model name\s*:\s*(.+)$", read_text("/proc/cpuinfo"), re.MULTILINE)
    yield {
        "event": "probe",
        **SYSTEM,
        "cpu_count": os.cpu_count() or 1,
        "cpu_model": read_text("/proc/device-tree/model") or (model.group(1) if model else None),
        "memory_bytes": read_kilobytes("/proc/meminfo", "MemTotal"),
        "free_bytes": disk.f_bavail * disk.f_frsize,
        "runtimes": {name: name_runtime(name) for name in RUNTIMES},
        "numpy": find_version("numpy"),
        "psutil": find_version("psutil"),
        "state": read_state(),
        **read_health(),
    }
    yield {"event": "done"}


def name_runtime(artifact_format: str) -> tuple[str, str] | None:
    """Name what would run a format, and its version; None where nothing can."""
    try:
        found = find_program(artifact_format) or find_runtime(artifact_format)
    except Fault:  # a program that does not run here
        return None
    return found[:2] if found else None
