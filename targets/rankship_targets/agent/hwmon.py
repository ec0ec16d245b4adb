"""The kernel's power sensors (hwmon): channels of power, or of current and voltage, and which are not believed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from .channels import Gauge, describe, make_simple, parse_integer, read_integer, read_integers
from .system import explain_refusal, find_paths, read_text

# hwmon chip → divisor of the current's step and its factor to the power's step, as the ina2xx driver computes them.
INA_STEPS = {"ina219": (100, 20), "ina220": (100, 20), "ina226": (400, 25), "ina230": (400, 25), "ina231": (400, 25)}
INA260_STEP_UW, INA_SHUNT_UOHM = 10_000, 10_000
MOST_UW = 1_000_000_000  # more than any board draws
SUPPLIES = {"Battery", "Mains", "USB", "Wireless", "UPS"}  # what the kernel shows in hwmon and is no sensor of its own


class Found(NamedTuple):
    """One channel: its name, what it reads in µW now (None: it refuses, `why`), how, and the step of the values."""

    name: str
    now: int | None
    why: str
    read: Callable[[], int | None]
    step_uw: int | None
    lag_ns: int


def find_hwmon() -> Gauge:
    """Find the kernel's sensors of power, or of current and voltage (INA219, INA226, INA260, INA3221)."""
    channels: list[dict[str, Any]] = []
    readers: list[Callable[[], int | None]] = []
    notes: list[str] = []
    for one in list_channels():
        if one.now is None or abs(one.now) > MOST_UW:
            refused = f"refuses to be read: {one.why}"
            told = refused if one.now is None else f"is not believed: {abs(one.now) / 1e6:,.0f} W is no board's power"
            notes.append(f"{one.name} {told}")
            continue
        if one.now <= 0:
            wired = "tells a reversed sign, which is undone" if one.now else "tells 0 W: nothing may be wired to it"
            notes.append(f"{one.name} {wired}")
        channels.append(describe(one.name, "uW", resolution_uw=one.step_uw, lag_ns=one.lag_ns))
        readers.append(one.read)
    missing = "no hwmon chip reports power, or current and voltage"
    gauge = make_simple("hwmon", "measured", channels, readers, "; ".join([missing, *notes]))
    gauge.offer["notes"] += notes
    return gauge


def list_channels() -> list[Found]:
    """List every channel under a name of its own."""
    found = [one for folder in find_paths("/sys/class/hwmon/hwmon[0-9]*") for one in list_chip(folder)]
    names = [one.name for one in found]
    return [
        one._replace(name=f"{one.name}#{names[:place].count(one.name) + 1}") if names.count(one.name) > 1 else one
        for place, one in enumerate(found)
    ]


def list_chip(folder: str) -> Iterator[Found]:
    """List one chip's channels: its powers, else its pairs of current and voltage that belong together."""
    if read_text(f"{folder}/device/type") in SUPPLIES:
        return
    chip = read_text(f"{folder}/name")
    start = f"{chip}@{os.path.basename(folder)}"  # noqa: PTH119 - as above
    lag_ns = 1_000_000 * (parse_integer(read_text(f"{folder}/update_interval")) or 0)
    powers = find_paths(f"{folder}/power[0-9]*_input")
    for path in powers:
        label = read_text(path.replace("_input", "_label")) or os.path.basename(path).replace("_input", "")  # noqa: PTH119 - as above
        now, step_uw = read_integer(path), find_power_step(chip, folder)
        yield Found(f"{start}:{label}", now, explain(path), partial(read_size, path), step_uw, lag_ns)
    if any(read_integer(path) is not None for path in powers):
        return
    for current in find_paths(f"{folder}/curr[0-9]*_input"):
        voltage = current.replace("/curr", "/in")
        labels = [read_text(path.replace("_input", "_label")) for path in (current, voltage)]
        apart = all(labels) and labels[0] != labels[1] and labels[0][1:] != labels[1][1:]  # PMBus: iout1 beside vcap
        if apart or not find_paths(voltage):
            continue
        number = re.findall(r"\d+", os.path.basename(current))[0]  # noqa: PTH119 - as above
        name = f"{start}:{labels[0] or f'curr{number}*in{number}'}"
        pair = read_integers([current, voltage])
        now = pair[0] * pair[1] if pair else None
        step_uw = max(1, sum(map(abs, pair))) if pair else None
        yield Found(name, now, explain(current, voltage), partial(multiply, current, voltage), step_uw, lag_ns)


def explain(*paths: str) -> str:
    """Return why the first of these files that cannot be read refuses."""
    return next((why for why in map(explain_refusal, paths) if why), "it holds no whole number")


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


def read_size(path: str) -> int | None:
    """Read a power in µW without its sign; None if there is none, or none that a board can draw."""
    return measure_size(read_integer(path))


def multiply(current: str, voltage: str) -> int | None:
    """Return the product of two files' milliamperes and millivolts, in microwatts without sign; None without both."""
    pair = read_integers([current, voltage])
    return measure_size(pair[0] * pair[1]) if pair else None


def measure_size(power_uw: int | None) -> int | None:
    """Return a power without its sign: a shunt wired the other way turns it; None for more than any board draws."""
    return None if power_uw is None or abs(power_uw) > MOST_UW else abs(power_uw)
