"""The device's description and condition, read from /proc and /sys.

The environment variable RANKSHIP_AGENT_ROOT names a folder whose /proc and /sys describe the device instead.
"""

from __future__ import annotations

import glob
import importlib
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from .protocol import Event

ROOT = os.environ.get("RANKSHIP_AGENT_ROOT", "")
# VmHWM there is this process's own peak; getrusage's ru_maxrss starts at the parent's, which exec inherits.
OWN_STATUS = "/proc/self/status"
OWN_SCHEDULE = "/proc/thread-self/schedstat"  # ns on a processor, ns runnable but waiting for one, turns taken
FIRMWARE = "/sys/devices/platform/soc/soc:firmware/get_throttled"  # of a Raspberry Pi, hexadecimal
PROGRAM_TIMEOUT_S = 5
# The kernel's names of Android's BatteryManager constants; and whether the battery is charging or full in each.
STATUSES = {"1": "Unknown", "2": "Charging", "3": "Discharging", "4": "Not charging", "5": "Full"}
FED = {"Charging": True, "Full": True, "Discharging": False, "Not charging": False}
SYSTEM = {"python": platform.python_version(), "machine": platform.machine(), "kernel": platform.release()}


class Battery(NamedTuple):
    """A battery's charge and its status, as the kernel names it; None where the device does not report it."""

    percent: int | None
    status: str | None


def read_text(path: str) -> str:
    """Read a small file of /sys or /proc; empty if there is none."""
    try:
        with open(ROOT + path, encoding="utf-8", errors="replace") as stream:  # noqa: PTH123 - as above
            return stream.read().strip("\0 \n")
    except OSError:
        return ""


def read_each(pattern: str) -> list[str]:
    """Read every readable file that matches, in order of the numbers in their names."""
    return [text for text in map(read_text, find_paths(pattern)) if text]


def find_paths(pattern: str) -> list[str]:
    """Find the files that match, in order of the numbers in their names."""
    paths = [path[len(ROOT) :] for path in glob.glob(ROOT + pattern)]  # noqa: PTH207 - as above
    return sorted(paths, key=lambda path: ([int(number) for number in re.findall(r"\d+", path)], path))


