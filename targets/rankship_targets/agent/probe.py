"""The command `probe`: what the device is and has, without importing any runtime."""

from __future__ import annotations

import os
import re
import struct
import time
from collections.abc import Iterator

from .programs import find_program
from .protocol import Event, Fault, Request
from .runtimes import RUNTIMES, find_runtime, find_version
from .system import SYSTEM, read_battery, read_firmware, read_kilobytes, read_state, read_text


def probe(request: Request) -> Iterator[Event]:
    """Describe the device without importing any runtime."""
    disk = os.statvfs(request["workdir"])
    battery = read_battery()
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
        "state": read_state(battery),
        "battery_status": battery.status,
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


def read_health() -> Event:
    """Read what makes numbers bad and is no part of the condition while measuring; None where it is not told."""
    total, free = read_kilobytes("/proc/meminfo", "SwapTotal"), read_kilobytes("/proc/meminfo", "SwapFree")
    return {
        "userland_bits": struct.calcsize("P") * 8,
        "throttled": read_firmware(),
        "swap_used_bytes": None if total is None or free is None else total - free,
        "cpus_online": parse_cpus(read_text("/sys/devices/system/cpu/online")),
        "clock_utc_ns": time.time_ns(),
    }


def parse_cpus(text: str) -> list[int] | None:
    """Parse the kernel's list of processors, "0-3,6"; None where it is none."""
    if not re.fullmatch(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*", text):
        return None
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found
