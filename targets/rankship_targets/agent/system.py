"""What the device tells of itself in /proc and /sys, and through its own programs.

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

ROOT = os.environ.get("RANKSHIP_AGENT_ROOT", "")
# VmHWM there is this process's own peak; getrusage's ru_maxrss starts at the parent's, which exec inherits.
OWN_STATUS = "/proc/self/status"
OWN_SCHEDULE = "/proc/thread-self/schedstat"  # ns on a processor, ns runnable but waiting for one, turns taken
FIRMWARE = "/sys/devices/platform/soc/soc:firmware/get_throttled"  # of a Raspberry Pi, hexadecimal
PROGRAM_TIMEOUT_S = 5
PART_BYTES, NOT_READY_S = 1 << 16, 0.01
# The kernel's names of Android's BatteryManager constants; and whether the battery is charging or full in each.
STATUSES = {"1": "Unknown", "2": "Charging", "3": "Discharging", "4": "Not charging", "5": "Full"}
FED = {"Charging": True, "Full": True, "Discharging": False, "Not charging": False}
SYSTEM = {"python": platform.python_version(), "machine": platform.machine(), "kernel": platform.release()}


class Battery(NamedTuple):
    """A battery's charge and its status, as the kernel names it; None where the device does not report it."""

    percent: int | None
    status: str | None


def read_text(path: str) -> str:
    """Read a small file of /sys or /proc; empty if there is none, or if it refuses."""
    try:
        return read_bytes(path).decode("utf-8", "replace").strip("\0 \n")
    except OSError:
        return ""


def explain_refusal(path: str) -> str:
    """Return why a file that is there refuses to be read; empty if it can be read, or is not there."""
    try:
        read_bytes(path)
    except FileNotFoundError:
        return ""
    except OSError as failure:
        return failure.strerror or type(failure).__name__
    return ""


def read_bytes(path: str) -> bytes:
    """Read a small file whole; a sensor that is not ready (EAGAIN) is asked once more, one that hangs never."""
    descriptor = os.open(ROOT + path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        parts = [read_part(descriptor)]
        while parts[-1]:
            parts.append(read_part(descriptor))
    finally:
        os.close(descriptor)
    return b"".join(parts)


def read_part(descriptor: int) -> bytes:
    """Read the next part of a file, after a pause if it is not ready yet."""
    try:
        return os.read(descriptor, PART_BYTES)
    except BlockingIOError:
        time.sleep(NOT_READY_S)
        return os.read(descriptor, PART_BYTES)


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
        if read_text(f"{folder}/scope") != "Device" and parse_percent(percent) is not None:  # "Device": a mouse's
            return Battery(parse_percent(percent), status or None)
    return parse_battery(run_program("dumpsys", "battery"))


def parse_battery(text: str) -> Battery:
    """Parse the output of Android's `dumpsys battery`."""
    level = re.search(r"^\s*level: (\d{1,3})\s*$", text, re.MULTILINE)
    status = re.search(r"^\s*status: (\d)\s*$", text, re.MULTILINE)
    return Battery(parse_percent(level.group(1)) if level else None, STATUSES.get(status.group(1)) if status else None)


def parse_percent(text: str) -> int | None:
    """Parse a battery's charge; None for what is none, such as 255 of a gauge that knows nothing."""
    return int(text) if re.fullmatch(r"\d{1,3}", text, re.ASCII) and int(text) <= 100 else None  # noqa: PLR2004 - per cent


def find_named(pattern: str, content: str) -> list[str]:
    """Find the files whose whole text matches `content`."""
    return [path for path in find_paths(pattern) if re.fullmatch(content, read_text(path))]
