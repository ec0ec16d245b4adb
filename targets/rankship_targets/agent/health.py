"""What makes a device's numbers bad and is no part of its condition while measuring: power, swap, word size, clock."""

from __future__ import annotations

import re
import struct
import time

from .protocol import Event
from .system import ask, read_each, read_firmware, read_kilobytes, read_text

# Android's BatteryManager constants.
_STATUS = {"1": "Unknown", "2": "Charging", "3": "Discharging", "4": "Not charging", "5": "Full"}


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


def read_battery() -> tuple[int | None, str | None]:
    """Read the battery's charge in percent and what it does ("Charging", "Full", …)."""
    kinds = read_each("/sys/class/power_supply/*/type")
    charges = read_each("/sys/class/power_supply/*/capacity")
    if "Battery" in kinds and charges:
        statuses = read_each("/sys/class/power_supply/*/status")
        percent = int(charges[0]) if re.fullmatch(r"\d{1,3}", charges[0]) else None
        return percent, statuses[0] if statuses else None
    return parse_battery(ask("dumpsys", "battery"))


def parse_battery(text: str) -> tuple[int | None, str | None]:
    """Parse what Android's `dumpsys battery` prints."""
    level = re.search(r"^\s*level: (\d{1,3})\s*$", text, re.MULTILINE)
    status = re.search(r"^\s*status: (\d)\s*$", text, re.MULTILINE)
    return (int(level.group(1)) if level else None), (_STATUS.get(status.group(1)) if status else None)


def parse_cpus(text: str) -> list[int] | None:
    """Parse the kernel's list of processors, "0-3,6"; None where it is none."""
    if not re.fullmatch(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*", text):
        return None
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found
