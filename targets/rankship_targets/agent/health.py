"""What makes a device's numbers bad and is no part of its condition while measuring: power, swap, word size, clock."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import time

from .protocol import Event
from .system import ROOT, read_each, read_kilobytes, read_text

_THROTTLED = "/sys/devices/platform/soc/soc:firmware/get_throttled"
_ASK_TIMEOUT_S = 5
# Android's BatteryManager constants.
_STATUS = {"1": "Unknown", "2": "Charging", "3": "Discharging", "4": "Not charging", "5": "Full"}


def read_health() -> Event:
    """Read everything; None where the device does not tell."""
    total, free = read_kilobytes("/proc/meminfo", "SwapTotal"), read_kilobytes("/proc/meminfo", "SwapFree")
    percent, status = read_battery()
    return {
        "userland_bits": struct.calcsize("P") * 8,
        "throttled": parse_throttled(read_text(_THROTTLED) or ask("vcgencmd", "get_throttled")),
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


def parse_throttled(text: str) -> int | None:
    """Parse "throttled=0x50005" of vcgencmd, or the bare "50005" of the kernel's file."""
    found = re.fullmatch(r"(?:throttled=)?(?:0x)?([0-9a-fA-F]{1,8})", text.strip())
    return int(found.group(1), 16) if found else None


def parse_cpus(text: str) -> list[int] | None:
    """Parse the kernel's list of processors, "0-3,6"; None where it is none."""
    if not re.fullmatch(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*", text):
        return None
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def ask(program: str, *arguments: str) -> str:
    """Ask a program of the device's; empty where it is not there, fails, or the device is a pretended one."""
    if ROOT or not shutil.which(program):
        return ""
    try:
        done = subprocess.run(  # noqa: PLW1510 - a failure is an empty answer
            [program, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_ASK_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""
    return done.stdout if done.returncode == 0 else ""
