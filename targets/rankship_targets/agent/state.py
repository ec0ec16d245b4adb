"""The device's condition now: clocks, temperature, load, throttling, battery."""

from __future__ import annotations

import re
import time

from .protocol import Event
from .system import (
    FED,
    Battery,
    find_named,
    query_psutil,
    read_battery,
    read_boot_id,
    read_each,
    read_firmware,
    read_kilobytes,
    read_text,
)
from .thermal import read_temperature

SLOWEST_KHZ, FASTEST_KHZ = 20_000, 10_000_000  # of a processor's clock
CLOCKS = "/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq"


def read_governor() -> str | None:
    """Read the frequency governor; different ones are joined by "+"."""
    governors = read_each("/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor")
    return "+".join(sorted(set(governors))) or None


def read_state(battery: Battery | None = None) -> Event:
    """Read the device's condition now; a `battery` that was just read is not read again."""
    battery = battery or read_battery()
    load, uptime = (parse_thousandths(read_text(path).split(" ")[0]) for path in ("/proc/loadavg", "/proc/uptime"))
    return {
        "governor": read_governor(),
        "frequency_khz": read_clocks(),
        "temperature_mc": read_temperature(),
        "load_1m_milli": load,
        "available_memory_bytes": read_kilobytes("/proc/meminfo", "MemAvailable")
        or query_psutil(lambda ps: ps.virtual_memory().available),
        "boot_id": read_boot_id() or None,
        "uptime_ms": uptime,
        "clock_offset_ns": time.time_ns() - time.monotonic_ns(),
        **read_throttling(),
        "battery_percent": battery.percent,
        "charging": FED.get(battery.status or ""),
    }


def read_clocks() -> list[int] | None:
    """Read every core's clock in kHz, from the kernel or from psutil; None if no core's is believed."""
    told = [int(text) for text in read_each(CLOCKS) if re.fullmatch(r"\d{1,15}", text, re.ASCII)]
    clocks = [clock for clock in map(judge_clock, told) if clock]
    others = (
        None if clocks else query_psutil(lambda ps: [round(one.current * 1000) for one in ps.cpu_freq(percpu=True)])
    )
    return clocks or [clock for clock in map(judge_clock, others or []) if clock] or None


def judge_clock(told: int) -> int | None:
    """Return a clock in kHz that some drivers tell in Hz or MHz; None for what is no processor's clock in any."""
    fits = [khz for khz in (told, told // 1000, told * 1000) if SLOWEST_KHZ <= khz <= FASTEST_KHZ]
    return fits[0] if fits else None


def parse_thousandths(text: str) -> int | None:
    """Parse a number with a decimal point into thousandths; None for anything else."""
    return round(float(text) * 1000) if re.fullmatch(r"\d{1,12}(\.\d+)?", text, re.ASCII) else None


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


def add_up(texts: list[str]) -> int | None:
    """Add up the texts that are whole numbers; None if none is."""
    numbers = [int(text) for text in texts if re.fullmatch(r"\d+", text)]
    return sum(numbers) if numbers else None
