"""This machine as a device: with a folder of its own, and with sensors of its own under another root."""

import sys
from pathlib import Path

from rankship_targets.devices.device import Device

HEAT = "sys/class/thermal/thermal_zone0/temp"
GOVERNOR = "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"
BOOT_ID = "proc/sys/kernel/random/boot_id"
THROTTLED = "sys/devices/platform/soc/soc:firmware/get_throttled"
HOT, COLD = "90000", "40000"  # m°C


def make_local(folder: Path, name: str = "here", python: Path | None = None) -> Device:
    """This machine, working in `folder`."""
    return Device(name=name, transport="local", python=str(python or sys.executable), workdir=str(folder))


def write_python(folder: Path, **environment: object) -> Path:
    """A program that is this Python with more in its environment."""
    python = folder / "python"
    settings = " ".join(f'{name}="{value}"' for name, value in environment.items())
    python.write_text(f'#!/bin/sh\n{settings} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


def write_rooted_python(folder: Path) -> Path:
    """A program that is this Python and in which the agent reads its sensors under folder/root."""
    return write_python(folder, RANKSHIP_AGENT_ROOT=folder / "root")


def write_sensors(root: Path, **texts: str) -> None:
    """Write what sensors show: `heat`, `governor`, `boot_id`, `throttled`."""
    places = {"heat": HEAT, "governor": GOVERNOR, "boot_id": BOOT_ID, "throttled": THROTTLED}
    for name, text in texts.items():
        path = root / places[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def write_power_meter(root: Path, microwatts: int) -> None:
    """A power sensor of the board that always shows the same."""
    sensor = root / "sys/class/hwmon/hwmon0"
    sensor.mkdir(parents=True)
    (sensor / "name").write_text("ina226\n")
    (sensor / "power1_input").write_text(f"{microwatts}\n")
