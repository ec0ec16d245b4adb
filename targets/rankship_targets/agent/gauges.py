"""Every gauge that a device may have: where it is found, which channels it offers, how it is read.

Formats: the kernel's ABI documents for hwmon, powercap and power_supply; for phones the ODPM driver's `energy_value`
and the power HAL's dump. A value is a whole number of microwatts or microjoules.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from . import system
from .battery import find_battery
from .channels import Gauge, Reading, Units, describe, make_offer, make_simple, parse_integer, read_integer
from .hwmon import find_hwmon
from .system import find_paths, read_text

PI_IDLE_UW, PI_BUSY_UW, PI_MODEL = 2_286_000, 4_534_000, "Raspberry Pi 4"  # P = 2.286 + 4.534·u W, for a 4B rev 1.2
TICKS_PER_S = 100  # of /proc/stat
LONGEST_MEAN_PERIODS = 5  # a mean over more would hide a gap
ODPM_STAMP_NS, ODPM_REFRESH_NS = 1_000_000, 32_000_000
RAPL_STEP_UJ, RAPL_REFRESH_NS, RAPL_STALL_NS = 61, 1_000_000, 1_000_000_000
DUMPSYS = ["dumpsys", "android.hardware.power.stats.IPowerStats/default"]
DUMPSYS_TIMEOUT_S = 5.0


def find_odpm() -> Gauge:
    """Find a phone's power rails in the driver's files: energy counters with a time for each value."""
    paths = find_paths("/sys/bus/iio/devices/iio:device[0-9]*/energy_value")
    names = sorted({name for path in paths for name, _, _ in parse_energy_value(read_text(path))[0]})
    channels = [describe(name, "uJ", resolution_uj=1, lag_ns=ODPM_STAMP_NS, stamped=True) for name in names]

    def read() -> list[Reading]:
        suspended_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.monotonic_ns()
        found: dict[str, list[Reading]] = {name: [] for name in names}
        for path in paths:
            for name, at_ms, energy_uj in parse_energy_value(read_text(path))[0]:
                if name in found:
                    found[name].append([names.index(name), at_ms * 1_000_000 - suspended_ns, energy_uj])
        # A rail that is listed twice, or not at all, has no reading.
        missing = time.monotonic_ns()
        return [rows[0] if len(rows) == 1 else [names.index(name), missing, None] for name, rows in found.items()]

    problem = "" if names else "no iio device has a readable energy_value with rails in it"
    return Gauge(make_offer("rails", "counter", channels, problem), read)


def parse_energy_value(text: str) -> tuple[list[tuple[str, int, int]], int]:
    """Parse lines "CH4(T=199784)[S3M_VDD_CPUCL1], 38098419" into rail, ms since boot and µJ; counts other lines."""
    rows, strange = [], 0
    for line in text.splitlines():
        found = re.fullmatch(r"CH\d{1,3}\(T=(\d{1,15})\)\[([^\]\s]{1,64})\], (\d{1,19})", line.strip(), re.ASCII)
        if found:
            rows.append((found.group(2), int(found.group(1)), int(found.group(3))))
        elif line.strip() and not re.fullmatch(r"t=\d+", line.strip(), re.ASCII):
            strange += 1
    return rows, strange


def find_powerstats() -> Gauge:
    """Find the same rails through the power HAL, for phones whose shell may not read the driver's files."""
    started = time.monotonic_ns()
    now = parse_powerstats(run_dumpsys())
    lag_ns = ODPM_REFRESH_NS + time.monotonic_ns() - started
    names = sorted(now)
    channels = [describe(name, "uJ", resolution_uj=find_float_step(now[name]), lag_ns=lag_ns) for name in names]

    def read() -> list[Reading]:
        before = time.monotonic_ns()
        found = parse_powerstats(run_dumpsys())
        at_ns = (before + time.monotonic_ns()) // 2
        return [[position, at_ns, found.get(name)] for position, name in enumerate(names)]

    problem = "" if names else f"`{' '.join(DUMPSYS)}` shows no energy meter"
    return Gauge(make_offer("powerstats", "counter", channels, problem), read)