def read_kilobytes(path: str, name: str) -> int | None:
    """Read a line "name:  123 kB" of /proc, in bytes; None if there is none."""
    found = re.search(rf"^{name}:\s+(\d+) kB", read_text(path), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


def read_waited() -> int | None:
    """Read how long this thread has waited for a processor since it began, in ns; None if it is not counted."""
    return parse_waited(read_text(OWN_SCHEDULE))


def parse_waited(text: str) -> int | None:
    """Parse a thread's schedstat into ns waited; None for "0 0 0", which a kernel that does not count shows."""
    found = re.fullmatch(r"(\d+) (\d+) \d+", text)
    return int(found.group(2)) if found and int(found.group(1)) else None


def query_psutil(query: Callable[[Any], Any]) -> Any:  # noqa: ANN401 - whatever the query returns
    """Return what psutil knows beyond the files; None without psutil, without a result, or for a pretended device."""
    try:
        return None if ROOT else query(importlib.import_module("psutil")) or None
    except Exception:  # noqa: BLE001 - a second source must never end the run
        return None


def read_boot_id() -> str:
    """Read the kernel's id of this boot; empty if there is none."""
    return read_text("/proc/sys/kernel/random/boot_id")


def read_governor() -> str | None:
    """Read the frequency governor; different ones are joined by "+"."""
    governors = read_each("/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor")
    return "+".join(sorted(set(governors))) or None


def read_temperature() -> int | None:
    """Read the temperature of the hottest sensor, in thousandths of a degree Celsius."""
    zones = [int(text) for text in read_each("/sys/class/thermal/thermal_zone*/temp") if re.fullmatch(r"-?\d+", text)]
    sensors = (
        None if zones else query_psutil(lambda ps: [one for part in ps.sensors_temperatures().values() for one in part])
    )
    return max(zones or [round(one.current * 1000) for one in sensors or []], default=None)


def read_state(battery: Battery | None = None) -> Event:
    """Read the device's condition now; a `battery` that was just read is not read again."""
    battery = battery or read_battery()
    clocks = [int(text) for text in read_each("/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")]
    clocks = clocks or query_psutil(lambda ps: [round(one.current * 1000) for one in ps.cpu_freq(percpu=True)])
    load, uptime = (read_text(path).split(" ")[0] for path in ("/proc/loadavg", "/proc/uptime"))
    return {
        "governor": read_governor(),
        "frequency_khz": clocks or None,
        "temperature_mc": read_temperature(),
        "load_1m_milli": round(float(load) * 1000) if load else None,
        "available_memory_bytes": read_kilobytes("/proc/meminfo", "MemAvailable")
        or query_psutil(lambda ps: ps.virtual_memory().available),
        "boot_id": read_boot_id() or None,
        "uptime_ms": round(float(uptime) * 1000) if uptime else None,
        "clock_offset_ns": time.time_ns() - time.monotonic_ns(),
        **read_throttling(),
        "battery_percent": battery.percent,
        "charging": FED.get(battery.status or ""),
    }


def read_throttling() -> Event:
    """Read how the device throttles itself; each figure is None if it is not reported.

    `throttled_bits` are the flags of a Raspberry Pi's firmware (0 to 3 now, 16 to 19 since boot), `throttle_count` the
    events that x86 kernels count, `cooling_steps` the number of steps by which the kernel now slows the processors.
    """
    counts = read_each("/sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/core_throttle_count")
    steps = [
        read_text(name.replace("/type", "/cur_state"))
        for name in find_named("/sys/class/thermal/cooling_device*/type", r"(?i).*(cpu|processor).*")
    ]
    return {
        "throttled_bits": read_firmware(),
        "throttle_count": add_up(counts),
        "cooling_steps": add_up(steps),
    }


def read_firmware() -> int | None:
    """Read the throttling flags of a Raspberry Pi's firmware, from the kernel's file or from `vcgencmd`."""
    return parse_throttled(read_text(FIRMWARE) or run_program("vcgencmd", "get_throttled"))


def parse_throttled(text: str) -> int | None:
    """Parse "throttled=0x50005" of vcgencmd, or the bare "50005" of the kernel's file."""
    found = re.fullmatch(r"(?:throttled=)?(?:0x)?([0-9a-fA-F]{1,8})", text.strip())
    return int(found.group(1), 16) if found else None


def run_program(program: str, *arguments: str) -> str:
    """Return what a program of the device prints; empty if it is missing or fails, or for a pretended device."""
    if ROOT or not shutil.which(program):
        return ""
    try:
        done = subprocess.run(  # noqa: PLW1510 - a failure is an empty answer
            [program, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PROGRAM_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def read_battery() -> Battery:
    """Read charge in percent and status ("Charging", "Full", …) of the device's own first battery."""
    for name in find_named("/sys/class/power_supply/*/type", "Battery"):
        folder = name[: -len("/type")]
        percent, status = read_text(f"{folder}/capacity"), read_text(f"{folder}/status")
        if read_text(f"{folder}/scope") != "Device" and re.fullmatch(r"\d{1,3}", percent):  # "Device": a mouse's
            return Battery(int(percent), status or None)
    return parse_battery(run_program("dumpsys", "battery"))


def parse_battery(text: str) -> Battery:
    """Parse the output of Android's `dumpsys battery`."""
    level = re.search(r"^\s*level: (\d{1,3})\s*$", text, re.MULTILINE)
    status = re.search(r"^\s*status: (\d)\s*$", text, re.MULTILINE)
    return Battery(int(level.group(1)) if level else None, STATUSES.get(status.group(1)) if status else None)


def find_named(pattern: str, content: str) -> list[str]:
    """Find the files whose whole text matches `content`."""
    return [path for path in find_paths(pattern) if re.fullmatch(content, read_text(path))]


def add_up(texts: list[str]) -> int | None:
    """Add up the texts that are whole numbers; None if none is."""
    numbers = [int(text) for text in texts if re.fullmatch(r"\d+", text)]
    return sum(numbers) if numbers else None
