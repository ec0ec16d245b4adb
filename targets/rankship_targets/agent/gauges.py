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
from typing import Any, NamedTuple

from . import system
from .system import find_paths, read_text

Reading = list[Any]  # position of the channel, monotonic ns, value or None
PI_IDLE_UW, PI_BUSY_UW, PI_MODEL = 2_286_000, 4_534_000, "Raspberry Pi 4"  # P = 2.286 + 4.534·u W, for a 4B rev 1.2
TICKS_PER_S = 100  # of /proc/stat
LONGEST_MEAN_PERIODS = 5  # a mean over more would hide a gap
ODPM_STAMP_NS, ODPM_REFRESH_NS = 1_000_000, 32_000_000
# hwmon chip → divisor of the current's step and its factor to the power's step, as the ina2xx driver computes them.
INA_STEPS = {"ina219": (100, 20), "ina220": (100, 20), "ina226": (400, 25), "ina230": (400, 25), "ina231": (400, 25)}
INA260_STEP_UW, INA_SHUNT_UOHM = 10_000, 10_000
RAPL_STEP_UJ, RAPL_REFRESH_NS, RAPL_STALL_NS = 61, 1_000_000, 1_000_000_000
CHARGE_STALL_NS = 300_000_000_000
DUMPSYS = ["dumpsys", "android.hardware.power.stats.IPowerStats/default"]
DUMPSYS_TIMEOUT_S = 5.0


class Gauge(NamedTuple):
    """A gauge's description for the host, and a function that reads it once; unused if `offer` has a problem."""

    offer: dict[str, Any]
    read: Callable[[], list[Reading]]


def find_hwmon() -> Gauge:
    """Find the kernel's sensors of power, or of current and voltage (INA219, INA226, INA260)."""
    channels: list[dict[str, Any]] = []
    readers: list[Callable[[], int | None]] = []
    for folder in find_paths("/sys/class/hwmon/hwmon[0-9]*"):
        chip = read_text(f"{folder}/name")
        lag_ns = 1_000_000 * (parse_integer(read_text(f"{folder}/update_interval")) or 0)
        powers = [path for path in find_paths(f"{folder}/power[0-9]*_input") if read_text(path)]
        for path in powers:
            label = read_text(path.replace("_input", "_label")) or os.path.basename(path).replace("_input", "")  # noqa: PTH119 - as above
            name = f"{chip}@{os.path.basename(folder)}:{label}"  # noqa: PTH119 - as above
            channels.append(describe(name, "uW", resolution_uw=find_power_step(chip, folder), lag_ns=lag_ns))
            readers.append(partial(read_integer, path))
        current, voltage = f"{folder}/curr1_input", f"{folder}/in1_input"
        now = read_integers([current, voltage])
        if not powers and now:
            name = f"{chip}@{os.path.basename(folder)}:curr1*in1"  # noqa: PTH119 - as above
            channels.append(describe(name, "uW", resolution_uw=max(1, sum(map(abs, now))), lag_ns=lag_ns))
            readers.append(partial(multiply, current, voltage))
    return make_simple("hwmon", "measured", channels, readers, "no hwmon chip reports power, or current and voltage")


def find_power_step(chip: str, folder: str) -> int | None:
    """Return the step of power1_input in microwatts; None for an unknown chip."""
    if chip == "ina260":
        return INA260_STEP_UW
    if chip not in INA_STEPS:
        return None
    divisor, factor = INA_STEPS[chip]
    shunt = read_text(f"{folder}/shunt_resistor") or read_text(f"{folder}/device/shunt_resistor")
    shunt_uohm = parse_integer(shunt) or INA_SHUNT_UOHM
    return max(1, factor * round(1_000_000_000 / divisor / shunt_uohm))


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


def find_battery() -> Gauge:
    """Find a battery's gauge: discharge power, and the charge drawn so far; it is wrong while plugged in."""
    folders = [path for path in find_paths("/sys/class/power_supply/*") if read_text(f"{path}/type") == "Battery"]
    readable = [path for path in folders if read_integers([f"{path}/current_now", f"{path}/voltage_now"])]
    channels: list[dict[str, Any]] = []
    readers: list[Callable[[], int | None]] = []
    for folder in readable:
        name, paths = os.path.basename(folder), [f"{folder}/current_now", f"{folder}/voltage_now"]  # noqa: PTH119 - as above
        # No resolution: the files' whole µA and µV are finer than what the gauge can distinguish.
        channels.append(describe(f"{name}:current*voltage", "uW"))
        readers.append(partial(read_discharge, folder, paths))
        if read_integers([f"{folder}/charge_counter"]):
            channels.append(describe(f"{name}:charge", "uJ", stall_ns=CHARGE_STALL_NS))
            readers.append(make_charge_reader(folder))
    problem = find_plug(readable[0]) if readable else "no battery reports current and voltage"
    return make_simple("battery", "counter", channels, readers, problem, is_problem=bool(problem))