def run_dumpsys() -> str:
    """Return the power HAL's dump; empty if there is no such HAL."""
    program = [system.ROOT + "/system/bin/" + DUMPSYS[0]] if system.ROOT else DUMPSYS[:1]
    try:
        done = subprocess.run(
            program + DUMPSYS[1:],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=DUMPSYS_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace")


def parse_powerstats(text: str) -> dict[str, int]:
    """Parse lines "[S3M_VDD_CPUCL1]:CPU   38098.42 mWs" of the dump's energy meter into µJ, by rail."""
    section = re.search(r"^=+ PowerStats HAL 2\.0 energy meter =+$(.*?)^=+ End of", text, re.MULTILINE | re.DOTALL)
    line = r"^\s*\[([^\]\s]{1,64})\](?::\S*)?\s+(\d{1,15})\.(\d\d) mWs(?: \(.*\))?\s*$"
    lines = re.findall(line, section.group(1), re.MULTILINE | re.ASCII) if section else []
    names = [name for name, _, _ in lines]
    return {name: int(whole) * 1000 + int(part) * 10 for name, whole, part in lines if names.count(name) == 1}


def find_float_step(energy_uj: int) -> int:
    """Return the step of a counter that the HAL prints through a 32-bit float, to a hundredth of a mWs."""
    return max(10, 1 << max(0, energy_uj.bit_length() + 1 - 24))  # one bit more, because the counter grows


def find_rapl() -> Gauge:
    """Find the energy counters of x86 processors, through powercap."""
    channels: list[dict[str, Any]] = []
    readers: list[Callable[[], int | None]] = []
    paths = find_paths("/sys/class/powercap/*/energy_uj")
    for path in paths:
        folder = os.path.dirname(path)  # noqa: PTH120 - as above
        if parse_integer(read_text(path)) is None:
            continue
        name = f"{read_text(f'{folder}/name')}@{os.path.basename(folder)}"  # noqa: PTH119 - as above
        wrap_uj = parse_integer(read_text(f"{folder}/max_energy_range_uj"))
        limits = {"resolution_uj": RAPL_STEP_UJ, "lag_ns": RAPL_REFRESH_NS, "wrap_uj": wrap_uj}
        channels.append(describe(name, "uJ", stall_ns=RAPL_STALL_NS, **limits))
        readers.append(partial(read_integer, path))
    missing = f"{paths[0]} is readable by root only" if paths else "no powercap zone has an energy counter"
    return make_simple("rapl", "counter", channels, readers, missing)


def find_model(period_ns: int) -> Gauge:
    """Model a Pi 4's power by a published straight line over CPU use; this cannot tell two compute kernels apart."""
    ticks = max(1, (os.cpu_count() or 1) * TICKS_PER_S * period_ns // 1_000_000_000)
    channels = [describe("utilisation", "uW", resolution_uw=math.ceil(PI_BUSY_UW / ticks))]
    last: list[tuple[int, int, int]] = []

    def read() -> list[Reading]:
        now = parse_stat(read_text("/proc/stat"))
        at_ns = time.monotonic_ns()
        if now is None:
            last.clear()
            return [[0, at_ns, None]]
        before = last[-1] if last and at_ns - last[-1][0] <= LONGEST_MEAN_PERIODS * period_ns else None
        if before and now[1] == before[2]:
            return []  # no tick has passed yet
        last[:] = [(at_ns, *now)]
        if before is None:
            return []
        busy, whole = now[0] - before[1], now[1] - before[2]
        sound = 0 <= busy <= whole
        # The mean since the last reading gets the time in the middle between the two.
        return [[0, (before[0] + at_ns) // 2, PI_IDLE_UW + PI_BUSY_UW * busy // whole if sound else None]]

    board = read_text("/proc/device-tree/model")
    problem = (
        "" if PI_MODEL in board else f"the model holds for a Raspberry Pi 4B rev 1.2, this is {board or 'another'!r}"
    )
    offer = make_offer("model", "modelled", channels, problem)
    offer["notes"] = [] if "Rev 1.2" in board else [f"the model's constants are for a 4B rev 1.2, this is {board!r}"]
    return Gauge(offer, read)


def parse_stat(text: str) -> tuple[int, int] | None:
    """Parse /proc/stat's first line into busy and all ticks since boot (user time already includes guests)."""
    found = re.match(r"cpu +((?:\d+ ){3,9}\d+)(?:\n|$)", text, re.ASCII)
    if not found:
        return None
    ticks = [int(part) for part in found.group(1).split()][:8]
    return sum(ticks) - sum(ticks[3:5]), sum(ticks)


# meter → the function that finds it, for a sampling period in ns and the inventory's units; a missing meter has a
# `problem`.
GAUGES: dict[str, Callable[[int, Units], Gauge]] = {
    "hwmon": lambda _, __: find_hwmon(),
    "rails": lambda _, __: find_odpm(),
    "powerstats": lambda _, __: find_powerstats(),
    "battery": lambda _, units: find_battery(units),
    "rapl": lambda _, __: find_rapl(),
    "model": lambda period_ns, _: find_model(period_ns),
}
