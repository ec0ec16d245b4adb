"""What the device is and how it does, read from /proc and /sys.

The environment variable RANKSHIP_AGENT_ROOT puts another folder before /sys and /proc in what describes the device.
"""

from __future__ import annotations

import glob
import importlib
import os
import platform
import re
from collections.abc import Callable
from typing import Any

from .protocol import Event

ROOT = os.environ.get("RANKSHIP_AGENT_ROOT", "")
# VmHWM there is this process's own peak; getrusage's ru_maxrss starts at the parent's, which exec inherits.
OWN_STATUS = "/proc/self/status"
SYSTEM = {"python": platform.python_version(), "machine": platform.machine(), "kernel": platform.release()}


def read_text(path: str) -> str:
    """Read a small file of /sys or /proc; empty where there is none."""
    try:
        with open(ROOT + path, encoding="utf-8", errors="replace") as stream:  # noqa: PTH123 - as above
            return stream.read().strip("\0 \n")
    except OSError:
        return ""


def read_each(pattern: str) -> list[str]:
    """Read every readable file that matches, in order of the numbers in its name."""
    paths = [path[len(ROOT) :] for path in glob.glob(ROOT + pattern)]  # noqa: PTH207 - as above
    texts = [read_text(path) for path in sorted(paths, key=lambda path: [int(n) for n in re.findall(r"\d+", path)])]
    return [text for text in texts if text]


def read_kilobytes(path: str, name: str) -> int | None:
    """Read a line "name:  123 kB" of /proc, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", read_text(path), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


def ask_psutil(question: Callable[[Any], Any]) -> Any:  # noqa: ANN401 - whatever it answers
    """Ask psutil what the files do not tell; None without it, without an answer, or for a pretended device."""
    try:
        return None if ROOT else question(importlib.import_module("psutil")) or None
    except Exception:  # noqa: BLE001 - a second source must never end the run
        return None


def read_state() -> Event:
    """Read the device's condition now."""
    governors = read_each("/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor")
    clocks = [int(text) for text in read_each("/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")]
    clocks = clocks or ask_psutil(lambda ps: [round(one.current * 1000) for one in ps.cpu_freq(percpu=True)])
    zones = [int(text) for text in read_each("/sys/class/thermal/thermal_zone*/temp") if re.fullmatch(r"-?\d+", text)]
    sensors = (
        None if zones else ask_psutil(lambda ps: [one for part in ps.sensors_temperatures().values() for one in part])
    )
    zones = zones or [round(one.current * 1000) for one in sensors or []]
    load = read_text("/proc/loadavg").split(" ")[0]
    return {
        "governor": "+".join(sorted(set(governors))) or None,
        "frequency_khz": clocks or None,
        "temperature_mc": max(zones, default=None),
        "load_1m_milli": round(float(load) * 1000) if load else None,
        "available_memory_bytes": read_kilobytes("/proc/meminfo", "MemAvailable")
        or ask_psutil(lambda ps: ps.virtual_memory().available),
    }
