"""The command `probe`: describes the device, without importing any runtime."""

from __future__ import annotations

import os
import re
import struct
import sys
import sysconfig
import time
from collections.abc import Iterator

from .programs import find_program
from .protocol import Event, Fault, Request
from .runtimes import RUNTIMES, find_runtime, find_version
from .state import read_state
from .system import SYSTEM, read_battery, read_firmware, read_kilobytes, read_text
from .thermal import read_belief


def probe(request: Request) -> Iterator[Event]:
    """Describe the device without importing any runtime."""
    disk = os.statvfs(request["workdir"])
    battery, temperature = read_battery(), read_belief()
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
        "managed": is_managed(),
        "temperature_of": temperature.why,
        "temperature_doubts": temperature.doubts,
        **read_health(),
    }
    yield {"event": "done"}


def name_runtime(artifact_format: str) -> tuple[str, str] | None:
    """Return name and version of the runtime for a format; None if there is none."""
    try:
        found = find_program(artifact_format) or find_runtime(artifact_format)
    except Fault:  # a program that does not run here
        return None
    return found[:2] if found else None


def is_managed() -> bool:
    """Return whether this Python is the system's own and takes no packages from pip (PEP 668)."""
    marker = os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")  # noqa: PTH118 - as above
    return sys.prefix == sys.base_prefix and os.path.exists(marker)  # noqa: PTH110 - as above


def read_health() -> Event:
    """Read what can spoil measurements and is not part of DeviceState; None where the device does not report it."""
    total, free = read_kilobytes("/proc/meminfo", "SwapTotal"), read_kilobytes("/proc/meminfo", "SwapFree")
    return {
        "userland_bits": struct.calcsize("P") * 8,
        "throttled": read_firmware(),
        "swap_used_bytes": None if total is None or free is None else total - free,
        "cpus_online": parse_cpus(read_text("/sys/devices/system/cpu/online")),
        "clock_utc_ns": time.time_ns(),
    }


def parse_cpus(text: str) -> list[int] | None:
    """Parse the kernel's list of processors, "0-3,6"; None for any other text."""
    if not re.fullmatch(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*", text):
        return None
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found