def find_plug(folder: str) -> str:
    """Return why a battery's gauge is wrong now; empty while the battery alone feeds the device."""
    for path in find_paths("/sys/class/power_supply/*/online"):
        if read_text(path) not in {"", "0"}:
            return f"plugged in, according to {path}: the gauge then shows the charging current"
    status = read_text(f"{folder}/status")
    return "" if status == "Discharging" else f"plugged in: the battery's status is {status!r}, not 'Discharging'"


def read_discharge(folder: str, paths: list[str]) -> int | None:
    """Return the power drawn in microwatts, whatever sign the driver gives the current; None while plugged in."""
    now = read_integers(paths)
    return None if not now or find_plug(folder) else round(abs(now[0]) * now[1] / 1_000_000)


def make_charge_reader(folder: str) -> Callable[[], int | None]:
    """Make a counter of the energy drawn: each step of the charge (µAh) at the mean voltage of its ends."""
    last: list[int] = []
    drawn = [0]

    def read() -> int | None:
        now = read_integers([f"{folder}/charge_counter", f"{folder}/voltage_now"])
        if not now or find_plug(folder):
            last.clear()  # the charge gained in between is not energy drawn
            return None
        if last:
            drawn[0] += (last[0] - now[0]) * 3600 * (last[1] + now[1]) // 2_000_000
        last[:] = now
        return drawn[0]

    return read


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


# meter → the function that finds it, for a sampling period in ns; a missing meter has a `problem`.
GAUGES: dict[str, Callable[[int], Gauge]] = {
    "hwmon": lambda _: find_hwmon(),
    "rails": lambda _: find_odpm(),
    "powerstats": lambda _: find_powerstats(),
    "battery": lambda _: find_battery(),
    "rapl": lambda _: find_rapl(),
    "model": find_model,
}


def make_simple(
    name: str,
    provenance: str,
    channels: list[dict[str, Any]],
    readers: list[Callable[[], int | None]],
    problem: str,
    *,
    is_problem: bool = False,
) -> Gauge:
    """Make a gauge that is read channel by channel; `problem` counts without channels, or with `is_problem`."""

    def read() -> list[Reading]:
        rows = []
        for position, reader in enumerate(readers):
            before = time.monotonic_ns()
            value = reader()
            rows.append([position, (before + time.monotonic_ns()) // 2, value])
        return rows

    return Gauge(make_offer(name, provenance, channels, problem if is_problem or not channels else ""), read)


def make_offer(name: str, provenance: str, channels: list[dict[str, Any]], problem: str) -> dict[str, Any]:
    """Return a gauge's description for the host."""
    return {
        "name": name,
        "provenance": provenance,
        "clock": "monotonic",
        "channels": channels,
        "problem": problem or None,
        "notes": [],
    }


def describe(name: str, unit: str, **limits: Any) -> dict[str, Any]:  # noqa: ANN401 - numbers, None or a flag
    """Return a channel's description for the host."""
    return {"name": name, "unit": unit, **limits}


def read_integers(paths: Any) -> list[int]:  # noqa: ANN401 - any sequence of paths
    """Read one whole number from each file; empty if any file has none."""
    values = [parse_integer(read_text(path)) for path in paths]
    return [] if None in values else values  # type: ignore[return-value]  # none is None


def read_integer(path: str) -> int | None:
    """Read a whole number from a file; None if it has none."""
    return parse_integer(read_text(path))


def multiply(current: str, voltage: str) -> int | None:
    """Return the product of two files' milliamperes and millivolts, in microwatts; None without both."""
    pair = read_integers([current, voltage])
    return pair[0] * pair[1] if pair else None


def parse_integer(text: str) -> int | None:
    """Parse a whole number from sysfs; None for anything else."""
    return int(text) if re.fullmatch(r"-?\d{1,19}", text.strip(), re.ASCII) else None
