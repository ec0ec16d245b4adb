"""What makes a device's numbers bad and is no part of its condition while measuring: power, swap, word size, clock."""

from __future__ import annotations

import re
import struct
import time

from .protocol import Event
from .system import read_battery, read_firmware, read_kilobytes, read_text


def read_health() -> Event:
    """Read everything; None where the device does not tell."""
    total, free = read_kilobytes("/proc/meminfo", "SwapTotal"), read_kilobytes("/proc/meminfo", "SwapFree")
    percent, status = read_battery()
    return {
        "userland_bits": struct.calcsize("P") * 8,
        "throttled": read_firmware(),
        "swap_used_bytes": None if total is None or free is None else total - free,
        "cpus_online": parse_cpus(read_text("/sys/devices/system/cpu/online")),
        "battery_percent": percent,
        "battery_status": status,
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
